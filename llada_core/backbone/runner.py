"""The cached runner: token ids in, hidden states out (docs/model.md, Prefix cache).

It owns what a forward pass needs besides weights: keys and values of final blocks, padding, masks and CUDA graphs.
"""

from collections.abc import Callable, Hashable, Sequence

import torch

from . import attention_kernels
from .attention_kernels import Attend
from .cache import Prefix, PrefixCache, PrunedPrefix, RowsOfCache
from .cuda_graphs import CUDAGraphRunner, GraphStore, Then, capturable_sizes
from .model import Backbone, block_causal_mask

PREFILL = 1024  # positions of a prompt run at once, with few rows: bounds the mask and the activations
FEW_ROWS = 4  # more of them run fewer positions at once
STORED = 512  # a cache that graphs use is a multiple of it long
SCORED = 384  # positions of all rows whose full-vocabulary logits are held at once

AnyCache = PrefixCache | RowsOfCache | PrunedPrefix
Context = tuple[AnyCache, torch.Tensor | None]  # what a round attends to, and the mask of it


def prefill_positions(rows: int, block_length: int) -> int:
    """Positions of a prompt that so many rows run at once: whole blocks."""
    most = PREFILL * FEW_ROWS // max(rows, FEW_ROWS)
    return max(-(-most // block_length), 1) * block_length


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
        store: where CUDA graphs are kept from one runner to the next; None runs every round kernel by kernel. No
            weight may move while there is one.
        scored: keep what SPRINT ranks positions by.
        then: makes what follows the backbone in each round and is part of its graph.
        key: equal where `then` makes what computes the same.

    Attributes:
        cached: of each row, positions whose keys and values are final, or that are padding.
        confidence: with `scored`, the probability of the best token of each cached position, float32 [rows, capacity].
        rounds: the cache, and rounds in fixed shapes.
    """

    def __init__(
        self,
        backbone: Backbone,
        pads: torch.Tensor,
        capacity: int,
        block_length: int,
        dtype: torch.dtype = torch.float32,
        attend: Attend = attention_kernels.sdpa,
        store: GraphStore | None = None,
        scored: bool = False,
        then: Callable[[], Then] | None = None,
        key: Hashable = None,
    ):
        self.backbone, self.pads, self.block_length, self.attend = backbone, pads, block_length, attend
        self.positions = (torch.arange(capacity, device=pads.device) - pads[:, None]).clamp_min(0)
        self.confidence = torch.zeros(len(pads), capacity, device=pads.device) if scored else None
        # Blocks of nothing but padding are never seen, so they are never run.
        self._pads: list[int] = pads.tolist()
        self.cached = [pad // block_length * block_length for pad in self._pads]
        self._store = store
        # A cache for graphs is a little longer, so that prompts of other lengths find it again.
        stored = capacity + -capacity % STORED if store is not None else capacity
        self._key = (len(pads), stored, block_length, dtype, attend, scored, key)
        kept = store.take(self._key) if store is not None else None
        if kept is None:
            cache = PrefixCache(backbone.config, len(pads), stored, pads.device, dtype, key_norms=scored)
            kept = self._rounds_over(cache, then)
        self.rounds = kept
        self._mask: tuple[tuple, torch.Tensor | None] | None = None  # the last one: begin, end and rows, mask
        self._pruned: tuple[int, Context] | None = None  # block, and what it attends to

    @property
    def cache(self) -> PrefixCache:
        """Keys and values; with `scored` also the norms of keys."""
        return self.rounds.cache

    @property
    def then(self) -> Then | None:
        """What follows the backbone in each round."""
        return self.rounds.then

    def _rounds_over(self, cache: PrefixCache, then: Callable[[], Then] | None) -> CUDAGraphRunner:
        # A round runs a block; the first of a block also what became final with the block before it.
        wanted, block = (self.block_length, 2 * self.block_length), self.block_length
        device = self.pads.device
        graphs = self._store is not None
        sizes = capturable_sizes(self.backbone, self.attend, device, cache.rows, wanted) if graphs else ()
        made = then() if then is not None else None
        return CUDAGraphRunner(self.backbone, cache, sizes, self.attend, made, block)

    def block(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Run a block, and `then`; what became final since the last call is run along and enters the cache for good.

        Args:
            ids: int64 [rows, capacity]; all before `start` are final.
            start: the block's first position.

        Returns:
            Hidden states [rows, block, hidden]; the next call may overwrite them.
        """
        end = start + self.block_length
        if self._pruned is not None and self._pruned[0] == start:
            return self._forward(ids, start, end, *self._pruned[1], then=True)
        self.catch_up(ids, start, prefill_positions(len(self._pads), self.block_length))
        return self._run(ids, start, min(self.cached), end, then=True)[:, -self.block_length :]

    def catch_up(self, ids: torch.Tensor, start: int, leave: int = 0) -> None:
        """Cache the final positions before `start`, but for the last `leave`, where they can go along with a block.

        Rows that are further than others wait for them.
        """
        while (behind := min(self.cached)) < start - leave:
            rows = [row for row, cached in enumerate(self.cached) if cached == behind]
            further = [cached for cached in self.cached if cached > behind]
            end = min(start, behind + prefill_positions(len(rows), self.block_length), *further)
            self._run(ids, start, behind, end, rows)

    def prefix(self, row: int, ids: Sequence[int]) -> Prefix:
        """What is cached of a row, copied; ids are the row's without padding."""
        begin, end = self._pads[row], self.cached[row]
        keys, values = (
            [tensor[row, :, begin:end].clone() for tensor in of] for of in (self.cache.keys, self.cache.values)
        )
        scores = [of if of is None else of[row, begin:end].clone() for of in (self.cache.key_norms, self.confidence)]
        return Prefix(list(ids[: max(end - begin, 0)]), keys, values, *scores)

    def adopt(self, row: int, prefix: Prefix, ids: Sequence[int]) -> None:
        """Take over what another sequence that begins alike has cached, as far as whole blocks agree.

        Args:
            row: nothing of it is cached yet.
            prefix: of the other sequence, with the same weights, types and `scored`.
            ids: the row's prompt, without padding.
        """
        pad = self._pads[row]
        if pad % self.block_length:
            return  # its blocks are cut elsewhere
        pairs = enumerate(zip(ids, prefix.ids, strict=False))  # one of the two is longer
        same = next((at for at, (mine, others) in pairs if mine != others), None)
        count = min(len(ids), len(prefix.ids)) if same is None else same
        end = pad + count // self.block_length * self.block_length
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self.cache.keys[layer][row, :, pad:end] = keys[:, : end - pad]
            self.cache.values[layer][row, :, pad:end] = values[:, : end - pad]
        for mine, others in ((self.cache.key_norms, prefix.key_norms), (self.confidence, prefix.confidence)):
            if mine is not None and others is not None:
                mine[row, pad:end] = others[: end - pad]
        self.cached[row] = end

    def prune(self, start: int, positions: torch.Tensor, real: torch.Tensor) -> None:
        """Let the block at `start` see only some of what stands before it, from its next round on.

        Args:
            start: the block; everything before it is cached.
            positions: int64 [rows, m], what remains visible, in order.
            real: bool [rows, m], False where a row with fewer is filled up.
        """
        at = torch.arange(start + self.block_length, device=self.pads.device)
        unpadded = at >= self.pads[:, None]  # a short row's padding may reach into the block itself
        if self.block_length in self.rounds.sizes:
            # Rounds of a fixed shape attend to everything, so hiding is enough.
            seen = torch.zeros_like(unpadded[:, :start]).scatter_(1, positions, real)
            mask = torch.cat((seen, unpadded[:, start:]), -1)[:, None, None]
            self._pruned = start, (self.cache, mask)
            return
        mask = torch.cat((real, unpadded[:, start:]), -1)
        kept = PrunedPrefix(self.cache, positions, self.block_length)
        self._pruned = start, (kept, None if bool(mask.all()) else mask[:, None, None])

    def keep(self, rows: list[int], then: Callable[[], Then] | None = None, key: Hashable = None) -> None:
        """Go on with some of the rows, in the order given; `then` and `key` are for their number."""
        at = torch.tensor(rows, device=self.pads.device)
        self.pads, self.positions = self.pads[at], self.positions[at]
        self._mask = self._pruned = None
        self._pads, self.cached = ([of[row] for row in rows] for of in (self._pads, self.cached))
        if self.confidence is not None:
            self.confidence = self.confidence[at]
        self.rounds.close()
        self.cache.keep(at)
        self.rounds = self._rounds_over(self.cache, then)
        self._key = (len(rows), *self._key[1:-1], key)

    def finish(self) -> None:
        """Leave the graphs to the next runner of these shapes."""
        if self._store is not None and self.rounds.sizes:
            self._store.give(self._key, self.rounds)

    def close(self) -> None:
        """Let go of the graphs."""
        self.rounds.close()

    def _run(
        self,
        ids: torch.Tensor,
        start: int,
        begin: int,
        end: int,
        rows: list[int] | None = None,
        then: bool = False,
    ) -> torch.Tensor:
        """Run positions begin...end, of all rows or of some; what stands before `start` is final and stays cached."""
        some = rows if rows is not None and len(rows) < len(self._pads) else None
        at = slice(None) if some is None else torch.tensor(some, device=self.pads.device)
        what = (begin, end, None if some is None else tuple(some))
        if self._mask is None or self._mask[0] != what:
            self._mask = (what, block_causal_mask(begin, end - begin, self.block_length, self.pads[at]))
        context = RowsOfCache(self.cache, at) if isinstance(at, torch.Tensor) else self.cache
        hidden = self._forward(ids, begin, end, context, self._mask[1], then, at)
        final = min(end, start)
        if self.confidence is not None:
            step = max(SCORED // len(hidden), 1)
            for first in range(begin, final, step):
                part = hidden[:, first - begin : min(first + step, final) - begin]
                top = top_probability(self.backbone.lm_head(part))
                self.confidence[at, first : first + part.shape[1]] = top
        for row in rows if rows is not None else range(len(self._pads)):
            self.cached[row] = max(self.cached[row], final)
        return hidden

    def _forward(
        self,
        ids: torch.Tensor,
        begin: int,
        end: int,
        context: AnyCache,
        mask: torch.Tensor | None,
        then: bool,
        rows: torch.Tensor | slice = slice(None),
    ) -> torch.Tensor:
        ids, positions = ids[rows, begin:end], self.positions[rows, begin:end]
        if then and context is self.cache and end - begin in self.rounds.sizes:
            hidden = self.rounds.run(ids, positions, begin, mask)
            if hidden is not None:
                return hidden
        hidden = self.backbone(ids, positions, context, begin, mask, self.attend)
        if then and self.then is not None:
            self.then(hidden[:, -self.block_length :])
        return hidden


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """Top-1 probability float32 [...] of logits [..., vocabulary]."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()
