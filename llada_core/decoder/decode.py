"""Tokens -> pixels: the semantic decoder and the VAE behind two calls that a host can stand between.

docs/model.md, Files; Decoding. Sizes of grids are in tokens; a grid [h, w] decodes to 32·h × 32·w pixels.
"""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.component import Component, build_on_meta, known_fields, need_counts
from ..checkpoint.weights import Slot, TensorFiles, need, plan, read_json
from ..errors import CheckpointError, InputError
from ..image_tokens import UPSAMPLING
from ..nonfinite import FiniteWatch, nonfinite_error
from ..options import Decoding
from ..progress import ProgressCallback
from ..quantization.choices import quantizable
from .flow import guide, noise_stream, normal_times, sample_normal, sample_turbo, turbo_times
from .zimage_form import ZImageComponent, check_zimage_form, is_zimage_form

if TYPE_CHECKING:  # importing diffusers takes seconds
    from diffusers import AutoencoderKL

    from .transformer import SemanticDecoder

log = logging.getLogger(__name__)

DECODER_FILES = ("decoder_model.safetensors", "model.safetensors")  # as released, as some mirrors name it
VAE_FILE = "diffusion_pytorch_model.safetensors"
AXES_LENS = (32768, 1024, 1024)  # positions of conditioning, rows and columns; the file's own are too few
LATENTS = 4  # latents a token covers, each way, once up-sampled
VAE_FACTOR = 8  # pixels a latent covers, each way
VAE_TILE = 64  # latents each way of a tile, when memory does not suffice for the whole: 512 pixels

DECODER_COUNTS = ("dim", "in_channels", "n_heads", "n_layers", "n_refiner_layers")


def decoder_file(folder: Path) -> Path:
    """The weights of decoder/ or decoder-turbo/; a path that does not exist where there are none."""
    return next((folder / name for name in DECODER_FILES if (folder / name).is_file()), folder / DECODER_FILES[0])


def open_decoder(folder: Path, features: int) -> Component:
    """decoder/ or decoder-turbo/ of a checkpoint, headers checked and no weights read.

    Args:
        folder: with config.json and decoder_model.safetensors (or model.safetensors).
        features: width of the SigVQ features (`SigVQEmbedder`'s).

    Returns:
        Component of a `transformer.SemanticDecoder`; one that refuses to load where the file is in Z-Image's own form,
        as hosts write it, which only they read.

    Raises:
        CheckpointError: a file is missing, damaged or of another model.
    """
    label = folder.name
    config = read_json(label, folder / "config.json")
    need_counts(label, config, *DECODER_COUNTS)
    from .transformer import PATCH, SemanticDecoder

    patches = config.get("all_patch_size", [PATCH]), config.get("all_f_patch_size", [1])
    if patches != ([PATCH], [1]):
        found = f"all_patch_size {patches[0]}, all_f_patch_size {patches[1]}"
        expected = f"[{PATCH}] and [1]"
        raise CheckpointError(f"{label}: config.json", found, expected, "Download config.json again.")
    names = inspect.signature(SemanticDecoder.__init__).parameters
    fields = known_fields(label, config, names) | {"axes_lens": list(AXES_LENS), "cap_feat_dim": features}
    module = build_on_meta(label, lambda: SemanticDecoder(**fields))
    source = TensorFiles(label, [decoder_file(folder)])
    if is_zimage_form(source.entries):
        check_zimage_form(source.entries, module.state_dict(), label)
        return ZImageComponent(module, source, {})
    slots = plan(module, source, lambda key: Slot(_renamed(key)))
    return Component(
        module,
        source,
        slots,
        keep_float32=lambda name: name.endswith("_pad_token"),  # they may hold numbers that float16 cannot
        quantizable=quantizable("decoder", module),
    )


def open_vae(folder: Path) -> Component:
    """vae/ of a checkpoint, headers checked and no weights read.

    Args:
        folder: with config.json and diffusion_pytorch_model.safetensors.

    Returns:
        Component of diffusers' AutoencoderKL. Load it as `vae_dtype` says.

    Raises:
        CheckpointError: a file is missing, damaged or of another model.
    """
    label = folder.name
    config = read_json(label, folder / "config.json")
    need_counts(label, config, "latent_channels")
    blocks, _ = need(label, config, "block_out_channels", "scaling_factor")
    if not isinstance(blocks, list) or 2 ** (len(blocks) - 1) != VAE_FACTOR:
        expected = f"one width a block, for {VAE_FACTOR} pixels a latent"
        found = f"block_out_channels {blocks!r}"
        raise CheckpointError(f"{label}: config.json", found, expected, "Download config.json again.")
    from diffusers import AutoencoderKL

    names = inspect.signature(AutoencoderKL.__init__).parameters
    fields = known_fields(label, config, names)
    module = build_on_meta(label, lambda: AutoencoderKL(**fields))
    source = TensorFiles(label, [folder / VAE_FILE])
    return Component(module, source, plan(module, source, Slot), compute_dtype=vae_dtype)


_RELEASED, _LIBRARY = "semantic_embedder.", "cap_embedder."


def _renamed(key: str) -> str:
    """The library's name of a tensor of the decoder's file."""
    return _LIBRARY + key.removeprefix(_RELEASED) if key.startswith(_RELEASED) else key


def released_key(name: str) -> str:
    """The key of one of a decoder's tensors in the release's file."""
    return _RELEASED + name.removeprefix(_LIBRARY) if name.startswith(_LIBRARY) else name


def check_grid(h: int, w: int) -> None:
    """Raise InputError where a grid of h × w tokens has more positions than the decoder's rotary tables."""
    conditioning, rows, columns = AXES_LENS
    # The conditioning, padded to a multiple of 32, counts from 1; the image comes one behind it.
    most = (conditioning - 32) // UPSAMPLING**2
    if h * w > most or UPSAMPLING * h > rows or UPSAMPLING * w > columns:
        expected = f"at most {most} tokens and {rows // UPSAMPLING} a side"
        raise InputError("tokens", f"a grid of {h} x {w}", expected, "Decode a smaller image.")


def decoder_working_bytes(h: int, w: int, dtype: torch.dtype, config: Mapping[str, Any]) -> int:
    """Memory of `sample_latents` beside the weights, from above: bytes for a grid of h × w tokens in `dtype`.

    The peak is in a feed-forward: its input and two tensors of 8/3 · dim for each of 8·h·w positions. The sum that runs
    through the blocks is kept for all of them, half as much for the image alone and for each of two conditionings; in
    float16 it is float32. Attention is taken to be fused; a device without that needs quadratic memory, which nothing
    here allows for.

    Args:
        config: the decoder's (`decoder.config`).
    """
    positions = 2 * (UPSAMPLING**2 * h * w + 32)
    sums = max(dtype.itemsize, 4 if dtype == torch.float16 else 0)
    return int((6.4 * dtype.itemsize + 2.6 * sums) * config["dim"] * positions) + 40 * 2**20


def vae_working_bytes(h: int, w: int, dtype: torch.dtype, config: Mapping[str, Any]) -> int:
    """Memory of `decode_latents` beside the weights, from above: bytes for a grid of h × w tokens in `dtype`.

    The peak is where the last block begins: three maps at the picture's size of the widest width that reaches it. As
    much again is left to the workspace of convolutions.

    Args:
        config: the VAE's (`vae.config`).
    """
    pixels = h * w * (LATENTS * VAE_FACTOR) ** 2
    return 6 * max(config["block_out_channels"][:2]) * pixels * vae_dtype(dtype).itemsize + 32 * 2**20


@torch.no_grad()
def sample_latents(
    decoder: "SemanticDecoder",
    features: torch.Tensor,
    size: tuple[int, int],
    decoding: Decoding,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: ProgressCallback | None = None,
) -> torch.Tensor:
    """Features of a grid's codes -> clean latents, the decoder's part of the work.

    Args:
        decoder: a loaded `SemanticDecoder`, the turbo one where `decoding.turbo`.
        features: [4·h·w, width], `SigVQEmbedder`'s answer; brought to the device here, because a host may have sent
            the embedder away to make room for the decoder.
        size: (h, w) of the grid, in tokens.
        decoding: kind, steps and guidance.
        seed: of this image's noise; image i of a batch has decoding.seed + i.
        device, dtype: where and in what the transformer computes. The latents themselves stay float32 (normal) or
            float64 (turbo).
        progress: called after each round, stage "decoder".

    Returns:
        float32 [1, in_channels, 4·h, 4·w] on the CPU.

    Raises:
        InputError: a grid too large for the decoder, or latents that left the range of `dtype`, a round after they did.
        CheckpointError: latents that are not finite because a weight is not.
    """
    h, w = size
    check_grid(h, w)
    side = LATENTS * h, LATENTS * w
    features = features.to(device, dtype)
    conditionings = [decoder.condition(features, side)]
    if not decoding.turbo and decoding.guidance > 0:
        conditionings.append(decoder.condition(torch.zeros_like(features), side))
    del features
    noise = noise_stream(seed, (1, decoder.config.in_channels, 1, *side))
    x = next(noise).to(device)
    part = "decoder-turbo" if decoding.turbo else "decoder"
    watch = FiniteWatch(lambda: nonfinite_error(part, decoder, dtype, "latents"))

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        given, *without = decoder.velocities(x, t, conditionings)
        v = guide(given, without[0], decoding.guidance) if without else given
        watch.note(v)
        return v

    if decoding.turbo:
        x = sample_turbo(velocity, x, turbo_times(decoding.rounds), noise, progress)
    else:
        x = sample_normal(velocity, x, normal_times(decoding.rounds), progress)
    watch.check()
    return x.squeeze(2).cpu()


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the VAE computes in where the rest computes in `dtype`.

    The Flux family's VAE overflows in float16 (its configuration says force_upcast), so float32 takes its place.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@torch.no_grad()
def decode_latents(
    vae: "AutoencoderKL", latents: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Latents -> the picture. Where memory runs out, once more in tiles of 512 pixels.

    Args:
        vae: a loaded AutoencoderKL, of `vae_dtype(dtype)` unless a host casts its weights.
        latents: [1, latent_channels, height, width], as `sample_latents` gives them.
        device, dtype: where and in what to compute; float16 becomes float32.

    Returns:
        float32 [1, 8·height, 8·width, 3] in 0...1 on the CPU.

    Raises:
        InputError: latents of another number of channels.
    """
    channels = vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        remedy = "Use the VAE of the same checkpoint."
        raise InputError("latents", list(latents.shape), f"[1, {channels}, height, width]", remedy)
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    z = z.to(device, vae_dtype(dtype))
    try:
        image = vae.decode(z, return_dict=False)[0]
    except torch.OutOfMemoryError:
        # Leave this clause before trying again: the error holds every tensor that was alive when it was raised.
        image = None
    if image is None:
        pixels = VAE_TILE * VAE_FACTOR
        log.warning("Not enough memory to decode the picture at once; decoding it in tiles of %d pixels.", pixels)
        image = _decode_tiled(vae, z)
    return (image.float().cpu() + 1).div(2).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def encode_picture(
    vae: "AutoencoderKL", picture: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A picture -> its latents, the mean of what the VAE gives.

    Args:
        vae, device, dtype: as for `decode_latents`.
        picture: float32 [H, W, 3] in 0...1, H and W multiples of 8.

    Returns:
        float32 [1, latent_channels, H / 8, W / 8] on the CPU, in the decoder's scale.
    """
    x = (picture.movedim(-1, 0)[None] * 2 - 1).to(device, vae_dtype(dtype))
    mean = vae.encode(x).latent_dist.mean.float().cpu()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def _decode_tiled(vae: "AutoencoderKL", z: torch.Tensor) -> torch.Tensor:
    # The library's tiles are as large as the VAE's training images, 1024 pixels, which helps no 1024-pixel picture.
    before = vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size
    vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = True, VAE_TILE, VAE_TILE * VAE_FACTOR
    try:
        return vae.decode(z, return_dict=False)[0]
    finally:
        vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = before
