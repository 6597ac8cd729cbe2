"""The cached runner: token ids in, hidden states out (docs/model.md, Prefix cache).

It owns what a forward pass needs besides weights: keys and values of final blocks, padding, masks and CUDA graphs.
"""

import torch

from . import attention_kernels
from .attention_kernels import Attend
from .cache import PrefixCache, PrunedPrefix
from .cuda_graphs import CUDAGraphRunner, capturable_sizes
from .model import Backbone, block_causal_mask

PREFILL = 1024  # positions of a prompt run at once: bounds the mask and the activations
SCORED = 128  # positions whose full-vocabulary logits are held at once

Context = tuple[PrefixCache | PrunedPrefix, torch.Tensor | None]  # what a round attends to, and the mask of it


class CachedRunner:
    """Runs blocks of a batch, block after block, each against everything before it.

    A row is a sequence of the batch: a branch of a sample. Rows of other lengths are padded at their left up to a
    multiple of the block, so that all rows share block boundaries; padding is never seen, and positions (for RoPE)
    start from 0 behind it.

    Args:
        backbone: the model, its weights already where `pads` is.
        pads: int64 [rows], padding positions at each row's left.
        capacity: positions of the longest row, padding and everything to come included.
        block_length: positions of a block.
        dtype: of the activations.
        attend: the attention kernel.
        graphs: rounds may become CUDA graphs: no weight moves before `close`.
        scored: keep what SPRINT ranks positions by.

    Attributes:
        cached: positions whose keys and values are final.
        cache: keys and values; with `scored` also the norms of keys.
        confidence: with `scored`, the probability of the best token of each cached position, float32 [rows, capacity].
    """

    def __init__(
        self,
        backbone: Backbone,
        pads: torch.Tensor,
        capacity: int,
        block_length: int,
        dtype: torch.dtype = torch.float32,
        attend: Attend = attention_kernels.sdpa,
        graphs: bool = False,
        scored: bool = False,
    ):
        self.backbone, self.pads, self.block_length, self.attend = backbone, pads, block_length, attend
        rows, device = len(pads), pads.device
        self.positions = (torch.arange(capacity, device=device) - pads[:, None]).clamp_min(0)
        # A round runs a block; the first of a block also what became final with the block before it.
        wanted = (block_length, 2 * block_length)
        sizes = capturable_sizes(backbone, attend, device, rows, wanted) if graphs else ()
        stored = capacity + -capacity % attention_kernels.PART if sizes else capacity
        self.cache = PrefixCache(backbone.config, rows, stored, device, dtype, key_norms=scored)
        self.confidence = torch.zeros(rows, capacity, device=device) if scored else None
        self.cached = 0
        self.graphs = CUDAGraphRunner(backbone, self.cache, sizes, attend)
        self._mask: tuple[int, int, torch.Tensor | None] | None = None  # the last one: begin, end, mask
        self._pruned: tuple[int, Context] | None = None  # block, and what it attends to

    def block(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Run a block; what became final since the last call is run along with it and enters the cache for good.

        Args:
            ids: int64 [rows, capacity]; all before `start` are final.
            start: the block's first position.

        Returns:
            Hidden states [rows, block, hidden]; the next call may overwrite them.
        """
        end = start + self.block_length
        if self._pruned is not None and self._pruned[0] == start:
            return self._forward(ids, start, end, *self._pruned[1])
        self.catch_up(ids, start, PREFILL)
        return self._run(ids, start, end)[:, -self.block_length :]

    def catch_up(self, ids: torch.Tensor, start: int, leave: int = 0) -> None:
        """Cache the final positions before `start`, but for the last `leave`, where they can go along with a block."""
        part = -(-PREFILL // self.block_length) * self.block_length
        while self.cached < start - leave:
            self._run(ids, start, min(start, self.cached + part))

    def prune(self, start: int, positions: torch.Tensor, real: torch.Tensor) -> None:
        """Let the block at `start` see only some of what stands before it, from its next round on.

        Args:
            start: the block; everything before it is cached.
            positions: int64 [rows, m], what remains visible, in order.
            real: bool [rows, m], False where a row with fewer is filled up.
        """
        at = torch.arange(start + self.block_length, device=self.pads.device)
        unpadded = at >= self.pads[:, None]  # a short row's padding may reach into the block itself
        if self.block_length in self.graphs.sizes:
            # Rounds of a fixed shape attend to everything, so hiding is enough.
            seen = torch.zeros_like(unpadded[:, :start]).scatter_(1, positions, real)
            mask = torch.cat((seen, unpadded[:, start:]), -1)[:, None, None]
            self._pruned = start, (self.cache, mask)
            return
        mask = torch.cat((real, unpadded[:, start:]), -1)
        kept = PrunedPrefix(self.cache, positions, self.block_length)
        self._pruned = start, (kept, None if bool(mask.all()) else mask[:, None, None])

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the rows, in the order given."""
        at = torch.tensor(rows, device=self.pads.device)
        self.pads, self.positions = self.pads[at], self.positions[at]
        self._mask = self._pruned = None
        if self.confidence is not None:
            self.confidence = self.confidence[at]
        self.graphs.close()
        self.cache.keep(at)

    def close(self) -> None:
        """Let go of the graphs."""
        self.graphs.close()

    def _run(self, ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Run what is not cached up to `end`; what stands before `start` is final and stays cached."""
        begin = self.cached
        if self._mask is None or self._mask[:2] != (begin, end):
            self._mask = (begin, end, block_causal_mask(begin, end - begin, self.block_length, self.pads))
        hidden = self._forward(ids, begin, end, self.cache, self._mask[2])
        final = min(end, start)
        if self.confidence is not None:
            for at in range(begin, final, SCORED):
                part = hidden[:, at - begin : min(at + SCORED, final) - begin]
                self.confidence[:, at : at + part.shape[1]] = top_probability(self.backbone.lm_head(part))
        self.cached = max(self.cached, final)
        return hidden

    def _forward(
        self,
        ids: torch.Tensor,
        begin: int,
        end: int,
        context: PrefixCache | PrunedPrefix,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        ids, positions = ids[:, begin:end], self.positions[:, begin:end]
        if context is self.cache and end - begin in self.graphs.sizes:
            hidden = self.graphs.run(ids, positions, begin, mask)
            if hidden is not None:
                return hidden
        return self.backbone(ids, positions, context, begin, mask, self.attend)


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """Top-1 probability float32 [...] of logits [..., vocabulary]."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()
