"""Tensors from files straight into modules: checked against their headers first, then read one at a time."""

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError
from .fp8 import SCALE_SUFFIX, dequantize, scale_shape

# A mapped file counts as memory once its pages are touched; a fresh map drops the pages already copied out.
REMAP_BYTES = 256 * 2**20
DOWNLOAD = "Download the file again."


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what its header says. `load` reads it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: parameter or buffer `name`, at `index` of it (all of it where index is empty)."""

    name: str
    index: tuple[int | slice, ...] = ()


class TensorFiles:
    """The tensors of one or several safetensors files, by key, with headers read and no data.

    Args:
        label: the part, as errors name it ("backbone").
        files: the shards.
        expected: key -> file name, as an index lists it; every listed key must be there.

    Raises:
        CheckpointError: a file that is missing, truncated or no safetensors, or a listed key that is absent.
    """

    def __init__(self, label: str, files: Iterable[Path], expected: Mapping[str, str] | None = None):
        self.label = label
        self.entries: dict[str, Entry] = {}
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{label}: {path.name}", "no such file", "a safetensors file", DOWNLOAD)
            try:
                with safe_open(str(path), framework="pt") as file:
                    for key in file.keys():
                        part = file.get_slice(key)
                        self.entries[key] = Entry(path, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError) as error:
                found = f"an unreadable file of {path.stat().st_size} bytes ({error})"
                raise CheckpointError(f"{label}: {path.name}", found, "a whole safetensors file", DOWNLOAD) from error
        absent = sorted(set(expected or ()) - set(self.entries))
        if absent:
            found = f"no {absent[0]} ({len(absent)} listed tensors absent)"
            raise CheckpointError(
                f"{label}: {(expected or {})[absent[0]]}", found, "every tensor of the index", DOWNLOAD
            )

    def read(self, keys: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Yield (key, tensor) file by file. A tensor is valid until the next one is asked for."""
        wanted = set(keys)
        for path in dict.fromkeys(self.entries[key].file for key in wanted):
            here = [key for key, entry in self.entries.items() if entry.file == path and key in wanted]
            while here:
                with safe_open(str(path), framework="pt") as file:
                    seen = 0
                    while here and seen < REMAP_BYTES:
                        tensor = file.get_tensor(here[0])
                        seen += tensor.nbytes
                        yield here.pop(0), tensor


class PickledTensors:
    """The tensors of one `.pt` file, with the interface of TensorFiles. Nothing but tensors is ever unpickled.

    The file is mapped while it is looked at and while it is read, never in between: Windows lets nobody replace a
    mapped file.
    """

    def __init__(self, label: str, path: Path):
        self.label, self._path = label, path
        self.entries = {key: Entry(path, tuple(t.shape), str(t.dtype)) for key, t in self._mapped().items()}

    def _mapped(self) -> dict[str, torch.Tensor]:
        """All tensors, on a map that closes with the last of them."""
        label, path, expected = self.label, self._path, "a dictionary of tensors"
        if not path.is_file():
            raise CheckpointError(f"{label}: {path.name}", "no such file", expected, DOWNLOAD)
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            found = f"a file that cannot be read as tensors alone ({str(error).splitlines()[0]})"
            remedy = "Do not use this file: download it again from the model's own page."
            raise CheckpointError(f"{label}: {path.name}", found, expected, remedy) from error
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise CheckpointError(f"{label}: {path.name}", type(tensors).__name__, expected, DOWNLOAD)
        return tensors

    def read(self, keys: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Yield (key, a copy of the tensor). Raises CheckpointError where the file has changed since it was opened."""
        tensors = self._mapped()
        for key in keys:
            entry, found = self.entries[key], tensors.get(key)
            if found is None or (tuple(found.shape), str(found.dtype)) != (entry.shape, entry.dtype):
                remedy = "Load the checkpoint again; wait until a download has ended."
                raise CheckpointError(f"{self.label}: {entry.file.name}", "another file", "the one opened", remedy)
            yield key, found.clone()


Place = Callable[[str], Slot | None]
OnRead = Callable[[int, int], None]


def plan(module: nn.Module, source: TensorFiles | PickledTensors, place: Place) -> dict[str, Slot]:
    """Match a file's tensors with a module's, by headers alone.

    Args:
        module: the component, on any device; only its names and shapes are read.
        source: the files.
        place: key -> where it goes; None for a key that belongs to another module. A key that goes nowhere must be
            given a Slot with a name that the module lacks, and is reported as unknown.

    Returns:
        key -> Slot for every key to be read; FP8 scales are left out, they are read with their weights.

    Raises:
        CheckpointError: an unknown key, another shape, an absent tensor, an FP8 weight without its scale.
    """
    targets = dict(module.state_dict(keep_vars=True))
    slots: dict[str, Slot] = {}
    filled: dict[str, int] = dict.fromkeys(targets, 0)
    for key, entry in source.entries.items():
        slot = place(key.removesuffix(SCALE_SUFFIX) + ".weight" if key.endswith(SCALE_SUFFIX) else key)
        if slot is None:
            continue
        label = f"{source.label}: {entry.file.name}"
        target = targets.get(slot.name)
        if target is None or any(isinstance(i, int) and i >= n for i, n in zip(slot.index, target.shape, strict=False)):
            remedy = "This file belongs to another model or release; download the checkpoint's own."
            raise CheckpointError(label, f"the unknown tensor {key}", "only tensors of this component", remedy)
        if key.endswith(SCALE_SUFFIX):
            continue
        shape = tuple(target[slot.index].shape)
        if entry.shape != shape:
            remedy = "The file and config.json belong to different models, or the file is damaged; download both again."
            raise CheckpointError(label, f"{key} of shape {list(entry.shape)}", f"shape {list(shape)}", remedy)
        if torch_dtype(entry.dtype, label).is_floating_point != target.is_floating_point():
            remedy = "Use the bf16 or FP8 release; other quantizations are not read."
            raise CheckpointError(label, f"{key} of type {entry.dtype}", f"a type like {target.dtype}", remedy)
        if entry.dtype.startswith("F8"):
            _check_scale(source, key, label)
        filled[slot.name] += entry_numel(shape)
        slots[key] = slot
    absent = [name for name, tensor in targets.items() if filled[name] != tensor.numel()]
    if absent:
        found = f"no complete {absent[0]} ({len(absent)} tensors absent)"
        remedy = "Download the checkpoint again; a shard may be missing."
        raise CheckpointError(source.label, found, "every tensor of this component", remedy)
    return slots


def entry_numel(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return torch.Size(shape).numel()


def _check_scale(source, key: str, label: str) -> None:
    scale_key = key.removesuffix(".weight") + SCALE_SUFFIX
    entry, scale = source.entries[key], source.entries.get(scale_key)
    wanted = scale_shape(entry.shape)
    if scale is None or scale.shape != wanted:
        found = f"the FP8 weight {key} with " + ("no scale" if scale is None else f"a scale of {list(scale.shape)}")
        remedy = "Without its scale an 8-bit weight has no meaning; download the file again."
        raise CheckpointError(label, found, f"{scale_key} of shape {list(wanted)}", remedy)


def fill(
    module: nn.Module,
    source: TensorFiles | PickledTensors,
    slots: Mapping[str, Slot],
    dtype: torch.dtype | None,
    keep_float32: Callable[[str], bool] = lambda name: False,
    on_read: OnRead | None = None,
) -> nn.Module:
    """Give a meta module its weights: allocate each tensor once, read every file tensor into its place.

    Args:
        module: the component on the meta device; returned in eval mode, without gradients, on the CPU.
        source, slots: the files and `plan`'s answer.
        dtype: of every floating-point parameter; None keeps what the files say (FP8 becomes bfloat16).
        keep_float32: names that stay float32 whatever dtype says.
        on_read: (numbers read, numbers in all), called after each tensor.

    Returns:
        The same module.
    """
    native = {slot.name: torch_dtype(source.entries[key].dtype) for key, slot in slots.items()}
    for name in {slot.name for slot in slots.values()}:
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        old = getattr(owner, leaf)
        wanted = torch.float32 if keep_float32(name) else dtype or native[name]
        wanted = wanted if native[name].is_floating_point else native[name]
        new = torch.empty(old.shape, dtype=wanted, device="cpu")
        if isinstance(old, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(new, requires_grad=False))
        else:
            owner.register_buffer(leaf, new)
    targets = module.state_dict()
    scales = {key: key.removesuffix(".weight") + SCALE_SUFFIX for key in slots if source.entries[key].dtype[:2] == "F8"}
    scale_values = {key: tensor.clone() for key, tensor in source.read(scales.values())}
    done, total = 0, sum(entry_numel(source.entries[key].shape) for key in slots)
    for key, tensor in source.read(slots):
        slot = slots[key]
        if key in scales:
            tensor = dequantize(tensor, scale_values[scales[key]])
        targets[slot.name][slot.index].copy_(tensor)
        done += tensor.numel()
        if on_read:
            on_read(done, total)
    left = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    left += [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left:
        raise RuntimeError(f"{source.label}: {left[0]} was never given a value")
    return module.eval().requires_grad_(False)


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.bfloat16,  # dequantised while it is read
    "I64": torch.int64,
}


def torch_dtype(name: str, label: str = "checkpoint") -> torch.dtype:
    """The type that a header's tensor type is read as. Raises CheckpointError for one that is not read at all."""
    if name.startswith("torch."):
        return getattr(torch, name.removeprefix("torch."))
    if name not in _SAFETENSORS_DTYPES:
        expected = ", ".join(_SAFETENSORS_DTYPES)
        remedy = "Use the bf16 or FP8 release; other quantizations are not read."
        raise CheckpointError(label, f"tensors of type {name}", expected, remedy)
    return _SAFETENSORS_DTYPES[name]


def read_json(label: str, path: Path) -> dict:
    """A JSON file's object. Raises CheckpointError where it is missing, unreadable or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{label}: {path.name}", "no such file", "a JSON file", DOWNLOAD) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{label}: {path.name}", f"unreadable JSON ({error})", "a JSON object", DOWNLOAD
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: {path.name}", type(value).__name__, "a JSON object", DOWNLOAD)
    return value


def need(label: str, config: Mapping, *names: str) -> list:
    """The values of required fields of a configuration. Raises CheckpointError naming the first absent one."""
    for name in names:
        if config.get(name) is None:
            found = f"no field {name}"
            raise CheckpointError(f"{label}: config.json", found, f"a value for {name}", "Download config.json again.")
    return [config[name] for name in names]
