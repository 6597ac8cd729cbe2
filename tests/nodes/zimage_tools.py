"""For scripts that run inside a real ComfyUI's own modules: importing this enters them and loads the pack.

Usage of such a script: python <script> <ComfyUI folder> <checkpoint> <work folder> [options for ComfyUI].
"""

import dataclasses
import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[2]))
from dev.hosts.inside import enter, pack

COMFYUI, CHECKPOINT, WORK, *OPTIONS = sys.argv[1:]
KEPT = enter(COMFYUI, OPTIONS)
core = importlib.import_module("nodes")
native, zimage, managers, hosted = (
    pack(f"nodes.{name}") for name in ("native_decoder", "host.zimage.decoder", "host.component_manager", "host.model")
)
engine, front, image_tokens = (pack(f"llada_core.{name}") for name in ("engine", "zimage", "image_tokens"))

SEED, FILE = 7, "decoder_model.safetensors"
SETTINGS = {"turbo": (8, 1.0, "lcm"), "normal": (49, 2.0, "euler")}


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference by the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


def open_model(precision: str = "auto", weights: str = "as stored", checkpoint: str = CHECKPOINT):
    """The checkpoint, in the host's memory management."""
    return hosted.HostedModel(Path(checkpoint), managers.HostComponentManager(precision, weights), "auto")


def tokens_of(model, *sizes: tuple[int, int]):
    """Grids of these sizes with codes drawn at random, the same for the same sizes."""
    generator = torch.Generator().manual_seed(sum(h * w for h, w in sizes))
    grids = tuple(torch.randint(0, model.codebook_size, size, generator=generator) for size in sizes)
    return image_tokens.ImageTokens(grids, model.codebook_size)


def load(model, kind: str):
    """A decoder, guided where it is the normal one, and the VAE."""
    decoder, vae = native.DecoderModel.execute(model, kind).result
    return (native.DecoderGuidance.execute(decoder).result[0] if kind == "normal" else decoder), vae


def load_from(model, tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype | None = None):
    """The normal decoder as it would be with these tensors in its file, guided."""
    path = Path(WORK) / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    files = dataclasses.replace(front.decoder_files(model, "normal"), weights=path)
    decoder = zimage.load_decoder(files, front.vae_files(model).config, dtype)
    return native.DecoderGuidance.execute(decoder).result[0]


def draw(model, decoder, tokens, kind: str, seed: int = SEED) -> torch.Tensor:
    """Latents by KSampler's own function, with the scheduler `simple`."""
    positive, negative, latent, *_ = native.TokensToConditioning.execute(model, tokens).result
    steps, cfg, sampler = SETTINGS[kind]
    drawn = core.common_ksampler(decoder, seed, steps, cfg, sampler, "simple", positive, negative, latent)
    return drawn[0]["samples"]
