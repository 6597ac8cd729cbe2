"""The pictures of the help pages: cards in a workflow's own columns, links between them, a sign for what each holds."""

import re

from PIL import Image, ImageDraw, ImageFont

from .graph_forms import COLOURS, Box, Note, Workflow

SCALE = 4  # drawn larger, then reduced, for smooth edges
PAPER, INK, LINE, BRIGHT = "#1e1f24", "#f2f2f2", "#8a8f9c", "#ffb347"
TYPE_COLOURS = {
    "LLADA_UNI": "#5b6fc9",
    "LLADA_TOKENS": "#e39b3b",
    "IMAGE": "#64b5f6",
    "STRING": "#8fbf8f",
    "LLADA_SAMPLING": "#4fa3a5",
    "LLADA_SPRINT": "#c46fa8",
    "MODEL": "#b39ddb",
    "VAE": "#ff6e6e",
    "CONDITIONING": "#ffa931",
    "LATENT": "#ff9cf9",
    "MASK": "#81c784",
    "SAMPLER": "#8fa6b5",
    "SIGMAS": "#8fa6b5",
}
CELLS = ("#c8553d", "#e39b3b", "#588b8b", "#5b6fc9", "#9a5ba6", "#7fae5f", "#d9c27e")
PICTURES = (
    "LoadImage",
    "SaveImage",
    "PreviewImage",
    "LLaDAUniDecode",
    "LLaDAUniPreviewTokens",
    "VAEDecode",
    "ImageScale",
    "ImageCompositeMasked",
)
TEXTS = ("PreviewAny", "LLaDAUniImageQA")
OPTIONS = (
    "LLaDAUniSampling",
    "LLaDAUniSprint",
    "LLaDAUniDecoderGuidance",
    "LLaDAUniDecoderSchedule",
    "KSamplerSelect",
    "ScaleROPE",
    "LoraLoaderModelOnly",
)
STACKS = ("LLaDAUniLoader", "LLaDAUniDecoderModel")
DRAWING = ("LLaDAUniSample", "LLaDAUniInterleave", "KSampler", "SamplerCustom")

_CAMEL = re.compile("(?<=[a-z])(?=[A-Z])")  # where the name of a class may be broken

Frame = tuple[int, int, int, int]  # left, top, right, bottom


def draw_help(workflow: Workflow, kind: str) -> Image.Image:
    """A picture of 800x360 with the nodes' full names; nodes of that kind are marked."""
    names = {box.id: workflow.schemas[box.kind].name for box in workflow.nodes}
    marked = {box.id for box in workflow.nodes if box.kind == kind}
    return _draw(workflow, (800, 360), names, 17, marked).quantize(64)


def _draw(
    workflow: Workflow,
    size: tuple[int, int],
    names: dict[int, str],
    points: int,
    marked: set[int],
) -> Image.Image:
    picture = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    pen = ImageDraw.Draw(picture)
    frames = _frames(workflow, picture.size)
    for box in workflow.nodes:
        for slot, spec in enumerate(i for i in workflow.schemas[box.kind].inputs if not i.is_widget):
            if source := workflow.link(box, spec):
                kind = workflow.schemas[source[0].kind].outputs[source[1]].type
                _link(pen, frames[source[0].id], frames[box.id], slot, TYPE_COLOURS[kind])
    font = ImageFont.load_default(points * SCALE)
    for box in workflow.nodes:
        inside = _card(pen, box, frames[box.id], names[box.id], font, box.id in marked)
        if inside:
            _sign(pen, box.kind, inside)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _columns(workflow: Workflow) -> list[list[Box]]:
    """The nodes of each column that has any."""
    columns = [[box for box in column.boxes if not isinstance(box, Note)] for column in workflow.columns]
    return [column for column in columns if column]


def _frames(workflow: Workflow, size: tuple[int, int]) -> dict[int, Frame]:
    """Where each card goes: the columns share the width, the cards of a column the height."""
    columns = _columns(workflow)
    pitch = size[0] / (len(columns) + 0.2)
    width = min(int(pitch * 0.76), size[0] // 4)
    frames = {}
    for number, column in enumerate(columns):
        left = int(pitch * (number + 0.6) - width / 2)
        row = size[1] / (len(column) + 0.25)
        height = int(min(row * 0.8, width * 1.6))
        for index, box in enumerate(column):
            top = int(row * (index + 0.625) - height / 2)
            frames[box.id] = (left, top, left + width, top + height)
    return frames


def _link(pen: ImageDraw.ImageDraw, start: Frame, end: Frame, slot: int, colour: str) -> None:
    if start[0] == end[0]:  # the same column: from the side round to the side
        start = (start[0], start[1], start[0], start[3])
    x0, y0 = start[2], (start[1] + start[3]) / 2
    x1, y1 = end[0], end[1] + (end[3] - end[1]) * (0.4 + 0.14 * slot)
    bend = max(abs(x1 - x0) / 2, 14 * SCALE) * (-1 if start[0] == end[0] else 1)
    points = []
    for step in range(61):
        t = step / 60
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
        points.append((a * x0 + b * (x0 + bend) + c * (x1 - abs(bend)) + d * x1, (a + b) * y0 + (c + d) * y1))
    pen.line(points, fill=colour, width=2 * SCALE, joint="curve")


def _card(pen: ImageDraw.ImageDraw, box: Box, frame: Frame, name: str, font, marked: bool) -> Frame | None:
    """Draw a card and its name; returns the square that is left for what it holds, where there is room."""
    left, top, right, bottom = frame
    dark, light = COLOURS.get(box.kind, ("#2b2d33", "#454852"))
    edge, corner = (BRIGHT, 3) if marked else (LINE, 1), 6 * SCALE
    pen.rounded_rectangle(frame, corner, fill=_hex(light), outline=edge[0], width=edge[1] * SCALE)
    lines = wrap(name, font, right - left - 8 * SCALE)
    height = int(font.size * 1.25)
    head = top + height * len(lines) + 5 * SCALE
    inner = edge[1] * SCALE
    pen.rounded_rectangle((left + inner, top + inner, right - inner, head), corner - inner, fill=_hex(dark))
    for number, line in enumerate(lines):
        middle = ((left + right) // 2, top + 3 * SCALE + number * height + height // 2)
        pen.text(middle, line, fill=INK, font=font, anchor="mm")
    side = min(right - left, bottom - head) - 12 * SCALE
    if side <= 12 * SCALE:
        return None
    x, y = (left + right - side) // 2, (head + bottom - side) // 2
    return x, y, x + side, y + side


def _sign(pen: ImageDraw.ImageDraw, kind: str, frame: Frame) -> None:
    """What the node holds: a picture, text, options, a stack for the model, else a grid of tokens."""
    left, top, right, bottom = frame
    side = right - left
    if kind in PICTURES:
        pen.rectangle(frame, fill="#8fb8de")
        pen.ellipse((left + side * 0.6, top + side * 0.12, left + side * 0.84, top + side * 0.36), fill="#f7dc6f")
        hill = [(left, bottom), (left + side * 0.38, top + side * 0.4), (left + side * 0.78, bottom)]
        pen.polygon(hill, fill="#4f7d57")
        pen.polygon(
            [(left + side * 0.4, bottom), (left + side * 0.72, top + side * 0.58), (right, bottom)], fill="#6b9a6f"
        )
    elif kind in TEXTS:
        for number, share in enumerate((1, 0.85, 0.95, 0.6)):
            y = top + side * (0.12 + 0.22 * number)
            pen.rectangle((left, y, left + side * share, y + side * 0.1), fill="#dfe3e8")
    elif kind in OPTIONS:
        for number, share in enumerate((0.3, 0.75, 0.5)):
            y, x = top + side * (0.2 + 0.3 * number), left + side * share
            pen.line((left, y, right, y), fill="#dfe3e8", width=2 * SCALE)
            pen.ellipse((x - side * 0.09, y - side * 0.09, x + side * 0.09, y + side * 0.09), fill=BRIGHT)
    elif kind in STACKS:
        for number, colour in enumerate(("#5b6fc9", "#7f90dc", "#a9b5ec")):
            y = top + side * (0.08 + 0.3 * number)
            pen.rounded_rectangle((left, y, right, y + side * 0.24), 2 * SCALE, fill=colour)
    else:
        _grid(pen, frame, masked=kind in DRAWING)


def _grid(pen: ImageDraw.ImageDraw, frame: Frame, masked: bool) -> None:
    left, top, right, _ = frame
    count = 5
    cell = (right - left) / count
    for row in range(count):
        for column in range(count):
            x, y = left + column * cell, top + row * cell
            place = (x, y, x + cell - SCALE, y + cell - SCALE)
            if masked and row * count + column > 14 and (row + column) % 2:
                pen.rectangle(place, outline="#9aa0ad", width=SCALE)
            else:
                pen.rectangle(place, fill=CELLS[(row * 4 + row * row + column + column * column * 2) % len(CELLS)])


def wrap(text: str, font, width: int) -> list[str]:
    """Lines of whole words that fit; a word that does not fit alone is broken at a hyphen, or a capital letter."""
    lines: list[str] = []
    whole = text.replace("-", "- ").split()
    for word in [part for one in whole for part in ([one] if font.getlength(one) <= width else _CAMEL.split(one))]:
        glue = "" if lines and lines[-1].endswith("-") else " "
        joined = lines[-1] + glue + word if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _hex(colour: str) -> str:
    return "#" + "".join(c * 2 for c in colour[1:]) if len(colour) == 4 else colour
