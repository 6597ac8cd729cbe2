"""Where a tensor of a checkpoint goes in the backbone, in every published form of the keys (docs/model.md, Files)."""

import re
from collections.abc import Iterator
from typing import Any

import torch

from ..checkpoint.component import Component
from ..checkpoint.weights import Slot, TensorFiles, plan
from ..quantization.choices import quantizable
from .config import BackboneConfig
from .model import Backbone

_EXPERT = re.compile(r"(?P<mlp>.+\.mlp)\.experts\.(?:(?P<expert>\d{1,6})\.)?(?P<kind>gate|up|down)_proj(?:\.weight)?")


def open_backbone(files: TensorFiles, config: BackboneConfig) -> Component:
    """The backbone on the meta device, matched with its files. Raises CheckpointError as `plan` does."""
    with torch.device("meta"):
        module = Backbone(config)
    # Gate and up are quantized each by itself, as they are released.
    layers = quantizable(
        "backbone", module, lambda name: config.moe_intermediate_size if name.endswith(".gate_up") else 0
    )
    slots = plan(module, files, lambda key: place(key, config), layers)
    return Component(module, files, slots, keep_float32, quantizable=layers)


def keep_float32(name: str) -> bool:
    """The router works in float32, so its few weights stay there."""
    return name.endswith((".gate.weight", ".expert_bias"))


def place(key: str, config: BackboneConfig) -> Slot:
    """Where a backbone tensor goes.

    Takes per-expert and stacked experts, and the prefixes of the release (`model.`) and of its sibling
    (`model.language_model.`, `model.lm_head.`). Gate and up share one bank: gate first.
    """
    name = key.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    match = _EXPERT.fullmatch(name)
    if match is None:
        return Slot(name)
    bank, rows = _projections(config)[match["kind"]]
    expert = slice(None) if match["expert"] is None else int(match["expert"])
    return Slot(f"{match['mlp']}.experts.{bank}.weight", (expert, rows))


def released_keys(name: str, config: BackboneConfig) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What `place` undoes: the release's keys of one of the module's tensors, and the part of it that each holds."""
    key = converted_key(name)
    stem, banked, rest = key.partition(".experts.")
    if not banked:
        yield key, ()
        return
    for expert in range(config.num_experts):
        for kind, (bank, rows) in _projections(config).items():
            if rest == f"{bank}.weight":
                yield f"{stem}.experts.{expert}.{kind}_proj.weight", (expert, rows)


def converted_key(name: str) -> str:
    """The key of one of the module's tensors in a converted folder, where banks are whole."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _projections(config: BackboneConfig) -> dict[str, tuple[str, slice]]:
    """An expert's projections: the bank that holds each, and its rows there."""
    inner = config.moe_intermediate_size
    return {"gate": ("gate_up", slice(0, inner)), "up": ("gate_up", slice(inner, None)), "down": ("down", slice(None))}
