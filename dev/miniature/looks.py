"""What each image token of the first world looks like: what a code has to tell."""

import numpy as np

from .world import COLOURS, RADII, SHAPES, TOKEN, Scene, centre_of, mask_of

KINDS = tuple((shape, size) for shape in SHAPES for size in RADII)  # 0 is "no object" in targets
_CELLS = 4  # each way, in which a patch's coverage is told
_NAMES = tuple(COLOURS)


def targets(scene: Scene) -> dict[str, np.ndarray]:
    """What is to be told of each patch: colour, kind and quarter int64 [h·w], cover float32 [h·w, 16]."""
    rows, columns = scene.grid
    colour = np.full((rows, columns), _NAMES.index(scene.background))
    kind = np.zeros((rows, columns), dtype=np.int64)
    quarter = np.zeros((rows, columns), dtype=np.int64)
    cover = np.zeros((rows, columns, _CELLS, _CELLS), dtype=np.float32)
    for thing in scene.things:
        x, y = (at // TOKEN for at in centre_of(thing.place, scene.grid))
        here = np.s_[y - 1 : y + 1, x - 1 : x + 1]
        colour[here] = _NAMES.index(thing.colour)
        kind[here] = 1 + KINDS.index((thing.shape, thing.size))
        quarter[here] = [[0, 1], [2, 3]]
        mask, cell = mask_of(thing.shape, thing.size), TOKEN // _CELLS
        cover[here] = mask.reshape(2, _CELLS, cell, 2, _CELLS, cell).mean((2, 5)).transpose(0, 2, 1, 3)
    flat = {"colour": colour.ravel(), "kind": kind.ravel(), "quarter": quarter.ravel()}
    return {**flat, "cover": cover.reshape(rows * columns, -1)}
