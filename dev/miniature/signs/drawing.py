"""How scenes look: objects, letters and grounds as coverage and colour, and the picture they make."""

import random
from functools import cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .font import glyph
from .world import COLOURS, SIZES, SKY, TOKEN, Scene, box_of, cell_of, ground_colours

_RIM, _STRIPE = 8, 16  # pixels of the rim of a hollow object, and of a stripe
_SMOOTH = 4  # masks are drawn so many times larger and averaged down


@cache
def mask_of(shape: str, size: str, fill: str = "plain") -> np.ndarray:
    """Coverage of an object, float32 [side, side] in 0...1 over its whole tokens."""
    side = SIZES[size] * TOKEN
    solid = _solid(shape, side)
    if fill == "hollow":
        inside = solid.filter(ImageFilter.MinFilter(2 * _RIM + 1))
        return (np.asarray(solid, dtype=np.float32) - np.asarray(inside, dtype=np.float32)) / 255
    covered = np.asarray(solid, dtype=np.float32) / 255
    if fill == "striped":
        covered = covered * ((np.arange(side) - 8) // _STRIPE % 2 == 0)[:, None]
    return covered


def _solid(shape: str, side: int) -> Image.Image:
    """A shape filled, its box in the middle of a picture of so many pixels each way."""
    middle, r = side * _SMOOTH / 2, 0.46 * side * _SMOOTH
    image = Image.new("L", (side * _SMOOTH, side * _SMOOTH))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((middle - r, middle - r, middle + r, middle + r), fill=255)
    else:
        draw.polygon([(middle + x * r, middle + y * r) for x, y in _outline(shape)], fill=255)
    return image.resize((side, side), Image.Resampling.BOX)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners (x, y) in -1...1, y downwards."""
    if shape == "star":
        spokes = [(1.0 if i % 2 == 0 else 0.45, pi * (i / 5 - 0.5)) for i in range(10)]
        return [(d * cos(a), d * sin(a)) for d, a in spokes]
    if shape == "heart":
        turns = [2 * pi * i / 60 for i in range(60)]
        return [(sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.05) for t in turns]
    if shape == "cross":
        arm = [(-0.34, -1), (0.34, -1), (0.34, -0.34)]
        turned = [(arm, 1, 0), (arm, 0, 1), (arm, -1, 0), (arm, 0, -1)]
        return [(x * c - y * s, x * s + y * c) for points, c, s in turned for x, y in points]
    return {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "arrow": [(-1, -0.36), (0, -0.36), (0, -0.95), (1, 0), (0, 0.95), (0, 0.36), (-1, 0.36)],
    }[shape]


@cache
def specks() -> np.ndarray:
    """Coverage of the stars of a token of night sky, float32 [TOKEN, TOKEN]."""
    token = np.zeros((TOKEN, TOKEN), dtype=np.float32)
    token[6:11, 8:13] = 1
    token[21:25, 22:26] = 1
    return token


def horizon(grid: tuple[int, int]) -> int:
    """Rows of tokens above the horizon."""
    return grid[0] // 2


@cache
def ground(background: str, grid: tuple[int, int]) -> np.ndarray:
    """A picture of a background alone, uint8 [height, width, 3]; not to be written to."""
    rows, columns = grid
    pixels = np.empty((rows * TOKEN, columns * TOKEN, 3), dtype=np.float32)
    upper, *rest = ({"sky": SKY, **COLOURS}[name] for name in ground_colours(background))
    pixels[:] = upper
    if rest:
        pixels[horizon(grid) * TOKEN :] = rest[0]
    if background == "night":
        sky = np.tile(specks(), grid)[..., None]
        pixels += sky * (np.array(COLOURS["white"], dtype=np.float32) - pixels)
    return pixels.round().astype(np.uint8)


def layers(scene: Scene):
    """What is painted over the ground, from back to front: (row, column) of its first token, coverage, colour."""
    for thing in scene.things:
        row, column, _ = box_of(thing, scene.grid)
        yield (row, column), mask_of(thing.shape, thing.size, thing.fill), thing.colour
    if scene.sign:
        for index, character in enumerate(scene.sign.text):
            yield cell_of(scene.sign, index, scene.grid), glyph(character), scene.sign.ink


def painted(scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 [height, width, 3], TOKEN pixels a token each way."""
    pixels = ground(scene.background, scene.grid).copy()
    for (row, column), mask, colour in layers(scene):
        height, width = mask.shape
        box = pixels[row * TOKEN : row * TOKEN + height, column * TOKEN : column * TOKEN + width]
        box[:] = np.rint(box + mask[..., None] * (np.array(COLOURS[colour], dtype=np.float32) - box))
    return pixels


def render(scene: Scene) -> Image.Image:
    """`painted` as a picture, RGB."""
    return Image.fromarray(painted(scene))


def seen(scene: Scene) -> np.ndarray:
    """The picture as the vision tower sees it, 16 pixels a token: what the engine's preprocessing makes of `render`.

    The filter reaches four pixels far, so only what surrounds the things is resized.
    """
    pixels, half = painted(scene), _seen_ground(scene.background, scene.grid).copy()
    for (row, column), mask, _ in layers(scene):
        top, left, bottom, right = (
            row * TOKEN,
            column * TOKEN,
            row * TOKEN + mask.shape[0],
            column * TOKEN + mask.shape[1],
        )
        part = np.s_[max(0, top - 16) : bottom + 16, max(0, left - 16) : right + 16]
        inner = np.s_[max(0, top - 8) // 2 : (bottom + 8) // 2, max(0, left - 8) // 2 : (right + 8) // 2]
        resized = _halved(pixels[part])
        y, x = (inner[i].start - part[i].start // 2 for i in (0, 1))
        target = half[inner]
        target[:] = resized[y : y + target.shape[0], x : x + target.shape[1]]
    return half


@cache
def _seen_ground(background: str, grid: tuple[int, int]) -> np.ndarray:
    return _halved(ground(background, grid))


def _halved(pixels: np.ndarray) -> np.ndarray:
    size = pixels.shape[1] // 2, pixels.shape[0] // 2
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def focus(scene: Scene, rng: random.Random) -> tuple[int, int]:
    """Somewhere in the picture where there is something to see, (x, y) in pixels."""
    (row, column), mask, _ = rng.choice(list(layers(scene)))
    return column * TOKEN + rng.randrange(mask.shape[1]), row * TOKEN + rng.randrange(mask.shape[0])
