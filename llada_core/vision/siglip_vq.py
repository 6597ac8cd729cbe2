"""SigLIP-VQ: an image -> its discrete semantic codes (docs/model.md, Parts; Files; Image preprocessing).

The vision tower and the quantizer are transformers' own. Only the way through them is ours: it casts what the library
reads from its weights by hand, so that weights may lie elsewhere than the computation, and searches the codebook in
float32 in slices.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.func import functional_call

from ..checkpoint.component import Component, build_on_meta, known_fields, need_counts
from ..checkpoint.weights import Slot, TensorFiles, need, plan, read_json
from ..errors import CheckpointError, InputError
from ..image_tokens import PATCH
from ..nonfinite import nonfinite_error
from ..quantization.choices import quantizable

LABEL = "image_tokenizer"
CODE_SLICE = 2048  # codes compared at a time: 2,500 tokens x 2,048 codes of 2,048 values take about 100 MB

VISION_COUNTS = ("depth", "hidden_size", "image_size", "in_channels", "intermediate_size", "num_heads", "patch_size")
VISION_OPTIONS = ("attention_bias", "attention_dropout", "hidden_act", "layer_norm_eps", "spatial_merge_size")
VQ_COUNTS = ("embed_dim", "latent_channels", "num_embeddings")
VQ_OPTIONS = ("in_channels",)


class SiglipVQ(nn.Module):
    """The vision tower `visual` (transformers' GlmImageVisionModel) and the quantizer `vqmodel` (GlmImageVQVAE).

    State-dict keys are the file's below its prefix "model.".
    """

    visual: Any  # the library's modules; it names what is in them
    vqmodel: Any

    def __init__(self, visual: nn.Module, vqmodel: nn.Module):
        super().__init__()
        self.visual = visual
        self.vqmodel = vqmodel

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.vqmodel.config.num_embeddings

    @property
    def config(self):
        """The vision tower's configuration."""
        return self.visual.config

    @torch.no_grad()
    def encode(
        self,
        pixels: torch.Tensor,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        after_block: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """One image -> its codes.

        Args:
            pixels: [3, H, W] as `preprocess.Normalisation` leaves them, H and W multiples of 16.
            device, dtype: where and in what to compute; by default where and what the weights are. A host that
                casts weights layer by layer names both.
            after_block: called after each block of the tower; what it raises ends the work. A large image takes
                minutes on a slow device.

        Returns:
            int64 [H / 16, W / 16] on the CPU, codes 0...codebook_size - 1.

        Raises:
            InputError: pixels of another shape, or features that leave the range of `dtype`.
            CheckpointError: features that are not finite because a weight is not.
        """
        channels = self.visual.patch_embed.in_channels
        if pixels.ndim != 3 or pixels.shape[0] != channels or pixels.shape[1] % PATCH or pixels.shape[2] % PATCH:
            expected = f"[{channels}, height, width], both multiples of {PATCH}"
            raise InputError("pixels", list(pixels.shape), expected, "Prepare the image with vision.preprocess.")
        if pixels.numel() == 0:
            raise InputError("pixels", list(pixels.shape), "at least one patch", "Choose an image that is not empty.")
        weight = self.visual.patch_embed.proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        height, width = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
        patches = rearrange(pixels, "c (h p) (w q) -> (h w) c p q", p=PATCH, q=PATCH)
        features = self._features(patches.to(device, dtype), height, width, after_block)
        latents = self.vqmodel.quant_conv(features.T[None, :, :, None])[0, :, :, 0].T
        if not bool(latents.isfinite().all()):
            raise nonfinite_error(LABEL, self, dtype, "features")
        codes = nearest_codes(latents, self.vqmodel.quantize.embedding.weight)
        return codes.view(height, width).cpu()

    def _features(
        self, patches: torch.Tensor, height: int, width: int, after_block: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """Patches [h·w, 3, 16, 16] in raster order -> features [h·w, hidden_size]."""
        device, tokens = patches.device, height * width
        rows, columns = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        hidden = self.visual.patch_embed.proj(patches).flatten(1)
        embeddings = self.visual.embeddings
        # This module reads its weight itself and computes where that lies, so it is lent a copy in the right place.
        hidden = functional_call(
            embeddings,
            {"position_embedding.weight": embeddings.position_embedding.weight.to(hidden)},
            (hidden, [tokens], torch.tensor([[1, height, width]], device=device), rows.flatten(), columns.flatten()),
        )
        bounds = torch.tensor([0, tokens], dtype=torch.int32)  # on the CPU: the blocks read them as numbers
        for block in self.visual.blocks:
            hidden = block(hidden, cu_seqlens=bounds)
            after_block()
        return hidden


def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """For each latent, the code at the smallest distance once both have unit length; of equals the lowest.

    Args:
        latents: [n, d], any floating type; the search runs on its device in float32.
        codebook: [codes, d], anywhere and of any floating type.

    Returns:
        int64 [n].
    """
    latents = F.normalize(latents.float(), dim=-1)
    best = latents.new_full((len(latents),), -torch.inf)
    found = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
    for start in range(0, len(codebook), CODE_SLICE):
        codes = codebook[start : start + CODE_SLICE].to(latents.device, torch.float32)
        # Between unit vectors the smallest distance is the largest product.
        score, index = (latents @ F.normalize(codes, dim=-1).T).max(dim=1)
        found = torch.where(score > best, index + start, found)
        best = torch.maximum(score, best)
    return found


def build(config: Mapping[str, Any]) -> SiglipVQ:
    """The module for image_tokenizer/config.json, on the meta device, in eval mode.

    Raises:
        CheckpointError: a field is absent or wrong, or describes something other than 16-pixel patches.
    """
    from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
    from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

    vision, vq = need(LABEL, config, "vision_config", "vq_config")
    for name, part in (("vision_config", vision), ("vq_config", vq)):
        if not isinstance(part, Mapping):
            found = f"{name} = {part!r}"
            raise CheckpointError(f"{LABEL}: config.json", found, "an object", "Download config.json again.")
    need_counts(LABEL, vision, *VISION_COUNTS)
    need_counts(LABEL, vq, *VQ_COUNTS)
    agree = vision["patch_size"] == PATCH and vision["hidden_size"] == vq["latent_channels"]
    if not agree or vision["hidden_size"] % vision["num_heads"]:
        found = ", ".join(f"{name} {vision[name]}" for name in ("patch_size", "hidden_size", "num_heads"))
        expected = f"patches of {PATCH} and a hidden_size of latent_channels ({vq['latent_channels']}), shared by heads"
        raise CheckpointError(f"{LABEL}: config.json", found, expected, "Download config.json again.")
    vision = known_fields(LABEL, vision, VISION_COUNTS + VISION_OPTIONS)
    vq = known_fields(LABEL, vq, VQ_COUNTS + VQ_OPTIONS)

    def make() -> SiglipVQ:
        visual = GlmImageVisionModel(GlmImageVisionConfig(**vision, attn_implementation="sdpa"))
        return SiglipVQ(visual, GlmImageVQVAE(GlmImageVQVAEConfig(**vq)))

    return build_on_meta(LABEL, make)


def open_siglip_vq(folder: Path) -> Component:
    """image_tokenizer/ of a checkpoint, headers checked and no weights read.

    Args:
        folder: image_tokenizer/, with config.json and image_tokenizer.safetensors.

    Raises:
        CheckpointError: a file is missing, damaged or of another model.
    """
    module = build(read_json(LABEL, folder / "config.json"))
    source = TensorFiles(LABEL, [folder / "image_tokenizer.safetensors"])
    slots = plan(module, source, lambda key: Slot(key.removeprefix("model.")))
    return Component(module, source, slots, quantizable=quantizable(LABEL, module))


def encode_working_bytes(pixels: int, dtype: torch.dtype, config: Any) -> int:
    """Memory of `encode` beside the weights, from above, for an image of so many pixels.

    The peak of a large image is in an MLP: two tensors of its inner width and a few of the hidden one for each patch.
    That of a small one is at the start, where the table of positions is copied, once to where it is needed and once to
    float32. The search of the codebook stays below both.

    Args:
        config: the vision tower's (`SiglipVQ.config`).
    """
    patches = pixels // PATCH**2
    hidden = 8 * patches * config.hidden_size * dtype.itemsize
    table = (config.image_size // PATCH) ** 2 * config.hidden_size * (dtype.itemsize + torch.float32.itemsize)
    return hidden + max(table, 2 * patches * config.intermediate_size * dtype.itemsize)
