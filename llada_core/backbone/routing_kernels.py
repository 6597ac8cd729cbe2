"""Triton kernels around the experts' products: scores, choice, sorting, summing up. Imported only where used.

Each is one of torch's forms in `experts.py` in one launch; a round has tens of thousands of such short kernels, and a
GPU takes a few microseconds for each however little it does.
"""

import torch
import triton
import triton.language as tl

from ..quantization.launch import capability
from ..quantization.start import start
from .config import BackboneConfig

# Pairs beyond which torch's sort is faster than comparing each with each.
MOST_PAIRS = 16_384
SORTED = 16  # pairs that a program finds the places of


@triton.jit
def logits_kernel(
    x_ptr, weight_ptr, logits_ptr, tokens, experts, width, share,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """logits float32 [splits, tokens, experts], to be summed over splits: x @ weight.T over `share` columns each.

    Grid: (tiles of tokens, tiles of experts, splits). PRECISION "tf32x3" is float32 on matrix units: three products
    of parts, of which x of 16 bits has only one.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, width)
    total = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        at = k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + token[:, None] * width + at[None, :], mask=(token[:, None] < tokens) & (at[None, :] < end), other=0
        )
        weight = tl.load(
            weight_ptr + expert[:, None] * width + at[None, :],
            mask=(expert[:, None] < experts) & (at[None, :] < end),
            other=0,
        )
        total += tl.dot(x.to(tl.float32), tl.trans(weight.to(tl.float32)), input_precision=PRECISION)
    mask = (token[:, None] < tokens) & (expert[None, :] < experts)
    row = tl.program_id(2) * tokens + token
    tl.store(logits_ptr + row[:, None] * experts + expert[None, :], total, mask=mask)


@triton.jit
def choose_kernel(
    logits_ptr, bias_ptr, chosen_ptr, weights_ptr, tokens, factor,
    SPLITS: tl.constexpr, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_TOP: tl.constexpr,
):  # fmt: skip
    """The chosen experts int32 and their weights float32, [tokens, TOP], of a token a program.

    Experts are seen as [GROUPS, EXPERTS // GROUPS], padded to [BLOCK_G, BLOCK_S]. Of equal ones the first is chosen.
    """
    SIZE: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0)
    group = tl.arange(0, BLOCK_G)
    slot = tl.arange(0, BLOCK_S)
    expert = group[:, None] * SIZE + slot[None, :]
    there = (group[:, None] < GROUPS) & (slot[None, :] < SIZE)
    logit = tl.zeros((BLOCK_G, BLOCK_S), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        logit += tl.load(logits_ptr + (split * tokens + token) * EXPERTS + expert, mask=there, other=0)
    biased = 1 / (1 + tl.exp(-logit)) + tl.load(bias_ptr + expert, mask=there, other=0).to(tl.float32)
    biased = tl.where(there, biased, float("-inf"))
    # A group's value is the sum of its two best.
    best, at = tl.max(biased, 1, return_indices=True)
    second = tl.max(tl.where(slot[None, :] == at[:, None], float("-inf"), biased), 1)
    value = best
    if SIZE > 1:
        value = best + second
    value = tl.where(group < GROUPS, value, float("-inf"))
    kept = group < 0
    for _ in tl.static_range(TOP_GROUPS):
        first = tl.argmax(value, 0)
        kept = kept | (group == first)
        value = tl.where(group == first, float("-inf"), value)
    flat = tl.reshape(tl.where(kept[:, None], biased, float("-inf")), (BLOCK_G * BLOCK_S,))
    position = tl.arange(0, BLOCK_G * BLOCK_S)
    column = tl.arange(0, BLOCK_TOP)
    chosen = tl.zeros((BLOCK_TOP,), dtype=tl.int32)
    for i in tl.static_range(TOP):
        first = tl.argmax(flat, 0)
        chosen = tl.where(column == i, first // BLOCK_S * SIZE + first % BLOCK_S, chosen)
        flat = tl.where(position == first, float("-inf"), flat)
    chosen = tl.minimum(chosen, EXPERTS - 1)  # also where numbers that are none hide the best
    logit = tl.zeros((BLOCK_TOP,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        logit += tl.load(logits_ptr + (split * tokens + token) * EXPERTS + chosen)
    weight = tl.where(column < TOP, 1 / (1 + tl.exp(-logit)), 0.0)
    weight = weight / (tl.sum(weight, 0) + 1e-20) * factor
    tl.store(chosen_ptr + token * TOP + column, chosen, mask=column < TOP)
    tl.store(weights_ptr + token * TOP + column, weight, mask=column < TOP)


@triton.jit
def sort_kernel(
    chosen_ptr, order_ptr, ends_ptr, pairs, experts,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A stable sort of pairs by expert, and where each expert's pairs end: each pair counts those before it.

    Grid: tiles of pairs, then tiles of experts. order[p] is the pair that stands at p. Sorting takes pairs squared
    comparisons, which for the few thousand pairs of a round is less than starting a sort of several kernels.
    """
    tiles = tl.cdiv(pairs, BLOCK)
    program = tl.program_id(0)
    of_pairs = program < tiles
    at = tl.where(of_pairs, program, program - tiles) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(chosen_ptr + at, mask=of_pairs & (at < pairs), other=0)
    # One number says expert and place. An expert's end counts whatever stands before the next expert's first.
    key = tl.where(of_pairs, mine * pairs + at, (at + 1) * pairs)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, pairs, CHUNK):
        other = first + tl.arange(0, CHUNK)
        theirs = tl.load(chosen_ptr + other, mask=other < pairs, other=experts) * pairs + other
        count += tl.sum((theirs[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(order_ptr + count, at, mask=of_pairs & (at < pairs))
    tl.store(ends_ptr + at, count, mask=(at < experts) & (program >= tiles))


@triton.jit
def combine_kernel(
    pairs_ptr, weights_ptr, added_ptr, places_ptr, out_ptr, width,
    TOP: tl.constexpr, ADDED: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [tokens, width] = each token's pairs [tokens, TOP, width] times their weights, summed in float32; with ADDED
    rounded and added to another tensor; with PLACED pairs lie where places say. Grid: (tokens, tiles of the width)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(TOP):
        pair = token * TOP + i
        place = tl.load(places_ptr + pair).to(tl.int64) if PLACED else pair
        weight = tl.load(weights_ptr + pair)
        total += tl.load(pairs_ptr + place * width + at, mask=mask, other=0).to(tl.float32) * weight
    if ADDED:
        rounded = total.to(added_ptr.dtype.element_ty).to(tl.float32)
        total = rounded + tl.load(added_ptr + token * width + at, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + token * width + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def route(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, config: BackboneConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `experts.Router` returns, with experts as int32."""
    (tokens, width), top, experts = x.shape, config.num_experts_per_tok, config.num_experts
    # Few tokens make few programs, so their columns are shared out as well.
    block_t, block_e, block_k, splits = (16, 16, 128, 4) if tokens <= 128 else (64, 32, 64, 4 if tokens <= 512 else 1)
    share = triton.cdiv(width, splits)
    logits = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x.device)
    chosen = torch.empty(tokens, top, dtype=torch.int32, device=x.device)
    weights = torch.empty(tokens, top, dtype=torch.float32, device=x.device)
    if not tokens:
        return chosen, weights
    start(
        logits_kernel,
        (triton.cdiv(tokens, block_t), triton.cdiv(experts, block_e), splits),
        x,
        weight,
        logits,
        tokens,
        experts,
        width,
        share,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=block_k,
        STAGES=4,
        PRECISION="tf32x3" if capability(x.device) >= (8, 0) and x.dtype != torch.float32 else "ieee",
        num_warps=4,
    )
    start(
        choose_kernel,
        (tokens,),
        logits,
        bias,
        chosen,
        weights,
        tokens,
        config.routed_scaling_factor,
        SPLITS=splits,
        EXPERTS=experts,
        GROUPS=config.n_group,
        TOP_GROUPS=config.topk_group,
        TOP=top,
        BLOCK_G=triton.next_power_of_2(config.n_group),
        BLOCK_S=triton.next_power_of_2(experts // config.n_group),
        BLOCK_TOP=triton.next_power_of_2(top),
        num_warps=1,
    )
    return chosen, weights


def sort(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen int32 [tokens, k] -> order int32 [tokens * k], the pair at each place when sorted by expert, and ends
    int32 [experts], where each expert's pairs end."""
    pairs = chosen.numel()
    if pairs > MOST_PAIRS:
        of_pair, order = chosen.flatten().to(torch.int16).sort(stable=True)
        every = torch.arange(experts, device=chosen.device, dtype=torch.int16)
        return order.int(), torch.searchsorted(of_pair, every, right=True, out_int32=True)
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    ends = torch.empty(experts, dtype=torch.int32, device=chosen.device)
    grid = (triton.cdiv(pairs, SORTED) + triton.cdiv(experts, SORTED),)
    start(sort_kernel, grid, chosen, order, ends, pairs, experts, BLOCK=SORTED, CHUNK=512, num_warps=4)
    return order, ends


def combine(
    pairs: torch.Tensor, weights: torch.Tensor, added: torch.Tensor | None, order: torch.Tensor | None = None
) -> torch.Tensor:
    """pairs [tokens * k, width] in the order of tokens, weights [tokens, k] -> their weighted sums [tokens, width].

    In float32; with `added` rounded to its type and added to it. With `order`, as `sort` returns it, pairs lie sorted
    by expert, and are read from there: no copy of them in the order of tokens is made, nor one with their weights.
    """
    (tokens, top), width = weights.shape, pairs.shape[-1]
    dtype = torch.float32 if added is None else added.dtype
    out = torch.empty(tokens, width, dtype=dtype, device=pairs.device)
    places = None
    if order is not None:
        numbers = torch.arange(len(order), dtype=torch.int32, device=order.device)
        places = torch.empty_like(numbers).index_copy_(0, order.long(), numbers)
    block = 1024
    start(
        combine_kernel,
        (tokens, triton.cdiv(width, block)),
        pairs,
        weights,
        out if added is None else added,
        out if places is None else places,
        out,
        width,
        TOP=top,
        ADDED=added is not None,
        PLACED=places is not None,
        BLOCK=block,
    )
    return out
