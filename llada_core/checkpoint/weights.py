"""What tensors a checkpoint's files hold, by their headers, and where each goes in a module."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError
from ..quantization.formats import (
    METADATA_SUFFIX,
    Dense,
    Format,
    FP8Block,
    decode_metadata,
    format_of,
)
from .bounds import check_archive, check_held, check_json_size, check_sizes, parse_json

DOWNLOAD = "Download the file again."
_OTHER = "Use the bf16 or FP8 release, or a folder that was converted from one; other quantizations are not read."
METADATA_BYTES = 4096  # far more than any format's
# What a file may hold beside a quantized weight, by the last part of its key.
BESIDE = ("weight_scale_inv", "weight_scale", "weight_zeros", METADATA_SUFFIX)

# The names that the files give to types.
FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what its header says.

    Attributes:
        file: the file.
        shape: of the tensor.
        dtype: as the file names it.
        offset: bytes from the beginning of the file to the tensor's first number.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: parameter or buffer `name`, at `index` of it (all of it where index is empty).

    `form` is how the file stores it; `plan` says so.
    """

    name: str
    index: tuple[int | slice, ...] = ()
    form: Format | None = None

    @property
    def stored(self) -> Format:
        """`form`, of a slot that `plan` made. Raises ValueError for another."""
        if self.form is None:
            raise ValueError(f"nothing has said how {self.name} is stored")
        return self.form


class TensorFiles:
    """The tensors of one or several safetensors files, by key, with headers read and no data.

    Args:
        label: the part, as errors name it ("backbone").
        files: the shards.
        expected: key -> file name, as an index lists it; every listed key must be there.

    Attributes:
        entries: every tensor by its key.
        metadata: what `comfy_quant` says beside a quantized weight, by its key: the only data that is read here.

    Raises:
        CheckpointError: a file that is missing, truncated or no safetensors, or a listed key that is absent.
    """

    def __init__(self, label: str, files: Iterable[Path], expected: Mapping[str, str] | None = None):
        self.label = label
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, object]] = {}
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{label}: {path.name}", "no such file", "a safetensors file", DOWNLOAD)
            try:
                self._open(path)
            except (SafetensorError, OSError) as error:
                found = f"an unreadable file of {path.stat().st_size} bytes ({error})"
                raise CheckpointError(f"{label}: {path.name}", found, "a whole safetensors file", DOWNLOAD) from error
        absent = sorted(set(expected or ()) - set(self.entries))
        if absent:
            found = f"no {absent[0]} ({len(absent)} listed tensors absent)"
            raise CheckpointError(
                f"{label}: {(expected or {})[absent[0]]}", found, "every tensor of the index", DOWNLOAD
            )

    def _open(self, path: Path) -> None:
        # The library checks the header and the file's length; its own answers say nothing of offsets.
        with safe_open(str(path), framework="pt") as file, open(path, "rb") as raw:
            begin = 8 + int.from_bytes(raw.read(8), "little")
            for key, value in json.loads(raw.read(begin - 8)).items():
                if key != "__metadata__":
                    offset = begin + value["data_offsets"][0]
                    self.entries[key] = Entry(path, tuple(value["shape"]), value["dtype"], offset)
                    if key.endswith(f".{METADATA_SUFFIX}"):
                        self.metadata[key] = self._metadata(file, path, key)

    def _metadata(self, file, path: Path, key: str) -> dict[str, object]:
        label = f"{self.label}: {path.name}: {key}"
        shape = self.entries[key].shape
        if entry_numel(shape) > METADATA_BYTES:
            found = f"metadata of shape {list(shape)}"
            raise CheckpointError(label, found, f"at most {METADATA_BYTES} bytes of JSON", DOWNLOAD)
        return decode_metadata(file.get_tensor(key), label)


class PickledTensors:
    """The tensors of one `.pt` file, with the interface of TensorFiles. Nothing but tensors is ever unpickled.

    The file is mapped while it is looked at and while it is read, never in between: Windows lets nobody replace a
    mapped file.
    """

    def __init__(self, label: str, path: Path):
        self.label, self._path = label, path
        self.metadata: dict[str, dict[str, object]] = {}
        self.entries = {key: Entry(path, tuple(t.shape), str(t.dtype)) for key, t in self._mapped().items()}

    def _mapped(self) -> dict[str, torch.Tensor]:
        """All tensors, on a map that closes with the last of them."""
        label, path, expected = self.label, self._path, "a dictionary of tensors"
        if not path.is_file():
            raise CheckpointError(f"{label}: {path.name}", "no such file", expected, DOWNLOAD)
        try:
            check_archive(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(tensors, dict) and all(isinstance(t, torch.Tensor) for t in tensors.values()):
                check_held(tensors, path)
        except Exception as error:  # a damaged file makes the unpickler fail in any way there is
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            found = f"a file that cannot be read as tensors alone ({reason})"
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


def plan(
    module: nn.Module,
    source: TensorFiles | PickledTensors,
    place: Place,
    quantizable: Mapping[str, int] | None = None,
) -> dict[str, Slot]:
    """Match a file's tensors with a module's, by headers alone.

    Args:
        module: the component, on any device, its weights dense; only its names and shapes are read.
        source: the files.
        place: key -> where it goes; None for a key that belongs to another module. A key that goes nowhere must be
            given a Slot with a name that the module lacks, and is reported as unknown.
        quantizable: as `Component.quantizable`.

    Returns:
        key -> Slot, with its form, for every weight to be read; scales and the like are read with their weights.

    Raises:
        CheckpointError: an unknown key, another shape, an absent tensor, a quantized weight of an unknown form, or
            without its scales.
    """
    targets = dict(module.state_dict(keep_vars=True))
    slots: dict[str, Slot] = {}
    filled: dict[str, int] = dict.fromkeys(targets, 0)
    beside: set[str] = set()  # scales and the like that a weight's form asks for
    for key, entry in source.entries.items():
        slot = place(weight_of(key, source.entries))
        if slot is None:
            continue
        label = f"{source.label}: {entry.file.name}"
        target = targets.get(slot.name)
        if target is None or any(isinstance(i, int) and i >= n for i, n in zip(slot.index, target.shape, strict=False)):
            raise _unknown(label, key)
        if _suffix(key) in BESIDE:
            continue
        shape = tuple(target[slot.index].shape)
        # A piece of a bank is one released weight; a whole bank is several.
        parts = (quantizable or {}).get(slot.name, 0) if shape == tuple(target.shape) else 0
        form = stored_form(source, key, parts)
        if isinstance(form, Dense):
            _check_dense(label, key, entry, shape, form.dtype, target.dtype)
        else:
            form.check(_stored(source, key), shape, f"{label}: {key}")
        beside |= set(companions(key, form, shape).values())
        filled[slot.name] += entry_numel(shape)
        slots[key] = replace(slot, form=form)
    for key, entry in source.entries.items():
        if _suffix(key) in BESIDE and key not in beside and place(weight_of(key, source.entries)) is not None:
            raise _unknown(f"{source.label}: {entry.file.name}", key)
    absent = [name for name, tensor in targets.items() if filled[name] != tensor.numel()]
    if absent:
        found = f"no complete {absent[0]} ({len(absent)} tensors absent)"
        remedy = "Download the checkpoint again; a shard may be missing."
        raise CheckpointError(source.label, found, "every tensor of this component", remedy)
    return slots


def companions(key: str, form: Format, shape: tuple[int, ...]) -> dict[str, str]:
    """Suffix -> key of all that a file has of a weight of that form and dense shape; "weight" is the weight itself."""
    stem = key.removesuffix(".weight")
    keys = {suffix: f"{stem}.{suffix}" for suffix in form.tensors(shape)} | {"weight": key}
    return keys if form.metadata(shape) is None else keys | {METADATA_SUFFIX: f"{stem}.{METADATA_SUFFIX}"}


def stored_form(source: TensorFiles | PickledTensors, key: str, part_rows: int = 0) -> Format:
    """How a file stores a weight. Raises CheckpointError for a type or a form that is not read.

    Args:
        part_rows: as in `FP8Block`.
    """
    entry = source.entries[key]
    label = f"{source.label}: {entry.file.name}"
    metadata = source.metadata.get(f"{key.removesuffix('.weight')}.{METADATA_SUFFIX}")
    if metadata is not None:
        form = format_of(metadata, f"{label}: {key}")
    elif entry.dtype == "F8_E4M3":
        form = FP8Block(part_rows)
    else:
        dtype = file_dtype(entry.dtype, label)
        if dtype in (torch.int8, torch.uint8):
            expected = f"the {METADATA_SUFFIX} that says what its numbers mean"
            raise CheckpointError(label, f"{key} of type {entry.dtype} alone", expected, _OTHER)
        return Dense(dtype)
    if len(entry.shape) < 2:
        expected = "a matrix, or a bank of them"
        raise CheckpointError(label, f"{key} of shape {list(entry.shape)} as {form.name}", expected, _OTHER)
    return form


def file_dtype(name: str, label: str = "checkpoint") -> torch.dtype:
    """The type of a tensor in its file. Raises CheckpointError for one that is not read at all."""
    if name.startswith("torch."):
        return getattr(torch, name.removeprefix("torch."))
    if name not in FILE_DTYPES:
        raise CheckpointError(label, f"tensors of type {name}", ", ".join(FILE_DTYPES), _OTHER)
    return FILE_DTYPES[name]


def entry_numel(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return torch.Size(shape).numel()


def _suffix(key: str) -> str:
    return key.rpartition(".")[2]


def weight_of(key: str, entries: Mapping[str, Entry]) -> str:
    """The key of the weight that a scale or the like belongs to; any other key is its own."""
    stem, _, suffix = key.rpartition(".")
    if suffix not in BESIDE:
        return key
    return stem if f"{stem}.weight" not in entries and stem in entries else f"{stem}.weight"


def _stored(source: TensorFiles | PickledTensors, key: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix -> shape and type of what the file has of a weight."""
    stem = key.removesuffix(".weight")
    keys = {"weight": key} | {suffix: f"{stem}.{suffix}" for suffix in BESIDE if suffix != METADATA_SUFFIX}
    found = {suffix: source.entries[name] for suffix, name in keys.items() if name in source.entries}
    return {suffix: (entry.shape, file_dtype(entry.dtype, source.label)) for suffix, entry in found.items()}


def _check_dense(
    label: str, key: str, entry: Entry, shape: tuple[int, ...], found: torch.dtype, wanted: torch.dtype
) -> None:
    if entry.shape != shape:
        remedy = "The file and config.json belong to different models, or the file is damaged; download both again."
        raise CheckpointError(label, f"{key} of shape {list(entry.shape)}", f"shape {list(shape)}", remedy)
    if found.is_floating_point != wanted.is_floating_point:
        raise CheckpointError(label, f"{key} of type {entry.dtype}", f"a type like {wanted}", _OTHER)


def _unknown(label: str, key: str) -> CheckpointError:
    remedy = "This file belongs to another model or release; download the checkpoint's own."
    return CheckpointError(label, f"the unknown tensor {key}", "only tensors of this component", remedy)


def read_json(label: str, path: Path) -> dict:
    """A JSON file's object. Raises CheckpointError where it is missing, unreadable or no object."""
    try:
        check_json_size(label, path)
        value = parse_json(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{label}: {path.name}", "no such file", "a JSON file", DOWNLOAD) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{label}: {path.name}", f"unreadable JSON ({error})", "a JSON object", DOWNLOAD
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: {path.name}", type(value).__name__, "a JSON object", DOWNLOAD)
    try:
        check_sizes(label, path.name, value)
    except RecursionError as error:
        raise CheckpointError(f"{label}: {path.name}", "JSON nested too deeply", "a JSON object", DOWNLOAD) from error
    return value


def need(label: str, config: Mapping, *names: str) -> list:
    """The values of required fields of a configuration. Raises CheckpointError naming the first absent one."""
    for name in names:
        if config.get(name) is None:
            found = f"no field {name}"
            raise CheckpointError(f"{label}: config.json", found, f"a value for {name}", "Download config.json again.")
    return [config[name] for name in names]
