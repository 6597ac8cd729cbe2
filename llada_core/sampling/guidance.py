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


def merge(logits: torch.Tensor, guidance: Guidance | None) -> torch.Tensor:
    """Logits float32 [..., branches, n, vocabulary], as `guided_branches` orders them -> [..., n, vocabulary].

    g = u + s_text (c - u) + s_image (u - n), then drawn back to the spread of c by `rescale`.
    """
    c, *others = logits.unbind(-3)
    if not others:
        return c
    guidance = cast(Guidance, guidance)  # which several branches come with
    u = others[0]
    g = torch.lerp(u, c, guidance.text)
    if len(others) == 2:
        g = g + guidance.image * (u - others[1])
    if guidance.rescale > 0:
        ratio = c.std(-1, keepdim=True) / g.std(-1, keepdim=True)
        g = g * (guidance.rescale * ratio + 1 - guidance.rescale)
    return g
