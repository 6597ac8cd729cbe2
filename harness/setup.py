"""A base folder as a host wants it: models, input and output, with the tiny checkpoint and a picture to edit."""

import copy
import shutil
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "tests" / "goldens" / "alpha" / "checkpoint"  # until a trained miniature exists
CHECKPOINT_NAME = "tiny"
EXAMPLE = "example.png"  # the picture that ComfyUI itself brings, and the shipped graphs name
GRAPHS = ROOT / "workflows" / "api"
# Sampling Options with short texts: random weights never end one.
SHORT = {
    "block_length": 32,
    "threshold": 0.95,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "guidance_rescale": 0.7,
    "image_guidance": 0.0,
    "thinking_steps": 32,
    "thinking_length": 64,
}


def make_base(base: Path) -> Path:
    """Fill a folder with all a host needs to run the shipped graphs; returns it, absolute."""
    base = base.resolve()
    for name in ("models", "input", "output", "temp", "custom_nodes", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    target = base / "models" / "llada_uni" / CHECKPOINT_NAME
    if not target.exists():
        shutil.copytree(CHECKPOINT, target)
    draw_example().save(base / "input" / EXAMPLE)
    return base


def draw_example(width: int = 256, height: int = 192) -> Image.Image:
    """A small drawn scene: a red disc and a blue square over a green field."""
    picture = Image.new("RGB", (width, height), (206, 226, 240))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, height * 2 // 3, width, height), fill=(88, 148, 74))
    draw.ellipse((width // 8, height // 4, width // 8 + height // 2, height * 3 // 4), fill=(204, 52, 46))
    draw.rectangle((width * 5 // 8, height * 3 // 8, width * 7 // 8, height * 3 // 4), fill=(48, 82, 178))
    return picture


def for_tiny(graph: dict, side: int = 128) -> dict:
    """A shipped API graph with the tiny checkpoint and small pictures, so that a CPU is done with it in seconds.

    Args:
        graph: node id -> {"class_type", "inputs"}.
        side: pixels of drawn pictures each way; references shrink to a quarter of that area.
    """
    graph = copy.deepcopy(graph)
    for node in list(graph.values()):
        inputs = node["inputs"]
        match node["class_type"]:
            case "LLaDAUniLoader":
                inputs["checkpoint"] = CHECKPOINT_NAME
            case "LLaDAUniSample":
                inputs |= {"width": side, "height": side}
            case "LLaDAUniEncode":
                inputs["pixels"] = side * side // 4
            case "LLaDAUniSampling":
                inputs["thinking_length"] = SHORT["thinking_length"]
            case "LLaDAUniInterleave":
                inputs.setdefault("sampling", ["short", 0])
                graph["short"] = {"class_type": "LLaDAUniSampling", "inputs": dict(SHORT)}
            case "LLaDAUniImageQA":
                inputs["max_new_tokens"] = 64
    return graph
