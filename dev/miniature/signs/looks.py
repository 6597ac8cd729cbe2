"""What each image token looks like: the colour and the pattern that a code has to tell."""

from functools import cache

import numpy as np

from .drawing import horizon, layers, mask_of, specks
from .font import CHARACTERS, glyph
from .world import (
    COLOURS,
    FILLS,
    SHAPES,
    SIZES,
    TOKEN,
    Scene,
    ground_colours,
)

TINTS = (*COLOURS, "sky")  # colours of a token: of what lies on top there
GROUNDS = 2  # the first patterns: nothing, and the specks of the night
_CELLS = 4  # each way, in which a token's coverage is told
_EMPTY = 0.012  # mean coverage below which a token shows nothing of what lies on it
_ALIKE = 0.035  # mean difference below which two patterns are one


@cache
def patterns() -> tuple[np.ndarray, dict[bytes, int]]:
    """Coverages that tokens have, float32 [n, TOKEN, TOKEN], and for each coverage as bytes its number.

    Number 0 is nothing at all, 1 the specks of the night, the others parts of objects and characters.
    """
    known = [np.zeros((TOKEN, TOKEN), dtype=np.float32), specks()]
    numbers: dict[bytes, int] = {}
    masks = [mask_of(shape, size, fill) for shape in SHAPES for size in SIZES for fill in FILLS]
    for mask in (*masks, *map(glyph, CHARACTERS)):
        for part in tokens_of(mask).reshape(-1, TOKEN, TOKEN):
            if part.tobytes() in numbers:
                continue
            if part.mean() < _EMPTY:
                numbers[part.tobytes()] = 0
                continue
            far = np.abs(np.stack(known[2:]) - part).mean((1, 2)) if len(known) > 2 else np.ones(1)
            if far.min() < _ALIKE:
                numbers[part.tobytes()] = 2 + int(far.argmin())
            else:
                numbers[part.tobytes()] = len(known)
                known.append(part)
    return np.stack(known), numbers


def tokens_of(mask: np.ndarray) -> np.ndarray:
    """A coverage cut into tokens: [rows, columns, TOKEN, TOKEN]."""
    rows, columns = mask.shape[0] // TOKEN, mask.shape[1] // TOKEN
    return np.ascontiguousarray(mask.reshape(rows, TOKEN, columns, TOKEN).swapaxes(1, 2))


@cache
def _cover() -> np.ndarray:
    """Of each pattern the coverage of its cells, float32 [n, _CELLS ** 2]."""
    known, _ = patterns()
    cell = TOKEN // _CELLS
    return known.reshape(-1, _CELLS, cell, _CELLS, cell).mean((2, 4)).reshape(len(known), -1)


def targets(scene: Scene) -> dict[str, np.ndarray]:
    """What is to be told of each token: colour, kind and quarter int64 [h·w], cover float32 [h·w, 16].

    The kind is the number of the frontmost pattern there; quarter is always 0, as a pattern says where it lies.
    """
    _, numbers = patterns()
    upper, *rest = (TINTS.index(name) for name in ground_colours(scene.background))
    colour = np.full(scene.grid, upper)
    colour[horizon(scene.grid) :] = rest[0] if rest else upper
    kind = np.full(scene.grid, int(scene.background == "night"))
    for (row, column), mask, tint in layers(scene):
        for y, line in enumerate(tokens_of(mask)):
            for x, part in enumerate(line):
                if number := numbers[part.tobytes()]:
                    colour[row + y, column + x], kind[row + y, column + x] = TINTS.index(tint), number
    flat = {"colour": colour.ravel(), "kind": kind.ravel(), "quarter": np.zeros(colour.size, dtype=np.int64)}
    return {**flat, "cover": _cover()[flat["kind"]]}
