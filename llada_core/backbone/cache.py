"""The exact prefix cache: keys and values of finished blocks (contract section 3), and what SPRINT keeps of it."""

import torch

from .config import BackboneConfig


class PrefixCache:
    """Keys and values of all positions up to a capacity, a pair of tensors a layer.

    Attributes:
        keys, values: per layer [rows, kv_heads, capacity, head_dim].
        key_norms: [rows, capacity] float32, key norms averaged over layers and heads; filled only where wanted.
    """

    def __init__(self, config: BackboneConfig, rows: int, capacity: int, device, dtype, key_norms: bool = False):
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.key_norms = torch.zeros(rows, capacity, device=device) if key_norms else None

    def extend(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [rows, kv_heads, n, head_dim] at `start`; return all keys and values up to their end (views)."""
        end = start + k.shape[2]
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        if self.key_norms is not None:
            norms = k.float().norm(dim=-1).mean(1) / len(self.keys)
            self.key_norms[:, start:end] = norms if layer == 0 else self.key_norms[:, start:end] + norms
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


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
