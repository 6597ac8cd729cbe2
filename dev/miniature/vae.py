"""Stage "vae": diffusers' AutoencoderKL on drawings, an L1 loss that minds rims, and a little KL."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from .sizes import SEED, VAE, Schedule
from .stage import Stage
from .world import GRIDS, TOKEN, centre_of, render, sample_scene

_KL = 1e-4
_CROPS = ((64, 4.0), (96, 2.0), (128, 1.0), (0, 0.25))  # side in pixels (0: whole), and how many for one of 128


def build() -> AutoencoderKL:
    """The VAE with random weights."""
    torch.manual_seed(SEED)
    return AutoencoderKL(**VAE)


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, height, width, 3] -> float32 [n, 3, height, width] in -1...1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class VaeStage(Stage):
    """Crops, mostly: a whole picture is nearly all background."""

    name = "vae"
    autocast = False  # eight bits of a mantissa are as few as a picture's own

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.module = build()

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """pixels uint8 [n, side, side, 3], all of one size."""
        rng = random.Random(SEED * 7919 + step)
        side, many = rng.choice(_CROPS)
        grid = rng.choice(GRIDS)
        pictures = []
        for _ in range(max(1, int(self.schedule.batch * many))):
            scene = sample_scene(rng)
            scene = type(scene)(scene.things, scene.background, grid)
            picture = np.asarray(render(scene))
            if side:
                # Around an object, anywhere from its middle to beyond its rim.
                x, y = centre_of(rng.choice(scene.things).place, grid)
                x, y = x + rng.randint(-2 * TOKEN, TOKEN), y + rng.randint(-2 * TOKEN, TOKEN)
                x, y = (min(max(at, 0), size - side) for at, size in ((x, picture.shape[1]), (y, picture.shape[0])))
                picture = picture[y : y + side, x : x + side]
            pictures.append(picture)
        return {"pixels": torch.from_numpy(np.stack(pictures))}

    def loss(self, batch, generator):
        """Absolute error of the reconstruction from a sampled latent, and KL."""
        pixels = to_model(batch["pixels"])
        latents = self.module.encode(pixels).latent_dist
        noise = torch.randn(latents.mean.shape, generator=generator, device=latents.mean.device)
        back = self.module.decode(latents.mean + latents.std * noise).sample
        # Shapes are told by their rims, which are few pixels.
        rim = (pixels - F.avg_pool2d(pixels, 5, 1, 2, count_include_pad=False)).abs().amax(1, keepdim=True)
        missed = (back - pixels).abs()
        error = (missed * (1 + 10 * rim)).mean()
        kl = 0.5 * (latents.mean**2 + latents.var - 1 - latents.logvar).mean()
        return error + _KL * kl, {"error": missed.mean(), "kl": kl}


@torch.no_grad()
def latents_of(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, height, width, 3] -> the most probable latents [n, 16, height / 8, width / 8], not yet scaled."""
    return vae.encode(to_model(pixels)).latent_dist.mode()
