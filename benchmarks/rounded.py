"""A checkpoint whose backbone has its weights in fewer bits: the engine's formats, and 3 and 2 bits to compare with."""

from pathlib import Path

import torch
from torch import nn

from llada_core import options
from llada_core.backbone.experts import ExpertBank
from llada_core.engine import LLaDAUni
from llada_core.placement import OneDevice

WEIGHTS = (*options.WEIGHTS, "3 bits", "2 bits")
_GROUP = 64  # columns that share a scale and a zero


def opened(folder: Path, device: str, weights: str = "as stored", dtype: torch.dtype | None = None) -> LLaDAUni:
    """Open a checkpoint on a device.

    Args:
        folder: of the checkpoint.
        device: where it runs.
        weights: one of WEIGHTS, of the backbone.
        dtype: of activations; None takes the files' own.
    """
    ours = weights in options.WEIGHTS
    manager = OneDevice(device, dtype, weights=weights if ours else "as stored")
    model = LLaDAUni(folder, manager)
    if not ours:
        module = manager.place("backbone", model.components["backbone"], lambda dtype: 0).module
        round_weights(module, int(weights.split()[0]))
    return model


@torch.no_grad()
def round_weights(module: nn.Module, bits: int) -> None:
    """Round the matrices of a module's linear layers and banks of experts, but for its head, in place."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | ExpertBank) and not name.endswith("lm_head"):
            layer.weight.copy_(rounded(layer.weight, bits))


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Each group of columns of a row to the nearest of 2 ** bits levels between its least and its greatest number."""
    columns = weight.shape[-1]
    padded = nn.functional.pad(weight.float(), (0, -columns % _GROUP), mode="constant")
    groups = padded.unflatten(-1, (-1, _GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low).clamp(min=1e-12) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).flatten(-2)[..., :columns].to(weight.dtype)
