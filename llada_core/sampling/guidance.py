"""Classifier-free guidance over rows of one batch (docs/model.md, Guidance)."""

import torch

from ..options import Guidance
from ..prompts import Prompts


def guided_rows(rows: Prompts, guidance: Guidance) -> list[list[int]]:
    """The prompts that guidance needs: conditional, then without text, then without image.

    One row where the scales ask for none: text 1 (or 0 when editing) and image 0. Without references the image
    scale has nothing to act on.
    """
    editing = rows.without_image is not None
    if rows.without_text is None:
        return [rows.conditional]
    if editing and guidance.image > 0:
        return [rows.conditional, rows.without_text, rows.without_image]
    if guidance.text == 1 or (editing and guidance.text == 0):
        return [rows.conditional]
    return [rows.conditional, rows.without_text]


def merge(logits: torch.Tensor, guidance: Guidance | None) -> torch.Tensor:
    """Logits of all rows float32 [rows, n, vocabulary], rows as `guided_rows` orders them -> [n, vocabulary].

    g = u + s_text (c - u) + s_image (u - n), then drawn back to the spread of c by `rescale`.
    """
    c = logits[0]
    if len(logits) == 1:
        return c
    u = logits[1]
    g = torch.lerp(u, c, guidance.text)
    if len(logits) == 3:
        g = g + guidance.image * (u - logits[2])
    if guidance.rescale > 0:
        ratio = c.std(-1, keepdim=True) / g.std(-1, keepdim=True)
        g = g * (guidance.rescale * ratio + 1 - guidance.rescale)
    return g
