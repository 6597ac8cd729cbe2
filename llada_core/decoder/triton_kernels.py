"""The functions of a decoder's block as Triton kernels: each tensor is read once and written once.

A program does a row, or all heads of a position. Importing this file imports Triton. None of it needs more than
compute capability 8.0; float8 needs 8.9.
"""

from typing import cast

import torch
import triton
import triton.language as tl

from .kernels import FP16_MAX, VALUES_MAX, Activations, Rows, ScaledRows
from .rotary import Rotary

NORM_WARPS = 8
SUM_WARPS = 16
HEADS_WARPS = 8
ACTIVATION_WARPS = 4
ACTIVATION_BLOCK = 2048


@triton.jit
def _within(values, LIMIT: tl.constexpr):
    """values, those beyond +-LIMIT at it, NaN as it is; LIMIT 0 is none."""
    if LIMIT > 0:
        values = tl.maximum(values, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        values = tl.minimum(values, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return values


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_row(
    out,
    out_scale,
    row,
    columns,
    mask,
    values,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """float32 values of a row -> out in its type, scaled to a largest magnitude of LIMIT, or kept within it."""
    if SCALED:
        # NaN passes, so a row that is not finite has a scale that is not.
        largest = tl.reduce(tl.abs(values), 0, _larger)
        tl.store(out_scale + row, largest / LIMIT)
        values = values * tl.where(largest > 0, LIMIT / largest, 0.0)
        if out.dtype.element_ty == tl.int8:
            values = tl.floor(values + 0.5)
        values = _within(values, LIMIT)
    else:
        values = _within(values, LIMIT)
    tl.store(out + row * WIDTH + columns, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _normed(values, eps, WIDTH: tl.constexpr):
    return values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + eps)


@triton.jit
def _rms_norm(
    x, vector, out, out_scale, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, LIMIT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    values = tl.load(x + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    values = _normed(values, eps, WIDTH) * tl.load(vector + columns, mask=mask, other=0.0)
    _store_row(out, out_scale, row, columns, mask, values, WIDTH, SCALED, LIMIT)


@triton.jit
def _add_rms_norm(
    x,
    y,
    y_scale,
    vector,
    next_vector,
    out,
    out_scale,
    eps,
    next_eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    SCALED: tl.constexpr,
    LIMIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    if HAS_SCALE:
        scale = tl.load(y_scale + row)
        eps = eps / (scale * scale)
    update = tl.load(y + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    update = _normed(update, eps, WIDTH) * tl.load(vector + columns, mask=mask, other=0.0)
    place = x + row * WIDTH + columns
    summed = (tl.load(place, mask=mask, other=0.0).to(tl.float32) + update).to(x.dtype.element_ty)
    tl.store(place, summed, mask=mask)
    if HAS_NEXT:
        values = _normed(summed.to(tl.float32), next_eps, WIDTH) * tl.load(next_vector + columns, mask=mask, other=0.0)
        _store_row(out, out_scale, row, columns, mask, values, WIDTH, SCALED, LIMIT)


@triton.jit
def _heads(
    x,
    out,
    weight,
    cos,
    sin,
    eps,
    positions,
    batch_stride,
    position_stride,
    head_stride,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_TURNS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """All heads of a position: x [batch, positions, HEADS * DIM] -> out, wherever its strides say."""
    row = tl.program_id(0).to(tl.int64)
    position = row % positions
    number = tl.arange(0, DIM_BLOCK)
    head = tl.arange(0, HEADS_BLOCK)
    mask = (head < HEADS)[:, None] & (number < DIM)[None, :]
    place = row * (HEADS * DIM) + head[:, None] * DIM + number[None, :]
    values = _within(tl.load(x + place, mask=mask, other=0.0).to(tl.float32), LIMIT)
    if HAS_NORM:
        values = values * tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)[:, None]
        values = values * tl.load(weight + number, mask=number < DIM, other=0.0)[None, :]
    if HAS_TURNS:
        even, odd = tl.split(tl.reshape(values, (HEADS_BLOCK, DIM_BLOCK // 2, 2)))
        pair = tl.arange(0, DIM_BLOCK // 2)
        turn = position * (DIM // 2) + pair
        c = tl.load(cos + turn, mask=pair < DIM // 2, other=0.0)[None, :]
        s = tl.load(sin + turn, mask=pair < DIM // 2, other=0.0)[None, :]
        values = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (HEADS_BLOCK, DIM_BLOCK))
    place = row // positions * batch_stride + position * position_stride
    place = place + head.to(tl.int64)[:, None] * head_stride + number[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_rows(
    gate,
    up,
    out,
    out_scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    INPUT_LIMIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    g = _within(tl.load(gate + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32), INPUT_LIMIT)
    u = _within(tl.load(up + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32), INPUT_LIMIT)
    _store_row(out, out_scale, row, columns, mask, g * tl.sigmoid(g) * u, WIDTH, True, LIMIT)


@triton.jit
def _silu_mul(gate, up, numel, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < numel
    g = _within(tl.load(gate + place, mask=mask, other=0.0).to(tl.float32), LIMIT)
    u = _within(tl.load(up + place, mask=mask, other=0.0).to(tl.float32), LIMIT)
    values = _within(g * tl.sigmoid(g) * u, LIMIT)
    tl.store(gate + place, values.to(gate.dtype.element_ty), mask=mask)


@triton.jit
def _scale_rows(x, out, out_scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    values = tl.load(x + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    _store_row(out, out_scale, row, columns, mask, values, WIDTH, True, LIMIT)


class TritonKernels:
    """`kernels.Kernels` on a GPU that Triton serves."""

    def rms_norm(self, x: torch.Tensor, vector: torch.Tensor, eps: float, rows: Rows) -> Activations:
        out, scale = _empty(x, rows)
        width = x.shape[-1]
        _rms_norm[(_count(x),)](
            x,
            vector,
            out,
            out if scale is None else scale,
            eps,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            SCALED=rows.scaled,
            LIMIT=_limit(rows),
            num_warps=NORM_WARPS,
        )
        return _result(out, scale)

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, vector: torch.Tensor, eps: float, y_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._add(x, y, vector, eps, y_scale)
        return x

    def add_rms_norm_twice(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        vector: torch.Tensor,
        eps: float,
        next_vector: torch.Tensor,
        next_eps: float,
        rows: Rows,
        y_scale: torch.Tensor | None = None,
    ) -> Activations:
        out, scale = _empty(x, rows)
        self._add(x, y, vector, eps, y_scale, (next_vector, next_eps, rows, out, scale))
        return _result(out, scale)

    def _add(self, x, y, vector, eps, y_scale, then=None) -> None:
        width = x.shape[-1]
        next_vector, next_eps, rows, out, scale = then or (vector, eps, Rows(x.dtype), x, None)
        _add_rms_norm[(_count(x),)](
            x,
            y,
            x if y_scale is None else y_scale,
            vector,
            next_vector,
            out,
            out if scale is None else scale,
            eps,
            next_eps,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            HAS_SCALE=y_scale is not None,
            HAS_NEXT=then is not None,
            SCALED=rows.scaled,
            LIMIT=_limit(rows),
            num_warps=SUM_WARPS,
        )

    def heads(
        self, x: torch.Tensor, count: int, weight: torch.Tensor | None, eps: float, turns: Rotary | None
    ) -> torch.Tensor:
        batch, positions, width = x.shape
        dim = width // count
        # Attention reads the rows of a head one behind the other; that pays for the copy, and no more (H200, cuDNN).
        out = x.new_empty(batch, count, positions, dim)
        cos, sin = (x, x) if turns is None else (turns.cos, turns.sin)
        _heads[(_count(x),)](
            x,
            out,
            cos if weight is None else weight,
            cos,
            sin,
            eps,
            positions,
            out.stride(0),
            out.stride(2),
            out.stride(1),
            HEADS=count,
            HEADS_BLOCK=triton.next_power_of_2(count),
            DIM=dim,
            DIM_BLOCK=triton.next_power_of_2(dim),
            HAS_NORM=weight is not None,
            HAS_TURNS=turns is not None,
            LIMIT=min(_input_limit(x), FP16_MAX if turns else VALUES_MAX),
            num_warps=HEADS_WARPS,
        )
        return out

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor, rows: Rows) -> Activations:
        if not rows.scaled:
            grid = (triton.cdiv(gate.numel(), ACTIVATION_BLOCK),)
            _silu_mul[grid](gate, up, gate.numel(), BLOCK=ACTIVATION_BLOCK, LIMIT=_input_limit(gate))
            return gate
        out, scale = _empty(gate, rows, gate if gate.dtype == rows.dtype else None)
        width = gate.shape[-1]
        _silu_mul_rows[(_count(gate),)](
            gate,
            up,
            out,
            scale,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            LIMIT=rows.limit,
            INPUT_LIMIT=_input_limit(gate),
            num_warps=ACTIVATION_WARPS,
        )
        return _result(out, scale)

    def scale_rows(self, x: torch.Tensor, rows: Rows) -> ScaledRows:
        out, scale = _empty(x, rows)
        width = x.shape[-1]
        _scale_rows[(_count(x),)](
            x,
            out,
            scale,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            LIMIT=rows.limit,
            num_warps=NORM_WARPS,
        )
        return cast(ScaledRows, _result(out, scale))


def _empty(x: torch.Tensor, rows: Rows, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) if rows.scaled else None
    return torch.empty_like(x, dtype=rows.dtype) if out is None else out, scale


def _result(values: torch.Tensor, scale: torch.Tensor | None) -> Activations:
    return values if scale is None else ScaledRows(values, scale)


def _count(x: torch.Tensor) -> int:
    """Rows of [batch, n, width]."""
    return x.shape[0] * x.shape[1]


def _limit(rows: Rows) -> float:
    if rows.scaled:
        return rows.limit
    return FP16_MAX if rows.dtype == torch.float16 else 0.0


def _input_limit(x: torch.Tensor) -> float:
    """Where x is float16, its infinities become the largest number: the product that wrote it overflowed."""
    return FP16_MAX if x.dtype == torch.float16 else 0.0
