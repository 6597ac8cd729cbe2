"""What a conversion has written, read back."""

import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..checkpoint.component import Component
from ..checkpoint.loading import pieces
from ..checkpoint.reading import Stretch, read
from ..checkpoint.weights import Entry, TensorFiles
from ..errors import CheckpointError
from ..quantization.formats import Dense
from .parts import NewFile, Weight, kind
from .record import Record
from .shards import bytes_of

CHUNK = 16 * 2**20  # bytes read at a time
AT_ONCE = 4  # files
REMEDY = "The disk or its driver may be at fault. Delete the unfinished folder and convert again."


def check_tensors(folder: Path, record: Record, on_share: Callable[[float], None]) -> None:
    """Read every written tensor and compare it with what was written. Raises CheckpointError where one differs."""
    total = max(sum(noted["bytes"] for noted in record.files.values()), 1)
    done, turn = 0, threading.Lock()

    def check(path: str) -> None:
        nonlocal done
        noted = record.files[path]
        entries = TensorFiles(noted["part"], [folder / path]).entries
        found = dict.fromkeys(entries, 0)
        for key, tensors in read(_works(entries)):
            found[key] = zlib.crc32(bytes_of(tensors["rows"]), found[key])
            with turn:
                done += tensors["rows"].nbytes
                on_share(done / total)
        wrong = [key for key, value in noted["crc32"].items() if found.get(key) != value]
        if wrong or found.keys() != noted["crc32"].keys():
            name = (wrong or sorted(found.keys() ^ noted["crc32"].keys()))[0]
            label = f"{noted['part']}: {path}"
            raise CheckpointError(label, f"{name} other than it was written", "the same bytes", REMEDY)

    # A checksum takes longer than the reading, and computes outside Python's lock.
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1), thread_name_prefix="check") as threads:
        checks = [threads.submit(check, path) for path in record.files]
        try:
            for one in checks:
                one.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def check_samples(
    old: Mapping[str, Component],
    new: Mapping[str, Component],
    files: list[NewFile],
    record: Record,
    device: torch.device | str = "cpu",
) -> None:
    """Compare some weights of the new folder with the old one's, as the engine reads both. `device` computes.

    They are those of every kind at the beginning, in the middle and at the end of each part. Raises CheckpointError
    where one is further off than it was when it was written.
    """
    errors = record.errors()
    for part in {file.part: None for file in files}:
        kinds: dict[str, list[Weight]] = {}
        for weight in (weight for file in files if file.part == part for weight in file.weights):
            kinds.setdefault(kind(weight.name), []).append(weight)
        for weights in kinds.values():
            for weight in {w.name: w for w in (weights[0], weights[len(weights) // 2], weights[-1])}.values():
                lost, whole = errors.get((part, weight.name), (0.0, 1.0))
                allowed = 2 * math.sqrt(lost / whole) + 1e-6
                found = _difference(weight, old[part], new[part], torch.device(device))
                if not found <= allowed:
                    what = f"{weight.name} with a relative error of {found:.3g}"
                    raise CheckpointError(part, what, f"at most {allowed:.3g}", REMEDY)


def _difference(weight: Weight, old: Component, new: Component, device: torch.device) -> float:
    """The relative difference of the first few megabytes of a weight in two folders."""
    dense = Dense(torch.float32)
    shapes, forms = {weight.name: weight.shape}, {weight.name: dense}
    key = next(key for key, slot in new.slots.items() if slot.name == weight.name)
    lost = whole = 0.0
    first = next(iter(pieces(new.source, {key: new.slots[key]}, shapes, forms, device)))
    now = first.dense()[1]
    rows = _rows(first.index, weight.shape)
    for piece in pieces(old.source, _inside(weight, rows), shapes, forms, device):
        before, place = piece.dense()[1], piece.index
        begin, end = _rows(place, weight.shape)
        shared = range(max(begin, rows[0]), min(end, rows[1]))
        if not shared:
            continue
        mine = before if not place or not isinstance(place[0], int) else before[None]
        a = mine[shared.start - begin : shared.stop - begin]
        rest = (slice(None), *place[1:])
        b = now[shared.start - rows[0] : shared.stop - rows[0]][rest]
        lost += squared_norm(a - b)
        whole += squared_norm(a)
    return math.sqrt(lost / whole) if whole else math.sqrt(lost)


def squared_norm(x: torch.Tensor) -> float:
    """The sum of squares of float32 x [..., n], rows in float32: converting each number takes longer than the sum."""
    return float(x.square().sum(-1).sum(dtype=torch.float64))


def _inside(weight: Weight, rows: tuple[int, int]) -> dict:
    """The old keys that have a part of those rows (or experts)."""
    return {
        key: slot
        for key, slot in weight.slots.items()
        if (span := _rows(slot.index, weight.shape))[0] < rows[1] and span[1] > rows[0]
    }


def _rows(index: tuple, shape: tuple[int, ...]) -> tuple[int, int]:
    """First and one behind the last position along the first dimension that an index reaches."""
    if not index or not shape:
        return 0, (*shape, 1)[0]
    if isinstance(index[0], int):
        return index[0], index[0] + 1
    start, stop, _ = index[0].indices(shape[0])
    return start, stop


def _works(entries: Mapping[str, Entry]) -> Iterator[tuple[str, dict[str, Stretch]]]:
    for key, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        count = (*entry.shape, 1)[0]
        row = max(Stretch(entry, 0, 1).nbytes, 1)
        step = max(1, CHUNK // row)
        for start in range(0, max(count, 1), step):
            yield key, {"rows": Stretch(entry, start, min(start + step, count))}
