"""The grouped product: sorted pairs (of a token and an expert) through the matrices of their experts.

Forms for every device and format, which agree to rounding: one expert after the other on a CPU, several as one batch
elsewhere, torch's own kernel where it has one. Quantized banks are dequantized some experts at a time.
"""

import sys

import torch
import torch.nn.functional as F

from .formats import Dense, Format, Stored

# Up to so many tokens, every expert's pairs are filled up to the most it can have, which nobody needs to count: a
# product takes about as long as reading its weights anyway.
FEW_TOKENS = 128
# Bytes of the dense weights, and of the padded pairs, that a batch of experts may take.
BATCH_BYTES = 32 * 2**20
# What a batch takes in all: dequantizing passes through float32.
WORKING_BYTES = 6 * BATCH_BYTES


def grouped_product(
    form: Format, stored: Stored, pairs: torch.Tensor, ends: torch.Tensor, most: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """Each pair times the matrix of its expert, in the fastest form without kernels of our own.

    Args:
        form, stored: the bank, where `pairs` is.
        pairs: [n, in], sorted by expert.
        ends: int32 [experts], where the pairs of each expert end.
        most: how many pairs an expert has at most: the number of tokens.
        shape: experts, out, in.

    Returns:
        [n, out] of the pairs' type.
    """
    if isinstance(form, Dense) and can_group(stored["weight"], pairs.dtype):
        return torch._grouped_mm(pairs, stored["weight"].to(pairs.dtype).transpose(1, 2), offs=ends)
    if pairs.device.type == "cpu":
        return _looped(form, stored, pairs, ends, shape)
    return _batched(form, stored, pairs, ends, most if most <= FEW_TOKENS else None, shape)


def waits_for_device(form: Format, weight: torch.Tensor, dtype: torch.dtype, most: int) -> bool:
    """Whether `grouped_product` reads something back from the device for so many tokens."""
    return not (isinstance(form, Dense) and can_group(weight, dtype)) and (
        weight.device.type == "cpu" or most > FEW_TOKENS
    )


def can_group(bank: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for this bank's grouped product as `dtype`: bf16, rows of 16 bytes, Hopper, Blackwell.

    Elsewhere, and on Windows, torch computes it one expert after the other, and reads their sizes back for that.
    """
    if not bank.is_cuda or dtype != torch.bfloat16 or bank.shape[-1] % 8 or bank.shape[-2] % 8:
        return False
    if not hasattr(torch, "_grouped_mm") or torch.version.hip or sys.platform == "win32":
        return False
    return torch.cuda.get_device_capability(bank.device)[0] in (9, 10)


def _looped(
    form: Format, stored: Stored, pairs: torch.Tensor, ends: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """One expert after the other."""
    _, out_features, width = shape
    out = pairs.new_empty(len(pairs), out_features)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            one = {suffix: tensor[expert] for suffix, tensor in stored.items()}
            out[start:end] = F.linear(pairs[start:end], form.dequantize(one, width, pairs.dtype))
            start = end
    return out


def _batched(
    form: Format,
    stored: Stored,
    pairs: torch.Tensor,
    ends: torch.Tensor,
    most: int | None,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Some experts at a time: their pairs filled up to the same number and multiplied as one batch.

    Without `most`, the numbers are read back from the device once, and experts of like numbers go together.
    """
    experts, out_features, width = shape
    starts = F.pad(ends[:-1], (1, 0)).long()
    counts = ends.long() - starts
    if most is None:
        numbers = counts.tolist()
        order = sorted((e for e in range(experts) if numbers[e]), key=lambda e: -numbers[e])
    else:
        numbers, order = [most] * experts, list(range(experts))
    # One row more than there are pairs takes what the padding gives.
    out = pairs.new_empty(len(pairs) + 1, out_features)
    matrix = max(out_features * width * pairs.element_size(), 1)
    while order:
        rows = numbers[order[0]]
        padding = rows * (width + out_features) * pairs.element_size()
        batch, order = _split(order, max(1, BATCH_BYTES // max(matrix, padding)))
        # A slice is a view, where an index copies.
        chosen = slice(batch[0], batch[-1] + 1) if most is not None else torch.tensor(batch, device=pairs.device)
        slots = torch.arange(rows, device=pairs.device)
        index = starts[chosen][:, None] + slots
        index = torch.where(slots < counts[chosen][:, None], index, len(pairs))
        some = {suffix: tensor[chosen] for suffix, tensor in stored.items()}
        dense = form.dequantize(some, width, pairs.dtype)
        padded = pairs[index.clamp(max=len(pairs) - 1)]
        out.index_copy_(0, index.flatten(), torch.bmm(padded, dense.transpose(1, 2)).flatten(0, 1))
    return out[:-1]


def _split(order: list[int], count: int) -> tuple[list[int], list[int]]:
    return order[:count], order[count:]
