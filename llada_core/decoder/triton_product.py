"""The product of 8-bit rows as a Triton kernel. Importing this file imports Triton."""

import torch
import triton
import triton.language as tl

GROUP = 8  # rows of tiles that go together, so that what they read of the weight is in the cache
# Tile of the result, numbers of `in` at a time, warps, stages of the pipeline.
HOPPER = (128, 256, 128, 8, 4)
OTHERS = (128, 128, 64, 8, 3)


@triton.jit
def _tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of this program's tile: down a group of rows of tiles, then to the next column."""
    program = tl.program_id(0)
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    return (first + within % size) * BLOCK_M, within // size * BLOCK_N


@triton.jit
def _store(
    sums,
    out,
    scale,
    weight_scale,
    rows,
    columns,
    row,
    column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m, n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    result = sums.to(tl.float32) * tl.load(scale + m, mask=m < rows, other=0.0)[:, None]
    result = result * tl.load(weight_scale + n, mask=n < columns, other=0.0)[None, :]
    place = out + m[:, None].to(tl.int64) * columns + n[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


@triton.jit
def _product_tma(
    a,
    b,
    out,
    scale,
    weight_scale,
    rows,
    columns,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a and b are descriptors, through which Hopper's copy engine reads; what lies outside is zero."""
    row, column = _tile(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, width, BLOCK_K):
        sums = tl.dot(a.load([row, k]), b.load([column, k]).T, sums, out_dtype=tl.int32)
    _store(sums, out, scale, weight_scale, rows, columns, row, column, BLOCK_M, BLOCK_N)


@triton.jit
def _product(
    a,
    b,
    out,
    scale,
    weight_scale,
    rows,
    columns,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    row, column = _tile(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    # Rows behind the last are read from the start and not stored.
    place_a = a + ((row + tl.arange(0, BLOCK_M)) % rows).to(tl.int64)[:, None] * width + k[None, :]
    place_b = b + ((column + tl.arange(0, BLOCK_N)) % columns).to(tl.int64)[None, :] * width + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            x, y = tl.load(place_a + start), tl.load(place_b + start)
        else:
            inside = start + k < width
            x = tl.load(place_a + start, mask=inside[None, :], other=0)
            y = tl.load(place_b + start, mask=inside[:, None], other=0)
        sums = tl.dot(x, y, sums, out_dtype=tl.int32)
    _store(sums, out, scale, weight_scale, rows, columns, row, column, BLOCK_M, BLOCK_N)


def product8(
    values: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """int8 [n, in] x scale [n, 1] times (int8 [out, in] x weight_scale [out, 1]) transposed -> [n, out] of dtype.

    Contiguous, `in` a multiple of 16.
    """
    (rows, width), columns = values.shape, len(weight)
    out = values.new_empty(rows, columns, dtype=dtype)
    hopper = values.is_cuda and torch.cuda.get_device_capability(values.device)[0] == 9
    block_m, block_n, block_k, warps, stages = HOPPER if hopper else OTHERS
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": GROUP}
    if hopper:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a = TensorDescriptor.from_tensor(values, [block_m, block_k])
        b = TensorDescriptor.from_tensor(weight, [block_n, block_k])
        _product_tma[grid](
            a, b, out, scale, weight_scale, rows, columns, width, **blocks, num_warps=warps, num_stages=stages
        )
        return out
    _product[grid](
        values,
        weight,
        out,
        scale,
        weight_scale,
        rows,
        columns,
        width,
        **blocks,
        EVEN=width % block_k == 0,
        num_warps=warps,
        num_stages=stages,
    )
    return out
