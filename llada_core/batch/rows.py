"""A batch and its results as rows of a dataset: JSON, and bytes where there are files. Nothing is pickled."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..image_tokens import ImageTokens, load_tokens
from ..sampling.pipeline import Usage
from .requests import TOKEN_FILE, Request, parse

Source = ImageTokens | Path | bytes  # an image of a request: its codes, its file, or what the file holds


@dataclass(frozen=True)
class Work:
    """A request and its images."""

    request: Request
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
        error: why it has no result; "" where it has one.
        answer: to a question.
        thinking: the plan, where there was one.
        tokens: that were drawn.
        picture: a PNG file; empty where there is none.
        usage: of the backbone.
        seconds: this request's share of its batch's time.
        worker: who did it, "machine:process".
    """

    id: str
    kind: str
    error: str = ""
    answer: str | None = None
    thinking: str | None = None
    tokens: ImageTokens | None = None
    picture: bytes = b""
    usage: Usage | None = None
    seconds: float = 0.0
    worker: str = ""


def pack(key: str, batch: Sequence[Request], send: bool) -> tuple[dict[str, Any], list[Result]]:
    """A batch as a row, and results of the requests whose files have gone since they were checked.

    Args:
        key: the batch's own.
        send: whether pictures travel in the row; else their paths do, for workers on this machine.
    """
    files: list[bytes] = []
    works, gone = [], []
    for request in batch:
        sources: list[dict[str, Any]] = []
        try:
            for path in request.images:
                if path.name.endswith(TOKEN_FILE):
                    sources.append({"tokens": _as_json(load_tokens(path))})
                elif send:
                    files.append(_contents(path))
                    sources.append({"file": len(files) - 1})
                else:
                    sources.append({"path": str(path)})
            works.append({"request": dict(request.raw), "sources": sources})
        except InputError as error:
            gone.append(Result(request.id, request.kind, error=str(error)))
    return {"key": key, "works": json.dumps(works), "files": files}, gone


def unpack(row: Mapping[str, Any]) -> list[Work]:
    """The batch of a row."""

    def source(given: dict[str, Any]) -> Source:
        if "tokens" in given:
            return _from_json(given["tokens"])
        return bytes(row["files"][given["file"]]) if "file" in given else Path(given["path"])

    return [Work(parse(w["request"], None), tuple(map(source, w["sources"]))) for w in json.loads(row["works"])]


def pack_result(result: Result) -> dict[str, Any]:
    """A result as a row."""
    plain = ("id", "kind", "error", "answer", "thinking", "seconds", "worker")
    values = {name: getattr(result, name) for name in plain}
    values["usage"] = result.usage and asdict(result.usage)
    values["tokens"] = result.tokens and _as_json(result.tokens)
    return {"result": json.dumps(values), "picture": result.picture, "fault": ""}


def pack_fault(text: str) -> dict[str, Any]:
    """In place of results: why the worker can do nothing at all."""
    return {"result": "", "picture": b"", "fault": text}


def unpack_result(row: Mapping[str, Any]) -> Result:
    """The result of a row."""
    values = json.loads(row["result"])
    values["usage"] = values["usage"] and Usage(**values["usage"])
    values["tokens"] = values["tokens"] and _from_json(values["tokens"])
    return Result(**values, picture=bytes(row["picture"]))


def _as_json(tokens: ImageTokens) -> dict[str, Any]:
    return {"grids": [grid.tolist() for grid in tokens.grids], "codebook_size": tokens.codebook_size}


def _from_json(value: Mapping[str, Any]) -> ImageTokens:
    return ImageTokens(tuple(torch.tensor(g, dtype=torch.int64) for g in value["grids"]), value["codebook_size"])


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "It was there when the requests were checked; put it back and run the same command."
        raise InputError("image", f"{path.name}, unreadable ({error})", "the file that was checked", remedy) from error
