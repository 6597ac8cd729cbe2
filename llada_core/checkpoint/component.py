"""A part of a checkpoint between "its headers fit" and "its weights are in memory"."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from .weights import OnRead, PickledTensors, Slot, TensorFiles, entry_numel, fill, need, torch_dtype

log = logging.getLogger(__name__)


def _never(name: str) -> bool:
    return False


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


@dataclass(frozen=True)
class Component:
    """A module without weights, and the file tensors that belong into it.

    Attributes:
        module: the module on the meta device: its structure and configuration, no data.
        source: the files, headers checked.
        slots: `weights.plan`'s answer for the two.
        keep_float32: names of parameters that stay float32 whatever dtype is asked for.
        compute_dtype: the dtype that the part computes in where another is asked for (the VAE overflows in float16).
    """

    module: nn.Module
    source: TensorFiles | PickledTensors
    slots: Mapping[str, Slot]
    keep_float32: Callable[[str], bool] = _never
    compute_dtype: Callable[[torch.dtype], torch.dtype] = _same

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the weights have in the files; FP8 counts as bfloat16, which it becomes."""
        sizes: dict[torch.dtype, int] = {}
        for key in self.slots:
            entry = self.source.entries[key]
            found = torch_dtype(entry.dtype)
            sizes[found] = sizes.get(found, 0) + entry_numel(entry.shape)
        return max(sizes, key=sizes.get)

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of memory that the weights take once loaded as `dtype`."""

        def size(name: str, tensor: torch.Tensor) -> int:
            kept = torch.float32 if self.keep_float32(name) else dtype
            return tensor.numel() * (kept if tensor.is_floating_point() else tensor.dtype).itemsize

        return sum(size(name, tensor) for name, tensor in self.module.state_dict().items())

    def load(self, dtype: torch.dtype, on_read: OnRead | None = None) -> nn.Module:
        """Read the weights as `dtype` into a module of their own: on the CPU, in eval mode, without gradients.

        `module` stays as it is, so that a component can be loaded, released and loaded again. `on_read` hears of
        each tensor; an exception from it ends the reading and leaves nothing behind.
        """
        return fill(copy.deepcopy(self.module), self.source, self.slots, dtype, self.keep_float32, on_read)


def known_fields(label: str, config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The fields of a configuration that a library class takes; the others are named in one log line.

    Fields that begin with "_" are a library's own notes (class name, version) and are passed over in silence.
    """
    unknown = sorted(name for name in config if name not in names and not name.startswith("_"))
    if unknown:
        log.info("%s: config.json has fields that are not used here: %s", label, ", ".join(unknown))
    return {name: value for name, value in config.items() if name in names}


def build_on_meta(label: str, make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` builds, on the meta device, in eval mode; whatever a library objects to becomes a CheckpointError."""
    try:
        with torch.device("meta"):
            return make().eval().requires_grad_(False)
    except Exception as error:  # the libraries share no class for "this configuration is wrong"
        found = f"a configuration that the library refuses ({type(error).__name__}: {error})"
        raise CheckpointError(f"{label}: config.json", found, "a valid one", "Download config.json again.") from error


def need_counts(label: str, config: Mapping[str, Any], *names: str) -> list[int]:
    """The values of required fields that are whole numbers from 1 up. Raises CheckpointError for any other."""
    values = need(label, config, *names)
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            found = f"{name} = {value!r}"
            expected = "a whole number from 1 up"
            raise CheckpointError(f"{label}: config.json", found, expected, "Download config.json again.")
    return values
