"""Writes docs/miniature.png: what the miniature makes of the first held-out prompts with at most one picture.

python -m dev.build.build_gallery
"""

from PIL import Image, ImageDraw, ImageFont

from benchmarks.quality import Quality, examples
from dev.hosts.scenes import CHECKPOINT
from dev.miniature.world import render
from llada_core.engine import LLaDAUni
from llada_core.image_tokens import ImageTokens

from .schemas import ROOT
from .showcase import to_image

OUT = ROOT / "docs" / "miniature.png"
COLUMNS, TILE, GAP, CAPTION = 4, 208, 24, 92
PAPER, INK, PALE = "#1e1f24", "#f2f2f2", "#9aa0ad"
SEED = 1  # of the prompts; the figures are measured with 0

Tile = tuple[Image.Image, str, str]  # picture, what was asked, what was said


def tiles(model: LLaDAUni) -> list[Tile]:
    """Four drawings, two edits with what they began from, and two stories or questions."""

    quality = Quality(model, 0, 0)

    def picture(tokens: ImageTokens) -> Image.Image:
        return to_image(model.decode(tokens)[0])

    found: list[Tile] = []
    for made in examples("draw", COLUMNS, SEED):
        rows, columns = made.frames[-1][1].grid
        found.append((picture(model.generate(made.instruction, 32 * rows, 32 * columns).tokens), made.instruction, ""))
    for made in [one for one in examples("edit", 9, SEED) if len(one.references) == 1][:2]:
        before = render(made.references[0])
        tokens = model.generate(made.instruction, references=quality.encode(made.references, "edit")).tokens
        found += [(before, "before", ""), (picture(tokens), made.instruction, "")]
    for made in [one for one in examples("understand", 9, SEED) if len(one.references) == 1][:2]:
        answer = model.answer(made.instruction, quality.encode(made.references, "understand"), max_new_tokens=128).text
        found.append((render(made.references[0]), made.instruction, answer))
    (story,) = [one for one in examples("story", 9, SEED) if len(one.frames) == 3][:1]
    told = model.interleave(story.instruction, 4)
    said = [part.strip() for part in told.text.split("\n\n") if part and not part.startswith("[image")]
    for index, grid in enumerate(told.tokens.grids[:2] if told.tokens else ()):
        words = ImageTokens((grid,), model.codebook_size)
        found.append((picture(words), story.instruction if index == 0 else "", said[index]))
    return found


def draw(shown: list[Tile]) -> Image.Image:
    """All tiles with their texts, row by row."""
    rows = -(-len(shown) // COLUMNS)
    size = (GAP + COLUMNS * (TILE + GAP), GAP + rows * (TILE + CAPTION))
    canvas = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for number, (picture, asked, said) in enumerate(shown):
        x = GAP + number % COLUMNS * (TILE + GAP)
        y = GAP + number // COLUMNS * (TILE + CAPTION)
        small = picture.resize((TILE, TILE * picture.height // picture.width), Image.Resampling.LANCZOS)
        top = y + TILE - small.height
        canvas.paste(small, (x, top))
        pen.rectangle((x - 1, top - 1, x + TILE, y + TILE), outline=PALE)
        y += TILE + 6
        for text, colour in ((asked, PALE), (said, INK)):
            for line in _lines(text, font):
                pen.text((x, y), line, fill=colour, font=font)
                y += 16
    return canvas


def _lines(text: str, font) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= TILE:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def gallery() -> Image.Image:
    """The picture, from the shipped checkpoint."""
    return draw(tiles(LLaDAUni(ROOT / "checkpoints" / CHECKPOINT)))


if __name__ == "__main__":
    gallery().quantize(128).save(OUT, optimize=True)
