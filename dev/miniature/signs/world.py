"""Scenes of up to six objects and a written word, and which of them training never sees.

A scene has exactly one picture. Everything lies on whole image tokens: a large object on 3 x 3, a small one on 2 x 2, a
letter on one column of two. So a token says what part of what it is, in which colour; the ground it need not say.
"""

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

from ..world import COLOURS as PLAIN
from ..world import TOKEN as TOKEN  # for those who import this world
from .font import CHARACTERS, DIGITS, LETTERS

# (rows, columns) of tokens: 512 x 512, and 448, 384 and 640 high by 512 wide. One width, so that the decoder, which
# counts features in one row after the other, has one way to find the place of each.
GRIDS = ((16, 16), (14, 16), (12, 16), (20, 16))
SHOWN = GRIDS[:2]  # of pictures to be edited or asked about: the engine halves these exactly (docs/model.md, Sizes)
TOLD = GRIDS[2]  # of the pictures of a story
COLOURS = {**PLAIN, "pink": (245, 150, 190)}
SKY = (140, 200, 235)
# What lies behind: one colour, or one above and one below the horizon; the night has specks.
SCENERY = {"meadow": ("sky", "green"), "beach": ("sky", "yellow"), "sea": ("sky", "blue"), "night": ("black", "black")}
BACKGROUNDS = (*COLOURS, *SCENERY)
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "arrow")
SIZES = {"large": 3, "small": 2}  # tokens each way
FILLS = ("plain", "striped", "hollow")  # small objects are plain
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SIGNED = ("top", "centre", "bottom")  # where a word may stand
INKS = ("black", "white", "red", "blue")
MOST = 6  # objects
_HELD_OUT = 10  # per cent of the scenes
_APART = 8  # per cent of the combinations


@dataclass(frozen=True, order=True)
class Thing:
    """One object.

    Attributes:
        shape, colour, size, fill, place: one of SHAPES, COLOURS, SIZES, FILLS and PLACES.
        front: whether it is small and lies over the lower right of a large one at the same place.
        touching: whether it is small and touches the left side of a small one at the same place.
    """

    shape: str
    colour: str
    size: str = "large"
    fill: str = "plain"
    place: str = "centre"
    front: bool = False
    touching: bool = False

    @property
    def second(self) -> bool:
        """Whether it stands at another thing's place: in front of it, or touching it."""
        return self.front or self.touching


@dataclass(frozen=True, order=True)
class Sign:
    """A word or number of one to five characters, at one of SIGNED, in one of INKS."""

    text: str
    ink: str
    place: str


@dataclass(frozen=True)
class Scene:
    """A picture's content.

    Attributes:
        things: at most six, in the order of PLACES, of two at a place the one in front, or touching, behind the other.
        background: one of BACKGROUNDS; no thing and no ink has a colour of it.
        sign: what is written, at a place without a thing.
        grid: (rows, columns) of tokens, one of GRIDS.
    """

    things: tuple[Thing, ...]
    background: str = "white"
    sign: Sign | None = None
    grid: tuple[int, int] = GRIDS[0]

    def at(self, place: str) -> tuple[Thing, ...]:
        """The things at a place, at most two."""
        return tuple(thing for thing in self.things if thing.place == place)

    def free(self) -> list[str]:
        """Places where nothing is."""
        taken = {thing.place for thing in self.things} | ({self.sign.place} if self.sign else set())
        return [place for place in PLACES if place not in taken]

    def colours(self) -> list[str]:
        """Colours that things may have here."""
        return [colour for colour in COLOURS if colour not in ground_colours(self.background)]

    def inks(self) -> list[str]:
        """Colours that a word may have here."""
        return [ink for ink in INKS if ink not in ground_colours(self.background)]

    def with_things(self, things) -> "Scene":
        """The scene with other things, put in order."""
        return replace(self, things=in_order(things))


def in_order(things) -> tuple[Thing, ...]:
    """Things in the order of their places, of two at a place the second one last."""
    return tuple(sorted(things, key=lambda thing: (PLACES.index(thing.place), thing.second)))


def ground_colours(background: str) -> tuple[str, ...]:
    """Colours of a background."""
    return SCENERY.get(background, (background,))


def problem(scene: Scene) -> str | None:
    """Why a scene is none of this world; None where it is."""
    places = [thing.place for thing in scene.things if not thing.second]
    seconds = [(thing, scene.at(thing.place)[0], len(scene.at(thing.place))) for thing in scene.things if thing.second]
    rules = {
        "at most six objects": len(scene.things) <= MOST,
        "something to see": bool(scene.things or scene.sign),
        "one thing a place, but for one in front or touching": len(set(places)) == len(places),
        "things in order": scene.things == in_order(scene.things),
        "colours that are seen": all(thing.colour in scene.colours() for thing in scene.things),
        "small things are plain": all(thing.fill == "plain" for thing in scene.things if thing.size == "small"),
        "in front is small, over a large one of another colour": all(
            thing.size == "small" and here == 2 and first.size == "large" and first.colour != thing.colour
            for thing, first, here in seconds if thing.front
        ),
        "touching is small, beside a small one of another colour": all(
            thing.size == "small" and here == 2 and first.size == "small" and first.colour != thing.colour
            and not thing.front
            for thing, first, here in seconds if thing.touching
        ),
        "a known background": scene.background in BACKGROUNDS,
        "a known size": scene.grid in GRIDS,
    }  # fmt: skip
    if sign := scene.sign:
        rules["an ink that is seen"] = sign.ink in scene.inks()
        rules["a word at a free place in the middle column"] = sign.place in SIGNED and not scene.at(sign.place)
        rules["one to five characters"] = 1 <= len(sign.text) <= 5 and set(sign.text) <= set(CHARACTERS)
    return next((rule for rule, holds in rules.items() if not holds), None)


def origin_of(place: str, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the upper left token of the 3 x 3 that a place is."""
    index = PLACES.index(place)

    def along(which: int, tokens: int) -> int:
        margin = 1 if tokens >= 14 else 0
        return (margin, (tokens - 3) // 2, tokens - 3 - margin)[which]

    return along(index // 3, grid[0]), along(index % 3, grid[1])


def box_of(thing: Thing, grid: tuple[int, int]) -> tuple[int, int, int]:
    """(row, column, tokens each way) of a thing; a small one lies in the lower right of its place.

    One that touches it lies to its left, and so begins one column before the place does.
    """
    row, column = origin_of(thing.place, grid)
    inset = 3 - SIZES[thing.size]
    return row + inset, column + inset - (SIZES["small"] if thing.touching else 0), SIZES[thing.size]


def cell_of(sign: Sign, index: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the upper token of a sign's character."""
    return origin_of(sign.place, grid)[0], (grid[1] - len(sign.text)) // 2 + index


def _percent(content: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:4], "big") % 100


def held_out(scene: Scene) -> bool:
    """Whether a scene is kept from training, by a hash of its content; its grid plays no part."""
    return _percent((scene.things, scene.background, scene.sign)) < _HELD_OUT


def combinations(scene: Scene) -> set[tuple]:
    """What meets in a scene: a word's beginning with the number of things, and how many of which shape."""
    shapes = [thing.shape for thing in scene.things]
    met: set[tuple] = {(shape, shapes.count(shape)) for shape in set(shapes) if shapes.count(shape) > 1}
    return met | ({(scene.sign.text[:2], len(shapes))} if scene.sign else set())


def held_apart(scene: Scene) -> bool:
    """Whether things meet in a scene that never meet in training."""
    return any(_percent(("apart", *met)) < _APART for met in combinations(scene))


def belongs(scene: Scene, split: str | None) -> bool:
    """Whether a scene is of a split: "train", "held-out" (by content), "combination", or None for all."""
    apart, held = held_apart(scene), held_out(scene)
    return {"train": not apart and not held, "held-out": held and not apart, "combination": apart}.get(split, True)


WORDS = tuple((Path(__file__).parent / "words.txt").read_text().split())


def sample_word(rng: random.Random) -> str:
    """A word of the list, letters that make none, or a number."""
    chance = rng.random()
    if chance < 0.35:
        return rng.choice(WORDS)
    if chance < 0.8:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5)))
    return "".join(rng.choice(DIGITS) for _ in range(rng.randint(1, 3)))


def sample_thing(rng: random.Random, colours, place: str, size: str | None = None) -> Thing:
    """A thing at a place in one of some colours."""
    size = size or rng.choice(("large", "large", "small"))
    fill = rng.choice(("plain", "plain", *FILLS[1:])) if size == "large" else "plain"
    return Thing(rng.choice(SHAPES), rng.choice(colours), size, fill, place)


def sample_sign(rng: random.Random, inks, places) -> Sign:
    """A sign at one of some places."""
    return Sign(sample_word(rng), rng.choice(inks), rng.choice(places))


def second(thing: Thing, rng: random.Random, colours) -> Thing:
    """A small thing that lies over a large one, or that touches a small one."""
    others = [colour for colour in colours if colour != thing.colour]
    large = thing.size == "large"
    return Thing(rng.choice(SHAPES), rng.choice(others), "small", "plain", thing.place, front=large, touching=not large)


COUNTS = {1: 22, 2: 26, 3: 20, 4: 13, 5: 10, 6: 9}  # how often scenes have so many things


def sample_scene(rng: random.Random, count: int | None = None, split: str | None = "train", grids=GRIDS) -> Scene:
    """A random scene.

    Args:
        rng: the only source of chance.
        count: number of things, 1 to 6; None draws it.
        split: see `belongs`.
        grids: sizes to choose from; the first is taken half the time.
    """
    while True:
        background = rng.choice(tuple(COLOURS)) if rng.random() < 0.7 else rng.choice(tuple(SCENERY))
        grid = grids[0] if rng.random() < 0.5 else rng.choice(grids)
        empty = Scene((), background, None, grid)
        number = count or rng.choices(tuple(COUNTS), COUNTS.values())[0]
        sign = sample_sign(rng, empty.inks(), SIGNED) if rng.random() < 0.45 else None
        places = replace(empty, sign=sign).free()
        if rng.random() < 0.35 and number > 1:  # many of a kind
            one = sample_thing(rng, empty.colours(), places[0])
            things = [replace(one, place=place) for place in layout(number, sign) or rng.sample(places, number)]
        else:
            pairs = number >= 2 and rng.random() < 0.3
            things = [sample_thing(rng, empty.colours(), place) for place in rng.sample(places, number - pairs)]
            if pairs:
                size = rng.choice(tuple(SIZES))
                things[0] = sample_thing(rng, empty.colours(), things[0].place, size)
                things.append(second(things[0], rng, empty.colours()))
        scene = Scene(in_order(things), background, sign, grid)
        if belongs(scene, split):
            return scene


_LAYOUTS = {
    1: ("centre",),
    2: ("left", "right"),
    3: ("left", "centre", "right"),
    4: ("top left", "top right", "bottom left", "bottom right"),
    5: ("top left", "top right", "centre", "bottom left", "bottom right"),
    6: ("top left", "top", "top right", "bottom left", "bottom", "bottom right"),
}


def layout(count: int, sign: Sign | None = None) -> tuple[str, ...] | None:
    """Where so many things stand of whose places nothing is said; None where a sign is in the way."""
    places = _LAYOUTS[count]
    return None if sign and sign.place in places else places
