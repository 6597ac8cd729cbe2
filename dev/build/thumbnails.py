"""Thumbnails of the template browser: what goes into a workflow, what comes out of it, and a sentence.

The front end shows a template's file name and this picture, and no description, so the picture has one.
"""

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dev.hosts.scenes import ENLARGED, MASK, PAINTED, PROMPTS, SAID

from .graph_forms import Workflow
from .pictures import INK, PAPER, wrap

SIZE = 400  # the browser's cards are square
SCALE = 2  # drawn larger, then reduced
STAGE = (16, 46, 384, 314)  # left, top, right, bottom; the browser lays a badge over the strip above
ARROW = 34
PALE, CARD, PAINT = "#aab0bd", "#2b2d33", "#ffb347"
SAMPLED, CHANGED, TOLD, DECODED = "#5f9f5f", "#a077b8", "#e39b3b", "#5b8fc9"  # what a workflow is about
DESCRIPTIONS = {
    "miniature": ("Draw, edit and ask in seconds, with nothing to download", SAMPLED),
    "text-to-image": ("A prompt becomes a picture", SAMPLED),
    "thinking-text-to-image": ("It plans in words before it draws", SAMPLED),
    "edit": ("Change a picture by saying how", CHANGED),
    "edit-two-references": ("Two pictures and a sentence make a third", CHANGED),
    "edit-a-part": ("Paint over a part and have it drawn anew", CHANGED),
    "outpaint": ("Draw what lies beyond the edges", CHANGED),
    "four-variations": ("One picture, and four more like it", SAMPLED),
    "image-qa": ("Ask about a picture", TOLD),
    "story": ("A story in words and pictures", TOLD),
    "sprint-side-by-side": ("One prompt plainly, and with SPRINT in fewer rounds", SAMPLED),
    "turbo-and-normal": ("One set of tokens through both decoders", DECODED),
    "decoder-with-ksampler": ("The decoder in ComfyUI's own samplers", DECODED),
    "edit-keeps-the-photo": ("An edit that keeps the photo's detail", DECODED),
    "edit-in-a-mask": ("Edit inside a mask; all else stays to the last bit", DECODED),
    "larger": ("Twice the trained size, then refined", DECODED),
    "with-lora": ("A LoRA on the decoder", DECODED),
}
ASKED = "make the blue star yellow"  # of `miniature`, whose other prompt its first picture shows

Frame = tuple[int, int, int, int]  # left, top, right, bottom


def draw_thumbnail(workflow: Workflow, shown: dict[int, list[Image.Image]]) -> Image.Image:
    """A picture of 400x400; `shown` are the pictures of a run, by the id of the node."""
    picture = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), PAPER)
    pen = ImageDraw.Draw(picture)
    text, colour = DESCRIPTIONS[workflow.name]
    given = [shown[box.id][0] for box in workflow.nodes if box.kind == "LoadImage"]
    if workflow.name in PAINTED:
        given = [_painted(one) for one in given]
    saves = [box for box in workflow.nodes if box.kind == "SaveImage"]
    made = [(box.title if len(saves) > 1 else "", one) for box in saves for one in shown[box.id]]
    left, top, right, bottom = STAGE
    asked, said = PROMPTS.get(workflow.name, ASKED), SAID.get(workflow.name, "")
    middle = left + (right - left) * (5 if given else 4) // 12
    words = (left, bottom - 58, middle, bottom)
    if given:
        _tiles(picture, pen, [("", one) for one in given], (left, top, middle, bottom - 70))
        _words(pen, asked, words, colour)
    else:
        _words(pen, asked, (left, top + 30, middle, bottom - 30), colour)
    _arrow(pen, middle, (top + bottom) // 2, colour)
    out = (middle + ARROW, top, right, bottom)
    if said and made:
        _tiles(picture, pen, made, (out[0], top, right, bottom - 70))
        _words(pen, said, (out[0], bottom - 58, right, bottom), PALE)
    elif made:
        _tiles(picture, pen, made, out, ENLARGED.get(workflow.name, 1) > 1)
    else:
        _words(pen, said, (out[0], top + 30, right, bottom - 30), PALE)
    font = ImageFont.load_default(21 * SCALE)
    lines = wrap(text, font, (SIZE - 36) * SCALE)
    pen.rectangle((0, 326 * SCALE, 8 * SCALE, SIZE * SCALE), fill=colour)
    for number, line in enumerate(lines):
        pen.text((22 * SCALE, (333 + 28 * number) * SCALE), line, fill=INK, font=font)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _painted(picture: Image.Image) -> Image.Image:
    """A picture with the part marked that is painted over in the host's input folder."""
    marked = picture.copy()
    veil = Image.new("RGB", (MASK[2] - MASK[0], MASK[3] - MASK[1]), PAINT)
    marked.paste(Image.blend(marked.crop(MASK), veil, 0.45), MASK[:2])
    return marked


def _tiles(
    picture: Image.Image,
    pen: ImageDraw.ImageDraw,
    made: list[tuple[str, Image.Image]],
    frame: Frame,
    spread: bool = False,
) -> None:
    """Pictures with their titles, up to three one above the other, more in two columns.

    One alone is no larger than 200 pixels, unless it may spread.
    """
    left, top, right, bottom = frame
    columns = 2 if len(made) > 3 else 1
    rows = -(-len(made) // columns)
    width, height = (right - left) // columns, (bottom - top) // rows
    font = ImageFont.load_default(13 * SCALE)
    for number, (title, one) in enumerate(made):
        row, column = divmod(number, columns)
        room = 18 if title else 0
        limit = (width - 6, height - 8 - room)
        if not spread and len(made) == 1:
            limit = (min(limit[0], 200), min(limit[1], 200))
        small = ImageOps.contain(one, (limit[0] * SCALE, limit[1] * SCALE), Image.Resampling.LANCZOS)
        x = (left + column * width) * SCALE + (width * SCALE - small.width) // 2
        y = (top + row * height + room) * SCALE + ((height - room) * SCALE - small.height) // 2
        picture.paste(small, (x, y))
        pen.rectangle((x, y, x + small.width, y + small.height), outline=PALE, width=SCALE)
        if title:
            pen.text((x, y - 17 * SCALE), title, fill=PALE, font=font)


def _words(pen: ImageDraw.ImageDraw, text: str, frame: Frame, colour: str) -> None:
    """A card with as much of a text as fits."""
    left, top, right, bottom = (side * SCALE for side in frame)
    pen.rounded_rectangle((left, top, right, bottom), 8 * SCALE, fill=CARD, outline=colour, width=2 * SCALE)
    font, pitch = ImageFont.load_default(13 * SCALE), 16 * SCALE
    lines = wrap(" ".join(text.split()), font, right - left - 16 * SCALE)
    room = (bottom - top - 10 * SCALE) // pitch
    if len(lines) > room:
        lines = [*lines[: room - 1], f"{lines[room - 1]} ..."]
    for number, line in enumerate(lines):
        pen.text((left + 8 * SCALE, top + 6 * SCALE + number * pitch), line, fill=INK, font=font)


def _arrow(pen: ImageDraw.ImageDraw, left: int, y: int, colour: str) -> None:
    x0, x1, y = (left + 6) * SCALE, (left + ARROW - 6) * SCALE, y * SCALE
    head = 9 * SCALE
    pen.line((x0, y, x1 - head // 2, y), fill=colour, width=4 * SCALE)
    pen.polygon([(x1, y), (x1 - head, y - head), (x1 - head, y + head)], fill=colour)
