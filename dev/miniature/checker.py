"""What a picture shows, told from its pixels alone: background, and each object's shape, colour, size and place."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from .world import COLOURS, PLACES, RADII, SHAPES, TOKEN, Scene, Thing, centre_of, mask_of

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_COARSE = 2  # pixels each way of a cell in which objects are told apart
_LEAST_CELLS = 24  # smaller spots are specks
_LEAST_LIKENESS = 0.6  # intersection over union below which a mask is no shape we know
_TOO_FAR = 24  # pixels from every place, beyond which an object has none


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        things: objects in the order of places; an attribute that fits nothing known is "?".
        background: its colour.
    """

    things: tuple[Thing, ...]
    background: str

    def shows(self, scene: Scene) -> bool:
        """Whether everything is right and nothing else is there."""
        return self.background == scene.background and self.things == scene.things


def look(picture: np.ndarray) -> Report:
    """Examine a picture, uint8 or float in 0...1, [height, width, 3], height and width multiples of 32."""
    pixels = np.asarray(picture, dtype=np.float32)
    if np.asarray(picture).dtype != np.uint8:
        pixels = pixels * 255
    nearest = _colour(pixels)
    ground = int(np.bincount(nearest.ravel(), minlength=len(_NAMES)).argmax())
    near = nearest == ground
    # The background as it is painted here, not as it ought to be: a decoder may be a little off.
    painted = np.median(pixels[near], axis=0)
    distances = np.linalg.norm(pixels - painted, axis=-1)
    objects = (distances > 40) & ~(near & (distances < 60))
    found = [_thing(pixels, distances, mask) for mask in _parts(objects)]
    order = (*PLACES, "?")
    return Report(tuple(sorted(found, key=lambda t: (order.index(t.place), t))), _NAMES[ground])


def _colour(pixels: np.ndarray) -> np.ndarray:
    """Index of the nearest colour of the palette: [..., 3] -> [...]."""
    return np.linalg.norm(pixels[..., None, :] - _PALETTE, axis=-1).argmin(-1)


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, each a mask of the same shape."""
    height, width = mask.shape
    coarse = mask.reshape(height // _COARSE, _COARSE, width // _COARSE, _COARSE).mean((1, 3)) > 0.3
    left = set(zip(*np.nonzero(coarse), strict=True))
    parts = []
    while left:
        stack, part = [left.pop()], []
        while stack:
            y, x = stack.pop()
            part.append((y, x))
            for cell in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if cell in left:
                    left.remove(cell)
                    stack.append(cell)
        if len(part) >= _LEAST_CELLS:
            cells = np.zeros_like(coarse)
            cells[tuple(np.array(part).T)] = True
            wide = cells.copy()  # one cell more all around: thin tips fill no cell by themselves
            wide[1:] |= cells[:-1]
            wide[:-1] |= cells[1:]
            wide[:, 1:] |= cells[:, :-1]
            wide[:, :-1] |= cells[:, 1:]
            parts.append(mask & wide.repeat(_COARSE, 0).repeat(_COARSE, 1))
    return parts


def _thing(pixels: np.ndarray, distances: np.ndarray, mask: np.ndarray) -> Thing:
    ys, xs = np.nonzero(mask)
    # The rim is a blend with the background: the pixels least like it tell the colour.
    inner = mask & (distances >= np.quantile(distances[mask], 0.6))
    colour = _NAMES[int(_colour(np.median(pixels[inner], axis=0)))]
    middle = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
    grid = mask.shape[0] // TOKEN, mask.shape[1] // TOKEN
    away = {p: np.hypot(*np.subtract(centre_of(p, grid), middle)) for p in PLACES}
    place = min(away, key=away.get)
    shape, size = _likest(mask, middle)
    return Thing(shape, colour, size, place if away[place] <= _TOO_FAR else "?")


def _likest(mask: np.ndarray, middle: tuple[float, float]) -> tuple[str, str]:
    """Shape and size of the drawn object that overlaps a mask best once their boxes are centred on each other."""
    x, y = round(middle[0]), round(middle[1])
    padded = np.pad(mask, TOKEN)
    window = padded[y : y + 2 * TOKEN, x : x + 2 * TOKEN]
    area = mask.sum()
    best, found = 0.0, ("?", "?")
    for size in RADII:
        for shape in SHAPES:
            template = _template(shape, size)
            both = (window & template).sum()
            likeness = both / (area + template.sum() - both)
            if likeness > best:
                best, found = likeness, (shape, size)
    return found if best >= _LEAST_LIKENESS else ("?", found[1])


@cache
def _template(shape: str, size: str) -> np.ndarray:
    """bool [2 TOKEN, 2 TOKEN], the object's box in the middle as `_likest` finds it."""
    drawn = mask_of(shape, size) > 0.5
    ys, xs = np.nonzero(drawn)
    y, x = round((ys.min() + ys.max() + 1) / 2), round((xs.min() + xs.max() + 1) / 2)
    return np.roll(drawn, (TOKEN - y, TOKEN - x), (0, 1))


def preserved(before: Scene, after: Report, changed: set[str]) -> bool:
    """Whether an edit left alone what it was not about.

    Args:
        before: the scene that was edited.
        after: what the edited picture shows.
        changed: the places that the edit was about, and "background" where it was.
    """
    if "background" not in changed and after.background != before.background:
        return False
    kept = [thing for thing in before.things if thing.place not in changed]
    return kept == [thing for thing in after.things if thing.place not in changed]


def changed_places(before: Scene, after: Scene) -> set[str]:
    """What an edit is about, as `preserved` wants it."""
    places = {place for place in PLACES if before.at(place) != after.at(place)}
    return places | ({"background"} if before.background != after.background else set())
