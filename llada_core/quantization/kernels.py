"""Triton kernels of products with stored weights. Imported only where Triton is there and is used.

One program takes a tile of output features of one expert and goes through that expert's pairs, some rows at a time, so
each weight is read once; the weights become numbers in registers. A linear layer is one expert with every row.

The weights' way to 16-bit floating point, two at a time in a 32-bit register: a nibble v set into the low bits of the
number 128 (bfloat16) or 1024 (float16) is that number + v, so one subtraction of the number + 8 gives the code; the
bits of float8_e4m3fn shifted into place are the number by a power of two too small; for int8 Triton has a way of its
own as short. The same without inline assembly serves where that is not there (the interpreter).
"""

import triton
import triton.language as tl


@triton.jit
def _from_int4(packed, HIGH: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int8 tile of two codes a byte -> codes of the low or the high four bits, -8 to 7, as DTYPE."""
    if ASSEMBLY:
        SHIFT: tl.constexpr = "shr.u32 t, $2, 4;" if HIGH else "mov.b32 t, $2;"
        if tl.bfloat16 == DTYPE:
            codes = tl.inline_asm_elementwise(
                "{ .reg .b32 t, a, b, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308;"
                + SHIFT
                + "prmt.b32 a, t, 0, 0x4140; prmt.b32 b, t, 0, 0x4342;"
                "lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA; lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;"
                "fma.rn.bf16x2 $0, a, one, less; fma.rn.bf16x2 $1, b, one, less; }",
                "=r,=r,r",
                [packed],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=4,
            )
        else:
            codes = tl.inline_asm_elementwise(
                "{ .reg .b32 t, a, b, less; mov.b32 less, 0x64086408;"
                + SHIFT
                + "prmt.b32 a, t, 0, 0x4140; prmt.b32 b, t, 0, 0x4342;"
                "lop3.b32 a, a, 0x000F000F, 0x64006400, 0xEA; lop3.b32 b, b, 0x000F000F, 0x64006400, 0xEA;"
                "sub.rn.f16x2 $0, a, less; sub.rn.f16x2 $1, b, less; }",
                "=r,=r,r",
                [packed],
                dtype=tl.float16,
                is_pure=True,
                pack=4,
            )
    else:
        codes = (((packed >> (4 if HIGH else 0)) & 15).to(tl.float32) - 8).to(DTYPE)
    return codes


@triton.jit
def _from_fp8(codes, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """uint8 tile of the bits of float8_e4m3fn -> its numbers as DTYPE."""
    if ASSEMBLY:
        if tl.bfloat16 == DTYPE:
            numbers = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b, s, t, big, none; mov.b32 big, 0x7B807B80; mov.b32 none, 0x80008000;"
                "prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;"
                "and.b32 s, a, 0x80008000; and.b32 t, b, 0x80008000; shr.u32 a, a, 4; shr.u32 b, b, 4;"
                "lop3.b32 a, a, 0x07F007F0, s, 0xEA; lop3.b32 b, b, 0x07F007F0, t, 0xEA;"
                "fma.rn.bf16x2 $0, a, big, none; fma.rn.bf16x2 $1, b, big, none; }",
                "=r,=r,r",
                [codes],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=4,
            )
        else:
            numbers = tl.inline_asm_elementwise(
                "{ .reg .b32 a, b, s, t, big; mov.b32 big, 0x5C005C00;"
                "prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;"
                "and.b32 s, a, 0x80008000; and.b32 t, b, 0x80008000; shr.u32 a, a, 1; shr.u32 b, b, 1;"
                "lop3.b32 a, a, 0x3F803F80, s, 0xEA; lop3.b32 b, b, 0x3F803F80, t, 0xEA;"
                "mul.rn.f16x2 $0, a, big; mul.rn.f16x2 $1, b, big; }",
                "=r,=r,r",
                [codes],
                dtype=tl.float16,
                is_pure=True,
                pack=4,
            )
    else:
        # As float32: sign, then exponent and mantissa moved to their places, 2 ** 120 too small.
        bits = codes.to(tl.int32)
        wide = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        numbers = (wide.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)
    return numbers


@triton.jit
def _dot(x, w, SWAP: tl.constexpr):
    """x [rows, k] and w [features, k] -> [rows, features], or swapped [features, rows]."""
    return tl.dot(w, tl.trans(x)) if SWAP else tl.dot(x, tl.trans(w))


@triton.jit
def _over_features(values, SWAP: tl.constexpr):
    """A value a feature, to be multiplied with a tile."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def _over_rows(values, SWAP: tl.constexpr):
    """A value a row, to be multiplied with a tile."""
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def _add_step(
    total,
    x,
    x_odd,
    k,
    w_ptr,
    scale_ptr,
    feature,
    scale_row,
    N,
    K,
    width,
    groups_stride,
    DTYPE: tl.constexpr,
    FORM: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """The total with the products of BLOCK_K columns from k added; x and x_odd are even and odd columns for int4."""
    at = k // 2 + tl.arange(0, BLOCK_K // 2) if FORM == "int4" else k + tl.arange(0, BLOCK_K)
    pointers = w_ptr + feature[:, None].to(tl.int64) * width + at[None, :]
    if EVEN_N and EVEN_K:
        w = tl.load(pointers)
    else:
        w = tl.load(pointers, mask=(feature[:, None] < N) & (at[None, :] < width), other=0)
    if FORM == "int4":
        # The step is one group.
        low, high = _from_int4(w, False, DTYPE, ASSEMBLY), _from_int4(w, True, DTYPE, ASSEMBLY)
        pointers = scale_ptr + (k // BLOCK_K) * groups_stride + feature
        scale = tl.load(pointers) if EVEN_N and EVEN_K else tl.load(pointers, mask=(feature < N) & (k < K), other=0)
        part = _dot(x, low, SWAP) + _dot(x_odd, high, SWAP)
        total += part * _over_features(scale.to(tl.float32), SWAP)
    elif FORM == "fp8_block":
        pointers = scale_ptr + scale_row * ((K + 127) // 128) + k // 128
        scale = tl.load(pointers) if EVEN_K else tl.load(pointers, mask=(feature < N) & (k < K), other=0)
        total += _dot(x, _from_fp8(w, DTYPE, ASSEMBLY), SWAP) * _over_features(scale, SWAP)
    else:
        total += _dot(x, w.to(DTYPE), SWAP)
    return total


@triton.jit
def _add_zeros(
    total, sums, zeros_ptr, feature, N, groups, groups_stride,
    DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """The total with each group's zero times the sum of x over the group added. sums: float32 [rows, BLOCK_G]."""
    group = tl.arange(0, BLOCK_G)
    zeros = tl.load(
        zeros_ptr + group[None, :] * groups_stride + feature[:, None],
        mask=(group[None, :] < groups) & (feature[:, None] < N),
        other=0,
    )
    zeros = zeros.to(tl.float32).to(DTYPE)
    # In two parts of 16 bits each, so that the sums lose nothing.
    coarse = sums.to(DTYPE)
    fine = (sums - coarse.to(tl.float32)).to(DTYPE)
    return total + _dot(coarse, zeros, SWAP) + _dot(fine, zeros, SWAP)


@triton.jit
def grouped_kernel(
    x_ptr,
    gather_ptr,
    w_ptr,
    up_ptr,
    scale_ptr,
    up_scale_ptr,
    zeros_ptr,
    up_zeros_ptr,
    sums_ptr,
    ends_ptr,
    out_ptr,
    scatter_ptr,
    out_sums_ptr,
    rows,
    N,
    K,
    width,
    w_stride,
    scale_stride,
    groups_stride,
    part_rows,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATED: tl.constexpr,
    FORM: tl.constexpr,
    ZERO_GROUPS: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = x @ w of each row's expert; with GATED silu(x @ w) * (x @ up).

    Grid: (tiles of features x experts, SPLIT). w and up are [experts, N, K] as stored, up's pointers are w's rows
    further down in a fused bank. Row p of the sorted pairs reads x at gather[p] // GATHER (at p where GATHER is 0) and
    is written to out at scatter[p] (at p). ends says where each expert's pairs end; one expert has all `rows`.
    ZERO_GROUPS: for int4 with zeros the groups of a row, filled up to a power of two from 16 on; sums: float32 [rows
    of x, groups], each row's sums over them. OUT_GROUP: where it is not 0, out's own sums over groups of so many
    features go to out_sums float32 [pairs, N // OUT_GROUP].
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tiles = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // tiles
    feature = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = 0
    end = rows
    if EXPERTS > 1:
        end = tl.load(ends_ptr + expert)
        if expert > 0:
            begin = tl.load(ends_ptr + expert - 1)
    w_ptr += expert.to(tl.int64) * w_stride
    up_ptr += expert.to(tl.int64) * w_stride
    scale_ptr += expert.to(tl.int64) * scale_stride
    up_scale_ptr += expert.to(tl.int64) * scale_stride
    zeros_ptr += expert.to(tl.int64) * scale_stride
    up_zeros_ptr += expert.to(tl.int64) * scale_stride
    # For fp8_block: which row of scales a feature has, blocks beginning anew every part_rows.
    scale_row = feature // part_rows * ((part_rows + 127) // 128) + feature % part_rows // 128
    scale_row = tl.where(feature < N, scale_row, 0)

    for first in range(begin + tl.program_id(1) * BLOCK_M, end, SPLIT * BLOCK_M):
        pair = first + tl.arange(0, BLOCK_M)
        there = pair < end
        row = pair
        if GATHER > 0:
            row = tl.load(gather_ptr + pair, mask=there, other=0) // GATHER
        row = tl.where(there, row, 0).to(tl.int64)
        if SWAP:
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up_total = total
        if ZERO_GROUPS > 0:
            groups = (K + BLOCK_K - 1) // BLOCK_K
            group = tl.arange(0, ZERO_GROUPS)
            sums = tl.load(
                sums_ptr + row[:, None] * groups + group[None, :],
                mask=there[:, None] & (group[None, :] < groups),
                other=0,
            )
        for base in tl.range(0, K, BLOCK_K * STEPS, num_stages=STAGES):
            for step in tl.static_range(STEPS):
                k = base + step * BLOCK_K
                if FORM == "int4":
                    # Two columns of x at once; their halves go with the low and the high four bits.
                    at = k // 2 + tl.arange(0, BLOCK_K // 2)
                    pointers = x_ptr.to(tl.pointer_type(tl.int32)) + row[:, None] * (K // 2) + at[None, :]
                    inside = there[:, None] if EVEN_K else there[:, None] & (at[None, :] < K // 2)
                    both = tl.load(pointers, mask=inside, other=0)
                    x = (both & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
                    x_odd = ((both >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
                else:
                    at = k + tl.arange(0, BLOCK_K)
                    pointers = x_ptr + row[:, None] * K + at[None, :]
                    inside = there[:, None] if EVEN_K else there[:, None] & (at[None, :] < K)
                    x = tl.load(pointers, mask=inside, other=0)
                    x_odd = x
                total = _add_step(
                    total, x, x_odd, k, w_ptr, scale_ptr, feature, scale_row, N, K, width, groups_stride,
                    DTYPE, FORM, ASSEMBLY, EVEN_N, EVEN_K, BLOCK_K, SWAP,
                )  # fmt: skip
                if GATED:
                    up_total = _add_step(
                        up_total, x, x_odd, k, up_ptr, up_scale_ptr, feature, scale_row, N, K, width, groups_stride,
                        DTYPE, FORM, ASSEMBLY, EVEN_N, EVEN_K, BLOCK_K, SWAP,
                    )  # fmt: skip
        if ZERO_GROUPS > 0:
            total = _add_zeros(total, sums, zeros_ptr, feature, N, groups, groups_stride, DTYPE, ZERO_GROUPS, SWAP)
            if GATED:
                up_total = _add_zeros(
                    up_total, sums, up_zeros_ptr, feature, N, groups, groups_stride, DTYPE, ZERO_GROUPS, SWAP
                )
        if FORM == "int8":
            total *= _over_features(tl.load(scale_ptr + feature, mask=feature < N, other=0), SWAP)
            if GATED:
                up_total *= _over_features(tl.load(up_scale_ptr + feature, mask=feature < N, other=0), SWAP)
        if GATED:
            total = total / (1 + tl.exp(-total)) * up_total
        to = pair
        if SCATTER:
            to = tl.load(scatter_ptr + pair, mask=there, other=0)
        rounded = total.to(DTYPE)
        pointers = out_ptr + _over_rows(to.to(tl.int64), SWAP) * N + _over_features(feature, SWAP)
        tl.store(pointers, rounded, mask=_over_rows(there, SWAP) & _over_features(feature < N, SWAP))
        if OUT_GROUP > 0:
            COUNT: tl.constexpr = BLOCK_N // OUT_GROUP
            exact = tl.trans(rounded.to(tl.float32)) if SWAP else rounded.to(tl.float32)
            group = tl.program_id(0) % tiles * COUNT + tl.arange(0, COUNT)
            tl.store(
                out_sums_ptr + to.to(tl.int64)[:, None] * (N // OUT_GROUP) + group[None, :],
                tl.sum(tl.reshape(exact, (BLOCK_M, COUNT, OUT_GROUP)), 2),
                mask=there[:, None] & (group[None, :] < N // OUT_GROUP),
            )


@triton.jit
def sums_kernel(x_ptr, sums_ptr, width, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """sums float32 [rows, groups] = each row of x [rows, width] over its groups. Grid: (rows, tiles of groups)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * width + at, mask=at < width, other=0)
    tl.store(sums_ptr + row * groups + group, tl.sum(x.to(tl.float32), 1), mask=group < groups)
