"""Colours for previews: one for each image code (alike features, alike colours), and those of latents."""

import torch

ROUNDS = 6  # of subspace iteration: the colours stop changing visibly after three
CELLS, CELL = 24, 16  # of the picture that a VAE's colours are learnt from: cells each way, pixels of one


def colours(features: torch.Tensor) -> torch.Tensor:
    """Project features to their three main directions and spread each evenly over 0...255.

    Args:
        features: [codes, width], any floating type.

    Returns:
        uint8 [codes, 3], the same for the same features on every machine, up to rounding.
    """
    x = features.float()
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], 3, generator=generator)
    for _ in range(ROUNDS):
        directions = torch.linalg.qr(x.T @ (x @ directions)).Q
    projected = x @ directions
    ranks = projected.argsort(0).argsort(0).float()
    return (ranks * 255 / max(len(ranks) - 1, 1)).round().to(torch.uint8)


def colour_chart() -> torch.Tensor:
    """A picture to learn a VAE's colours from: cells of random colours, float32 [CELLS * CELL, CELLS * CELL, 3]."""
    cells = torch.rand(CELLS, CELLS, 3, generator=torch.Generator().manual_seed(0))
    return cells.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)


def fit_latents(latents: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """The linear map from latents to colours that is nearest to a picture and its latents.

    Args:
        latents: float32 [1, channels, h, w].
        picture: float32 [H, W, 3] in 0...1, H and W the same multiple of h and w.

    Returns:
        float32 [channels + 1, 3]; the last row is the bias.
    """
    factor = picture.shape[0] // latents.shape[2]
    colour = picture.unflatten(1, (-1, factor)).unflatten(0, (-1, factor)).mean((1, 3)).flatten(0, 1)
    x = torch.cat((latents[0].flatten(1).T, torch.ones(len(colour), 1)), 1)
    return torch.linalg.lstsq(x, colour).solution


def latent_colours(latents: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Latents [1, channels, h, w] as a small picture uint8 [h, w, 3], by `fit_latents`' answer."""
    x = latents[0].movedim(0, -1).to("cpu", torch.float32)
    return ((x @ factors[:-1] + factors[-1]).clamp(0, 1) * 255).round().to(torch.uint8)
