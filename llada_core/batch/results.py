"""The folder of results: a line in results.jsonl for each request, and the files that the line names.

A request is done when its line is there. Files come first, each named when it is whole; a line is written last, and
taken back where it did not fit. So a run that is killed, or has no room, leaves nothing that is half.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InputError, shown
from ..image_tokens import save_tokens
from ..whole_file import whole_file
from .requests import Request, Wrong
from .rows import Result

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
_LOCK = ".lock"
_ROOM = "Make room, or correct what is named, and run the same command: it goes on where it stopped."


class Output:
    """A folder of results, ours alone within this context.

    Args:
        folder: made where it is not there.

    Raises:
        InputError: a folder that another run is writing to, or that holds something else than results; no room.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._done: dict[str, dict[str, Any]] = {}
        self._lines: Any = None

    def __enter__(self) -> "Output":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            strangers = [path.name for path in self.folder.iterdir() if path.name not in (_LOCK, "images", "tokens")]
            if strangers and RESULTS not in strangers and strangers != [RESULTS + ".partial"]:
                remedy = "Choose a folder that is not there yet, or one of earlier results."
                raise InputError("output", f"a folder with {shown(strangers[0])}", "results or nothing", remedy)
            self._lock = (self.folder / _LOCK).open("ab")
            try:
                _lock(self._lock)
                self._read()
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise InputError("output", f"{self.folder.name} ({error})", "a folder to write to", _ROOM) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            self._lines.close()
        self._lock.close()

    def begin(self, requests: Sequence[Request], wrong: Sequence[Wrong]) -> list[Request]:
        """What is still to be done. Errors of earlier runs are forgotten, those of the file's lines noted.

        Raises:
            InputError: results here are of other requests that have the same ids; no room.
        """
        others = [r.id for r in requests if self._done.get(r.id, {}).get("request", r.digest) != r.digest]
        others += [line.id for line in wrong if line.id in self._done]
        if others:
            found = f"results of another request of the id {shown(others[0])}"
            found += f", and {len(others) - 1} more" if len(others) > 1 else ""
            remedy = "Requests have changed under their ids: choose another folder, or other ids."
            raise InputError("output", found, "results of these requests", remedy)
        lines = [json.dumps(record, ensure_ascii=False) for record in self._done.values()]
        lines += [json.dumps(_as_record(line), ensure_ascii=False) for line in wrong]
        try:
            with whole_file(self.folder / RESULTS) as partial:
                partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
            self._lines = (self.folder / RESULTS).open("ab", buffering=0)
        except OSError as error:
            raise InputError("output", f"{RESULTS} ({error})", "room for the results", _ROOM) from error
        return [request for request in requests if request.id not in self._done]

    def add(self, request: Request, result: Result) -> None:
        """Write a result: its files, then its line.

        Raises:
            InputError: it cannot be written; nothing of it is left then.
        """
        record: dict[str, Any] = {"id": result.id, "kind": result.kind, "outcome": "error" if result.error else "ok"}
        try:
            if result.picture:
                record["image"] = f"images/{result.id}.png"
                with self._file(record["image"]) as partial:
                    partial.write_bytes(result.picture)
            if result.tokens is not None:
                record["tokens"] = f"tokens/{result.id}.safetensors"
                with self._file(record["tokens"]) as partial:
                    save_tokens(result.tokens, partial)
            for name in ("answer", "thinking"):
                if getattr(result, name) is not None:
                    record[name] = getattr(result, name)
            if result.error:
                record["error"] = result.error
            record["usage"] = result.usage and asdict(result.usage)
            record |= {"seconds": result.seconds, "worker": result.worker, "request": request.digest}
            self._append(json.dumps(record, ensure_ascii=False) + "\n")
        except (OSError, InputError) as error:
            raise InputError("output", f"{result.id}, not written ({error})", "room for it", _ROOM) from error

    def _file(self, name: str):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        return whole_file(path)

    def _append(self, line: str) -> None:
        end = self._lines.seek(0, os.SEEK_END)
        text = line.encode()
        try:
            while text:
                text = text[self._lines.write(text) :]
            os.fsync(self._lines.fileno())
        except OSError:
            self._lines.truncate(end)
            raise

    def _read(self) -> None:
        """Results of earlier runs. What a killed run left behind the last whole line is no result."""
        path = self.folder / RESULTS
        if not path.exists():
            return
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            log.info("%s ends in half a line, of a run that was killed; that request is done again", RESULTS)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if record["outcome"] == "ok":
                    self._done[record["id"]] = record
            except (ValueError, TypeError, KeyError) as error:
                found = f"{RESULTS}, whose line {number} is no result"
                remedy = "Choose another folder, or remove that line."
                raise InputError("output", found, "results of an earlier run", remedy) from error


def _as_record(wrong: Wrong) -> dict[str, Any]:
    """The line of a request that was not run. Without an id of its own it has its line's number alone."""
    return {
        "id": wrong.id,
        "kind": wrong.kind,
        "outcome": "error",
        "error": wrong.error,
        "line": wrong.line,
    }


def _lock(file: Any) -> None:
    """Take the folder; the system gives it back when this process ends, however it does."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        remedy = "Wait for it, or choose another folder."
        raise InputError("output", "a folder that another run is writing to", "a folder of its own", remedy) from error
    except OSError as error:
        log.warning("this folder cannot be locked (%s): see that no other run writes to it", error)
