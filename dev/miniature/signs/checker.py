"""What a picture shows, told from its pixels alone: what lies at each place, what is written, and whether that is all.

Each place is read by itself: which colours lie there, and which objects or letters they make. Then the scene that was
read is drawn again; where the picture is otherwise, something is there that this world does not know.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from .drawing import ground, mask_of, painted
from .font import CHARACTERS, HIGH, WIDE, glyph
from .world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    GRIDS,
    INKS,
    PLACES,
    SHAPES,
    SIGNED,
    SIZES,
    TOKEN,
    Scene,
    Sign,
    Thing,
    in_order,
    origin_of,
)

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_STEP = 3  # pixels each way of which one tells the background
_FEW = 0.03  # share of a place below which a colour is a rim or a speck
_LIKE = 0.62  # intersection over union below which a mask is no object we know
_BESIDE = 0.1  # share of the column before a place above which two objects touch there
_LEGIBLE = 0.5  # the same for a letter
_STRAY = 40.0  # mean distance of a block of 16 x 16 pixels from what was read there
_MANY = 3  # such blocks are more than a bad rim
_BLOCK = 16


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        scene: what the picture shows; an attribute that fits nothing known is "?".
        clean: whether nothing else is there.
    """

    scene: Scene
    clean: bool

    def shows(self, scene: Scene) -> bool:
        """Whether everything is right and nothing else is there."""
        return self.clean and self.scene == scene


def look(picture: np.ndarray) -> Report:
    """Examine a picture, uint8 or float in 0...1, [height, width, 3], its size one of GRIDS in tokens.

    Raises:
        ValueError: another size.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    if np.asarray(picture).dtype != np.uint8:
        pixels = pixels * 255
    grid = pixels.shape[0] // TOKEN, pixels.shape[1] // TOKEN
    if grid not in GRIDS:
        raise ValueError(f"a picture of {grid} tokens: expected one of {GRIDS}")
    background = _background(pixels, grid)
    behind = ground(background, grid).astype(np.float32)
    ours = _labels(pixels, behind)
    sign = next(filter(None, (_sign(pixels, behind, place, grid) for place in SIGNED)), None)
    things = [thing for place in PLACES if not (sign and sign.place == place) for thing in _things(ours, place, grid)]
    scene = Scene(in_order(things), background, sign, grid)
    return Report(scene, _clean(pixels, scene))


def _background(pixels: np.ndarray, grid: tuple[int, int]) -> str:
    """Which background fits best where nothing can lie."""
    free = np.ones(grid, dtype=bool)
    for place in PLACES:
        row, column = origin_of(place, grid)
        free[row : row + 3, column - 1 : column + 3] = False
        if place in SIGNED:
            free[row : row + 2, grid[1] // 2 - 3 : grid[1] // 2 + 3] = False
    at = free.repeat(TOKEN, 0).repeat(TOKEN, 1)[::_STEP, ::_STEP]
    seen = pixels[::_STEP, ::_STEP][at]
    off = {
        n: np.linalg.norm(seen - ground(n, grid)[::_STEP, ::_STEP][at].astype(np.float32), axis=-1).mean()
        for n in BACKGROUNDS
    }
    return min(off, key=off.get)


def _labels(pixels: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """For each pixel the number of its colour, -1 where it is the ground: int [height, width]."""
    flat = pixels.reshape(-1, 3)
    far = (_PALETTE**2).sum(1) - 2 * flat @ _PALETTE.T  # squared distances, less what all have in common
    back = (behind.reshape(-1, 3) ** 2).sum(1) - 2 * (flat * behind.reshape(-1, 3)).sum(1)
    # Where the ground is a colour of the palette, both are equally near.
    return np.where(back <= far.min(1) + 1, -1, far.argmin(1)).reshape(pixels.shape[:2])


def _thick(mask: np.ndarray) -> np.ndarray:
    """A mask without what is thinner than five pixels."""
    padded = np.pad(mask, 2)
    shifted = [padded[y : y + mask.shape[0], x : x + mask.shape[1]] for y in (0, 2, 4) for x in (0, 2, 4)]
    return np.logical_and.reduce(shifted)


def _present(labels: np.ndarray) -> list[int]:
    """Colours that more than rims have, the most frequent first."""
    shares = {}
    for colour in np.unique(labels[labels >= 0]):
        share = _thick(labels == colour).mean()
        if share > _FEW / 4 and (labels == colour).mean() > _FEW:
            shares[int(colour)] = share
    return sorted(shares, key=shares.get, reverse=True)


def _things(labels: np.ndarray, place: str, grid: tuple[int, int]) -> list[Thing]:
    """What lies at a place: nothing, one object, or two: the second in front of the first, or touching it."""
    row, column = origin_of(place, grid)
    here = labels[row * TOKEN : (row + 3) * TOKEN, (column - 1) * TOKEN : (column + 3) * TOKEN]
    if (here[TOKEN:, :TOKEN] >= 0).mean() > _BESIDE:
        return _touching(here[TOKEN:], place)
    here = here[:, TOKEN:]
    present = _present(here)
    if not present:
        return []
    inked = here >= 0
    like, (shape, size, fill) = _likest(inked, _templates())
    one = Thing(shape, _NAMES[present[0]], size, fill, place)
    if len(present) == 1:
        return [one if like >= _LIKE else replace(one, shape="?")]
    best, pair = 0.0, []
    for over, under in (present[:2], present[1::-1]):
        fore, (shape, _, _) = _likest(here == over, _templates("small"))
        front = Thing(shape, _NAMES[over], "small", "plain", place, True)
        covered = _template(shape, "small", "plain")
        # The rim between both is neither: all that is inked and not in front belongs to what lies behind.
        rest, (shape, _, fill) = _likest(inked & ~covered & (here != over), _templates("large"), ~covered)
        if min(fore, rest) > best:
            best, pair = min(fore, rest), [Thing(shape, _NAMES[under], "large", fill, place), front]
    # Two colours in one object are a fault of its painter.
    return pair if best >= _LIKE else [replace(one, shape="?", colour="?")]


def _touching(labels: np.ndarray, place: str) -> list[Thing]:
    """Two small objects side by side, of 2 x 2 tokens each, the right one first."""
    pair = []
    for half, touching in ((labels[:, 2 * TOKEN :], False), (labels[:, : 2 * TOKEN], True)):
        like, (shape, _, _) = _likest(half >= 0, {kind: t[TOKEN:, TOKEN:] for kind, t in _templates("small").items()})
        present = _present(half)
        colour = _NAMES[present[0]] if len(present) == 1 else "?"
        pair.append(Thing(shape if like >= _LIKE else "?", colour, "small", "plain", place, touching=touching))
    return pair


def _likest(mask: np.ndarray, templates: dict, among: np.ndarray | None = None):
    """How well the best template fits (intersection over union, where `among` is true), and which it is."""
    best, found = -1.0, ("?", "?", "?")
    for which, template in templates.items():
        if among is not None:
            template = template & among
        like = (mask & template).sum() / max(1, (mask | template).sum())
        if like > best:
            best, found = like, which
    return best, found


@cache
def _templates(size: str | None = None) -> dict[tuple[str, str, str], np.ndarray]:
    kinds = [(shape, s, fill) for shape in SHAPES for s in SIZES for fill in FILLS if s == "large" or fill == "plain"]
    return {kind: _template(*kind) for kind in kinds if size in (None, kind[1])}


@cache
def _template(shape: str, size: str, fill: str) -> np.ndarray:
    """bool [3 TOKEN, 3 TOKEN], the object where it lies in its place."""
    where = np.zeros((3 * TOKEN, 3 * TOKEN), dtype=bool)
    side = SIZES[size] * TOKEN
    where[-side:, -side:] = mask_of(shape, size, fill) > 0.5
    return where


def _sign(pixels: np.ndarray, behind: np.ndarray, place: str, grid: tuple[int, int]) -> Sign | None:
    """The word at a place, or None where there is none; a letter that cannot be read is "?"."""
    top, middle = origin_of(place, grid)[0] * TOKEN, grid[1] * TOKEN // 2
    where = np.s_[top : top + HIGH, middle - 3 * TOKEN : middle + 3 * TOKEN]
    band, back = pixels[where], behind[where]
    best: tuple[float, Sign | None] = (_LEGIBLE, None)
    something = (np.linalg.norm(band - back, axis=-1) > 60).sum()
    if something < 60:
        return None
    for ink in INKS:
        # Strokes are as thin as blur is wide: how much ink there is tells more than the nearest colour.
        way = _PALETTE[_NAMES.index(ink)] - back
        share = ((band - back) * way).sum(-1) / (way**2).sum(-1).clip(1)
        mask = (share > 0.45) & (np.linalg.norm(band - back - share[..., None] * way, axis=-1) < 50)
        if mask.sum() < max(60, 0.5 * something):
            continue
        for length in range(1, 6):
            left = (grid[1] - length) // 2 * TOKEN - (middle - 3 * TOKEN)
            read = [_likest(mask[:, left + i * WIDE : left + (i + 1) * WIDE], _glyphs()) for i in range(length)]
            kept = mask[:, left : left + length * WIDE].sum() / mask.sum()  # a longer word has ink outside
            like = float(np.mean([value for value, _ in read]) * kept)
            if like > best[0]:
                text = "".join(name if value >= _LEGIBLE else "?" for value, name in read)
                best = like, Sign(text, ink, place)
    return best[1]


@cache
def _glyphs() -> dict[str, np.ndarray]:
    return {character: glyph(character) > 0.5 for character in CHARACTERS}


def _clean(pixels: np.ndarray, scene: Scene) -> bool:
    """Whether the picture is what was read, but for rims: false where anything was not."""
    attributes = [*(value for thing in scene.things for value in (thing.shape, thing.colour))]
    if "?" in attributes or (scene.sign and "?" in scene.sign.text):
        return False
    again = painted(scene).astype(np.float32)
    height, width = pixels.shape[:2]

    def blocks(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK, 3).mean((1, 3))

    off = np.linalg.norm(blocks(pixels) - blocks(again), axis=-1)
    return int((off > _STRAY).sum()) < _MANY


def preserved(before: Scene, after: Report, changed: set[str]) -> bool:
    """Whether an edit left alone what it was not about.

    Args:
        before: the scene that was edited.
        after: what the edited picture shows.
        changed: see `changed_places`.
    """
    found = after.scene
    if "background" not in changed and found.background != before.background:
        return False
    if "sign" not in changed and found.sign != before.sign:
        return False
    return all(before.at(place) == found.at(place) for place in PLACES if place not in changed)


def changed_places(before: Scene, after: Scene) -> set[str]:
    """What an edit is about: the places where things differ, "background" and "sign" where those do."""
    places = {place for place in PLACES if before.at(place) != after.at(place)}
    places |= {"background"} if before.background != after.background else set()
    return places | ({"sign"} if before.sign != after.sign else set())
