"""A colour for each image code, for previews: alike features, alike colours."""

import torch

ROUNDS = 6  # of subspace iteration: the colours stop changing visibly after three


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
