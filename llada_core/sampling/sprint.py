"""SPRINT's two halves: which prefix positions to keep, and how many tokens to unmask (docs/model.md, SPRINT)."""

import torch

from ..options import Sprint


def least_accepted(remaining: torch.Tensor, steps_left: int | torch.Tensor) -> torch.Tensor:
    """Tokens to accept at least in a round: the rest, int64 [samples], spread over the rounds left, rounded up."""
    return -(-remaining // steps_left)


def scores(key_norms: torch.Tensor, confidence: torch.Tensor, visible: torch.Tensor, alpha: float) -> torch.Tensor:
    """s_i = alpha K_i + (1 - alpha) c_i, K_i the key norm relative to the mean over visible positions.

    Args:
        key_norms, confidence: float32 [rows, prefix].
        visible: bool [rows, prefix], False for padding.
        alpha: 0...1.

    Returns:
        float32 [rows, prefix].
    """
    total = (key_norms * visible).sum(-1, keepdim=True)
    relative = key_norms * visible.sum(-1, keepdim=True) / total.clamp_min(1e-12)
    return alpha * relative + (1 - alpha) * confidence


def kept_positions(
    score: torch.Tensor, visible: torch.Tensor, is_image: torch.Tensor, sprint: Sprint
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The prefix positions that a block's later rounds still see: text and image ranked apart.

    Args:
        score: float32 [rows, prefix].
        visible, is_image: bool [rows, prefix].
        sprint: the ratios; each modality keeps floor(ratio x count) positions of each row.

    Returns:
        Positions int64 [rows, m] in order and bool [rows, m] saying which are real (rows with fewer are filled up),
        or None where every visible position is kept.
    """
    ratios = (sprint.text_keep_ratio, sprint.image_keep_ratio)
    text_ratio, image_ratio = (sprint.keep_ratio if ratio is None else ratio for ratio in ratios)
    keep = torch.zeros_like(visible)
    for ratio, group in ((text_ratio, visible & ~is_image), (image_ratio, visible & is_image)):
        counts = group.sum(-1, keepdim=True)
        rank = score.masked_fill(~group, float("-inf")).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        keep |= group & (rank < (counts * ratio + 1e-3).floor())  # 0.53 x 100 is 53, whatever float32 makes of it
    if bool((keep == visible).all()):
        return None
    most = int(keep.sum(-1).max())
    order = keep.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    return order, keep.gather(-1, order)
