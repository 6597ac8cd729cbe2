"""The parts of a checkpoint folder, opened for conversion, and which of their weights go into which file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..backbone.config import BackboneConfig
from ..backbone.keys import converted_key, open_backbone
from ..checkpoint.component import Component
from ..checkpoint.layout import Layout
from ..checkpoint.weights import Slot, companions
from ..decoder.conditioning import open_embedder
from ..decoder.decode import DECODER_FILES, open_decoder
from ..decoder.zimage_form import ZImageComponent
from ..errors import CheckpointError
from ..libraries import without_partial_torchvision
from ..quantization.formats import METADATA_SUFFIX, Dense, Format, FP8Block, encode_metadata
from ..vision.siglip_vq import open_siglip_vq

# Kinds of layers, by what their names contain: the rows of a card's table of errors.
_KINDS = {
    r"\.experts\.gate_up\.": "experts, gate and up",
    r"\.experts\.down\.": "experts, down",
    r"\.shared_experts\.": "shared experts",
    r"\.mlp\.(gate|up|down)_proj": "dense MLP",
    r"\.(attention|attn)\.": "attention",
    r"\.feed_forward\.|\.mlp\.": "MLP",
}


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer as the new folder stores it.

    Attributes:
        name: of the component's, whose dense shape is `shape`.
        key: of the weight in the new file.
        form: how it is stored there.
        slots: the keys of the old files that it is made of.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    form: Format
    slots: Mapping[str, Slot]

    @property
    def keys(self) -> dict[str, str]:
        """Suffix -> key of each stored tensor, with the metadata beside them."""
        return companions(self.key, self.form, self.shape)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Key -> shape and type of each stored tensor, with the metadata beside them."""
        stored = {self.keys[suffix]: value for suffix, value in self.form.tensors(self.shape).items()}
        metadata = self.metadata
        return (
            stored if metadata is None else stored | {self.keys[METADATA_SUFFIX]: (tuple(metadata.shape), torch.uint8)}
        )

    @property
    def metadata(self) -> torch.Tensor | None:
        """What is stored under `comfy_quant`."""
        said = self.form.metadata(self.shape)
        return None if said is None else encode_metadata(said)


@dataclass(frozen=True)
class NewFile:
    """A safetensors file to be written: its path in the new folder, the part that it belongs to, and its weights."""

    path: Path
    part: str
    weights: tuple[Weight, ...]


def open_parts(layout: Layout, config: BackboneConfig) -> dict[str, Component]:
    """The parts whose layers can be quantized, headers checked and no weights read; as far as the folder has them."""
    parts = {"backbone": open_backbone(layout.backbone_files(), config)}
    with without_partial_torchvision():
        if layout.has("image_tokenizer"):
            parts["image_tokenizer"] = open_siglip_vq(layout.require("image_tokenizer"))
        if layout.has("sigvq"):
            width = open_embedder(layout.require("sigvq")).module.outer.out_features
            for part in ("decoder", "decoder-turbo"):
                if layout.has(part):
                    parts[part] = open_decoder(layout.require(part), width)
    return parts


def new_files(part: str, component: Component, form: Format | None) -> list[NewFile]:
    """The files that a part's weights go into: of the backbone one a layer, of the others one.

    Args:
        form: of the layers that can be quantized; None keeps them as they are stored.

    Raises:
        CheckpointError: layers that are quantized already, or a decoder under Z-Image's own names.
    """
    if isinstance(component, ZImageComponent):
        found, expected = "a decoder in Z-Image's own form", "one under diffusers' names"
        raise CheckpointError(part, found, expected, "Convert the released checkpoint.")
    forms = {slot.stored for slot in component.slots.values()}
    quantized = [one.name for one in forms if not isinstance(one, Dense | FP8Block)]
    if quantized:
        remedy = "Quantizing twice adds both errors: convert the checkpoint that this one was made from."
        raise CheckpointError(part, f"layers in {quantized[0]}", "bf16 or FP8 weights", remedy)
    by_name: dict[str, dict[str, Slot]] = {}
    for key, slot in component.slots.items():
        by_name.setdefault(slot.name, {})[key] = slot
    shapes = {name: tuple(tensor.shape) for name, tensor in component.module.state_dict().items()}
    weights = [
        Weight(name, _key(part, name, slots), shapes[name], _form(name, component, form, slots), slots)
        for name, slots in by_name.items()
    ]
    if part != "backbone":
        name = DECODER_FILES[0] if "decoder" in part else "image_tokenizer.safetensors"
        return [NewFile(Path(part, name), part, tuple(weights))]
    layers: dict[int, list[Weight]] = {}
    last = max(_layer(weight.name) for weight in weights) + 1
    for weight in weights:
        layer = _layer(weight.name)
        layers.setdefault(last if layer < 0 else layer, []).append(weight)
    return [
        NewFile(Path(f"model-{number:05}-of-{len(layers):05}.safetensors"), part, tuple(layers[layer]))
        for number, layer in enumerate(sorted(layers), 1)
    ]


def kind(name: str) -> str:
    """What sort of layer a weight belongs to; "" for what is never quantized."""
    return next((word for pattern, word in _KINDS.items() if re.search(pattern, name)), "")


def _layer(name: str) -> int:
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _key(part: str, name: str, slots: Mapping[str, Slot]) -> str:
    """A weight's key in the new file: the backbone's as released, but for whole banks; the others' do not change."""
    if part != "backbone":
        return next(iter(slots))
    return converted_key(name)


def _form(name: str, component: Component, form: Format | None, slots: Mapping[str, Slot]) -> Format:
    stored = next(iter(slots.values())).stored
    wanted = form if form is not None and name in component.quantizable else stored
    return replace(wanted, part_rows=component.quantizable.get(name, 0)) if isinstance(wanted, FP8Block) else wanted
