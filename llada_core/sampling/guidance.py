"""Classifier-free guidance over the branches of a sample (docs/model.md, Guidance)."""

from typing import cast

import torch

from ..options import Guidance
from ..prompts import Prompts


def guided_branches(prompts: Prompts, guidance: Guidance) -> list[list[int]]:
    """The prompts that guidance needs: conditional, then without text, then without image.

    One branch where the scales ask for none: text 1 (or 0 when editing) and image 0. Without references the image
    scale has nothing to act on.
    """
    editing = prompts.without_image is not None
    if prompts.without_text is None:
        return [prompts.conditional]
    if prompts.without_image is not None and guidance.image > 0:
        return [prompts.conditional, prompts.without_text, prompts.without_image]
    if guidance.text == 1 or (editing and guidance.text == 0):
        return [prompts.conditional]
    return [prompts.conditional, prompts.without_text]


def combine(x: torch.Tensor, guidance: Guidance | None) -> torch.Tensor:
    """g = u + s_text (c - u) + s_image (u - n), of logits or of the hidden states that they are linear in.

    Args:
        x: float32 [..., branches, n, features], branches as `guided_branches` orders them.
        guidance: not read with one branch.

    Returns:
        [..., n, features].
    """
    c, *others = x.unbind(-3)
    if not others:
        return c
    guidance = cast(Guidance, guidance)  # which several branches come with
    u = others[0]
    g = torch.lerp(u, c, guidance.text)
    return g if len(others) == 1 else g + guidance.image * (u - others[1])


def rescale(g: torch.Tensor, c_std: torch.Tensor, g_std: torch.Tensor, guidance: Guidance) -> torch.Tensor:
    """g drawn back to the spread of c; standard deviations [..., n, 1] over the whole vocabulary."""
    return g * (guidance.rescale * c_std / g_std + 1 - guidance.rescale)
