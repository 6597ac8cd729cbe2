"""The drawn world: scenes of one to three coloured shapes, how they look, and which of them training never sees.

A scene has exactly one picture: nothing in it is random. Every object lies on 2 x 2 image tokens, so one token is a
quarter of an object or plain background.
"""

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

TOKEN = 32  # pixels of a picture that one image token covers
GRIDS = ((8, 8), (6, 8))  # (rows, columns) of tokens: 256 x 256 and 192 high x 256 wide
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 60),
    "green": (60, 160, 80),
    "blue": (50, 90, 200),
    "purple": (140, 70, 170),
    "black": (30, 30, 35),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star")
RADII = {"large": 28, "small": 16}  # half the side of the box that an object fills, in pixels
PLACES = ("left", "right", "above", "below", "centre")
_SMOOTH = 8  # masks are drawn so many times larger and averaged down
_HELD_OUT = 10  # per cent of the scenes


@dataclass(frozen=True, order=True)
class Thing:
    """One object."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """A picture's content.

    Attributes:
        things: one to three, each at a place of its own, in the order of PLACES.
        background: a colour that no thing has.
        grid: (rows, columns) of tokens, one of GRIDS.
    """

    things: tuple[Thing, ...]
    background: str
    grid: tuple[int, int] = GRIDS[0]

    def at(self, place: str) -> Thing | None:
        """The thing at a place."""
        return next((thing for thing in self.things if thing.place == place), None)

    def with_things(self, things) -> "Scene":
        """The scene with other things, put in order."""
        return replace(self, things=in_order(things))


def in_order(things) -> tuple[Thing, ...]:
    """Things in the order of their places."""
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def centre_of(place: str, grid: tuple[int, int]) -> tuple[int, int]:
    """(x, y) in pixels of a place: always a corner that four tokens share."""
    rows, columns = grid
    x, y = columns * TOKEN // 2, rows * TOKEN // 2
    return {
        "left": (TOKEN, y),
        "right": (columns * TOKEN - TOKEN, y),
        "above": (x, TOKEN),
        "below": (x, rows * TOKEN - TOKEN),
        "centre": (x, y),
    }[place]


def held_out(scene: Scene) -> bool:
    """Whether a scene is kept from training, by a hash of its content; its grid plays no part."""
    content = repr((scene.things, scene.background)).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big") % 100 < _HELD_OUT


def sample_thing(rng: random.Random, background: str, places=PLACES) -> Thing:
    """A thing at one of `places` that is seen against `background`."""
    colours = [colour for colour in COLOURS if colour != background]
    return Thing(rng.choice(SHAPES), rng.choice(colours), rng.choice(tuple(RADII)), rng.choice(places))


def sample_scene(rng: random.Random, count: int | None = None, split: str | None = "train") -> Scene:
    """A random scene.

    Args:
        rng: the only source of chance.
        count: number of things, 1 to 3; None draws it.
        split: "train", "held-out", or None for either.
    """
    while True:
        background = rng.choice(tuple(COLOURS))
        number = count or rng.choice((1, 1, 2, 2, 2, 3))
        # Pairs that face each other are what "to the left of" and "above" speak about.
        pairs = (("left", "right"), ("above", "below"))
        places = rng.choice(pairs) if number == 2 and rng.random() < 0.5 else rng.sample(PLACES, number)
        things = in_order(sample_thing(rng, background, (place,)) for place in places)
        scene = Scene(things, background, rng.choice((GRIDS[0], GRIDS[0], GRIDS[1])))
        if split is None or held_out(scene) == (split == "held-out"):
            return scene


@cache
def mask_of(shape: str, size: str) -> np.ndarray:
    """Coverage of an object, float32 [2 TOKEN, 2 TOKEN] in 0...1, its box in the middle."""
    side, radius, middle = 2 * TOKEN * _SMOOTH, RADII[size] * _SMOOTH, TOKEN * _SMOOTH
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    low, high = middle - radius, middle + radius - 1
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif shape == "square":
        inset = radius // 8  # a square of the full box would look larger than everything else
        draw.rectangle((low + inset, low + inset, high - inset, high - inset), fill=255)
    elif shape == "triangle":
        draw.polygon(((middle, low), (high, high), (low, high)), fill=255)
    elif shape == "diamond":
        draw.polygon(((middle, low), (high, middle), (middle, high), (low, middle)), fill=255)
    elif shape == "star":
        spokes = [(radius if i % 2 == 0 else radius * 0.42, pi * (i / 5 - 0.5)) for i in range(10)]
        draw.polygon([(middle + r * cos(a), middle + r * sin(a)) for r, a in spokes], fill=255)
    else:
        raise ValueError(f"shape {shape!r}: expected one of {SHAPES}")
    pixels = np.asarray(image, dtype=np.float32) / 255
    return pixels.reshape(2 * TOKEN, _SMOOTH, 2 * TOKEN, _SMOOTH).mean((1, 3))


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, TOKEN pixels a token each way."""
    rows, columns = scene.grid
    pixels = np.empty((rows * TOKEN, columns * TOKEN, 3), dtype=np.float32)
    pixels[:] = COLOURS[scene.background]
    for thing in scene.things:
        x, y = centre_of(thing.place, scene.grid)
        box = pixels[y - TOKEN : y + TOKEN, x - TOKEN : x + TOKEN]
        mask = mask_of(thing.shape, thing.size)[..., None]
        box += mask * (np.array(COLOURS[thing.colour], dtype=np.float32) - box)
    return Image.fromarray(pixels.round().astype(np.uint8))


def view(scene: Scene) -> Image.Image:
    """The picture as the vision tower sees it: 16 pixels a token (what the engine makes of `render`)."""
    picture = render(scene)
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC)
