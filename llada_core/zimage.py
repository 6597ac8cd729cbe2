"""The decoders for a host that runs Z-Image itself (docs/model.md, Decoding): what it has to read, and what to give it.

The transformer is Z-Image's, so a host that knows that architecture can load it with classes of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint.component import Component
from .checkpoint.weights import read_json
from .checks import check_choice
from .decoder.decode import LATENTS, VAE_FILE, decoder_file
from .decoder.flow import WARP, guide, noise_stream
from .decoder.zimage_form import quantize_layers, to_zimage_form
from .engine import LLaDAUni
from .errors import InputError
from .image_tokens import ImageTokens
from .options import MAX_BATCH
from .quantization.choices import asked_form

__all__ = [
    "DECODERS",
    "DecoderFiles",
    "VAEFiles",
    "asked_form",
    "decoder_files",
    "features_of",
    "guide",
    "noise_stream",
    "quantize_layers",
    "to_zimage_form",
    "vae_files",
]

DECODERS = ("turbo", "normal")
_LABELS = {"turbo": "decoder-turbo", "normal": "decoder"}


@dataclass(frozen=True)
class DecoderFiles:
    """A decoder as it lies in a checkpoint.

    Attributes:
        label: "decoder" or "decoder-turbo".
        weights: the safetensors file, in either form (`to_zimage_form`).
        config: its config.json.
    """

    label: str
    weights: Path
    config: Mapping[str, Any]

    @property
    def evaluations(self) -> int:
        """How many it takes by default: 8, or those between 50 times."""
        return 8 if self.label == _LABELS["turbo"] else 49

    @property
    def shift(self) -> float:
        """Of its noise levels: sigma = shift·s / (1 + (shift - 1)·s) for even s from 1 to 0, sigma being 1 - t."""
        return 1.0 if self.label == _LABELS["turbo"] else WARP


@dataclass(frozen=True)
class VAEFiles:
    """The VAE as it lies in a checkpoint.

    Attributes:
        weights: the safetensors file, under diffusers' names.
        config: its config.json.
        component: the same for this engine.
    """

    weights: Path
    config: Mapping[str, Any]
    component: Component


def decoder_files(model: LLaDAUni, decoder: str) -> DecoderFiles:
    """The files of one of DECODERS. Raises InputError for another, CheckpointError where the checkpoint lacks it."""
    check_choice("decoder", decoder, DECODERS)
    label = _LABELS[decoder]
    folder = model.layout.require(label)
    return DecoderFiles(label, decoder_file(folder), read_json(label, folder / "config.json"))


def vae_files(model: LLaDAUni) -> VAEFiles:
    """The VAE's files. Raises CheckpointError where the checkpoint lacks it."""
    folder = model.layout.require("vae")
    return VAEFiles(folder / VAE_FILE, read_json("vae", folder / "config.json"), model.components["vae"])


def features_of(model: LLaDAUni, tokens: ImageTokens) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """A batch of grids of one size -> what a decoder is conditioned on, and the shape of the latents that it fills.

    Returns:
        float32 [grids, 4·h·w, width] on the CPU, and (grids, in_channels, 4·h, 4·w).

    Raises:
        InputError: grids of several sizes, which cannot lie in one batch; more than 64; a grid too large; tokens of
            another codebook.
        CheckpointError: a checkpoint without any decoder, or without the SigVQ embedding.
    """
    sizes = sorted(set(tokens.sizes))
    if len(sizes) > 1:
        found = "grids of " + ", ".join(f"{h} x {w}" for h, w in sizes)
        remedy = "Give each size a node of its own, or use Semantic-Token Decode, which takes them all."
        raise InputError("tokens", found, "grids of one size, as a batch has", remedy)
    if len(tokens.grids) > MAX_BATCH:
        found = f"{len(tokens.grids)} images"
        raise InputError(
            "tokens",
            found,
            f"at most {MAX_BATCH} in a batch",
            "Use Semantic-Token Decode, which takes them one by one.",
        )
    (h, w) = sizes[0]
    has = next((name for name in DECODERS if model.layout.has(_LABELS[name])), DECODERS[0])
    channels = decoder_files(model, has).config["in_channels"]
    return torch.stack(model.features(tokens)).float(), (len(tokens.grids), channels, LATENTS * h, LATENTS * w)
