"""Attention kernels behind one call. Heads that share keys are folded into the queries, so no key is copied."""

import importlib.util
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import check_choice
from ..errors import InputError

log = logging.getLogger(__name__)

KINDS = ("auto", "sdpa", "flash_attention_2", "eager")

PART = 256  # keys that `in_parts` takes at a time

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def choose(kind: str) -> Attend:
    """The function for an attention kind.

    It takes q [rows, heads, n, dim], k and v [rows, kv_heads, m, dim] and `bias`'s form of a mask, or None where every
    query sees every key, and returns [rows, heads, n, dim].

    Raises:
        InputError: an unknown kind, or flash_attention_2 where the flash-attn package is not installed.
    """
    check_choice("attention", kind, KINDS)
    if kind == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            remedy = "Install flash-attn for your CUDA and torch, or choose sdpa, which needs nothing."
            raise InputError("attention", "flash_attention_2 without the flash-attn package", "sdpa", remedy)
        log.info(
            "flash_attention_2 serves rounds without a mask; prompts and padded guidance rows take sdpa, "
            "and rounds do not become CUDA graphs"
        )
        return flash
    return eager if kind == "eager" else sdpa


def _fold(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [rows, kv_heads, group * n, dim]


def bias(mask: torch.Tensor, n: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """A mask as the kernels add it to the scores, made once for all layers.

    Args:
        mask: bool [rows, 1, n or 1, m], True where a query sees a key.
        n: queries.
        group: query heads that share a key head.
        dtype: of q, k and v.

    Returns:
        [rows, 1, group * n, m], 0 where a query sees a key, and elsewhere so low that a softmax gives it nothing. It is
        finite, for a softmax over minus infinities alone is not a number.
    """
    lowest = torch.finfo(dtype).min / 2  # half: kernels multiply by the logarithm of e
    hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return hidden.expand(-1, -1, n, -1).repeat(1, 1, group, 1)


def without_planning(device: torch.device) -> AbstractContextManager:
    """The choice of sdpa's kernels while this is entered.

    cuDNN plans anew for every length of the keys, which changes with every block: a plan takes the processor longer
    than a whole layer takes the GPU.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's scaled dot product attention, whichever kernel it picks."""
    return F.scaled_dot_product_attention(_fold(q, k.shape[1]), k, v, attn_mask=bias).reshape(q.shape)


def in_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same for few queries and many keys, m a multiple of PART, spread over the whole GPU.

    torch's kernels that take a mask walk along all keys in a handful of places at once. Here each walks along PART of
    them, and the parts are merged by their softmax's denominators.
    """
    kv_heads, cut = k.shape[1], (k.shape[2] // PART, PART)
    queries = _fold(q, kv_heads).flatten(0, 1)[:, None].expand(-1, cut[0], -1, -1)  # [rows * kv_heads, parts, ...]
    k, v = (x.unflatten(2, cut).flatten(0, 1) for x in (k, v))
    bias = bias.expand(-1, kv_heads, -1, -1).unflatten(3, cut).transpose(2, 3).flatten(0, 1)
    if q.is_cpu:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, k, v, attn_mask=bias)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(queries, k, v, bias, True)
    share = lse[..., : queries.shape[2], None].softmax(1)
    return (out * share).sum(1).to(q.dtype).reshape(q.shape)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The formula written out, softmax in float32: slow, for comparing."""
    scores = (_fold(q, k.shape[1]) @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1).to(q.dtype) @ v).reshape(q.shape)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """flash-attn for the rounds of a block; a mask (prompts, guidance rows of other lengths) takes sdpa.

    flash-attn has no kernel for arbitrary masks; the README says so beside the option.
    """
    if bias is not None:
        return sdpa(q, k, v, bias)
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
