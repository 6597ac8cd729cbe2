"""A part of a checkpoint between "its headers fit" and "its weights are in memory"."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CheckpointError
from ..quantization.choices import asked_form, bits, holds
from ..quantization.formats import Dense, Format, FP8Block
from ..quantization.modules import apply_formats
from .loading import Mapped, fill
from .weights import OnRead, PickledTensors, Slot, TensorFiles, entry_numel, file_dtype, need, weight_of

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
        quantizable: weights that may lie in memory in a quantized form -> rows of each released weight that they are
            made of (`FP8Block.part_rows`), 0 for a weight that is one.
    """

    module: Any
    source: TensorFiles | PickledTensors
    slots: Mapping[str, Slot]
    keep_float32: Callable[[str], bool] = _never
    compute_dtype: Callable[[torch.dtype], torch.dtype] = _same
    quantizable: Mapping[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the dense weights have in the files, which activations take; bfloat16 without any."""
        sizes: dict[torch.dtype, int] = {}
        for key, slot in self.slots.items():
            if isinstance(slot.stored, Dense):
                dtype = slot.stored.dtype
                sizes[dtype] = sizes.get(dtype, 0) + entry_numel(self.source.entries[key].shape)
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)

    @property
    def stored(self) -> dict[type[Format], int]:
        """Forms of the weights in the files -> bytes of those, scales included; that of most numbers first."""
        sizes: dict[type[Format], int] = {}
        numbers: dict[type[Format], float] = {}
        for key, entry in self.source.entries.items():
            slot = self.slots.get(weight_of(key, self.source.entries))
            if slot is not None:
                kind, size = type(slot.stored), entry_numel(entry.shape) * file_dtype(entry.dtype).itemsize
                sizes[kind] = sizes.get(kind, 0) + size
                numbers[kind] = numbers.get(kind, 0) + size / bits(slot.stored)
        return dict(sorted(sizes.items(), key=lambda item: -numbers[item[0]]))

    def describe(self, dtype: torch.dtype | None = None, asked: Format | None = None) -> str:
        """Form and size in a few words, for logs: of the files, or as `load` makes it.

        Args:
            dtype, asked: as in `load`; without a dtype it is the files.
        """
        in_files = next(iter(self.stored), Dense).name
        if dtype is None:
            form = _type_name(self.dtype) if in_files == Dense.name else in_files
            return f"{form} {sum(self.stored.values()) / 1e9:.3g} GB"
        shapes, numbers = self._shapes(), dict[str, int]()
        for name, form_of in self.forms(dtype, asked).items():
            numbers[form_of.name] = numbers.get(form_of.name, 0) + entry_numel(shapes[name])
        main = max(numbers, key=lambda name: numbers[name])
        form = _type_name(dtype) if main == Dense.name else f"{main}, the rest {_type_name(dtype)}"
        how = f" (stored as {in_files})" if in_files not in (Dense.name, main) else ""
        return f"as {form}, {self.bytes(dtype, asked) / 1e9:.3g} GB{how}"

    def forms(self, dtype: torch.dtype, asked: Format | None = None) -> dict[str, Format]:
        """Parameter or buffer -> how it lies in memory once loaded.

        Args:
            dtype: of all that is dense.
            asked: of quantizable weights that are stored in more bits; Dense makes them dense whatever they are stored
                in; None leaves them as they are stored.
        """
        stored = self._stored_forms()

        def form(name: str, tensor: torch.Tensor) -> Format:
            kept = torch.float32 if self.keep_float32(name) else dtype
            dense = Dense(kept if tensor.is_floating_point() else tensor.dtype)
            own = stored.get(name, dense)
            if name not in self.quantizable or isinstance(asked, Dense):
                return dense
            wanted = asked if asked is not None and bits(asked) < bits(own) else own
            return replace(wanted, part_rows=self.quantizable[name]) if isinstance(wanted, FP8Block) else wanted

        return {name: form(name, tensor) for name, tensor in self.module.state_dict().items()}

    def bytes(self, dtype: torch.dtype, asked: Format | None = None) -> int:
        """Bytes of memory that the weights take once loaded; `dtype` and `asked` as in `forms`."""
        shapes = self._shapes()
        return sum(form.bytes(shapes[name]) for name, form in self.forms(dtype, asked).items())

    def load(
        self,
        dtype: torch.dtype,
        on_read: OnRead | None = None,
        device: torch.device | str = "cpu",
        compute: torch.device | str | None = None,
        mapped: Mapped | None = None,
        asked: Format | None = None,
    ) -> nn.Module:
        """Read the weights into a module of their own: in eval mode, without gradients.

        `module` stays as it is, so that a component can be loaded, released and loaded again.

        Args:
            dtype: of every floating-point parameter that is dense, but those of `keep_float32`.
            on_read: hears of each piece; an exception from it ends the reading and leaves nothing behind.
            device: where the weights will lie. They are read straight to it.
            compute: where weights are converted that are wanted in another form than the files'; `device` by default.
            mapped: path of a safetensors file -> its tensors by key, as slices of a map of the file: what is wanted as
                it is stored, and lies in one piece, is such a slice and is not read. For `device` "cpu".
            asked: as in `forms`. Weights are quantized while they are read, a piece at a time.
        """
        device = torch.device(device)
        forms = self.forms(dtype, asked)

        def choose(layer: str, shape: tuple[int, ...]) -> Format | None:
            form = forms[f"{layer}.weight"]
            return None if isinstance(form, Dense) else form

        return fill(
            apply_formats(copy.deepcopy(self.module), choose),
            self.source,
            self.slots,
            self._shapes(),
            forms,
            device,
            device if compute is None else torch.device(compute),
            mapped,
            on_read,
        )

    def asked(self, weights: str, part: str, dtype: torch.dtype | None, device: torch.device) -> Format | None:
        """What to ask `load` for, and so what becomes of the FP8 release.

        Args:
            weights: one of `options.WEIGHTS`.
            part: which component this is.
            dtype: the type that the user wants weights in; None where that is left to the files.
            device: where they will be used.

        Returns:
            What `weights` makes of the part; where it leaves it as it is stored, a Dense form for FP8 that the user
            wants in another type, or that the device has no type for.
        """
        form = asked_form(weights, part)
        if form is not None or FP8Block not in self.stored:
            return form
        return Dense(dtype or torch.bfloat16) if dtype is not None or not holds(device, FP8Block()) else None

    def _stored_forms(self) -> dict[str, Format]:
        """Parameter -> the quantized form that all its pieces have in the files."""
        found: dict[str, set[Format]] = {}
        for slot in self.slots.values():
            form = replace(slot.stored, part_rows=0) if isinstance(slot.stored, FP8Block) else slot.stored
            found.setdefault(slot.name, set()).add(form)
        single = {name: next(iter(forms)) for name, forms in found.items() if len(forms) == 1}
        return {name: form for name, form in single.items() if not isinstance(form, Dense)}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}


def described(components: Mapping[str, Component], missing: Mapping[str, list[str]]) -> str:
    """Parts, forms and sizes of a checkpoint's files, and what it lacks, for a line of a log.

    Args:
        missing: as in `layout.Layout`.
    """
    there = [f"{part} {component.describe()}" for part, component in components.items()]
    return ", ".join(there + [f"no {part} ({', '.join(files)})" for part, files in missing.items()])


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
