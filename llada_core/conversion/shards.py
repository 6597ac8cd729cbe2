"""Safetensors files written a tensor at a time, and never half of one under its name."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..checkpoint.weights import FILE_DTYPES
from ..whole_file import PARTIAL, whole_file

PAGE = 4096  # bytes: what begins on one can be mapped, and read past the page cache
_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}


class ShardWriter:
    """One safetensors file. Within its context tensors are written in any order; it gets its name when it ends well.

    Args:
        path: the file; what is being written is beside it, with another ending.
        tensors: key -> shape and type, of all that will be written.

    Attributes:
        checksums: key -> CRC-32 of the tensor's bytes, of what has been written.

    Raises:
        OSError: a full disk, among others. What was written of the file is removed then.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]):
        self.path, self.checksums = path, dict[str, int]()
        self._partial = path.with_name(path.name + PARTIAL)
        sizes = {key: torch.Size(shape).numel() * dtype.itemsize for key, (shape, dtype) in tensors.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        self._end = 0
        # What fills whole pages comes first, then what is aligned to less: so all is aligned, without gaps, which
        # the format forbids.
        for key in sorted(tensors, key=lambda key: (-min(sizes[key] & -sizes[key], PAGE), -sizes[key], key)):
            shape, dtype = tensors[key]
            self._offsets[key] = self._end
            self._end += sizes[key]
            header[key] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [self._offsets[key], self._end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % PAGE)
        self._head = len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self._head) + self._end

    def __enter__(self) -> "ShardWriter":
        self._file = open(self._partial, "wb", buffering=0)
        try:
            self._put(0, self._head)
        except OSError:
            self._drop()
            raise
        return self

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write one of the tensors, of its shape and type."""
        data = bytes_of(tensor)
        self._put(len(self._head) + self._offsets[key], data)
        self.checksums[key] = zlib.crc32(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._drop()
            return
        absent = sorted(set(self._offsets) - set(self.checksums))
        if absent:
            self._drop()
            raise RuntimeError(f"{self.path.name}: {absent[0]} was never written")
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
        except OSError:
            self._drop()
            raise

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        self._file.seek(offset)
        view, done = memoryview(data), 0
        while done < len(view):
            done += self._file.write(view[done:])

    def _drop(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    numbers: Any = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def write_text(path: Path, text: str) -> None:
    """Write a small file, never half of it under its name."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
