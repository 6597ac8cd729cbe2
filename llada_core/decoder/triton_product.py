"""The product of rows in 8 bits as a Triton kernel. Importing this file imports Triton."""

import torch
import triton
import triton.language as tl

# Tile of the result, numbers of `in` at a time, warps, stages of the pipeline: 96 KB of shared memory, which cards from
# compute capability 8.0 on have. On an H200 wider tiles, and reading by its copy engine, are no faster.
BLOCK_M, BLOCK_N, BLOCK_K, WARPS, STAGES = 128, 128, 128, 8, 3
GROUP = 8  # rows of tiles that go together, so that what they read of the weight is in the cache


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
    SCALED_BLOCKS: tl.constexpr,
):
    """A tile of a @ b.T; programs go down a group of rows of tiles and then to the next column.

    weight_scale has a number a row of b or, with SCALED_BLOCKS, a number a tile of BLOCK_N x BLOCK_K of it.
    """
    program = tl.program_id(0)
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    row, column = (first + within % size) * BLOCK_M, within // size * BLOCK_N
    m, n, k = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows behind the last are read from the start and not stored.
    place_a = a + (m % rows).to(tl.int64)[:, None] * width + k[None, :]
    place_b = b + (n % columns).to(tl.int64)[None, :] * width + k[:, None]
    KIND: tl.constexpr = tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if SCALED_BLOCKS else KIND)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            x, y = tl.load(place_a + start), tl.load(place_b + start)
        else:
            inside = start + k < width
            x = tl.load(place_a + start, mask=inside[None, :], other=0.0)
            y = tl.load(place_b + start, mask=inside[:, None], other=0.0)
        if SCALED_BLOCKS:
            block = weight_scale + column // BLOCK_N * tl.cdiv(width, BLOCK_K) + start // BLOCK_K
            sums += tl.dot(x, y, out_dtype=KIND).to(tl.float32) * tl.load(block)
        else:
            sums = tl.dot(x, y, sums, out_dtype=KIND)
    result = sums.to(tl.float32) * tl.load(scale + m, mask=m < rows, other=0.0)[:, None]
    if not SCALED_BLOCKS:
        result = result * tl.load(weight_scale + n, mask=n < columns, other=0.0)[None, :]
    place = out + m[:, None].to(tl.int64) * columns + n[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


def product8(
    values: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows in 8 bits times a weight in 8 bits, transposed.

    Args:
        values, scale: int8 or float8_e4m3fn [n, in], of which row i counts scale[i]; float32 [n, 1].
        weight: [out, in] of the same type.
        weight_scale: float32 [out, 1], or one for each block of 128 x 128, the last ones cut off.
        dtype: of the result.

    Returns:
        [n, out] of dtype. All are contiguous.
    """
    (rows, width), columns = values.shape, len(weight)
    out = values.new_empty(rows, columns, dtype=dtype)
    _product[(triton.cdiv(rows, BLOCK_M) * triton.cdiv(columns, BLOCK_N),)](
        values,
        weight,
        out,
        scale,
        weight_scale,
        rows,
        columns,
        width,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        GROUP=GROUP,
        EVEN=width % BLOCK_K == 0,
        SCALED_BLOCKS=tuple(weight_scale.shape) != (columns, 1),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out
