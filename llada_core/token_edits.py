"""Tokens as a canvas: which cells are to be drawn anew; pad, crop, paste; which cells to vary.

Cells are those of a token grid [h, w], 32 x 32 pixels of the decoded picture each. Masks mark what is to be drawn.
"""

import logging
import math

import torch
import torch.nn.functional as F

from .checks import MAX_SIDE, PIXELS, check_numbers, check_range
from .errors import InputError
from .image_tokens import ImageTokens

log = logging.getLogger(__name__)

BAND = 256  # rows of a mask that are looked at together
MOST_PIXELS = 2**28  # of a mask, 16,384 each way: an expanded tensor may claim any number of them


def touched_cells(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The cells that a mask touches.

    Args:
        mask: [H, W] or [1, H, W] in 0...1 or bool, of any size: above 0 is to be drawn. Where its proportions are not
            the grid's it is read as SigLIP-VQ Encode reads a picture: it covers the grid, and what hangs over is cut
            off on both sides.
        height, width: of the grid.

    Returns:
        bool [height, width].

    Raises:
        InputError: no tensor of that shape, too many pixels, or values that are not finite.
    """
    expected, remedy = "one mask [height, width]", "Connect a mask of the picture."
    check_numbers("mask", mask, expected, remedy)
    plain = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
    if plain.ndim != 2 or 0 in plain.shape:
        raise InputError("mask", f"shape {list(mask.shape)}", expected, remedy)
    if plain.numel() > MOST_PIXELS:
        raise InputError("mask", f"shape {list(mask.shape)}", f"at most {MOST_PIXELS} pixels", "Scale the mask down.")
    rows = [_bounds(band) for band in plain.split(BAND)]
    if not all(math.isfinite(bound) for band in rows for bound in band):
        raise InputError("mask", "values that are not finite", "values from 0 to 1", "Make the mask again.")
    cells = _reduced(_reduced(_middle(plain, height, width), height).T, width).T
    if not bool(cells.any()):
        log.warning("the mask marks nothing: nothing is drawn")
    return cells


def _bounds(values: torch.Tensor) -> tuple[float, float]:
    """The lowest and the highest; NaN where there is one."""
    low, high = values.float().aminmax()
    return float(low), float(high)


def _reduced(mask: torch.Tensor, count: int) -> torch.Tensor:
    """[n, m] -> bool [count, m]: whether any of the rows that an output row touches is above 0.

    Row by row, since what pools a whole mask at once takes several times its memory.
    """
    edges = [(at * len(mask) // count, -(-(at + 1) * len(mask) // count)) for at in range(count)]
    return torch.stack([(mask[low:high].float() > 0).any(0) for low, high in edges])


def _middle(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of a mask that has the proportions of the grid, rounded outwards to whole pixels."""
    rows, columns = mask.shape
    scale = max(height / rows, width / columns)
    inner = [size / scale for size in (height, width)]
    low = [max(math.floor((size - part) / 2 + 1e-6), 0) for size, part in zip((rows, columns), inner, strict=True)]
    high = [math.ceil((size + part) / 2 - 1e-6) for size, part in zip((rows, columns), inner, strict=True)]
    return mask[low[0] : high[0], low[1] : high[1]]


def mask_of_cells(cells: torch.Tensor) -> torch.Tensor:
    """Cells bool [h, w] -> the mask of the decoded picture, float32 [1, 32 h, 32 w], 1 where they are to be drawn."""
    return cells.float().repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)[None]


def pad(tokens: ImageTokens, left: int, top: int, right: int, bottom: int) -> tuple[ImageTokens, torch.Tensor]:
    """A larger canvas around an image: what is known stays where it stood, the rest is to be drawn.

    Args:
        tokens: one image.
        left, top, right, bottom: pixels of the decoded picture, multiples of 32 from 0 up.

    Returns:
        The larger image, whose new cells hold the code 0, and its mask float32 [1, H, W].

    Raises:
        InputError: several images, sides that are no multiples of 32, no side at all, a canvas beyond 8192 pixels.
    """
    grid = one_grid(tokens)
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    cells = {name: _in_cells(name, value) for name, value in sides.items()}
    if not any(cells.values()):
        raise InputError("padding", "0 pixels on every side", "a side to grow at", "Give left, top, right or bottom.")
    around = (cells["left"], cells["right"], cells["top"], cells["bottom"])
    rows, columns = grid.shape[0] + cells["top"] + cells["bottom"], grid.shape[1] + cells["left"] + cells["right"]
    _check_canvas("padding", rows, columns, "Pad less, or crop first.")
    larger = F.pad(grid, around, value=0)
    unknown = F.pad(torch.zeros_like(grid, dtype=torch.bool), around, value=True)
    return ImageTokens((larger,), tokens.codebook_size), mask_of_cells(unknown)


def crop(tokens: ImageTokens, left: int, top: int, width: int, height: int) -> ImageTokens:
    """A rectangle of every image; left, top, width and height in pixels of the decoded picture, multiples of 32.

    Raises:
        InputError: no multiples of 32, or a rectangle that reaches outside an image.
    """
    x, y = _in_cells("left", left), _in_cells("top", top)
    columns, rows = _in_cells("width", width, PIXELS), _in_cells("height", height, PIXELS)
    for grid in tokens.grids:
        _check_inside((x, y, columns, rows), grid, "Crop inside the image.")
    return ImageTokens(tuple(grid[y : y + rows, x : x + columns] for grid in tokens.grids), tokens.codebook_size)


def paste(tokens: ImageTokens, piece: ImageTokens, left: int, top: int) -> tuple[ImageTokens, torch.Tensor]:
    """An image with another laid over it; left and top in pixels of the decoded picture, multiples of 32.

    Returns:
        The image, and a mask float32 [1, H, W] of the piece's outermost cells and of those around it: the seam, to be
        drawn anew where it shows.

    Raises:
        InputError: several images, another codebook, no multiples of 32, a piece that reaches outside the image, an
            image beyond 8192 pixels.
    """
    grid, over = one_grid(tokens), one_grid(piece.for_codebook(tokens.codebook_size), "piece")
    x, y = _in_cells("left", left), _in_cells("top", top)
    _check_canvas("tokens", grid.shape[0], grid.shape[1], "Crop the image first.")
    rows, columns = over.shape
    _check_inside((x, y, columns, rows), grid, "Move the piece, crop it, or pad the image first.")
    result = grid.clone()
    result[y : y + rows, x : x + columns] = over
    seam = torch.zeros_like(grid, dtype=torch.bool)
    seam[max(y - 1, 0) : y + rows + 1, max(x - 1, 0) : x + columns + 1] = True
    seam[y + 1 : y + rows - 1, x + 1 : x + columns - 1] = False
    return ImageTokens((result,), tokens.codebook_size), mask_of_cells(seam)


def cells_to_vary(
    height: int, width: int, strength: float, seed: int, certainty: torch.Tensor | None = None
) -> torch.Tensor:
    """Which cells a variation draws anew: a share of all, by seed or the least certain first.

    Args:
        height, width: of the grid.
        strength: 0...1, the share, rounded to whole cells and at least one.
        seed: of the choice.
        certainty: float [height, width]; the cells with the lowest are taken. None chooses by the seed.

    Returns:
        bool [height, width].
    """
    check_range("strength", strength, 0.0, 1.0)
    count = max(round(strength * height * width), 1)
    generator = torch.Generator().manual_seed(seed % 2**64)
    rank = torch.rand(height * width, generator=generator) if certainty is None else certainty.flatten()
    cells = torch.zeros(height * width, dtype=torch.bool)
    cells[rank.argsort(stable=True)[:count]] = True
    return cells.view(height, width)


def one_grid(tokens: ImageTokens, name: str = "tokens") -> torch.Tensor:
    """The only grid of tokens. Raises InputError where there are several."""
    if len(tokens.grids) != 1:
        raise InputError(name, f"{len(tokens.grids)} images", "one image", "Take one of them first.")
    return tokens.grids[0]


def _in_cells(name: str, pixels: int, least: int = 0) -> int:
    if isinstance(pixels, bool) or not isinstance(pixels, int) or not least <= pixels <= MAX_SIDE or pixels % PIXELS:
        expected = f"a multiple of {PIXELS} from {least} to {MAX_SIDE}"
        raise InputError(name, f"{pixels!r} pixels", expected, "A token covers 32 x 32 pixels.")
    return pixels // PIXELS


def _check_canvas(name: str, rows: int, columns: int, remedy: str) -> None:
    """The mask of a canvas has a thousand numbers for each of its cells."""
    if max(rows, columns) * PIXELS > MAX_SIDE:
        raise InputError(name, f"{columns * PIXELS} x {rows * PIXELS} pixels", f"at most {MAX_SIDE} a side", remedy)


def _check_inside(rectangle: tuple[int, int, int, int], grid: torch.Tensor, remedy: str) -> None:
    x, y, columns, rows = rectangle
    if x + columns > grid.shape[1] or y + rows > grid.shape[0]:
        found = f"a rectangle up to {(x + columns) * PIXELS} x {(y + rows) * PIXELS} pixels"
        expected = f"one inside {grid.shape[1] * PIXELS} x {grid.shape[0] * PIXELS}"
        raise InputError("rectangle", found, expected, remedy)
