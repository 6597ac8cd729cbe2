"""A test picture that needs no file, and how much another picture is like it."""

import numpy as np
import torch
from PIL import Image, ImageDraw

RED, BLUE, WHITE = (214, 48, 49), (50, 90, 200), (245, 245, 245)
CELLS = 16  # each way, that two pictures are compared in


def drawn_picture(side: int = 512) -> torch.Tensor:
    """A large red circle on the left, a small blue square on the right, on white: float32 [1, side, side, 3]."""
    picture = Image.new("RGB", (side, side), WHITE)
    pen = ImageDraw.Draw(picture)
    unit = side // 64  # sizes and places as the miniature knows them
    pen.ellipse((unit, 25 * unit, 15 * unit, 39 * unit), fill=RED)
    pen.rectangle((52 * unit, 28 * unit, 60 * unit, 36 * unit), fill=BLUE)
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]


def likeness(picture: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """How near two pictures are, seen from afar.

    Args:
        picture, other: float32 [H, W, 3] in 0...1, of any sizes.

    Returns:
        Mean difference of colour, 0...1, and the correlation of the layout, -1...1 (0 where one is plain).
    """
    a, b = (_cells(p) for p in (picture, other))
    x, y = (grid - grid.mean((0, 1)) for grid in (a, b))
    norm = float(x.norm() * y.norm())
    return float((a - b).abs().mean()), float((x * y).sum()) / norm if norm > 1e-9 else 0.0


def _cells(picture: torch.Tensor) -> torch.Tensor:
    small = torch.nn.functional.interpolate(picture.movedim(-1, 0)[None].float(), (CELLS, CELLS), mode="area")
    return small[0].movedim(0, -1)


def merged_order(height: int, width: int) -> torch.Tensor:
    """Raster indices of the patches of a height x width grid, 2 x 2 neighbours at a time: int64 [height * width]."""
    grid = torch.arange(height * width).view(height // 2, 2, width // 2, 2)
    return grid.permute(0, 2, 1, 3).flatten()


def looks_like_words(text: str) -> bool:
    """Whether a text is made of words: mostly letters, spaces where they belong, not one letter or word all along."""
    words = text.split()
    letters = sum(character.isalpha() or character.isspace() for character in text)
    if not words or letters < 0.7 * len(text) or "\ufffd" in text:
        return False
    if len(text) > 8 and max(map(text.count, set(text) - {" "})) > len(text) / 2:
        return False
    spaceless = any("\u3040" <= character <= "\u9fff" for character in text)
    if not spaceless and max(map(len, words)) > 30:
        return False
    return len(words) < 6 or len({word.lower() for word in words}) > len(words) // 4
