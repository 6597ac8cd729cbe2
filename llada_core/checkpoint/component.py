"""A part of a checkpoint between "its headers fit" and "its weights are in memory"."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CheckpointError
from ..quantization.formats import Dense, Format
from .loading import Mapped, fill
from .weights import OnRead, PickledTensors, Slot, TensorFiles, entry_numel, need

log = logging.getLogger(__name__)

Built = TypeVar("Built", bound=nn.Module)


def _never(name: str) -> bool:
    return False


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


@dataclass(frozen=True)
class Component:
    """A module without weights, and the file tensors that belong into it.

    Attributes:
        module: the module on the meta device: its structure and configuration, no data. Of the class that the part's
            own file names, which who asks for the part knows.
        source: the files, headers checked.
        slots: `weights.plan`'s answer for the two.
        keep_float32: names of parameters that stay float32 whatever dtype is asked for.
        compute_dtype: the dtype that the part computes in where another is asked for (the VAE overflows in float16).
    """

    module: Any
    source: TensorFiles | PickledTensors
    slots: Mapping[str, Slot]
    keep_float32: Callable[[str], bool] = _never
    compute_dtype: Callable[[torch.dtype], torch.dtype] = _same

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the dense weights have in the files, which activations take; bfloat16 without any."""
        sizes: dict[torch.dtype, int] = {}
        for key, slot in self.slots.items():
            # The FP8 release keeps little else: what it was made from was bfloat16.
            found = slot.form.dtype if isinstance(slot.form, Dense) else torch.bfloat16
            sizes[found] = sizes.get(found, 0) + entry_numel(self.source.entries[key].shape)
        return max(sizes, key=lambda dtype: sizes[dtype])

    def forms(self, dtype: torch.dtype) -> dict[str, Format]:
        """Parameter or buffer -> how it lies in memory once loaded as `dtype`."""

        def form(name: str, tensor: torch.Tensor) -> Format:
            kept = torch.float32 if self.keep_float32(name) else dtype
            return Dense(kept if tensor.is_floating_point() else tensor.dtype)

        return {name: form(name, tensor) for name, tensor in self.module.state_dict().items()}

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of memory that the weights take once loaded as `dtype`."""
        shapes = self._shapes()
        return sum(form.bytes(shapes[name]) for name, form in self.forms(dtype).items())

    def load(
        self,
        dtype: torch.dtype,
        on_read: OnRead | None = None,
        device: torch.device | str = "cpu",
        compute: torch.device | str | None = None,
        mapped: Mapped | None = None,
    ) -> nn.Module:
        """Read the weights as `dtype` into a module of their own: in eval mode, without gradients.

        `module` stays as it is, so that a component can be loaded, released and loaded again.

        Args:
            dtype: of every floating-point parameter but those of `keep_float32`.
            on_read: hears of each piece; an exception from it ends the reading and leaves nothing behind.
            device: where the weights will lie. They are read straight to it.
            compute: where weights are converted that are wanted in another form than the files'; `device` by default.
            mapped: path of a safetensors file -> its tensors by key, as slices of a map of the file: what is wanted as
                it is stored, and lies in one piece, is such a slice and is not read. For `device` "cpu".
        """
        device = torch.device(device)
        return fill(
            copy.deepcopy(self.module),
            self.source,
            self.slots,
            self._shapes(),
            self.forms(dtype),
            device,
            device if compute is None else torch.device(compute),
            mapped,
            on_read,
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}


def known_fields(label: str, config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The fields of a configuration that a library class takes; the others are named in one log line.

    Fields that begin with "_" are a library's own notes (class name, version) and are passed over in silence.
    """
    unknown = sorted(name for name in config if name not in names and not name.startswith("_"))
    if unknown:
        log.info("%s: config.json has fields that are not used here: %s", label, ", ".join(unknown))
    return {name: value for name, value in config.items() if name in names}


def build_on_meta(label: str, make: Callable[[], Built]) -> Built:
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
