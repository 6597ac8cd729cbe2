"""What was computed without any chance in it, so that another seed need not compute it again."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ...llada_core.checks import odd_kind
from ...llada_core.errors import shown
from ...llada_core.image_tokens import ImageTokens

MOST = 32  # results that are kept: token grids and plans, a few kilobytes each


class Recent:
    """The last results of one model, by everything that they depend on.

    The host runs a node again when any of its inputs has changed, a seed too that plays no part.
    """

    def __init__(self):
        self._kept: dict[tuple, Any] = {}

    def get(self, key: tuple) -> Any:
        """What was kept under a key; None where nothing was."""
        return self._kept.get(key)

    def keep(self, key: tuple, result: Any) -> None:
        """Keep a result, and drop the oldest where there are too many."""
        self._kept[key] = result
        while len(self._kept) > MOST:
            self._kept.pop(next(iter(self._kept)))


def key_of(inputs: Mapping[str, Any]) -> tuple:
    """Inputs as a key: images and masks by their numbers, everything else as it is written."""
    return tuple((name, _content(value)) for name, value in sorted(inputs.items()))


def _content(value: Any) -> Any:
    if isinstance(value, ImageTokens):
        return value.codebook_size, *(_content(grid) for grid in value.grids)
    if isinstance(value, torch.Tensor) and odd_kind(value) is None:
        # What lies in memory, since an expanded tensor claims more; then how it is read.
        extent = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
        held = value.detach().as_strided((extent if value.numel() else 0,), (1,)).cpu()
        digest = hashlib.sha256(held.view(torch.uint8).numpy().data).digest()
        return tuple(value.shape), value.stride(), str(value.dtype), digest
    return (shown(value), id(value)) if isinstance(value, torch.Tensor) else repr(value)
