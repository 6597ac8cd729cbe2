"""Attention kernels behind one call. Heads that share keys are folded into the queries, so no key is copied."""

import importlib.util
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import InputError, check_choice

log = logging.getLogger(__name__)

KINDS = ("auto", "sdpa", "flash_attention_2", "eager")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def choose(kind: str) -> Attend:
    """The function for an attention kind.

    It takes q [rows, heads, n, dim], k and v [rows, kv_heads, m, dim] and mask, bool [rows, 1, n or 1, m] (True where
    a query sees a key) or None for all, and returns [rows, heads, n, dim].

    Raises:
        InputError: an unknown kind, or flash_attention_2 where the flash-attn package is not installed.
    """
    check_choice("attention", kind, KINDS)
    if kind == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            remedy = "Install flash-attn for your CUDA and torch, or choose sdpa, which needs nothing."
            raise InputError("attention", "flash_attention_2 without the flash-attn package", "sdpa", remedy)
        log.info("flash_attention_2 serves rounds without a mask; prompts and padded guidance rows take sdpa")
        return flash
    return eager if kind == "eager" else sdpa


def _fold(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [rows, kv_heads, group * n, dim]


def _fold_mask(mask: torch.Tensor | None, group: int) -> torch.Tensor | None:
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask.repeat(1, 1, group, 1)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """torch's scaled dot product attention, whichever kernel it picks."""
    folded = _fold(q, k.shape[1])
    mask = _fold_mask(mask, q.shape[1] // k.shape[1])
    if mask is not None:
        mask = mask.expand(-1, -1, folded.shape[2], -1)
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The formula written out, softmax in float32: slow, for comparing."""
    scores = (_fold(q, k.shape[1]) @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~_fold_mask(mask, q.shape[1] // k.shape[1]), float("-inf"))
    return (scores.softmax(-1).to(q.dtype) @ v).reshape(q.shape)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """flash-attn for the rounds of a block; a mask (prompts, guidance rows of other lengths) takes sdpa.

    flash-attn has no kernel for arbitrary masks; the README says so beside the option.
    """
    if mask is not None:
        return sdpa(q, k, v, mask)
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
