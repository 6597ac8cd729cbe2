"""What a conversion has done so far, in a file of its folder: it resumes from it, and the folder keeps it."""

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.layout import Layout
from ..checkpoint.weights import read_json
from ..errors import InputError
from ..whole_file import PARTIAL
from .options import Conversion
from .parts import NewFile
from .shards import write_text

RECORD = "conversion.json"
VERSION = 1


@dataclass
class Record:
    """A conversion's files, and what they cost.

    Attributes:
        folder: where it is being written.
        conversion: the choices, as JSON holds them.
        source: name, size and time of every file that it reads.
        files: path -> bytes, part, CRC-32 of every tensor by key, and by weight the squared error and the squared
            weight, of what was written.
        kept: path -> "linked" or "copied", of what stayed as it was.
    """

    folder: Path
    conversion: dict[str, object]
    source: list[str]
    files: dict[str, dict] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def begin(cls, folder: Path, layout: Layout, conversion: Conversion) -> "Record":
        """Begin in a folder that is not there yet, or go on in one that the same conversion left.

        Raises InputError for a folder that something else left.
        """
        stats = [(path, path.stat()) for path in layout.files(layout.root)]
        source = [f"{p.relative_to(layout.root).as_posix()} {s.st_size} {s.st_mtime_ns}" for p, s in stats]
        new = cls(folder, json.loads(json.dumps(conversion.as_dict())), source)
        if not os.path.lexists(folder):
            folder.mkdir(parents=True)
            new.save()
            return new
        remedy = "Delete that folder, or choose another target."
        if not (folder / RECORD).is_file():
            found = f"{folder.name}, which no conversion left"
            raise InputError("target", found, "no such folder", remedy)
        old = read_json("target", folder / RECORD)
        if (old.get("version"), old.get("conversion"), old.get("source")) != (VERSION, new.conversion, new.source):
            found = f"{folder.name} of a conversion with other choices, or of another source"
            raise InputError("target", found, "one of this conversion, to go on with", remedy)
        new.files, new.kept = old["files"], old["kept"]
        for left in folder.rglob(f"*{PARTIAL}"):
            left.unlink()
        return new

    def has(self, path: Path) -> bool:
        """Whether a file was written, and is still as long as it was."""
        noted, file = self.files.get(path.as_posix()), self.folder / path
        return noted is not None and file.is_file() and file.stat().st_size == noted["bytes"]

    def wrote(
        self, file: NewFile, nbytes: int, checksums: dict[str, int], errors: dict[str, tuple[float, float]]
    ) -> None:
        """Note a file; several threads may."""
        noted = {"part": file.part, "bytes": nbytes, "crc32": checksums, "errors": errors}
        with self._turn:
            self.files[file.path.as_posix()] = noted
            self.save()

    def took(self, path: Path, how: str) -> None:
        """Note a file that stays as it was."""
        self.kept[path.as_posix()] = how

    def errors(self) -> dict[tuple[str, str], tuple[float, float]]:
        """(part, weight) -> squared error and squared weight."""
        return {
            (noted["part"], name): (lost, whole)
            for noted in self.files.values()
            for name, (lost, whole) in noted["errors"].items()
        }

    def save(self) -> None:
        """Write it, whole or not at all."""
        content = {
            "version": VERSION,
            "conversion": self.conversion,
            "source": self.source,
            "files": self.files,
            "kept": self.kept,
        }
        write_text(self.folder / RECORD, json.dumps(content) + "\n")
