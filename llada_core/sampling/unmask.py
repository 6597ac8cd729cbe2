"""One round of unmasking: predictions, their confidence, which of them are kept (docs/model.md, Block diffusion)."""

from typing import cast

import torch

from ..options import Sampling


def quota(step: int, steps: int, block_length: int) -> int:
    """Tokens that plain sampling accepts at least in round `step` (from 0) of `steps`: they sum to block_length."""
    return block_length // steps + (step < block_length % steps)


def predict(
    logits: torch.Tensor, sampling: Sampling, kind: str, uniform: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token at every position.

    Args:
        logits: float32 [..., candidates], already guided and restricted.
        sampling: temperature, top_k, top_p.
        kind: "low_confidence" (probability of the chosen token), "top_k_margin" or "neg_entropy".
        uniform: float32 [...], a number in 0...1 for the draw at each position; not read at temperature 0.

    Returns:
        Index of the chosen candidate int64 [...] and its confidence float32 [...].
    """
    if sampling.temperature > 0:
        logits = _truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p)
        probabilities = logits.softmax(-1)
        chosen = _draw(probabilities, cast(torch.Tensor, uniform))
    else:
        probabilities = logits.softmax(-1)
        chosen = logits.argmax(-1)
    if kind == "top_k_margin":
        best = probabilities.topk(2, -1).values
        return chosen, best[..., 0] - best[..., 1]
    if kind == "neg_entropy":
        return chosen, torch.special.entr(probabilities).sum(-1).neg()
    return chosen, probabilities.gather(-1, chosen[..., None])[..., 0]


def _truncate(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        surplus = probabilities.cumsum(-1) - probabilities >= top_p  # the mass before a candidate is already enough
        drop = torch.zeros_like(surplus).scatter_(-1, order, surplus)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def _draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    mass = probabilities.cumsum(-1)
    target = uniform[..., None] * mass[..., -1:]
    chosen = torch.searchsorted(mass, target, right=True)[..., 0]
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(chosen, last)


def accept(confidence: torch.Tensor, masked: torch.Tensor, threshold: float, least: torch.Tensor) -> torch.Tensor:
    """Which masked positions to fix: all above threshold, or the `least` most confident where those are more.

    Args:
        confidence: float32 [samples, n].
        masked: bool [samples, n], positions still open.
        threshold: 0...1.
        least: int64 [samples], at least so many, as far as there are masked ones.

    Returns:
        bool [samples, n].
    """
    ranked = confidence.masked_fill(~masked, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(masked.shape[-1], device=masked.device) < least[:, None]
    best = torch.zeros_like(masked).scatter_(-1, ranked, first)
    return masked & (best | (confidence > threshold))
