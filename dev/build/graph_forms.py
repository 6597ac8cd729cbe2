"""One description of a workflow, and the two forms ComfyUI reads: a graph for the canvas, an API graph for the queue.

A workflow is columns of boxes from left to right. Positions follow from the boxes' sizes, so nothing can overlap.
"""

import math
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from .schemas import Input, Schema

GAP_X, GAP_Y = 64, 52  # between boxes; the title bar of 30 above a box lies inside GAP_Y
GROUP_EDGE, GROUP_TITLE, GROUP_FOOT = 24, 90, 50  # around its boxes; the newer canvas draws them about 30 higher
SLOT, WIDGET = 20, 24  # heights of a row
CONTROL = "control_after_generate"
COLOURS = {
    "LLaDAUniLoader": ("#223", "#335"),
    "LLaDAUniSample": ("#232", "#353"),
    "LLaDAUniInterleave": ("#232", "#353"),
    "LLaDAUniImageQA": ("#232", "#353"),
    "LLaDAUniSampling": ("#2a363b", "#3f5159"),
    "LLaDAUniSprint": ("#2a363b", "#3f5159"),
    "LLaDAUniEncode": ("#323", "#535"),
    "LLaDAUniDecode": ("#323", "#535"),
    "LLaDAUniDecoderModel": ("#223", "#335"),
    "LLaDAUniConditioning": ("#323", "#535"),
    "LLaDAUniDecoderGuidance": ("#2a363b", "#3f5159"),
    "LLaDAUniDecoderSchedule": ("#2a363b", "#3f5159"),
    "MarkdownNote": ("#432", "#653"),
}
WIDE = ("LLaDAUniSample", "LLaDAUniInterleave", "LLaDAUniImageQA", "SaveImage", "PreviewImage", "PreviewAny")
WIDTHS = dict.fromkeys(WIDE, 390) | {"MarkdownNote": 340}
NARROW = 310  # of all others
BESIDE_THE_MAP = 316  # below the first of a fourth column: the front end's map lies over that corner
HEIGHTS = {"LoadImage": 330, "SaveImage": 400, "PreviewImage": 400, "PreviewAny": 300}  # what shows a picture or text
PROMPT_LINE, PROMPT_LETTER, PROMPT_LEAST = 16, 6.6, 56  # pixels of a line and a letter of a prompt; of its box
ROOM = {  # below or beside the widgets, for what a node shows while it runs and after: progress, text, preview
    # The newer canvas wants more than the classic one, and live previews of the host's samplers more than either.
    "LLaDAUniSample": 346,
    "LLaDAUniVary": 330,
    "LLaDAUniInterleave": 396,
    "LLaDAUniDecode": 320,
    "LLaDAUniEncode": 70,
    "LLaDAUniPadTokens": 40,
    "LLaDAUniImageQA": 74,
    "LLaDAUniSaveTokens": 90,
    "LLaDAUniPreviewTokens": 28,
    "LLaDAUniLoader": 34,  # what the newer canvas needs for its line "Show advanced inputs"
    "LLaDAUniJoinTokens": 22,
    "LLaDAUniDecoderModel": 26,
    "LLaDAUniConditioning": 22,
    "LLaDAUniDecoderGuidance": 22,
    "LLaDAUniDecoderSchedule": 26,
    "LoraLoaderModelOnly": 30,
    "KSampler": 246,
    "SamplerCustom": 230,
}
NOTE_LETTERS = 60  # in a line of a note
ON_THE_FORM = {  # the widgets that app mode shows of a node
    "LoadImage": ("image",),
    "LLaDAUniSample": ("prompt", "width", "height"),
    "LLaDAUniInterleave": ("instruction", "max_images"),
    "LLaDAUniImageQA": ("question",),
    "LLaDAUniDecode": ("seed",),
    "KSampler": ("seed", "denoise"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
}
RESULTS = ("SaveImage", "PreviewImage", "PreviewAny")
NOT_WITH_REFERENCES = ("width", "height")  # of an edit, whose first reference gives the size


@dataclass
class Box:
    """A node of a workflow.

    Attributes:
        kind: node id of the class.
        inputs: what differs from the schema's defaults. A Box, or (Box, output name), is a link.
        title: shown instead of the class's name.
        after: what the front end does to the seed after each run: fixed, increment, decrement, randomize.
        height: pixels, where the usual ones are too few.
    """

    kind: str
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    after: str = "fixed"
    height: int = 0
    id: int = 0
    at: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)


@dataclass
class Note(Box):
    """A note on the canvas, in Markdown; not part of the API form."""

    text: str = ""


def note(title: str, text: str) -> Note:
    """A note with a title, high enough for its text."""
    shown = re.sub(r"\]\(.*?\)", "]", text)
    lines = sum(math.ceil(len(line) / NOTE_LETTERS) for line in shown.split("\n"))
    height = lines * 16 + shown.count("\n\n") * 12 + 50
    return Note("MarkdownNote", title=title, text=text, height=height)


def _prompt_height(text: str, width: int) -> int:
    """Of a box that shows the whole text, and a line more."""
    letters = (width - 40) / PROMPT_LETTER
    lines = sum(max(math.ceil(len(line) / letters), 1) for line in text.split("\n"))
    return max((lines + 1) * PROMPT_LINE + 12, PROMPT_LEAST)


@dataclass
class Column:
    """Boxes one above the other, framed by a group when it has a title."""

    boxes: list[Box]
    title: str = ""
    colour: str = "#3f789e"


@dataclass
class Workflow:
    """A named workflow: columns from left to right, and the schemas of the nodes in it."""

    name: str
    columns: list[Column]
    schemas: dict[str, Schema]

    def __post_init__(self):
        nodes = [box for column in self.columns for box in column.boxes]
        for number, box in enumerate(sorted(nodes, key=lambda box: isinstance(box, Note)), start=1):
            box.id = number
        x = 0
        for column in self.columns:
            width = max(WIDTHS.get(box.kind, NARROW) for box in column.boxes)
            last = len(self.columns) > 3 and column is self.columns[-1]
            y = 0
            for box in column.boxes:
                beside = last and y and column.boxes[0].kind != column.boxes[1].kind
                box.at, box.size = (x, y), (min(width, BESIDE_THE_MAP) if beside else width, self._height(box, width))
                y += box.size[1] + GAP_Y
            x += width + GAP_X

    @property
    def boxes(self) -> list[Box]:
        """Every box, notes last, in the order of their ids."""
        return sorted((box for column in self.columns for box in column.boxes), key=lambda box: box.id)

    @property
    def nodes(self) -> list[Box]:
        """Every box that runs."""
        return [box for box in self.boxes if not isinstance(box, Note)]

    def _height(self, box: Box, width: int) -> int:
        if box.height or box.kind in HEIGHTS:
            return box.height or HEIGHTS[box.kind]
        schema = self.schemas[box.kind]
        sockets = sum(not i.is_widget for i in schema.inputs)
        widgets = [i for i in schema.inputs if i.is_widget]  # the classic canvas shows the folded ones too
        rows = len(widgets) + sum(bool(i.options.get(CONTROL)) for i in widgets)
        prompts = [i for i in widgets if i.options.get("multiline")]
        slots = max(sockets, len(schema.outputs))
        room = 16 + ROOM.get(box.kind, 0)
        written = sum(_prompt_height(str(box.inputs.get(i.name, "")), width) for i in prompts)
        return slots * SLOT + (rows - len(prompts)) * WIDGET + written + room

    def value(self, box: Box, spec: Input) -> Any:
        """The value of a widget: the workflow's own, or the schema's default, as the front end would fill it.

        Of a widget that is linked it is the default, which shows nowhere and is not used.
        """
        if spec.name in box.inputs and not self.link(box, spec):
            return box.inputs[spec.name]
        if spec.type == "COMBO":
            return spec.options.get("default", spec.options["options"][0])
        if spec.options.get("default") is None:
            raise ValueError(f"{self.name}: {box.kind}.{spec.name} has no default; the workflow must give a value")
        return spec.options["default"]

    def link(self, box: Box, spec: Input) -> tuple[Box, int] | None:
        """Where a socket, or a widget that takes a link, is linked from: box and index of its output."""
        given = box.inputs.get(spec.name)
        source, name = given if isinstance(given, tuple) else (given, None)
        if not isinstance(source, Box):
            return None
        names = [output.name for output in self.schemas[source.kind].outputs]
        return source, names.index(name) if name else 0

    def api(self) -> dict:
        """The form that POST /prompt takes."""
        graph = {}
        for box in self.nodes:
            schema, inputs = self.schemas[box.kind], {}
            for spec in schema.inputs:
                if source := self.link(box, spec):
                    inputs[spec.name] = [str(source[0].id), source[1]]
                elif spec.is_widget:
                    inputs[spec.name] = self.value(box, spec)
            title = box.title or schema.name
            graph[str(box.id)] = {"class_type": box.kind, "inputs": inputs, "_meta": {"title": title}}
        return graph

    def graph(self) -> dict:
        """The form that the canvas opens (litegraph 0.4)."""
        links = [
            [0, source[0].id, source[1], box.id, slot, self.schemas[source[0].kind].outputs[source[1]].type]
            for box in self.nodes
            for slot, spec in enumerate(self._slots(box))
            if (source := self.link(box, spec))
        ]
        for number, link in enumerate(links, start=1):
            link[0] = number
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"llada-uni/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.boxes),
            "last_link_id": len(links),
            "nodes": [self._node(box, order, links) for order, box in enumerate(self._order())],
            "links": links,
            "groups": self._groups(),
            "config": {},
            "extra": {"linearData": self.form()},
            "version": 0.4,
        }

    def form(self) -> dict:
        """What the front end's app mode shows: some widgets as a form, and the nodes whose results appear."""
        inputs = [
            [box.id, name]
            for box in self._order()
            for name in ON_THE_FORM.get(box.kind, ())
            if not (name in NOT_WITH_REFERENCES and "references" in box.inputs)
        ]
        return {"inputs": inputs, "outputs": [box.id for box in self.nodes if box.kind in RESULTS]}

    def _slots(self, box: Box) -> list[Input]:
        """Inputs in the order in which the front end shows them: sockets, then widgets."""
        return sorted(self.schemas[box.kind].inputs, key=lambda spec: spec.is_widget)

    def _order(self) -> list[Box]:
        """Boxes in the order they run, notes first."""
        done: list[Box] = [box for box in self.boxes if isinstance(box, Note)]

        def visit(box: Box) -> None:
            for spec in self.schemas[box.kind].inputs:
                if (source := self.link(box, spec)) and source[0] not in done:
                    visit(source[0])
            if box not in done:
                done.append(box)

        for box in self.nodes:
            visit(box)
        return done

    def _node(self, box: Box, order: int, links: list[list]) -> dict:
        node = {"id": box.id, "type": box.kind, "pos": list(box.at), "size": list(box.size), "flags": {}}
        node |= {"order": order, "mode": 0}
        if isinstance(box, Note):
            node |= {"inputs": [], "outputs": [], "title": box.title, "properties": {}, "widgets_values": [box.text]}
        else:
            node |= self._sockets(box, links)
            if box.title:
                node["title"] = box.title
            package = {"cnr_id": "llada-uni"} if box.kind.startswith("LLaDAUni") else {"cnr_id": "comfy-core"}
            node["properties"] = {**package, "Node name for S&R": box.kind}
            node["widgets_values"] = self._widget_values(box)
        if box.kind in COLOURS:
            node["color"], node["bgcolor"] = COLOURS[box.kind]
        return node

    def _sockets(self, box: Box, links: list[list]) -> dict:
        inputs = []
        for slot, spec in enumerate(self._slots(box)):
            entry = {"name": spec.name, "type": spec.type}
            if spec.optional and not spec.is_widget:
                entry["shape"] = 7  # how the front end marks an optional socket
            if spec.is_widget:
                entry["widget"] = {"name": spec.name}
            entry["link"] = next((n for n, _, _, to, at, _ in links if (to, at) == (box.id, slot)), None)
            inputs.append(entry)
        outputs = []
        for slot, output in enumerate(self.schemas[box.kind].outputs):
            entry = {"name": output.name, "type": output.type}
            if output.is_list:
                entry["shape"] = 6  # a list
            entry["links"] = [n for n, start, at, *_ in links if (start, at) == (box.id, slot)] or None
            outputs.append(entry)
        return {"inputs": inputs, "outputs": outputs}

    def _widget_values(self, box: Box) -> list:
        values = []
        for spec in self.schemas[box.kind].inputs:
            if spec.is_widget:
                values.append(self.value(box, spec))
                if spec.options.get(CONTROL):
                    values.append(box.after)
                if spec.options.get("image_upload"):
                    values.append("image")  # the upload button's
        return values

    def _groups(self) -> list[dict]:
        groups = []
        for column in self.columns:
            if column.title:
                left, top = column.boxes[0].at
                last = column.boxes[-1]
                width = max(box.size[0] for box in column.boxes) + 2 * GROUP_EDGE
                height = last.at[1] + last.size[1] - top
                bounding = [left - GROUP_EDGE, top - GROUP_TITLE, width, height + GROUP_TITLE + GROUP_FOOT]
                shown = {"title": column.title, "bounding": bounding, "color": column.colour}
                groups.append({"id": len(groups) + 1, **shown, "font_size": 24, "flags": {}})
        return groups
