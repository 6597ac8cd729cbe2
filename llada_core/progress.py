"""How long work reports, and how it is stopped."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


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
    """A half-drawn token grid, or several side by side: codes [h, w] int64, -1 where still masked."""

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


def side_by_side(grids: Sequence[torch.Tensor]) -> torch.Tensor:
    """Grids int64 [h, w] as one, in rows of about as many as there are rows; -1 where there is nothing."""
    columns = math.ceil(math.sqrt(len(grids)))
    height, width = (max(grid.shape[side] for grid in grids) for side in (0, 1))
    padded = [F.pad(grid, (0, width - grid.shape[1], 0, height - grid.shape[0]), value=-1) for grid in grids]
    padded += [torch.full((height, width), -1)] * (-len(grids) % columns)
    return torch.cat([torch.cat(padded[at : at + columns], 1) for at in range(0, len(padded), columns)])
