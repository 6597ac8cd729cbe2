"""A base folder as a host wants it: models, input and output, with the tiny checkpoint, pictures to edit and a LoRA."""

import copy
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from dev.miniature.world import render

from .scenes import FIRST, LORA, MASK, MASKED, PAINTED, PICTURES, TRIED, tried_files

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests" / "goldens" / "alpha" / "checkpoint"  # random weights, odd sizes: for exact tests
CHECKPOINT_NAME = "tiny"
MINIATURE = ROOT / "checkpoints" / "miniature"
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
    for name, scene in PICTURES.items():
        render(scene).save(base / "input" / name)
    masked(render(FIRST), MASK).save(base / "input" / MASKED)
    for name, tried in TRIED.items():
        for file, scene in zip(tried_files(name), tried.pictures, strict=True):
            picture = render(scene)
            if name in PAINTED:  # over its upper half, where what changes lies
                picture = masked(picture, (0, 0, picture.width, picture.height // 2))
            picture.save(base / "input" / file)
    (base / "models" / "loras").mkdir(exist_ok=True)
    save_file(random_lora(), base / "models" / "loras" / LORA)
    return base


def masked(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """A picture with a part transparent, as the host's mask editor leaves it; box: left, top, right, bottom."""
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, box)
    painted = picture.convert("RGBA")
    painted.putalpha(alpha)
    return painted


def random_lora() -> dict[str, torch.Tensor]:
    """Small random updates of queries and values of the miniature's turbo decoder."""
    width = json.loads((MINIATURE / "decoder-turbo" / "config.json").read_text())["dim"]
    generator = torch.Generator().manual_seed(0)
    layers = [f"transformer.layers.{layer}.attention.{part}" for layer in (1, 2) for part in ("to_q", "to_v")]
    return {
        f"{layer}.{name}.weight": 0.05 * torch.randn(*shape, generator=generator)
        for layer in layers
        for name, shape in (("lora_A", (4, width)), ("lora_B", (width, 4)))
    }


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
            case "LoraLoaderModelOnly":
                inputs |= {"lora_name": LORA, "strength_model": 0.0}  # it is the miniature's
    return graph
