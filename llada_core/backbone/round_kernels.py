"""Triton kernels between a layer's products: norms, RoPE and the cache, attention of few queries. Imported where used.

Each is several of torch's forms in one launch: what a round spends between its products is mostly the start of kernels.
"""

import torch
import triton
import triton.language as tl

from ..quantization.start import start

# Keys that a program of attention goes through: few, so that many programs share them. Beyond so many keys there are
# programs enough, and what they leave to be merged would grow.
SHORT_PART, LONG_PART, SHORT_EXTENT = 128, 256, 2048
QUERIES, KEYS = 64, 64  # of a tile
LOG2_E = 1.4426950408889634


@triton.jit
def norm_kernel(
    x_ptr, added_ptr, weight_ptr, sum_ptr, out_ptr, sums_ptr, width, eps,
    ADDED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = RMS norm of x times a weight, [tokens, width]; with ADDED of x + added, which goes to sum. Grid: tokens.

    Where GROUP is not 0, out's own sums over groups of so many columns go to sums float32 [tokens, width // GROUP].
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * width + at, mask=mask, other=0).to(tl.float32)
    if ADDED:
        x += tl.load(added_ptr + token * width + at, mask=mask, other=0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        tl.store(sum_ptr + token * width + at, x.to(dtype), mask=mask)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=mask, other=0).to(tl.float32)
    rounded = ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype)
    tl.store(out_ptr + token * width + at, rounded, mask=mask)
    if GROUP > 0:
        group = tl.arange(0, BLOCK // GROUP)
        sums = tl.sum(tl.reshape(rounded.to(tl.float32), (BLOCK // GROUP, GROUP)), 1)
        tl.store(sums_ptr + token * (width // GROUP) + group, sums, mask=group < width // GROUP)


@triton.jit
def heads_kernel(
    qkv_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr, at_ptr, q_ptr, k_ptr, v_ptr,
    n, row_stride, head_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms and RoPE of all heads of a token; queries to q [rows, HEADS, n, DIM], keys and values into the cache.

    Grid: (rows * n, HEADS + 2 * KV_HEADS). at int64 [rows, n]: the positions of the cache that they have.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    row = token // n
    position = token % n
    d = tl.arange(0, BLOCK)
    mask = d < DIM
    dtype = q_ptr.dtype.element_ty
    base = qkv_ptr + (token.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * DIM
    x = tl.load(base + d, mask=mask, other=0)
    place = tl.load(at_ptr + token)
    if head >= HEADS + KV_HEADS:
        to = v_ptr + row.to(tl.int64) * row_stride + (head - HEADS - KV_HEADS) * head_stride + place * DIM
        tl.store(to + d, x, mask=mask)
    else:
        weight_ptr = query_weight_ptr if head < HEADS else key_weight_ptr
        HALF: tl.constexpr = ROTARY // 2
        other = tl.where(d < HALF, d + HALF, tl.where(d < ROTARY, d - HALF, d))
        x = x.to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(x * x, 0) / DIM + eps)
        partner = tl.load(base + other, mask=mask, other=0).to(tl.float32)
        x = ((x * scale).to(dtype).to(tl.float32) * tl.load(weight_ptr + d, mask=mask, other=0).to(tl.float32)).to(
            dtype
        )
        partner = (
            (partner * scale).to(dtype).to(tl.float32) * tl.load(weight_ptr + other, mask=mask, other=0).to(tl.float32)
        ).to(dtype)
        cos = tl.load(cos_ptr + token * DIM + d, mask=mask, other=0).to(tl.float32)
        sin = tl.load(sin_ptr + token * DIM + d, mask=mask, other=0).to(tl.float32)
        turned = (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(dtype)
        if head < HEADS:
            to = q_ptr + ((row.to(tl.int64) * HEADS + head) * n + position) * DIM
        else:
            to = k_ptr + row.to(tl.int64) * row_stride + (head - HEADS) * head_stride + place * DIM
        tl.store(to + d, turned, mask=mask)


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, at_ptr, out_ptr, lse_ptr, n, extent, row_stride, head_stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of the queries to PART keys: out float32 [rows * KV_HEADS, parts, GROUP * n, DIM], and the logarithm to
    base 2 of the softmax's denominator, lse float32 [rows * KV_HEADS, parts, GROUP * n].

    Grid: (rows * KV_HEADS, parts, tiles of queries). mask: bool [rows, n, extent]. at int64 [rows, n]: what lies
    behind the last of a row is not read. A part in which a query sees nothing has minus infinity for its logarithm.
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    row = head // KV_HEADS
    query = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    there = query < GROUP * n
    d = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr + (head.to(tl.int64) * GROUP * n + query[:, None]) * DIM + d[None, :],
        mask=there[:, None] & (d[None, :] < DIM), other=0,
    )  # fmt: skip
    base = row.to(tl.int64) * row_stride + (head % KV_HEADS) * head_stride
    largest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    out = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    end = tl.minimum(tl.load(at_ptr + row * n + n - 1).to(tl.int32) + 1 - part * PART, PART)
    for first in tl.range(0, end, BLOCK_K):
        at = part * PART + first + tl.arange(0, BLOCK_K)
        seen = tl.load(
            mask_ptr + (row.to(tl.int64) * n + query[:, None] % n) * extent + at[None, :],
            mask=there[:, None] & (at[None, :] < extent), other=0,
        ) != 0  # fmt: skip
        inside = (first + tl.arange(0, BLOCK_K)[:, None] < end) & (d[None, :] < DIM)
        k = tl.load(k_ptr + base + at[:, None] * DIM + d[None, :], mask=inside, other=0)
        v = tl.load(v_ptr + base + at[:, None] * DIM + d[None, :], mask=inside, other=0)
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        # Nothing seen yet is a largest of minus infinity, from which nothing can be taken off.
        safe = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(largest - safe)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        largest = now
    to = (head.to(tl.int64) * tl.num_programs(1) + part) * GROUP * n + query
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + to[:, None] * DIM + d[None, :], out, mask=there[:, None] & (d[None, :] < DIM))
    tl.store(lse_ptr + to, largest + tl.log2(total), mask=there)


@triton.jit
def merge_kernel(
    parts_ptr, lse_ptr, out_ptr, sums_ptr, n, parts,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [rows, n, HEADS * DIM] = the parts of each query weighed by their denominators. Grid: (rows * n, HEADS).

    Where GROUP_SIZE is not 0, out's own sums over groups of so many columns, a part of DIM, go to sums float32.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = token // n
    query = (head % GROUP) * n + token % n
    part = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    of = ((row * KV_HEADS + head // GROUP).to(tl.int64) * parts + part) * GROUP * n + query
    lse = tl.load(lse_ptr + of, mask=part < parts, other=float("-inf"))
    largest = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    share = share / tl.maximum(tl.sum(share, 0), 1e-30)
    some = (lse > float("-inf"))[:, None] & (d[None, :] < DIM)
    x = tl.load(parts_ptr + of[:, None] * DIM + d[None, :], mask=some, other=0)
    rounded = tl.sum(x * share[:, None], 0).to(out_ptr.dtype.element_ty)
    to = token.to(tl.int64) * HEADS + head
    tl.store(out_ptr + to * DIM + d, rounded, mask=d < DIM)
    if GROUP_SIZE > 0:
        COUNT: tl.constexpr = DIM // GROUP_SIZE
        group = tl.arange(0, BLOCK_D // GROUP_SIZE)
        sums = tl.sum(tl.reshape(rounded.to(tl.float32), (BLOCK_D // GROUP_SIZE, GROUP_SIZE)), 1)
        tl.store(sums_ptr + to * COUNT + group, sums, mask=group < COUNT)


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None, group_size: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`model.RMSNorm.after` in one launch: x [..., width] and what is added to it, each contiguous."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    sums = _sums_of(x.numel() // width, width, group_size, x.device)
    start(
        norm_kernel,
        (x.numel() // width,),
        x,
        x if added is None else added,
        weight,
        total,
        out,
        out if sums is None else sums,
        width,
        eps,
        ADDED=added is not None,
        GROUP=0 if sums is None else group_size,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
    return total, out, sums


def heads(
    qkv: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    eps: float,
    rope: tuple[torch.Tensor, torch.Tensor, int],
    at: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """What stands between a layer's first product and its attention: norms a head, RoPE, and the cache.

    Args:
        qkv: [rows, n, (heads + 2 kv_heads) * dim], the product.
        query_weight, key_weight: [dim], of the norms.
        eps: of the norms.
        rope: as `model.apply_rotary_emb` takes it.
        at: int64 [rows, n], the cache's positions that keys and values are written to.
        keys, values: [rows, kv_heads, capacity, dim], the cache.

    Returns:
        The queries [rows, heads, n, dim].
    """
    rows, n, width = qkv.shape
    kv_heads, dim = keys.shape[1], keys.shape[3]
    count = width // dim - 2 * kv_heads
    cos, sin, rotary = rope
    q = torch.empty(rows, count, n, dim, dtype=qkv.dtype, device=qkv.device)
    start(
        heads_kernel,
        (rows * n, count + 2 * kv_heads),
        qkv,
        query_weight,
        key_weight,
        cos,
        sin,
        at,
        q,
        keys,
        values,
        n,
        keys.stride(0),
        keys.stride(1),
        eps,
        HEADS=count,
        KV_HEADS=kv_heads,
        DIM=dim,
        ROTARY=rotary,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=1,
    )
    return q


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    at: torch.Tensor,
    group_size: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_kernels.in_parts` in two launches, which reads masks as they are and no key behind the last position.

    Args:
        q: [rows, heads, n, dim].
        keys, values: [rows, kv_heads, capacity, dim], the cache.
        mask: bool [rows, 1, n, extent], contiguous: which of the first `extent` keys a query sees.
        at: int64 [rows, n], the queries' own positions in the cache, each row's ascending.
        group_size: of the sums that the next product wants; 0 where it wants none.

    Returns:
        [rows, n, heads * dim]; its `launch.group_sums`, or None where the groups are no parts of the heads.
    """
    rows, count, n, dim = q.shape
    kv_heads, extent = keys.shape[1], mask.shape[-1]
    part = SHORT_PART if extent <= SHORT_EXTENT else LONG_PART
    parts, group = triton.cdiv(extent, part), count // kv_heads
    some = torch.empty(rows * kv_heads, parts, group * n, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(some.shape[:-1], dtype=torch.float32, device=q.device)
    block_d = max(triton.next_power_of_2(dim), 16)
    start(
        part_kernel,
        (rows * kv_heads, parts, triton.cdiv(group * n, QUERIES)),
        q,
        keys,
        values,
        mask,
        at,
        some,
        lse,
        n,
        extent,
        keys.stride(0),
        keys.stride(1),
        dim**-0.5 * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        PART=part,
        BLOCK_Q=QUERIES,
        BLOCK_K=KEYS,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=2,
    )
    out = torch.empty(rows, n, count * dim, dtype=q.dtype, device=q.device)
    sums = _sums_of(rows * n, count * dim, group_size if group_size and dim % group_size == 0 else 0, q.device)
    start(
        merge_kernel,
        (rows * n, count),
        some,
        lse,
        out,
        out if sums is None else sums,
        n,
        parts,
        HEADS=count,
        KV_HEADS=kv_heads,
        DIM=dim,
        GROUP_SIZE=0 if sums is None else group_size,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK_D=block_d,
        num_warps=2,
    )
    return out, sums


def _sums_of(rows: int, width: int, group_size: int, device: torch.device) -> torch.Tensor | None:
    """Where a kernel writes the `launch.group_sums` of what it returns; None where groups are not whole, or of 0."""
    if not group_size or width % group_size:
        return None
    return torch.empty(rows, width // group_size, dtype=torch.float32, device=device)
