"""Writes docs/icon.png, the registry's picture of the pack: a grid of tokens, drawn as far as its last rows.

python -m dev.build.build_icon
"""

from PIL import Image, ImageDraw

from .schemas import ROOT

OUT = ROOT / "docs" / "icon.png"
SIDE, SCALE = 400, 4  # drawn larger, then reduced, for smooth corners
EDGE, GAP, ROUND = 34, 6, 9
PAPER, MASKED, HATCH = "#1e1f24", "#2a2c33", "#3d4049"
COLOURS = {
    ".": "#33435c",  # evening sky
    "o": "#e39b3b",  # sun
    "*": "#f4c77b",
    "^": "#588b8b",  # hills
    "v": "#3f6b5a",
    "~": "#5b6fc9",  # water
}
PICTURE = (
    "........",
    "....oo..",
    "...o**o.",
    "^..o**o.",
    "^^^.oo.^",
    "v^^^^^??",
    "~vvv~???",
    "~~??????",
)


def icon() -> Image.Image:
    """The picture, [SIDE, SIDE]; "?" in PICTURE is a token that is still masked."""
    large = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), PAPER)
    draw = ImageDraw.Draw(large)
    cell = (SIDE - 2 * EDGE + GAP) * SCALE / len(PICTURE)
    for row, line in enumerate(PICTURE):
        for column, kind in enumerate(line):
            left, top = EDGE * SCALE + column * cell, EDGE * SCALE + row * cell
            box = (left, top, left + cell - GAP * SCALE, top + cell - GAP * SCALE)
            draw.rounded_rectangle(box, ROUND * SCALE, COLOURS.get(kind, MASKED))
            if kind == "?":
                third = (box[2] - left) / 3
                for start in (left + third / 2, left + third * 1.5):
                    draw.line((start, top + third * 2.3, start + third, top + third * 0.7), HATCH, 4 * SCALE)
    return large.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    icon().quantize(64).save(OUT, optimize=True)
