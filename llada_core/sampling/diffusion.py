"""The block loop: canvas, rounds, exact prefix cache (docs/model.md, Block diffusion and SPRINT)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..backbone.attention_kernels import PART
from ..backbone.cache import PrefixCache, PrunedPrefix
from ..backbone.cuda_graphs import CUDAGraphRunner, capturable_sizes
from ..backbone.model import Backbone, block_causal_mask
from ..errors import InputError
from ..options import Guidance, Sampling, Sprint
from .guidance import merge
from .sprint import kept_positions, least_accepted, scores
from .unmask import accept, predict, quota

PREFILL = 1024  # positions of a prompt run at once: bounds the mask and the activations
SCORED = 128  # positions whose full-vocabulary logits are held at once


@dataclass(frozen=True)
class Task:
    """What one call of `fill` may write.

    Attributes:
        count: positions to fill.
        steps: rounds a block may take.
        low, high: ids allowed, low <= id < high.
        stops: ids that end the text where no mask stands before them; empty for an image body.
    """

    count: int
    steps: int
    low: int
    high: int
    stops: frozenset[int] = frozenset()


@dataclass
class Filled:
    """What `fill` wrote: ids (the stop, if any, is the last of them) and the number of backbone rounds used."""

    ids: list[int]
    rounds: int
    stopped: bool


class Canvas:
    """All guidance rows of one generation: ids, and the cache of finished blocks.

    Rows of other lengths are left-padded with masks to the longest, so that all share block boundaries; the padding
    is invisible and positions restart at 0 after it.

    Args:
        backbone: the model, its weights already where `device` computes.
        prompts: token ids of each row, the conditional one first.
        room: the most positions that will be generated.
        mask_id: id of the mask token.
        sampling: block_length, threshold and drawing.
        guidance: scales; not read with one row.
        sprint: None for plain sampling.
        generator: CPU generator for temperature > 0.
        device, dtype: of the computation.
        graphs: rounds may become CUDA graphs: no weight moves while the canvas is filled.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: list[list[int]],
        room: int,
        mask_id: int,
        sampling: Sampling,
        guidance: Guidance | None = None,
        sprint: Sprint | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        graphs: bool = False,
    ):
        self.backbone, self.mask_id, self.sampling = backbone, mask_id, sampling
        self.guidance, self.sprint, self.generator = guidance, sprint, generator
        self.block = sampling.block_length
        self.length = max(map(len, prompts))  # positions that are final
        self.cached = 0  # positions whose keys and values are final
        capacity = -(-(self.length + room) // self.block) * self.block
        padded = [[mask_id] * (self.length - len(p)) + p + [mask_id] * (capacity - self.length) for p in prompts]
        self.ids = torch.tensor(padded, device=device)
        self.pads = torch.tensor([self.length - len(p) for p in prompts], device=device)
        self.positions = (torch.arange(capacity, device=device) - self.pads[:, None]).clamp_min(0)
        rows = len(prompts)
        # A round runs a block; the first of a block also what became final with the block before it.
        sizes = capturable_sizes(backbone, self.ids.device, rows, (self.block, 2 * self.block)) if graphs else ()
        stored = capacity + -capacity % PART if sizes else capacity
        self.cache = PrefixCache(backbone.config, rows, stored, device, dtype, key_norms=sprint is not None)
        self.fixed = CUDAGraphRunner(backbone, self.cache, sizes)
        self._drew_mask = False  # the mask token may be drawn; no text ends behind one (docs/model.md, Block diffusion)
        self._last_mask: tuple[int, int, torch.Tensor | None] | None = None
        self.confidence = torch.zeros(rows, capacity, device=device) if sprint else None

    def fill(self, task: Task, on_round: Callable[["Canvas", int, int], None] | None = None) -> Filled:
        """Write `task.count` ids, or text up to a stop.

        Args:
            task: what to write.
            on_round: called after each round with the canvas, the index of the block among those of this task and
                the rounds done in that block; an exception from it ends the work.

        Returns:
            The ids written. A canvas is filled once.
        """
        try:
            return self._fill(task, on_round)
        finally:
            self.fixed.close()

    def _fill(self, task: Task, on_round: Callable[["Canvas", int, int], None] | None) -> Filled:
        begin, target = self.length, self.length + task.count
        rounds = 0
        for index, start in enumerate(range(begin // self.block * self.block, target, self.block)):
            for step in self._rounds(start, target, task):
                rounds += 1
                if on_round:
                    on_round(self, index, step + 1)
            end = self._end_of_text(start, target, task)
            if end is not None:
                return Filled(self.ids[0, begin:end].tolist(), rounds, True)
            before, self.length = self.length, min(start + self.block, target)
            self._drew_mask |= bool((self.ids[0, before : self.length] == self.mask_id).any())
        return Filled(self.ids[0, begin:target].tolist(), rounds, False)

    def _end_of_text(self, start: int, target: int, task: Task) -> int | None:
        """Position after the first stop of the block at `start` that no mask stands before, if there is one."""
        if not task.stops or self._drew_mask:
            return None
        first = max(start, self.length)
        ids = self.ids[0, first : min(start + self.block, target)].tolist()
        for at, token in enumerate(ids, first):
            if token in task.stops:
                return at + 1
            if token == self.mask_id:
                return None
        return None

    def _rounds(self, start: int, target: int, task: Task) -> Iterator[int]:
        """Rounds of the block at `start`, one a step, until no mask is left before `target`.

        Masks behind it are filled along the way, as the reference does. The reference also goes on until none of them
        is left; nothing before `target` can change in those rounds, so they are saved.
        """
        window = self.ids[:, start : start + self.block]
        to_fill = torch.arange(start, start + self.block, device=window.device) >= self.length  # not padding or prompt
        pruned = None
        for step in range(task.steps):
            masked = to_fill & (window[0] == self.mask_id)
            remaining, wanted = torch.stack((masked.sum(), masked[: target - start].sum())).tolist()
            if wanted == 0 or self._end_of_text(start, target, task):
                return
            if self.sprint and step == self.sprint.warmup:
                self._catch_up(start)
                pruned = self._prune(start)
            hidden = self._forward(start, pruned)
            logits = merge(self.backbone.lm_head(hidden).float(), self.guidance)[:, task.low : task.high]
            kind = self.sprint.confidence if self.sprint else "low_confidence"
            chosen, confidence = predict(logits, self.sampling, kind, self.generator)
            if step == 0 and not bool(confidence.isfinite().all()):
                expected, remedy = "finite predictions", "Choose bf16 or fp32 in the loader."
                raise InputError("precision", f"numbers beyond the range of {hidden.dtype}", expected, remedy)
            if self.sprint:
                threshold, least = self.sprint.threshold, least_accepted(remaining, task.steps - step)
            else:
                threshold, least = self.sampling.threshold, quota(step, task.steps, self.block)
            fixed = accept(confidence, masked, threshold, least)
            window.copy_(torch.where(fixed, chosen + task.low, window))
            yield step

    def _forward(
        self, start: int, pruned: tuple[PrefixCache | PrunedPrefix, torch.Tensor | None] | None
    ) -> torch.Tensor:
        """Hidden states [rows, block, hidden] of the block at `start`."""
        end = start + self.block
        if pruned is None:
            # What became final since the last call is run along with the block: its keys enter the cache for good.
            self._catch_up(start, keep=PREFILL)
            return self._run(self.cached, end)[:, -self.block :]
        context, mask = pruned
        return self._compute(start, end, context, mask)

    def _compute(
        self, begin: int, end: int, context: PrefixCache | PrunedPrefix, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states of positions begin...end; the next call may overwrite them."""
        ids, positions = self.ids[:, begin:end], self.positions[:, begin:end]
        if context is self.cache and end - begin in self.fixed.sizes:
            return self.fixed.run(ids, positions, begin, mask)
        return self.backbone(ids, positions, context, begin, mask)

    def _catch_up(self, start: int, keep: int = 0) -> None:
        """Cache the final positions before `start`, but for the last `keep` where they can go along with a block."""
        while self.cached < start - keep:
            self._run(self.cached, min(start, self.cached + -(-PREFILL // self.block) * self.block))

    def _run(self, begin: int, end: int) -> torch.Tensor:
        """Run positions begin...end against the cache; those of blocks before the last masked one stay cached."""
        hidden = self._compute(begin, end, self.cache, self._mask(begin, end))
        final = min(end, self.length // self.block * self.block)
        if self.confidence is not None:
            for at in range(begin, final, SCORED):
                part = hidden[:, at - begin : min(at + SCORED, final) - begin]
                self.confidence[:, at : at + part.shape[1]] = top_probability(self.backbone.lm_head(part))
        self.cached = max(self.cached, final)
        return hidden

    def _mask(self, begin: int, end: int) -> torch.Tensor | None:
        """The mask of positions begin...end, kept from round to round of a block."""
        if self._last_mask is None or self._last_mask[:2] != (begin, end):
            self._last_mask = (begin, end, block_causal_mask(begin, end - begin, self.block, self.pads))
        return self._last_mask[2]

    def _prune(self, start: int) -> tuple[PrefixCache | PrunedPrefix, torch.Tensor | None] | None:
        """What the block at `start` is to see from now on, and how it is masked; None where that is everything."""
        visible = torch.arange(start, device=self.ids.device) >= self.pads[:, None]
        score = scores(self.cache.key_norms[:, :start], self.confidence[:, :start], visible, self.sprint.alpha)
        is_image = self.ids[:, :start] >= self.backbone.config.image_token_offset
        kept = kept_positions(score, visible, is_image, self.sprint)
        if kept is None:
            return None
        positions, real = kept
        # A short row's padding may reach into the block itself.
        block = torch.arange(start, start + self.block, device=self.ids.device) >= self.pads[:, None]
        if self.block in self.fixed.sizes:
            # Rounds of a fixed shape attend to everything, so hiding is enough.
            seen = torch.zeros_like(visible).scatter_(1, positions, real)
            return self.cache, torch.cat((seen, block), -1)[:, None, None]
        mask = torch.cat((real, block), -1)
        return PrunedPrefix(self.cache, positions, self.block), None if bool(mask.all()) else mask[:, None, None]


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """Top-1 probability float32 [...] of logits [..., vocabulary]."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()
