"""The cached runner: token ids in, hidden states out (docs/model.md, Prefix cache).

It owns what a forward pass needs besides weights: keys and values of final blocks, padding, masks and CUDA graphs.
"""

from collections.abc import Callable, Hashable, Sequence

import torch

from . import attention_kernels
from .attention_kernels import Attend
from .cache import IndexedCache, Prefix, PrefixCache, PrunedPrefix, RowsOfCache
from .cuda_graphs import CUDAGraphRunner, GraphStore, Then, capturable_sizes, furthest
from .model import Backbone, block_causal_mask, windows_mask

PREFILL = 1024  # positions of a prompt run at once, with few rows: bounds the mask and the activations
FEW_ROWS = 8  # more of them run fewer positions at once
STORED = 512  # a cache that graphs use is a multiple of it long
TOGETHER = 3  # a round runs two blocks of each row where one row in so many has the first of them to be cached
PADDING = 1024  # positions of padding that a pass runs to save another: about what takes as long as starting kernels
SCORED = 384  # positions of all rows whose full-vocabulary logits are held at once

AnyCache = PrefixCache | RowsOfCache | IndexedCache | PrunedPrefix


def prefill_positions(rows: int, block_length: int) -> int:
    """Positions of a prompt that so many rows run at once: whole blocks."""
    most = PREFILL * FEW_ROWS // max(rows, FEW_ROWS)
    return max(-(-most // block_length), 1) * block_length


class CachedRunner:
    """Runs blocks of a batch, block after block, each against everything before it.

    A row is a sequence of the batch: a branch of a sample. Rows of other lengths are padded at their left up to a
    multiple of the block, so that all rows share block boundaries; padding is never seen, and positions (for RoPE)
    start from 0 behind it. Rows need not be at the same block.

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
        cached: of each row, positions whose keys and values are final, or that are padding; of a row that is over, all.
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
        self._key = self._began_as = (len(pads), stored, block_length, dtype, attend, scored, key)
        kept = store.take(self._key) if store is not None else None
        self.rounds = kept or self._rounds_over(self._new_cache(), then)
        self._over = [False] * len(self._pads)
        self._mask: tuple[tuple, torch.Tensor | None] | None = None  # the last one: begin, end and rows, mask
        self._windows: tuple[tuple, torch.Tensor, torch.Tensor] | None = None  # the last ones: positions, mask
        self._pruned_at = [-1] * len(self._pads)  # of each row, the block that does not see all before it
        self._hidden: torch.Tensor | None = None  # bool [rows, capacity], what such a block does not see
        self._gathered: tuple[list[int], PrunedPrefix, torch.Tensor | None] | None = None  # blocks, what they see, mask

    @property
    def cache(self) -> PrefixCache:
        """Keys and values; with `scored` also the norms of keys."""
        return self.rounds.cache

    @property
    def then(self) -> Then | None:
        """What follows the backbone in each round."""
        return self.rounds.then

    def _new_cache(self) -> PrefixCache:
        rows, capacity, _, dtype, _, scored, _ = self._key
        return PrefixCache(self.backbone.config, rows, capacity, self.pads.device, dtype, key_norms=scored)

    def _rounds_over(self, cache: PrefixCache, then: Callable[[], Then] | None) -> CUDAGraphRunner:
        # A round runs a block; the first of a block also what became final with the block before it.
        wanted, block = (self.block_length, 2 * self.block_length), self.block_length
        device = self.pads.device
        graphs = self._store is not None
        sizes = capturable_sizes(self.backbone, self.attend, device, cache.rows, wanted) if graphs else ()
        made = then() if then is not None else None
        return CUDAGraphRunner(self.backbone, cache, sizes, self.attend, made, block)

    def block(self, ids: torch.Tensor, starts: int | Sequence[int], shown: Sequence[int] | None = None) -> torch.Tensor:
        """Run a block of each row, and `then`; what became final since the last call enters the cache for good.

        Args:
            ids: int64 [rows, capacity].
            starts: where the rows' blocks begin, one position or one of each row; all before it is final.
            shown: what `turns` returned for them; not needed where they are the same for all rows.

        Returns:
            Hidden states of the blocks at `shown` [rows, block, hidden]; the next call may overwrite them.
        """
        starts = [starts] * len(self._pads) if isinstance(starts, int) else list(starts)
        shown = starts if shown is None else list(shown)
        if self._gathered is not None and self._gathered[0] == starts:
            begin, (_, context, mask) = starts[0], self._gathered
            window = slice(begin, begin + self.block_length)
            return self._forward(ids[:, window], self.positions[:, window], begin, context, mask, then=True)
        if not self._abreast(starts):
            return self._run_apart(ids, starts, shown)
        self.catch_up(ids, starts[0] - prefill_positions(len(self._pads), self.block_length))
        end = starts[0] + self.block_length
        return self._run(ids, starts[0], min(self.cached), end, then=True)[:, -self.block_length :]

    def turns(self, starts: Sequence[int]) -> list[int]:
        """Where the block begins that each row runs in the next round: at `starts`, or the one before it.

        A row that has just filled a block has that to be cached before its next. Where many have, or where all are at
        the same block, a round runs both blocks of every row. Else it would run twice the tokens for a few rows, so
        these spend it on the block that they have filled, while the others go on with theirs.
        """
        late = [cached < start for cached, start in zip(self.cached, starts, strict=True)]
        many = sum(late) * TOGETHER >= self._over.count(False)
        if not any(late) or self._abreast(starts) or (many and min(starts) >= self.block_length):
            return list(starts)
        return [start - self.block_length * behind for start, behind in zip(starts, late, strict=True)]

    def _abreast(self, starts: Sequence[int]) -> bool:
        """Whether all rows are at the same block, and it sees everything before it."""
        return len(set(starts)) == 1 and starts[0] not in self._pruned_at

    def catch_up(self, ids: torch.Tensor, ends: int | Sequence[int]) -> None:
        """Cache the final positions before `ends`, one for all rows or one of each, multiples of the block.

        Rows that are further than others wait for them. Where what they have is no more than padding, they run a little
        of it along, so that prompts of many lengths take few passes.
        """
        ends = [ends] * len(self._pads) if isinstance(ends, int) else ends
        while behind := [row for row, end in enumerate(ends) if self.cached[row] < end]:
            behind.sort(key=self.cached.__getitem__)
            begin, spare = self.cached[behind[0]], PADDING
            most = prefill_positions(len(behind), self.block_length)
            rows, places = [], []
            for row in behind:
                more = self.cached[row] - begin
                if not more or (more <= min(spare, most - 1) and self.cached[row] <= self._pads[row]):
                    spare -= more
                    rows.append(row)
                else:
                    places.append(self.cached[row])
            most = prefill_positions(len(rows), self.block_length)
            end = min(begin + most, *places, *(ends[row] for row in rows))
            self._run(ids, end, begin, end, sorted(rows))

    def retire(self, rows: Sequence[int]) -> None:
        """These rows are over. They run along until `keep`, but nothing is cached of them any more."""
        for row in rows:
            self._over[row], self.cached[row] = True, self.positions.shape[1]

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

    def prune(self, rows: Sequence[int], starts: Sequence[int], positions: torch.Tensor, real: torch.Tensor) -> None:
        """Let the blocks of some rows see only some of what stands before them, from their next round on.

        Args:
            rows: which rows; everything before their blocks is cached.
            starts: where the blocks of all rows begin.
            positions: int64 [len(rows), m], what remains visible, in order.
            real: bool [len(rows), m], False where a row with fewer is filled up.
        """
        device, begins = self.pads.device, [starts[row] for row in rows]
        if self._hidden is None:
            self._hidden = torch.zeros(self.positions.shape, dtype=torch.bool, device=device)
        at = torch.arange(self.positions.shape[1], device=device)
        seen = torch.zeros(len(rows), len(at), dtype=torch.bool, device=device).scatter_(1, positions, real)
        self._hidden[torch.tensor(rows, device=device)] = ~(seen | (at >= torch.tensor(begins, device=device)[:, None]))
        for row, start in zip(rows, begins, strict=True):
            self._pruned_at[row] = start
        # Rounds of a fixed shape attend to everything, so hiding is enough; and what few rows see is not gathered.
        if self.block_length not in self.rounds.sizes and len(rows) == len(self._pads) and len(set(begins)) == 1:
            unpadded = at[begins[0] : begins[0] + self.block_length] >= self.pads[:, None]  # short rows' may reach here
            mask = torch.cat((real, unpadded), -1)
            kept = PrunedPrefix(self.cache, positions, self.block_length)
            self._gathered = begins, kept, None if bool(mask.all()) else mask[:, None, None]

    def has_graphs(self, rows: int, key: Hashable) -> bool:
        """Whether `keep` of so many rows would find graphs that were made before."""
        return self._store is not None and self._store.has((rows, *self._key[1:-1], key))

    def keep(self, rows: list[int], then: Callable[[], Then] | None = None, key: Hashable = None) -> None:
        """Go on with some of the rows, in the order given; `then` and `key` are for their number.

        Where graphs are kept, those for all rows stay for the next generation, as far as both may be kept.
        """
        at = torch.tensor(rows, device=self.pads.device)
        self.pads, self.positions = self.pads[at], self.positions[at]
        self._mask = self._windows = self._gathered = None
        self._pads, self.cached, self._pruned_at = (
            [of[row] for row in rows] for of in (self._pads, self.cached, self._pruned_at)
        )
        self._over = [self._over[row] for row in rows]
        if self.confidence is not None:
            self.confidence = self.confidence[at]
        if self._hidden is not None:
            self._hidden = self._hidden[at]
        before, whole = self._key, self.rounds
        self._key = (len(rows), *before[1:-1], key)
        both = whole.bytes + whole.cache.bytes * len(rows) // whole.cache.rows
        if self._store is None or not whole.sizes or both > self._store.most(self.pads.device):
            whole.close()
            whole.cache.keep(at)
            self.rounds = self._rounds_over(whole.cache, then)
            return
        self.rounds = self._store.take(self._key) or self._rounds_over(self._new_cache(), then)
        self.cache.take(whole.cache, at)
        self._store.give(before, whole)

    def finish(self) -> None:
        """Leave the graphs to the next runner of these shapes."""
        if self._store is not None and self.rounds.sizes:
            self._store.touch(self._began_as)
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
        window = ids[at, begin:end], self.positions[at, begin:end]
        hidden = self._forward(*window, begin, context, self._mask[1], then)
        final, which = min(end, start), list(rows if rows is not None else range(len(self._pads)))
        self._score(which, [begin] * len(which), hidden[:, : final - begin])
        for row in which:
            self.cached[row] = max(self.cached[row], final)
        return hidden

    def _run_apart(self, ids: torch.Tensor, starts: list[int], shown: list[int]) -> torch.Tensor:
        """Run a block of each row, or two, where rows are at different ones, or do not see all that is cached."""
        block = self.block_length
        self.catch_up(ids, [0 if over else start - block for over, start in zip(self._over, starts, strict=True)])
        late = [row for row, start in enumerate(starts) if self.cached[row] < start]
        n = 2 * block if late and shown == starts else block
        begins = [start + block - n for start in shown]
        pruned = [at == start for at, start in zip(self._pruned_at, starts, strict=True)]
        what = (begins, n, pruned)
        if self._windows is None or self._windows[0] != what:
            self._windows = (what, *self._windows_of(begins, n, starts if any(pruned) else None))
        at, mask = self._windows[1:]
        hidden = self._forward(ids.gather(1, at), self.positions.gather(1, at), begins, self.cache, mask, then=True)
        self._score(late, [begins[row] for row in late], hidden[late, :block] if late else hidden[:0])
        for row in late:
            self.cached[row] = begins[row] + block
        return hidden[:, -block:]

    def _windows_of(self, begins: list[int], n: int, starts: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """n positions of each row from `begins` on, int64 [rows, n], and what they see, bool [rows, 1, n, end].

        starts: where the rows' blocks begin; None where all see everything before them.
        """
        device, end = self.pads.device, max(begins) + n
        begin = torch.tensor(begins, device=device)
        at = begin[:, None] + torch.arange(n, device=device)
        mask = windows_mask(begin, n, end, self.block_length, self.pads)
        if starts is not None and self._hidden is not None:
            start = torch.tensor(starts, device=device)
            pruned = torch.tensor(self._pruned_at, device=device) == start
            own = (at >= start[:, None]) & pruned[
                :, None
            ]  # the block before it is run along to be cached, and sees all
            mask &= ~(own[:, None, :, None] & self._hidden[:, None, None, :end])
        return at, mask

    def _score(self, rows: list[int], begins: list[int], hidden: torch.Tensor) -> None:
        """Note the confidence at final positions from `begins` on, of some rows, where it is wanted."""
        if self.confidence is None or not hidden.numel():
            return
        device, step = hidden.device, max(SCORED // len(hidden), 1)
        of = torch.tensor(rows, device=device)[:, None]
        at = torch.tensor(begins, device=device)[:, None] + torch.arange(hidden.shape[1], device=device)
        for part in torch.arange(hidden.shape[1], device=device).split(step):
            self.confidence[of, at[:, part]] = top_probability(self.backbone.lm_head(hidden[:, part]))

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        begin: int | list[int],
        context: AnyCache,
        mask: torch.Tensor | None,
        then: bool,
    ) -> torch.Tensor:
        """Run ids and positions [rows, n] from `begin` on, of all rows or of each; arguments else as the backbone's."""
        n = ids.shape[1]
        if then and context is self.cache and n in self.rounds.sizes:
            hidden = self.rounds.run(ids, positions, begin, mask)
            if hidden is not None:
                return hidden
        if not isinstance(begin, int):
            context = IndexedCache(self.cache, n, furthest(begin) + n)
            context.place(begin)
        hidden = self.backbone(ids, positions, context, furthest(begin), mask, self.attend)
        if then and self.then is not None:
            self.then(hidden[:, -self.block_length :])
        return hidden


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """Top-1 probability float32 [...] of logits [..., vocabulary]."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()
