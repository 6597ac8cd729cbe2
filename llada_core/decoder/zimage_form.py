"""A decoder's tensors as Z-Image's own release names and fuses them, which is how a host knows that architecture.

The checkpoint's decoders have diffusers' names and one matrix each for queries, keys and values (docs/model.md, Decoder
and vision keys); Z-Image's release has one for all three. Nothing but names and that fusing differs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch

from ..checkpoint.component import Component
from ..errors import CheckpointError, InputError
from ..quantization.formats import METADATA_SUFFIX, Format, FP8Block, Int8, decode_metadata, encode_metadata

_STARTS = {
    "semantic_embedder.": "cap_embedder.",
    "all_x_embedder.2-1.": "x_embedder.",
    "all_final_layer.2-1.": "final_layer.",
}
_PARTS = {
    ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
    ".attention.to_out.0.": ".attention.out.",
}
_SPLIT, _FUSED = (".attention.to_q.", ".attention.to_k.", ".attention.to_v."), ".attention.qkv."
# What is quantized of a decoder (quantization/choices.py), under the release's names.
_LAYER = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(qkv|out)|feed_forward\.w[123])\.weight")
_ANCHOR = "x_pad_token"  # every such file has it, under this name behind whatever prefix a host gave
_REMEDY = "Convert the decoder again, with a scale a row (int8), or use the one that it was made from."


class ZImageComponent(Component):
    """A decoder in the release's form: its structure is known here, but its weights are read by a host alone."""

    @property
    def dtype(self) -> torch.dtype:
        """What it would compute in."""
        return torch.bfloat16

    def load(self, *arguments, **named) -> NoReturn:
        """Raises InputError, whatever is asked for."""
        found, expected = "weights in Z-Image's own form", "weights under diffusers' names"
        remedy = "In ComfyUI use Load Decoder and KSampler; else the decoder that this one was made from."
        raise InputError(self.source.label, found, expected, remedy)


def is_zimage_form(keys: Iterable[str]) -> bool:
    """Whether a file's tensors already have the release's names, whatever prefix a host put in front."""
    return any(key.endswith(f"{_FUSED}weight") for key in keys)


def zimage_name(key: str) -> str:
    """The release's name of a decoder's tensor; the same one for queries, keys and values."""
    for start, wanted in _STARTS.items():
        if key.startswith(start):
            return wanted + key.removeprefix(start)
    for part, wanted in {**_PARTS, **dict.fromkeys(_SPLIT, _FUSED)}.items():
        key = key.replace(part, wanted)
    return key


def check_zimage_form(keys: Iterable[str], names: Iterable[str], label: str) -> None:
    """Raise CheckpointError where a file in the release's form lacks one of a decoder's tensors.

    Args:
        keys: of the file.
        names: of the decoder's tensors, diffusers' ones.
        label: the part.
    """
    keys = list(keys)
    given = {key.removeprefix(_prefix(keys, label)) for key in keys}
    absent = sorted({zimage_name(name) for name in names} - given)
    if absent:
        found = f"no {absent[0]} ({len(absent)} tensors absent)"
        raise CheckpointError(label, found, "every tensor of a decoder", "Convert or download the file again.")


def to_zimage_form(tensors: Mapping[str, torch.Tensor], label: str) -> dict[str, torch.Tensor]:
    """A decoder file's tensors under the release's names; what need not be fused is the very same tensor.

    Args:
        tensors: of either form: dense, in blocks of FP8 (which become bfloat16), or quantized with `comfy_quant` keys.
        label: the part, for errors.

    Raises:
        CheckpointError: no decoder, or queries, keys and values quantized so that one matrix cannot hold them.
    """
    prefix = _prefix(tensors, label)
    plain = _without_blocks({key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    found: dict[str, torch.Tensor] = {}
    for key, tensor in plain.items():
        part = next((part for part in _SPLIT if part in key), None)
        if part is None:
            found[zimage_name(key)] = tensor
        elif part == _SPLIT[0]:
            before, after = key.split(part)
            found[zimage_name(key)] = _fused(plain, before, after, label)
    return found


def quantize_layers(
    tensors: Mapping[str, torch.Tensor], form: Format, compute: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """A decoder's tensors in the release's form with the dense matrices of its blocks stored in another.

    Args:
        form: with `comfy_quant` metadata, as hosts need it.
        compute: where to quantize; results lie where the weights do.
    """
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        layer = key.removesuffix(".weight")
        metadata = form.metadata(tuple(tensor.shape)) if _LAYER.fullmatch(key) else None
        if metadata is None or f"{layer}.{METADATA_SUFFIX}" in tensors:
            found[key] = tensor
            continue
        stored = form.quantize(tensor.to(compute), layer)
        found |= {f"{layer}.{suffix}": value.to(tensor.device) for suffix, value in stored.items()}
        found[f"{layer}.{METADATA_SUFFIX}"] = encode_metadata(metadata)
    return found


def _prefix(keys: Iterable[str], label: str) -> str:
    """What a host put in front of every name; "" for most files."""
    anchor = next((key for key in keys if key.endswith(_ANCHOR)), None)
    if anchor is None:
        raise CheckpointError(label, f"no {_ANCHOR}", "the tensors of a decoder", "Download the file again.")
    return anchor.removesuffix(_ANCHOR)


def _without_blocks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, with weights in blocks of FP8 as bfloat16: no host has that form."""
    suffix = ".weight_scale_inv"
    dense = dict(tensors)
    for key in [key for key in tensors if key.endswith(suffix)]:
        name = key.removesuffix(suffix) + ".weight"
        stored = {"weight": tensors[name], "weight_scale_inv": dense.pop(key)}
        dense[name] = FP8Block().dequantize(stored, tensors[name].shape[-1], torch.bfloat16)
    return dense


def _fused(tensors: Mapping[str, torch.Tensor], block: str, leaf: str, label: str) -> torch.Tensor:
    """The tensor `leaf` of a block's queries, keys and values together."""
    names = [block + part + leaf for part in _SPLIT]
    absent = [name for name in names if name not in tensors]
    if absent:
        raise CheckpointError(label, f"no {absent[0]}", f"it beside {names[0]}", _REMEDY)
    parts = [tensors[name] for name in names]
    if leaf in ("weight", "bias"):
        return torch.cat(parts)
    if leaf == "weight_scale" and _is_int8(tensors.get(f"{block}{_SPLIT[0]}{METADATA_SUFFIX}"), label):
        rows = [len(tensors[f"{block}{part}weight"]) for part in _SPLIT]
        return torch.cat([scale.reshape(-1, 1).expand(n, 1) for scale, n in zip(parts, rows, strict=True)])
    if any(part.shape != parts[0].shape or not torch.equal(part, parts[0]) for part in parts):
        found = f"{block}: queries, keys and values with {leaf} of their own"
        raise CheckpointError(label, found, "quantization that one matrix of them can have", _REMEDY)
    return parts[0]


def _is_int8(metadata: torch.Tensor | None, label: str) -> bool:
    return metadata is not None and decode_metadata(metadata, label).get("format") == Int8.host_format
