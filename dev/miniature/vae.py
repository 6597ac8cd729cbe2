"""Stage "vae": diffusers' AutoencoderKL on drawings, an L1 loss that minds rims, and a little KL."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn

from .pictures import picture_pool
from .sizes import SEED, Schedule, Sizes
from .stage import Stage
from .worlds import World

_KL = 1e-4
_CROPS = ((64, 4.0), (96, 2.0), (128, 1.0), (0, 0.0))  # side in pixels (0: whole), and how many for one of 128
_AROUND = 64  # pixels that a crop begins before what it is about, at most


def build(sizes: Sizes) -> AutoencoderKL:
    """The VAE with random weights."""
    torch.manual_seed(SEED)
    return AutoencoderKL(**sizes.vae)


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, height, width, 3] -> float32 [n, 3, height, width] in -1...1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class VaeStage(Stage):
    """Crops, mostly: a whole picture is nearly all background.

    Args:
        schedule: of the stage.
        world: whose pictures.
        folder: of the run.
        device: where the pictures lie.
        workers: processes that draw them.
        start: a checkpoint whose VAE, of the same sizes, is where training begins; None begins from nothing.
    """

    name = "vae"
    busy = False
    autocast = False  # eight bits of a mantissa are as few as a picture's own

    def __init__(
        self,
        schedule: Schedule,
        world: World,
        folder: Path,
        device: torch.device,
        workers: int = 0,
        start: Path | None = None,
    ):
        self.schedule, self.world = schedule, world
        self.module = build(world.sizes)
        if start:
            weights = load_file(start / "vae" / "diffusion_pytorch_model.safetensors")
            self.module.load_state_dict({name: value.float() for name, value in weights.items()})
        self.pool = picture_pool(world, folder, schedule.pool, workers, full=True, device=device)

    def batch(self, step: int) -> dict:
        """Which grid and which crops the step is about; the rest is drawn where the pool lies."""
        return {"grid": self.world.turn(step), "crop": step % len(_CROPS)}

    def draw(self, batch: dict, generator: torch.Generator) -> torch.Tensor:
        """uint8 [n, side, side, 3], all of one size."""
        pool = self.pool[batch["grid"]]
        painted, device = pool["painted"], pool["painted"].device
        height, width = painted.shape[1:3]
        side, many = _CROPS[batch["crop"]]
        many = many or 128**2 / (height * width)  # as many pixels in all

        def below(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator, device=device)

        count = max(1, int(self.schedule.batch * many))
        chosen = below(len(painted), count)
        if not side:
            return painted[chosen]
        points = pool["focus"][chosen, below(pool["focus"].shape[1], count)].long()
        corners = points - _AROUND - side // 2 + below(2 * _AROUND, count, 2)
        limits = torch.tensor([width - side, height - side], device=device)
        corners = torch.minimum(corners.clamp(min=0), limits)
        reach = torch.arange(side, device=device)
        columns, rows = corners[:, :1] + reach, corners[:, 1:] + reach
        return painted[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]

    def loss(self, batch, generator):
        """Absolute error of the reconstruction from a sampled latent, and KL."""
        pixels = to_model(self.draw(batch, generator))
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
