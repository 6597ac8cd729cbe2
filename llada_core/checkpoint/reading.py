"""Bytes of files into tensors: several threads, straight to where the numbers are wanted.

A thread reads a stretch of a file into memory that is already there. Nothing is mapped, so no page of a file counts as
memory of the process, and a read waits outside Python's lock. What has to be converted, or goes to another device, is
read into a buffer of a few megabytes first; a GPU copies from such a buffer by itself while the next ones are filled.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .weights import DOWNLOAD, Entry, file_dtype

THREADS = 8  # that a page cache or an SSD answers at once; more gain nothing
AHEAD = 64 * 2**20  # bytes of buffers that are filled and not yet used


@dataclass(frozen=True)
class Stretch:
    """Rows of a file tensor: those from `start` to `stop` along its first dimension.

    Attributes:
        entry: the tensor.
        start, stop: 0 and 1 where the tensor has no dimensions.
        into: where to read them, of their shape and the file's type, contiguous and on the CPU; None for a buffer.
    """

    entry: Entry
    start: int
    stop: int
    into: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows."""
        return (self.stop - self.start, *self.entry.shape[1:]) if self.entry.shape else ()

    @property
    def nbytes(self) -> int:
        """Of the rows."""
        return torch.Size(self.shape).numel() * file_dtype(self.entry.dtype).itemsize


Tag = TypeVar("Tag")


def read(
    works: Iterable[tuple[Tag, Mapping[str, Stretch]]], pinned: bool = False
) -> Iterator[tuple[Tag, dict[str, torch.Tensor]]]:
    """Read stretches of files, ahead of their use and in their order.

    Args:
        works: (whatever the caller wants back, stretches by name); asked for as the reading goes on.
        pinned: whether buffers are memory that a GPU reads by itself. Such a buffer is used again only when copies
            from it that were asked for have ended; torch's allocator sees to that.

    Yields:
        The first half of each work, and its tensors: `into` where that was given.

    Raises:
        CheckpointError: a file that has gone, or become shorter, since it was opened.
    """
    pending: deque[tuple[Tag, list[tuple[str, torch.Tensor]], list[Future], int]] = deque()
    waiting = 0
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="read weights") as threads:
        try:
            for tag, stretches in works:
                tensors, futures, size = [], [], 0
                for name, stretch in stretches.items():
                    tensor = stretch.into
                    if tensor is None:
                        tensor = torch.empty(stretch.shape, dtype=file_dtype(stretch.entry.dtype), pin_memory=pinned)
                    size += stretch.nbytes
                    tensors.append((name, tensor))
                    futures.append(threads.submit(_read, stretch, tensor))
                pending.append((tag, tensors, futures, size))
                waiting += size
                while pending and waiting > AHEAD:
                    waiting -= pending[0][3]
                    yield _finished(*pending.popleft())
            while pending:
                yield _finished(*pending.popleft())
        finally:
            for _, _, futures, _ in pending:
                for future in futures:
                    future.cancel()


def map_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file as slices of a map of it: pages that all processes share, read when used.

    Raises:
        CheckpointError: a file that cannot be read any more.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        found = f"a file that cannot be read any more ({error})"
        raise CheckpointError(path.name, found, "the file that was opened", DOWNLOAD) from error


def _finished(
    tag: Tag, tensors: list[tuple[str, torch.Tensor]], futures: list[Future], size: int
) -> tuple[Tag, dict[str, torch.Tensor]]:
    for future in futures:
        future.result()
    return tag, dict(tensors)


def _read(stretch: Stretch, tensor: torch.Tensor) -> None:
    """Fill a tensor from its place in the file."""
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    entry = stretch.entry
    row = stretch.nbytes // max(stretch.stop - stretch.start, 1)
    done = 0
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.offset + stretch.start * row)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    break
                done += count
    except OSError as error:
        found = f"a file that cannot be read any more ({error})"
        raise CheckpointError(entry.file.name, found, "the file that was opened", DOWNLOAD) from error
    if done < len(view):
        found = f"a file that ends {len(view) - done} bytes too early"
        raise CheckpointError(entry.file.name, found, "the file that was opened", DOWNLOAD)
