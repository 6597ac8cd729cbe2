"""How long work reports, and how it is stopped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """One report of long work, sent after each round.

    Attributes:
        done, total: rounds finished and expected (total may shrink when a block is done early).
        stage: "encode", "backbone", "thinking", "answer", "story", "decoder" or "pixels".
        preview: None, or a call without arguments that builds what can be shown by now. It is a call so that a
            listener without previews pays nothing. Backbone stages give a `TokenPreview` or the text so far (str);
            the decoder gives its estimate of the clean latents [1, 16, h, w].
    """

    done: int
    total: int
    stage: str
    preview: Callable[[], Any] | None = None


@dataclass(frozen=True)
class TokenPreview:
    """A half-drawn token grid: codes [h, w] int64, -1 where still masked."""

    codes: Any


class Interrupted(Exception):
    """The progress callback asked to stop by returning False."""


ProgressCallback = Callable[[Progress], bool | None]


def report(callback: ProgressCallback | None, progress: Progress) -> None:
    """Hand `progress` to the callback; False from it, or any exception in it, ends the work here."""
    if callback is not None and callback(progress) is False:
        raise Interrupted(f"stopped at {progress.stage} round {progress.done} of {progress.total}")


def shifted(progress: ProgressCallback | None, index: int, count: int) -> ProgressCallback | None:
    """Progress of image `index` of `count` as a part of the whole."""
    if progress is None:
        return None
    return lambda p: progress(Progress(index * p.total + p.done, count * p.total, p.stage, p.preview))
