"""The checkpoint's VAE as the host's: its own class, around the library's model where the host's has other sizes."""

from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import nn

from ....llada_core.zimage import VAEFiles

# What the host's class builds for a file of the Flux family, whatever the file's config.json says.
HOST_SIZES = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "act_fn": "silu",
}
LIBRARY_DEFAULTS = {"layers_per_block": 1, "norm_num_groups": 32, "mid_block_add_attention": True, "act_fn": "silu"}


def load_vae(files: VAEFiles, dtype: torch.dtype | None) -> comfy.sd.VAE:
    """Read the VAE into the host's class.

    Args:
        files: the VAE's.
        dtype: of its weights; None lets the host choose.
    """
    given = LIBRARY_DEFAULTS | dict(files.config)
    if {name: given.get(name) for name in HOST_SIZES} == HOST_SIZES:
        tensors, metadata = comfy.utils.load_torch_file(str(files.weights), return_metadata=True)
        return comfy.sd.VAE(sd=tensors, dtype=dtype, metadata=metadata)
    return SizedVAE(files, dtype)


class SizedVAE(comfy.sd.VAE):
    """The host's VAE around the library's model, for sizes that the host's model cannot have (fewer groups or layers).

    The host's constructor takes the model from the names in a file. It is given the smallest one that it knows, for all
    else that it sets up, and the model is exchanged.
    """

    patcher: comfy.model_patcher.ModelPatcher

    def __init__(self, files: VAEFiles, dtype: torch.dtype | None):
        channels = files.config["latent_channels"]
        sizes = {"double_z": True, "z_channels": channels, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
        sizes |= {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
        smallest: dict[str, Any] = {"ddconfig": sizes, "embed_dim": channels}
        super().__init__(AutoencoderKL(**smallest).state_dict(), config={"params": smallest}, dtype=dtype)
        self.latent_channels = channels
        self.first_stage_model = _Library(files.component.load(self.vae_dtype))
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=self.patcher.offload_device
        )
        self.disable_offload = True  # its layers do not cast weights, and it is small
        self.size = None
        self.model_size()


class _Library(nn.Module):
    """The library's model with the methods that the host calls."""

    model: Any

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] in -1...1 -> the mean of the latents."""
        return self.model.encode(pixels).latent_dist.mode()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents -> [batch, 3, height, width]."""
        return self.model.decode(latents, return_dict=False)[0]
