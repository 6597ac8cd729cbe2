"""What the miniature makes of the shipped workflows: the pictures that their thumbnails show."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from dev.hosts.in_process import InProcessHost
from dev.hosts.results import of_server
from dev.hosts.scenes import for_miniature
from dev.hosts.server import ComfyServer

from .graph_forms import Workflow

Pictures = dict[int, list[Image.Image]]  # box id -> what that node shows


def run(host: InProcessHost, name: str, api: dict) -> tuple[dict, dict[str, list[tuple]]]:
    """Run a workflow's API form on the miniature; returns the graph as it ran, and the outputs of its nodes."""
    graph = for_miniature(name, api)
    return graph, host.run(graph)


def pictures_of(workflow: Workflow, done: dict[str, list[tuple]]) -> Pictures:
    """The pictures that each node of a run holds, loads, saves or shows."""
    made = {box.id: _images(done[str(box.id)]) for box in workflow.nodes}
    for box in workflow.nodes:
        if box.kind in ("SaveImage", "PreviewImage"):
            made[box.id] = made[box.inputs["images"].id]
    return {number: pictures for number, pictures in made.items() if pictures}


def pictures_on_server(server: ComfyServer, workflow: Workflow) -> Pictures:
    """The pictures that a workflow's nodes load and save, as a real host runs it on the miniature."""
    graph = for_miniature(workflow.name, workflow.api())
    done = server.run(graph)
    made = {}
    for box in workflow.nodes:
        if box.kind == "SaveImage":
            files, _ = of_server({str(box.id): graph[str(box.id)]}, done, server)
        else:
            files = [server.base / "input" / graph[str(box.id)]["inputs"]["image"]] if box.kind == "LoadImage" else []
        made[box.id] = [Image.open(file).convert("RGB") for file in files]
    return {number: pictures for number, pictures in made.items() if pictures}


def _images(calls: list[tuple]) -> list[Image.Image]:
    return [image for call in calls if call for image in _as_images(call[0])]


def _as_images(value: Any) -> list[Image.Image]:
    if isinstance(value, list):
        return [image for one in value for image in _as_images(one)]
    if not torch.is_tensor(value) or value.ndim != 4:
        return []
    return [to_image(image) for image in value]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """float [height, width, 3] in 0...1 as a picture."""
    return Image.fromarray((pixels.numpy() * 255).round().astype(np.uint8))
