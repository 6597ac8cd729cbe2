"""Weights from files into modules, or from one form into another: a piece at a time, each read once.

Where a file stores a weight as it is wanted, its bytes are read straight to their place. Else a piece of it is read
into a buffer, brought to the device that computes, and converted there. Experts that lie one by one in a file go
together then: starting a computation takes a GPU as long as a megabyte of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..quantization.choices import holds
from ..quantization.formats import Dense, Format, FP8Block, Index, Shape
from .reading import Stretch, read
from .weights import DOWNLOAD, OnRead, PickledTensors, Slot, TensorFiles, companions, entry_numel, file_dtype

CHUNK = 8 * 2**20  # bytes of a large tensor that are read at a time
CHUNK_FOR_GPU = 32 * 2**20  # bytes of files that a GPU converts at a time, and of experts that go to one together
# Path of a safetensors file -> its tensors by key, each a slice of a map of that file.
Mapped = Callable[[Path], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Piece:
    """A part of a weight as it is wanted.

    Attributes:
        name: the parameter or buffer, a dense weight's.
        index: which part of the dense weight it is, as in `weights.Slot`.
        shape: of that part of the dense weight.
        key: of the weight in its file, the first one of several experts.
        form: the wanted one, for this part alone.
        stored: suffix -> where the tensor lies in the wanted form's, and the tensor.
        source: the file's form, and its tensors by suffix, valid until the next piece is asked for.
    """

    name: str
    index: Index
    shape: Shape
    key: str
    form: Format
    stored: dict[str, tuple[Index, torch.Tensor]]
    source: tuple[Format, dict[str, torch.Tensor]]

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The part as the file has it and as it is stored now, both dense float32."""
        form, tensors = self.source
        now = {suffix: tensor for suffix, (_, tensor) in self.stored.items()}
        width = self.shape[-1] if self.shape else 1
        return form.dequantize(tensors, width, torch.float32), self.form.dequantize(now, width, torch.float32)


def fill(
    module: nn.Module,
    source: TensorFiles | PickledTensors,
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    forms: Mapping[str, Format],
    device: torch.device,
    compute: torch.device,
    mapped: Mapped | None = None,
    on_read: OnRead | None = None,
) -> nn.Module:
    """Give a meta module its weights: allocate each tensor once, read every file tensor into its place.

    Args:
        module: the component on the meta device, its layers of the wanted forms; returned in eval mode, without
            gradients.
        source, slots: the files and `plan`'s answer.
        shapes: name -> the dense weight's.
        forms: name -> how it is wanted; for every name of `slots`.
        device: where the weights will lie.
        compute: where what is not wanted as it is stored is converted.
        mapped: gives weights that are wanted as they are stored, whole in one file, on `device` "cpu" only.
        on_read: (numbers read, numbers in all), called after each piece.

    Returns:
        The same module.
    """
    taken = {} if mapped is None or isinstance(source, PickledTensors) else _take(source, slots, shapes, forms, mapped)
    targets = _allocate(module, forms, device, taken)
    left = {key: slot for key, slot in slots.items() if slot.name not in taken}
    total = sum(entry_numel(shapes[name]) for name in forms)
    done = total - sum(entry_numel(shapes[name]) for name in {slot.name for slot in left.values()})
    for piece in pieces(source, left, shapes, forms, compute, targets):
        for suffix, (index, tensor) in piece.stored.items():
            target = targets[tensor_name(piece.name, suffix)][index]
            if target.data_ptr() != tensor.data_ptr():
                target.copy_(tensor.to(device, non_blocking=True) if device.type == "cuda" else tensor)
        done += entry_numel(piece.shape)
        if on_read:
            on_read(done, total)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # copies from buffers that are about to go
    tensors = [*module.named_parameters(), *module.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise RuntimeError(f"{source.label}: {empty[0]} was never given a value")
    return module.eval().requires_grad_(False)


def pieces(
    source: TensorFiles | PickledTensors,
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    forms: Mapping[str, Format],
    compute: torch.device,
    targets: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Piece]:
    """Every weight as it is wanted, a piece at a time, in the files' order.

    Args:
        source, slots, shapes, forms, compute: as in `fill`.
        targets: the wanted tensors by name; a piece that can be read straight into one on the CPU lies there already.
    """
    if isinstance(source, PickledTensors):
        for key, tensor in source.read(slots):
            yield _converted(slots[key], key, slots[key].index, forms, shapes, {"weight": tensor}, compute)
        return
    works = _works(source, slots, shapes, forms, targets or {}, compute.type == "cuda")
    for work, tensors in read(((work, work.stretches) for work in works), pinned=compute.type == "cuda"):
        yield _converted(slots[work.key], work.key, work.index, forms, shapes, work.together or tensors, compute)


def tensor_name(name: str, suffix: str) -> str:
    """The stored tensor of a weight: "a.weight", "weight_scale" -> "a.weight_scale"."""
    return name if suffix == "weight" else name.removesuffix("weight") + suffix


@dataclass(frozen=True)
class _Work:
    """What is read and converted at a time.

    Attributes:
        key: as in `Piece`.
        index: where it goes, as in `weights.Slot`.
        stretches: what to read; by suffix, but where there are several experts.
        together: suffix -> the tensor that is filled by them, of several experts.
    """

    key: str
    index: Index
    stretches: dict[Any, Stretch]
    together: dict[str, torch.Tensor] = field(default_factory=dict)


def _works(
    source: TensorFiles,
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    forms: Mapping[str, Format],
    targets: Mapping[str, torch.Tensor],
    gpu: bool,
) -> Iterator[_Work]:
    """What to read, in the order of the files: of large tensors some rows, or some experts, at a time."""
    chunk = CHUNK_FOR_GPU if gpu else CHUNK
    ordered = sorted(slots, key=lambda key: (source.entries[key].file, source.entries[key].offset))
    for _, keys in groupby(ordered, key=lambda key: source.entries[key].file):
        for run in _runs(keys, source, slots, shapes, forms, targets, chunk):
            if len(run) > 1:
                yield _several(run, source, slots, shapes, gpu)
            else:
                yield from _one(run[0], source, slots, shapes, forms, targets, chunk)


def _runs(
    keys: Iterable[str],
    source: TensorFiles,
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    forms: Mapping[str, Format],
    targets: Mapping[str, torch.Tensor],
    chunk: int,
) -> list[list[str]]:
    """The keys of a file; together those of successive experts of a bank that are converted, or sent to a GPU."""
    runs: list[list[str]] = []
    banks: dict[tuple[str, str, Format], list[str]] = {}
    for key in keys:
        slot = slots[key]
        if _expert(slot) is not None:
            banks.setdefault((slot.name, repr(slot.index[1:]), slot.stored), []).append(key)
        else:
            runs.append([key])
    for (name, _, stored), experts in banks.items():
        shape, target = piece_shape(shapes[name], slots[experts[0]].index), targets.get(name)
        read_straight = _alike(stored, forms[name], shape) or (
            isinstance(stored, Dense) and isinstance(forms[name], Dense)
        )
        most = 1
        if not read_straight or (target is not None and target.device.type == "cuda"):
            most = max(1, chunk // max(stored.bytes(shape), 1))
        previous: int | None = None
        for expert, key in sorted((_expert(slots[key]) or 0, key) for key in experts):
            if previous is None or expert != previous + 1 or len(runs[-1]) == most:
                runs.append([])
            runs[-1].append(key)
            previous = expert
    return sorted(runs, key=lambda run: min(source.entries[key].offset for key in run))


def _expert(slot: Slot) -> int | None:
    """Which expert of its bank a key is; None where it is no single one."""
    first = slot.index[0] if slot.index else None
    return first if isinstance(first, int) else None


def _several(
    run: list[str], source: TensorFiles, slots: Mapping[str, Slot], shapes: Mapping[str, Shape], pinned: bool
) -> _Work:
    """Successive experts of a bank, one behind the other in buffers of their own."""
    slot = slots[run[0]]
    shape = piece_shape(shapes[slot.name], slot.index)
    together: dict[str, torch.Tensor] = {}
    stretches = {}
    for place, key in enumerate(run):
        keys = companions(key, slot.stored, shape)
        for suffix in slot.stored.tensors(shape):
            entry = source.entries[keys[suffix]]
            if suffix not in together:
                dtype = file_dtype(entry.dtype)
                together[suffix] = torch.empty((len(run), *entry.shape), dtype=dtype, pin_memory=pinned)
            stretches[suffix, place] = Stretch(entry, 0, (*entry.shape, 1)[0], together[suffix][place])
    first = _expert(slot) or 0
    return _Work(run[0], (slice(first, first + len(run)), *slot.index[1:]), stretches, together)


def _one(
    key: str,
    source: TensorFiles,
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    forms: Mapping[str, Format],
    targets: Mapping[str, torch.Tensor],
    chunk: int,
) -> Iterator[_Work]:
    """A key's tensors, in parts where they are large; straight to their place where that can be."""
    slot, wanted = slots[key], forms[slots[key].name]
    shape = piece_shape(shapes[slot.name], slot.index)
    keys = companions(key, slot.stored, shape)
    entries = {suffix: source.entries[keys[suffix]] for suffix in slot.stored.tensors(shape)}
    for start, stop in _chunks(slot.stored, wanted, shape, chunk):
        index = _narrow(slot.index, shape, start, stop)
        into: dict[str, torch.Tensor] = {}
        if _alike(slot.stored, wanted, (stop - start, *shape[1:]) if shape else ()):
            into = {
                suffix: targets[tensor_name(slot.name, suffix)][where]
                for suffix, where in _place(wanted, shapes[slot.name], index).items()
                if tensor_name(slot.name, suffix) in targets
            }
        stretches = {}
        for suffix, entry in entries.items():
            rows = (start, stop) if len(entry.shape) and stop - start < shape[0] else (0, (*entry.shape, 1)[0])
            target = into.get(suffix)
            straight = target is not None and target.is_contiguous() and target.device.type == "cpu"
            stretches[suffix] = Stretch(entry, *rows, target if straight else None)
        yield _Work(key, index, stretches)


def _chunks(stored: Format, wanted: Format, shape: Shape, chunk: int) -> Iterator[tuple[int, int]]:
    """The parts, along the first dimension, that a weight is read in. A quantized matrix stays whole."""
    if not shape:
        yield 0, 1
        return
    step, both_dense = shape[0], isinstance(stored, Dense) and isinstance(wanted, Dense)
    if len(shape) > 2 or both_dense:
        # What is only sent goes in small parts, as many as there are threads that read.
        size = CHUNK if both_dense or _alike(stored, wanted, shape) else chunk
        step = max(1, size // max(stored.bytes((1, *shape[1:])), 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _narrow(index: Index, shape: Shape, start: int, stop: int) -> Index:
    """The place of rows start...stop of what goes to `index`, a place of that shape."""
    if not shape or stop - start == shape[0]:
        return index
    first = next((i for i, part in enumerate(index) if isinstance(part, slice)), None)
    if first is None:
        return (*index, slice(start, stop))
    part = index[first]
    begin = (part.start or 0) if isinstance(part, slice) else 0
    return (*index[:first], slice(begin + start, begin + stop), *index[first + 1 :])


def piece_shape(shape: Shape, index: Index) -> Shape:
    """The shape of the part of a tensor of that shape that an index chooses."""
    return tuple(torch.empty(shape, device="meta")[index].shape)


def _place(form: Format, shape: Shape, index: Index) -> dict[str, Index]:
    """As Format.place, for vectors and single numbers too."""
    return form.place(shape, index) if len(shape) > 1 else {"weight": index}


def _alike(stored: Format, wanted: Format, shape: Shape) -> bool:
    """Whether a piece of that shape has the same bytes in both forms."""
    if isinstance(stored, Dense) or isinstance(wanted, Dense):
        return stored == wanted
    return stored.name == wanted.name and stored.tensors(shape) == wanted.tensors(shape)


def _converted(
    slot: Slot,
    key: str,
    index: Index,
    forms: Mapping[str, Format],
    shapes: Mapping[str, Shape],
    tensors: dict[str, torch.Tensor],
    compute: torch.device,
) -> Piece:
    wanted, whole = forms[slot.name], shapes[slot.name]
    shape = piece_shape(whole, index)
    places = _place(wanted, whole, index)
    stored = tensors
    own = replace(wanted, part_rows=0) if isinstance(wanted, FP8Block) and shape[-2] < whole[-2] else wanted
    both_dense = isinstance(slot.stored, Dense) and isinstance(own, Dense)  # copying it will cast it
    if not both_dense and not _alike(slot.stored, own, shape):
        if holds(compute, slot.stored):
            tensors = {suffix: tensor.to(compute, non_blocking=True) for suffix, tensor in tensors.items()}
        dense = tensors["weight"]
        if not isinstance(slot.stored, Dense):
            dtype = wanted.dtype if isinstance(wanted, Dense) else torch.float32
            dense = slot.stored.dequantize(tensors, shape[-1], dtype)
        stored = own.quantize(dense, key)
    return Piece(
        slot.name,
        index,
        shape,
        key,
        own,
        {suffix: (places[suffix], tensor) for suffix, tensor in stored.items()},
        (slot.stored, tensors),
    )


def _allocate(
    module: nn.Module, forms: Mapping[str, Format], device: torch.device, taken: Mapping[str, dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Give every parameter and buffer its memory, or the mapped tensor; returns the tensors by name."""
    targets = {}
    for name, form in forms.items():
        path, _, leaf = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        suffixes = ["weight"] if isinstance(form, Dense) else list(owner.form.tensors(owner.shape))
        for suffix in suffixes:
            own = leaf if suffix == "weight" else suffix
            old = getattr(owner, own)
            new = taken.get(name, {}).get(suffix)
            if new is None:
                new = torch.empty(old.shape, dtype=form.dtype if isinstance(form, Dense) else old.dtype, device=device)
            if isinstance(old, nn.Parameter):
                setattr(owner, own, nn.Parameter(new, requires_grad=False))
            else:
                owner.register_buffer(own, new)
            targets[tensor_name(name, suffix)] = new
    return targets


def _take(
    source: TensorFiles,
    slots: Mapping[str, Slot],
    shapes: Mapping[str, Shape],
    forms: Mapping[str, Format],
    mapped: Mapped,
) -> dict[str, dict[str, torch.Tensor]]:
    """Name -> mapped tensors by suffix, for weights that one file holds whole and as they are wanted."""
    files: dict[Path, Mapping[str, torch.Tensor]] = {}
    taken: dict[str, dict[str, torch.Tensor]] = {}
    for key, slot in slots.items():
        shape = shapes[slot.name]
        if piece_shape(shape, slot.index) != tuple(shape) or not _alike(slot.stored, forms[slot.name], shape):
            continue
        path = source.entries[key].file
        if path not in files:
            files[path] = mapped(path)
        keys = companions(key, slot.stored, shape)
        found = {}
        for suffix in slot.stored.tensors(shape):
            tensor = files[path].get(keys[suffix])
            if tensor is None or tuple(tensor.shape) != source.entries[keys[suffix]].shape:
                raise CheckpointError(path.name, f"another {keys[suffix]}", "the file that was opened", DOWNLOAD)
            found[suffix] = tensor
        taken[slot.name] = found
    return taken
