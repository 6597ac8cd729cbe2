"""Blueprints: the chains that people build most, as subgraphs that the front end offers as single nodes.

ComfyUI lists every `subgraphs/*.json` of a pack among its nodes; an older one passes them over. Written by
`python -m dev.build.build_workflows`.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from .graph_forms import Box, Column, Workflow
from .schemas import ROOT, Schema

OUT = ROOT / "subgraphs"
CATEGORY = "LLaDA-Uni"
FROM_OUTSIDE, TO_OUTSIDE = -10, -20  # what the front end calls the two ends of a subgraph
END_WIDTH, SLOT, HEIGHT = 120, 20, 320


@dataclass(frozen=True)
class Blueprint:
    """A chain of boxes as one node.

    Attributes:
        name: as the front end lists it, and of the file.
        description: one sentence.
        aliases: other words that find it.
        boxes: the chain, from left to right.
        inputs: (label, box, name of its input): what the node shows.
        outputs: (label, box, name of its output).
    """

    name: str
    description: str
    aliases: tuple[str, ...]
    boxes: tuple[Box, ...]
    inputs: tuple[tuple[str, Box, str], ...]
    outputs: tuple[tuple[str, Box, str], ...]


def blueprints() -> list[Blueprint]:
    """Draw, edit and ask."""
    loader = Box("LLaDAUniLoader", {"checkpoint": "LLaDA2.0-Uni"})
    sample = Box("LLaDAUniSample", {"model": loader, "prompt": "A lighthouse in fog, watercolour"})
    decode = Box("LLaDAUniDecode", {"model": loader, "tokens": sample}, after="randomize")
    draw = Blueprint(
        "Draw (LLaDA-Uni)",
        "Draws a picture from a prompt with LLaDA2.0-Uni.",
        ("text to image", "t2i", "LLaDA2.0-Uni"),
        (loader, sample, decode),
        (
            ("prompt", sample, "prompt"),
            ("width", sample, "width"),
            ("height", sample, "height"),
            ("thinking", sample, "thinking"),
            ("seed", decode, "seed"),
            ("checkpoint", loader, "checkpoint"),
        ),
        (("image", decode, "image"), ("thinking", sample, "thinking")),
    )
    loader = Box("LLaDAUniLoader", {"checkpoint": "LLaDA2.0-Uni"})
    encode = Box("LLaDAUniEncode", {"model": loader})
    prompt = "Turn it into a watercolour painting"
    sample = Box("LLaDAUniSample", {"model": loader, "prompt": prompt, "guidance": 4.0, "references": encode})
    decode = Box("LLaDAUniDecode", {"model": loader, "tokens": sample}, after="randomize")
    edit = Blueprint(
        "Edit (LLaDA-Uni)",
        "Changes a picture as an instruction says, with LLaDA2.0-Uni.",
        ("image edit", "image to image", "LLaDA2.0-Uni"),
        (loader, encode, sample, decode),
        (
            ("image", encode, "image"),
            ("instruction", sample, "prompt"),
            ("guidance", sample, "guidance"),
            ("seed", decode, "seed"),
            ("checkpoint", loader, "checkpoint"),
        ),
        (("image", decode, "image"),),
    )
    loader = Box("LLaDAUniLoader", {"checkpoint": "LLaDA2.0-Uni"})
    answer = Box("LLaDAUniImageQA", {"model": loader, "question": "Describe this picture."})
    ask = Blueprint(
        "Ask (LLaDA-Uni)",
        "Answers a question about a picture with LLaDA2.0-Uni.",
        ("caption", "describe image", "image to text", "VQA", "LLaDA2.0-Uni"),
        (loader, answer),
        (("image", answer, "image"), ("question", answer, "question"), ("checkpoint", loader, "checkpoint")),
        (("answer", answer, "answer"),),
    )
    return [draw, edit, ask]


def graph(blueprint: Blueprint, schemas: dict[str, Schema]) -> dict:
    """The form that the front end reads: a graph of one node, whose class is the subgraph that comes with it."""
    workflow = Workflow(blueprint.name, [Column([box]) for box in blueprint.boxes], schemas)
    inner = workflow.graph()
    nodes = {node["id"]: node for node in inner["nodes"]}
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(keys, link, strict=True)) for link in inner["links"]]
    ids = iter(range(len(links) + 1, len(links) + 100))
    last = blueprint.boxes[-1]
    ends = {
        "inputNode": {
            "id": FROM_OUTSIDE,
            "bounding": [-2 * END_WIDTH, 0, END_WIDTH, SLOT * (len(blueprint.inputs) + 2)],
        },
        "outputNode": {
            "id": TO_OUTSIDE,
            "bounding": [last.at[0] + last.size[0] + END_WIDTH, 0, END_WIDTH, SLOT * (len(blueprint.outputs) + 2)],
        },
    }
    inputs, shown, outputs, made = [], [], [], []
    for index, (label, box, name) in enumerate(blueprint.inputs):
        slots = nodes[box.id]["inputs"]
        slot = next(n for n, entry in enumerate(slots) if entry["name"] == name)
        kind, number = slots[slot]["type"], next(ids)
        slots[slot]["link"] = number
        links.append(dict(zip(keys, (number, FROM_OUTSIDE, index, box.id, slot, kind), strict=True)))
        at = [-END_WIDTH - SLOT, SLOT * (index + 1)]
        identity = _uuid(blueprint, f"input {label}")
        inputs.append({"id": identity, "name": label, "type": kind, "linkIds": [number], "label": label, "pos": at})
        entry = {"name": label, "label": label, "type": kind}
        if "widget" in slots[slot]:
            entry["widget"] = {"name": label}
            shown.append([str(box.id), name])
        made.append({**entry, "link": None})
    for index, (label, box, name) in enumerate(blueprint.outputs):
        slots = nodes[box.id]["outputs"]
        slot = next(n for n, entry in enumerate(slots) if entry["name"] == name)
        kind, number = slots[slot]["type"], next(ids)
        slots[slot]["links"] = [*(slots[slot]["links"] or []), number]
        links.append(dict(zip(keys, (number, box.id, slot, TO_OUTSIDE, index, kind), strict=True)))
        at = [ends["outputNode"]["bounding"][0] + SLOT, SLOT * (index + 1)]
        identity = _uuid(blueprint, f"output {label}")
        outputs.append({"id": identity, "name": label, "type": kind, "linkIds": [number], "label": label, "pos": at})
    subgraph = {
        "id": _uuid(blueprint, "subgraph"),
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": max(nodes),
            "lastLinkId": max(link["id"] for link in links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        **ends,
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": inner["nodes"],
        "groups": [],
        "links": links,
        "extra": {},
        "category": CATEGORY,
        "description": blueprint.description,
    }
    node = {
        "id": len(nodes) + 1,  # all ids of a graph and of its subgraphs differ
        "type": subgraph["id"],
        "pos": [0, 0],
        "size": [400, HEIGHT],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": made,
        "outputs": [{"name": entry["name"], "type": entry["type"], "links": None} for entry in outputs],
        "properties": {"proxyWidgets": shown, "cnr_id": "llada-uni"},
        "widgets_values": [],
        "title": blueprint.name,
    }
    return {
        "id": _uuid(blueprint, "blueprint"),
        "revision": 0,
        "last_node_id": node["id"],
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {
            "BlueprintDescription": blueprint.description,
            "BlueprintSearchAliases": list(blueprint.aliases),
        },
    }


def _uuid(blueprint: Blueprint, what: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"llada-uni/{blueprint.name}/{what}"))


def files(schemas: dict[str, Schema]) -> dict[Path, str]:
    """Every blueprint's file."""
    made = {OUT / f"{blueprint.name}.json": graph(blueprint, schemas) for blueprint in blueprints()}
    return {path: json.dumps(form, indent=2) + "\n" for path, form in made.items()}
