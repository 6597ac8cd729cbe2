"""From a released checkpoint folder to one of fewer bits: streaming, resumable, checked at the end.

Everything is written into a folder beside the target, a safetensors file at a time, and that folder gets the target's
name when all of it is there and has been read back.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from ..backbone.config import BackboneConfig
from ..checkpoint.component import Component
from ..checkpoint.layout import INDEX, QUANTIZATION, QUANTIZATION_VERSION, Layout
from ..checkpoint.loading import pieces, tensor_name
from ..checkpoint.weights import read_json
from ..errors import CheckpointError, InputError
from ..quantization.formats import METADATA_SUFFIX, describe
from ..whole_file import PARTIAL
from .card import card
from .check import check_samples, check_tensors, squared_norm
from .options import PARTS, Conversion
from .parts import NewFile, Weight, new_files, open_parts
from .record import RECORD, Record
from .shards import ShardWriter, write_text

LINKED = 2**20  # bytes from which files that stay as they are become hard links, where the file system lets them
_ROOT_FILES = (".json", ".txt", ".jinja", ".model")  # of the tokenizer and the like; never programs

# (share of the work that is done, what is being done)
OnProgress = Callable[[float, str], None]


def convert(
    source: Path,
    target: Path,
    conversion: Conversion,
    device: torch.device | str = "cpu",
    link: bool = True,
    on_progress: OnProgress = lambda share, what: None,
) -> Record:
    """Write a checkpoint folder of fewer bits.

    Args:
        source: the bf16 or FP8 release, or some parts of it.
        target: the new folder, which must not be there yet.
        conversion: what becomes of the parts.
        device: where weights are quantized.
        link: whether large files that stay as they are become hard links instead of copies, where that is possible.
        on_progress: called some times a second; an exception from it ends the conversion, which the same call resumes.

    Returns:
        What was done.

    Raises:
        CheckpointError: a source that cannot be opened, or is quantized already; a target that is there; a full disk;
            a file that does not read back as it was written.
        InputError: a target that is the source or inside it; another conversion's remains beside the target.
    """
    source, target = Path(source), Path(target)
    _check_folders(source, target)
    layout = Layout.open(source)
    settings = read_json("backbone", source / "config.json")
    if QUANTIZATION in settings:
        remedy = "Quantizing twice adds both errors: convert the checkpoint that this one was made from."
        raise CheckpointError("source", f"{source.name}, which was converted already", "a released checkpoint", remedy)
    parts = open_parts(layout, BackboneConfig.from_dict(settings))
    files = [
        file
        for part, component in parts.items()
        if conversion.wants(part) and (part == "backbone" or conversion.form(part) is not None)
        for file in new_files(part, component, conversion.form(part))
    ]
    work = target.with_name(target.name + PARTIAL)
    with _room_on_disk(work):
        record = Record.begin(work, layout, conversion)
        kept = _kept_files(layout, conversion, {file.part for file in files})
        _check_room(work, record, files, [source / path for path in kept], link)
        for path in kept:
            record.took(path, _take(source / path, work / path, link))
        numbers = sum(_numbers(weight) for file in files for weight in file.weights)
        done = _Progress(on_progress, numbers * 5 // 4)  # the last fifth is reading back
        _write_all(files, parts, work, record, torch.device(device), done)
        _write_index(work, files)
        check_tensors(work, record, lambda share: done.rest(share, "reading back"))
        new_settings = _settings(settings, conversion, {file.part for file in files})
        new_parts = open_parts(Layout.look(work), BackboneConfig.from_dict(new_settings))
        check_samples(parts, new_parts, files, record, device)
        write_text(work / "README.md", card(source.name, target.name, conversion, layout, parts, files, record))
        record.save()
        write_text(work / "config.json", json.dumps(new_settings, indent=2) + "\n")
        if target.is_dir():
            target.rmdir()  # empty, as _check_folders has seen
        os.replace(work, target)
    on_progress(1.0, "done")
    return record


def _check_folders(source: Path, target: Path) -> None:
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        same = source.exists() and target.exists() and os.path.samefile(source, target)
        if same:
            remedy = "Choose a folder of its own; the source is never changed."
            raise InputError("target", f"{target.name}, which is the source", "another folder", remedy)
        remedy = "Delete it, or choose another name; nothing is written into a folder that is there."
        raise InputError("target", f"{target.name}, which is there already", "a folder that is not there yet", remedy)
    real_source, real_target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if real_source == real_target or real_source in real_target.parents:
        remedy = "Choose a folder of its own; the source is never changed."
        raise InputError("target", f"{target.name} inside the source", "a folder outside it", remedy)


def _write_all(
    files: list[NewFile],
    parts: Mapping[str, Component],
    work: Path,
    record: Record,
    device: torch.device,
    done: "_Progress",
) -> None:
    """Write the files that are not there yet; with a GPU some at once, as it waits for what a file's writing takes."""

    def write(file: NewFile) -> None:
        if record.has(file.path):
            done.add(sum(_numbers(weight) for weight in file.weights), file.path.name)
        else:
            _write(file, parts[file.part].source, work, record, device, done)

    at_once = files_at_once(device)
    if at_once == 1:
        for file in files:
            write(file)
        return
    with ThreadPoolExecutor(at_once, thread_name_prefix="convert") as threads:
        writing = [threads.submit(write, file) for file in files]
        try:
            while wait(writing, timeout=0.5, return_when=FIRST_EXCEPTION).not_done:  # Windows interrupts no longer wait
                for file_written in writing:
                    if file_written.done():
                        file_written.result()
            for file_written in writing:
                file_written.result()
        except BaseException:
            done.stop()
            threads.shutdown(cancel_futures=True)
            raise


def files_at_once(device: torch.device) -> int:
    """How many files are written at once where weights are quantized on that device."""
    return 3 if device.type == "cuda" else 1


def _write(file: NewFile, source, work: Path, record: Record, device: torch.device, done: "_Progress") -> None:
    """Write a safetensors file and note it."""
    path = work / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value for weight in file.weights for key, value in weight.tensors.items()}
    errors: dict[str, tuple[float, float]] = {}
    with ShardWriter(path, tensors) as writer:
        for weight in file.weights:
            stored = {
                suffix: torch.empty(shape, dtype=dtype)
                for suffix, (shape, dtype) in weight.form.tensors(weight.shape).items()
            }
            targets = {tensor_name(weight.name, suffix): tensor for suffix, tensor in stored.items()}
            lost = whole = 0.0
            for piece in pieces(
                source, weight.slots, {weight.name: weight.shape}, {weight.name: weight.form}, device, targets
            ):
                for suffix, (index, tensor) in piece.stored.items():
                    place = stored[suffix][index]
                    if place.data_ptr() != tensor.data_ptr():
                        place.copy_(tensor)
                if type(piece.form) is not type(piece.source[0]):
                    before, after = piece.dense()
                    lost += squared_norm(after - before)
                    whole += squared_norm(before)
                done.add(torch.Size(piece.shape).numel(), f"{file.part} {weight.name}")
            if whole:
                errors[weight.name] = (lost, whole)
            if weight.metadata is not None:
                stored[METADATA_SUFFIX] = weight.metadata
            for suffix, tensor in stored.items():
                writer.write(weight.keys[suffix], tensor)
    record.wrote(file, path.stat().st_size, writer.checksums, errors)


def _kept_files(layout: Layout, conversion: Conversion, written: set[str]) -> list[Path]:
    """Files that the new folder has as they are, relative to it."""
    kept = [
        path.relative_to(layout.root)
        for path in sorted(layout.root.iterdir())
        if path.is_file()
        and (path.suffix in _ROOT_FILES or path.name.startswith("LICENSE"))
        and path.name not in ("config.json", INDEX, RECORD)
    ]
    for part in PARTS[1:]:
        if conversion.wants(part) and layout.has(part):
            kept += [
                path for path in layout.part_files(part) if part not in written or path.suffix not in (".safetensors",)
            ]
    return kept


def _take(source: Path, target: Path, link: bool) -> str:
    """Link or copy a file; returns which. One that is there already was finished."""
    if target.exists():
        return "linked" if os.path.samefile(os.path.realpath(source), target) else "copied"
    target.parent.mkdir(parents=True, exist_ok=True)
    real = os.path.realpath(source)  # a download cache holds links
    if link and os.path.getsize(real) >= LINKED:
        try:
            os.link(real, target)
            return "linked"
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
    partial = target.with_name(target.name + PARTIAL)
    try:
        shutil.copyfile(real, partial)
        os.replace(partial, target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return "copied"


def _check_room(work: Path, record: Record, files: list[NewFile], kept: list[Path], link: bool) -> None:
    """Raise CheckpointError where the disk has not room for what is still to be written."""
    needed = sum(_bytes(weight) for file in files if not record.has(file.path) for weight in file.weights)
    same = link and kept and os.stat(work).st_dev == os.stat(kept[0]).st_dev
    needed += sum(path.stat().st_size for path in kept if not same or path.stat().st_size < LINKED)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise _full_disk(work, f"{free / 1e9:.3g} GB free", f"{needed / 1e9:.3g} GB")


@contextmanager
def _room_on_disk(work: Path):
    """Turns a disk that fills up while it is written to into a CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise
        raise _full_disk(work, "a full disk", "room for the rest") from error


def _full_disk(work: Path, found: str, expected: str) -> CheckpointError:
    remedy = f"Free some space and run the same command: it goes on where it stopped, in {work.name}."
    return CheckpointError("target", found, expected, remedy)


def _write_index(work: Path, files: list[NewFile]) -> None:
    listed = {
        key: file.path.name for file in files if file.part == "backbone" for w in file.weights for key in w.tensors
    }
    total = sum(_bytes(weight) for file in files if file.part == "backbone" for weight in file.weights)
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    write_text(work / INDEX, json.dumps(index, indent=1) + "\n")


def _settings(settings: dict, conversion: Conversion, parts: set[str]) -> dict:
    """The new folder's config.json."""
    forms = {part: describe(form) for part in sorted(parts) if (form := conversion.form(part)) is not None}
    kept = dict(settings)
    if conversion.backbone not in ("fp8", "keep"):
        kept.pop("quantization_config", None)  # what the FP8 release says of itself
    return kept | {QUANTIZATION: {"version": QUANTIZATION_VERSION, "parts": forms}}


def _numbers(weight: Weight) -> int:
    return torch.Size(weight.shape).numel()


def _bytes(weight: Weight) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in weight.tensors.values())


class _Progress:
    """Shares of the work: numbers converted, then what is left for reading back. Threads take turns."""

    def __init__(self, on_progress: OnProgress, total: int):
        self._report, self._total, self._done = on_progress, max(total, 1), 0
        self._turn, self._stopped = threading.Lock(), False

    def add(self, count: int, what: str) -> None:
        with self._turn:
            if self._stopped:
                raise CancelledError("another file could not be written")
            self._done += count
            self._report(self._done / self._total, what)

    def stop(self) -> None:
        """End whoever reports next."""
        self._stopped = True

    def rest(self, share: float, what: str) -> None:
        self._report((self._done + (self._total - self._done) * share) / self._total, what)
