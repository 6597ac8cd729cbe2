"""The exact prefix cache: keys and values of finished blocks (docs/model.md, Backbone), and what SPRINT keeps of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from .config import BackboneConfig


class PrefixCache:
    """Keys and values of all positions up to a capacity, a pair of tensors a layer.

    Attributes:
        rows, capacity: sizes.
        keys, values: per layer [rows, kv_heads, capacity, head_dim].
        key_norms: [rows, capacity] float32, key norms averaged over layers and heads; filled only where wanted.
    """

    def __init__(self, config: BackboneConfig, rows: int, capacity: int, device, dtype, key_norms: bool = False):
        self.rows, self.capacity = rows, capacity
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.key_norms = torch.zeros(rows, capacity, device=device) if key_norms else None

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def extend(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [rows, kv_heads, n, head_dim] at `start`; return all keys and values up to their end (views)."""
        end = start + k.shape[2]
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        if self.key_norms is not None:
            norms = self.layer_norms(k)
            self.key_norms[:, start:end] = norms if layer == 0 else self.key_norms[:, start:end] + norms
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some of the rows, int64 [kept]; layer by layer, so that only one is held twice."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[rows]
        if self.key_norms is not None:
            self.key_norms = self.key_norms[rows]
        self.rows = len(rows)

    def take(self, other: "PrefixCache", rows: torch.Tensor) -> None:
        """Become some of the rows, int64 [rows], of another cache of the same capacity."""
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine.copy_(theirs[rows])
        if self.key_norms is not None and other.key_norms is not None:
            self.key_norms.copy_(other.key_norms[rows])

    def layer_norms(self, k: torch.Tensor) -> torch.Tensor:
        """What keys [rows, kv_heads, n, head_dim] of one layer add to `key_norms`, float32 [rows, n]."""
        return k.float().norm(dim=-1).mean(1) / len(self.keys)


class RowsOfCache:
    """Some rows of a cache, for a pass that the others need not take part in.

    Args:
        cache: the whole cache.
        rows: int64 [k], which rows.
    """

    def __init__(self, cache: PrefixCache, rows: torch.Tensor):
        self._cache, self._rows = cache, rows

    def extend(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As PrefixCache.extend, with copies of the rows in place of views."""
        end = start + k.shape[2]
        cache, rows = self._cache, self._rows
        keys, values = cache.keys[layer], cache.values[layer]
        keys[rows, :, start:end] = k
        values[rows, :, start:end] = v
        if cache.key_norms is not None:
            norms = cache.layer_norms(k)
            cache.key_norms[rows, start:end] = norms if layer == 0 else cache.key_norms[rows, start:end] + norms
        return keys[rows, :, :end], values[rows, :, :end]


@dataclass(frozen=True)
class Prefix:
    """What the cache holds of the beginning of a sequence, for a sequence that goes on from it.

    Attributes:
        ids: the sequence's, padding left out, as many as are cached.
        keys, values: per layer [kv_heads, n, head_dim].
        key_norms, confidence: float32 [n], what SPRINT ranks positions by; None where that was not wanted.
    """

    ids: Sequence[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_norms: torch.Tensor | None = None
    confidence: torch.Tensor | None = None


class IndexedCache:
    """The cache written by index, so that each row has a place of its own, and returned to one extent.

    A CUDA graph can use it: nothing in it changes but what is in its buffers. What lies behind the written positions is
    to be masked.

    Args:
        cache: the whole cache.
        n: positions of each row that are written at a time.
        extent: positions returned.
    """

    def __init__(self, cache: PrefixCache, n: int, extent: int):
        self._cache, self._extent = cache, extent
        self._steps = torch.arange(n, device=cache.keys[0].device).expand(cache.rows, -1)
        self._at = self._steps.clone(memory_format=torch.contiguous_format)

    def place(self, starts: int | Sequence[int]) -> None:
        """Let the next n positions be written from there on: of all rows, or one of each."""
        each = starts if isinstance(starts, int) else torch.tensor(starts, device=self._at.device)[:, None]
        torch.add(self._steps, each, out=self._at)

    def extend(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As PrefixCache.extend; `start` is not read, `place` says where."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        at = self._at[:, None, :, None].expand_as(k)
        keys.scatter_(2, at, k)
        values.scatter_(2, at, v)
        if self._cache.key_norms is not None:
            self._add_norms(layer, k)
        return keys[:, :, : self._extent], values[:, :, : self._extent]

    def whole(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, to be written to at the positions int64 [rows, n] that come third."""
        return self._cache.keys[layer], self._cache.values[layer], self._at

    def note(self, layer: int) -> None:
        """What `extend` does besides, where keys were written to `whole`."""
        if self._cache.key_norms is not None:
            keys = self._cache.keys[layer]
            at = self._at[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            self._add_norms(layer, keys.gather(2, at))

    def _add_norms(self, layer: int, k: torch.Tensor) -> None:
        norms = cast(torch.Tensor, self._cache.key_norms)
        write = norms.scatter_ if layer == 0 else norms.scatter_add_
        write(1, self._at, self._cache.layer_norms(k))


class PrunedPrefix:
    """The kept positions of a prefix, gathered once, with room for the block that attends to them.

    Args:
        cache: the whole cache.
        kept: int64 [rows, m], positions kept of each row; rows with fewer repeat any position.
        room: positions of the block.
    """

    def __init__(self, cache: PrefixCache, kept: torch.Tensor, room: int):
        self._keys = [_gather(keys, kept, room) for keys in cache.keys]
        self._values = [_gather(values, kept, room) for values in cache.values]
        self._kept = kept.shape[1]

    def extend(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As PrefixCache.extend; `start` is not used, the block comes after the kept positions."""
        self._keys[layer][:, :, self._kept :] = k
        self._values[layer][:, :, self._kept :] = v
        return self._keys[layer], self._values[layer]


def _gather(source: torch.Tensor, kept: torch.Tensor, room: int) -> torch.Tensor:
    rows, heads, _, dim = source.shape
    out = source.new_empty(rows, heads, kept.shape[1] + room, dim)
    index = kept[:, None, :, None].expand(rows, heads, -1, dim)
    torch.gather(source, 2, index, out=out[:, :, : kept.shape[1]])
    return out
