"""Triton kernels behind the output head: the best token and its probability in one pass over the logits.

In torch's forms a softmax over a vocabulary of text writes as many float32 numbers as there are logits, several times.
"""

import torch
import triton
import triton.language as tl

from ..quantization.start import start

SPLITS = 8  # programs that share a row: few rows would leave most of a GPU idle
BLOCK = 2048


@triton.jit
def best_kernel(logits_ptr, largest_ptr, total_ptr, place_ptr, width, share, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of `share` logits of a row each: the largest, where it is, and the sum of exp(logit - largest), [rows, SPLITS].

    Grid: (rows, SPLITS). Each lane keeps its own until the end. A logit that is not finite makes the sum not finite.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, width)
    lane = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    place = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in tl.range(begin, end, BLOCK):
        at = first + lane
        x = tl.load(logits_ptr + row * width + at, mask=at < end, other=float("-inf")).to(tl.float32)
        higher = x > largest
        now = tl.where(higher, x, largest)
        # A lane that has seen nothing yet has minus infinity, from which nothing can be taken off.
        safe = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        place = tl.where(higher, at, place)
        largest = now
    most = tl.max(largest, 0)
    safe = tl.where(most == float("-inf"), 0.0, most)
    to = row * SPLITS + tl.program_id(1)
    tl.store(largest_ptr + to, most)
    tl.store(total_ptr + to, tl.sum(total * tl.exp(largest - safe), 0))
    tl.store(place_ptr + to, tl.min(tl.where(largest == most, place, width), 0))


@triton.jit
def merge_kernel(largest_ptr, total_ptr, place_ptr, chosen_ptr, probability_ptr, width, SPLITS: tl.constexpr):
    """The first of the best of all parts of a row, and its softmax probability. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    largest = tl.load(largest_ptr + row * SPLITS + split)
    most = tl.max(largest, 0)
    safe = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.load(total_ptr + row * SPLITS + split) * tl.exp(largest - safe), 0)
    place = tl.load(place_ptr + row * SPLITS + split)
    chosen = tl.min(tl.where(largest == most, place, width - 1), 0)
    tl.store(chosen_ptr + row, chosen.to(tl.int64))
    tl.store(probability_ptr + row, 1 / total)


def best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [..., width], contiguous -> the index of the first of the largest, int64 [...], and its probability under
    their softmax, float32 [...]; not finite where a logit is not."""
    shape, width = logits.shape[:-1], logits.shape[-1]
    rows, device = shape.numel(), logits.device
    largest = torch.empty(rows, SPLITS, dtype=torch.float32, device=device)
    total, place = torch.empty_like(largest), torch.empty_like(largest, dtype=torch.int32)
    chosen = torch.empty(shape, dtype=torch.int64, device=device)
    probability = torch.empty(shape, dtype=torch.float32, device=device)
    share = triton.cdiv(width, SPLITS)
    start(
        best_kernel,
        (rows, SPLITS),
        logits,
        largest,
        total,
        place,
        width,
        share,
        SPLITS=SPLITS,
        BLOCK=BLOCK,
        num_warps=8,
    )
    start(merge_kernel, (rows,), largest, total, place, chosen, probability, width, SPLITS=SPLITS, num_warps=1)
    return chosen, probability
