"""Which layers are quantized, and to what: the choices of the loader and of the conversion (docs/model.md, Files).

Router, norms, embeddings and the head keep their type, as do the decoders' embedders, modulations and last layers: they
are small beside the rest, or what they compute is not a sum over many inputs.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .formats import Dense, Format, FP8Block, Int4, Int8
from .modules import StoredWeight

# A caller's choice (`options.WEIGHTS`) -> what each part's layers become where their files store more bits.
_ASKED: Mapping[str, Mapping[str, Format]] = {
    "as stored": {},
    "8-bit": {"backbone": Int8(), "decoder": Int8(), "decoder-turbo": Int8()},
    "4-bit": {"backbone": Int4(), "decoder": Int8(), "decoder-turbo": Int8()},
}
# What the conversion offers by name; "keep" stores a part as it is.
FORMS: Mapping[str, Format | None] = {
    "int4": Int4(),
    "int4-128": Int4(128, symmetric=True),
    "int8": Int8(),
    "fp8": FP8Block(),
    "keep": None,
}

# Part -> names of the layers that are quantized.
_LAYERS = {
    "backbone": r"layers\.\d+\.(attention|mlp)\..+",
    "decoder": r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward)\..+",
    "image_tokenizer": r"visual\.blocks\.\d+\.(attn|mlp)\..+",
}
_BITS = {FP8Block: 8, Int8: 8, Int4: 4}


def quantizable(part: str, module: nn.Module, part_rows: Callable[[str], int] = lambda name: 0) -> dict[str, int]:
    """The weights of a part that may be quantized.

    Args:
        part: "backbone", "image_tokenizer" or "decoder", which stands for both decoders.
        module: the part, its layers dense.
        part_rows: layer -> as in `formats.FP8Block`.

    Returns:
        Parameter -> part_rows.
    """
    pattern = re.compile(_LAYERS[part])
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | StoredWeight)]
    return {f"{name}.weight": part_rows(name) for name in layers if pattern.fullmatch(name)}


def asked_form(weights: str, part: str) -> Format | None:
    """What one of `options.WEIGHTS` makes of a part's layers; None leaves them as they are stored."""
    return _ASKED[weights].get(part)


def bits(form: Format) -> int:
    """Bits of a number, scales aside."""
    return form.dtype.itemsize * 8 if isinstance(form, Dense) else _BITS[type(form)]


def holds(device: torch.device, form: Format) -> bool:
    """Whether tensors of a form can lie on a device: some have no 8-bit floating-point type at all."""
    return not isinstance(form, FP8Block) or device.type in ("cpu", "cuda", "xpu", "meta")
