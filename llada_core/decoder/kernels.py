"""What a block of the decoder does between its products: norms, gates, rotary embeddings and activations, fused.

Two forms of the same functions: `PlainKernels` in torch, for every device, and `triton_kernels.TritonKernels`, which
read and write each tensor once. Both compute in float32 and round what they write once.

Shapes: hidden states [batch, n, width], contiguous. A `vector` is float32 [width]: the weight of a norm, times what
the time modulates it by.
"""

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from .rotary import Rotary

log = logging.getLogger(__name__)

CHUNK = 2**21  # numbers that a plain function holds in float32 at a time
FP16_MAX = 65504.0
VALUES_MAX = 60000.0  # of attention's values in float16: their mean, with rounded weights, stays within it too
# The largest magnitude of a scaled row. In float16 it leaves room for the sum of a product's 10,240 terms.
LIMITS = {torch.float16: 1 / 16, torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Rows:
    """How activations go into a product.

    Args:
        dtype: of the values.
        scaled: each row is divided by a scale of its own, float32, so that its largest magnitude is `limit`.
    """

    dtype: torch.dtype
    scaled: bool = False

    @property
    def limit(self) -> float:
        """The largest magnitude of a scaled row."""
        return LIMITS[self.dtype]


@dataclass(frozen=True)
class ScaledRows:
    """Activations of a scaled form: values [batch, n, width] x scale [batch, n, 1], float32."""

    values: torch.Tensor
    scale: torch.Tensor


Activations = torch.Tensor | ScaledRows


class Kernels(Protocol):
    """The functions of a block."""

    def rms_norm(self, x: torch.Tensor, vector: torch.Tensor, eps: float, rows: Rows) -> Activations:
        """RMSNorm of x, times vector, as `rows`."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, vector: torch.Tensor, eps: float, y_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x + RMSNorm(y) times vector, in place of x.

        Args:
            y_scale: float32 [batch, n, 1]: y is short of these factors. They change nothing but the weight of eps.
        """
        ...

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
        """`add_rms_norm`, then the `rms_norm` of the new x, which is returned."""
        ...

    def heads(
        self, x: torch.Tensor, count: int, weight: torch.Tensor | None, eps: float, turns: Rotary | None
    ) -> torch.Tensor:
        """Queries, keys or values with their heads apart, as attention takes them.

        Args:
            x: [batch, n, count * head_dim]; overwritten, or not.
            count: number of heads.
            weight: float32 [head_dim] of their norm; None where they are not normed.
            eps: of the norm.
            turns: of n or more positions; None for values, which are neither normed nor turned.

        Returns:
            [batch, count, n, head_dim].
        """
        ...

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor, rows: Rows) -> Activations:
        """silu(gate) * up as `rows`, in place of gate where the type is gate's."""
        ...

    def scale_rows(self, x: torch.Tensor, rows: Rows) -> ScaledRows:
        """x in a scaled form."""
        ...


class PlainKernels:
    """The functions in plain torch, some rows at a time, so that float32 copies stay small."""

    def rms_norm(self, x: torch.Tensor, vector: torch.Tensor, eps: float, rows: Rows) -> Activations:
        out = _Writer(x, rows)
        for part in _parts(x):
            out.write(part, _normed(x[part], eps) * vector)
        return out.result

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, vector: torch.Tensor, eps: float, y_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        for part in _parts(x):
            scale = None if y_scale is None else y_scale[part]
            x[part] = (x[part].float() + _normed(y[part], eps, scale) * vector).to(x.dtype)
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
        return self.rms_norm(self.add_rms_norm(x, y, vector, eps, y_scale), next_vector, next_eps, rows)

    def heads(
        self, x: torch.Tensor, count: int, weight: torch.Tensor | None, eps: float, turns: Rotary | None
    ) -> torch.Tensor:
        if turns is None:
            x = x.clamp_(-VALUES_MAX, VALUES_MAX) if x.dtype == torch.float16 else x
        else:
            for part in _parts(x):
                heads = _finite_range(x[part]).unflatten(-1, (count, -1))
                if weight is not None:
                    heads = _normed(heads, eps) * weight
                cos, sin = turns.cos[part[1], None], turns.sin[part[1], None]
                even, odd = heads[..., 0::2], heads[..., 1::2]
                turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
                x[part] = turned.flatten(-3).to(x.dtype)
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor, rows: Rows) -> Activations:
        out = _Writer(gate, rows, gate if gate.dtype == rows.dtype else None)
        for part in _parts(gate):
            out.write(part, F.silu(_finite_range(gate[part])) * _finite_range(up[part]))
        return out.result

    def scale_rows(self, x: torch.Tensor, rows: Rows) -> ScaledRows:
        out = _Writer(x, rows)
        for part in _parts(x):
            out.write(part, x[part].float())
        return cast(ScaledRows, out.result)


class _Writer:
    """Writes float32 rows in the form that is asked for."""

    def __init__(self, like: torch.Tensor, rows: Rows, values: torch.Tensor | None = None):
        self.rows = rows
        self.values = torch.empty_like(like, dtype=rows.dtype) if values is None else values
        self.scale = like.new_empty(*like.shape[:-1], 1, dtype=torch.float32) if rows.scaled else None

    @property
    def result(self) -> Activations:
        return self.values if self.scale is None else ScaledRows(self.values, self.scale)

    def write(self, part: tuple, x: torch.Tensor) -> None:
        if self.scale is not None:
            limit = self.rows.limit
            # max passes NaN on, so a row that is not finite has a scale that is not.
            largest = x.abs().amax(-1, keepdim=True)
            self.scale[part] = largest / limit
            x = x * torch.where(largest > 0, limit / largest, 0)
            if self.rows.dtype == torch.int8:
                x = (x + 0.5).floor().nan_to_num(0).clamp(-limit, limit)
        elif self.rows.dtype == torch.float16:
            x = x.clamp(-FP16_MAX, FP16_MAX)
        self.values[part] = x.to(self.rows.dtype)


def _parts(x: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of [batch, n, width], some positions at a time."""
    batch, n, width = x.shape
    step = max(1, CHUNK // (batch * width))
    for start in range(0, n, step):
        yield slice(None), slice(start, min(start + step, n))


def _normed(x: torch.Tensor, eps: float, scale: torch.Tensor | None = None) -> torch.Tensor:
    x = x.float()
    # With x short of a factor, so is eps of its square.
    added = eps if scale is None else eps / scale.square()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + added)


def _finite_range(x: torch.Tensor) -> torch.Tensor:
    """float32; where x is float16, its infinities become the largest number: the product that wrote it overflowed."""
    return x.float().clamp(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else x.float()


def choose_kernels(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], inner: int) -> Kernels:
    """The fastest functions that work on a device; the log says why where these are not Triton's on a GPU.

    Args:
        device, dtype: of the activations.
        heads: number and width.
        inner: width between the products of a feed-forward.
    """
    if device.type != "cuda":
        return PlainKernels()
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        missing = "the GPU is older than those that Triton serves"
    else:
        # A Triton without a C compiler, or for another torch, fails where its first kernel is built, in its own ways.
        try:
            from .triton_kernels import TritonKernels

            fused = TritonKernels()
            if agrees(fused, device, dtype, heads, inner):
                return fused
            missing = "Triton's kernels give wrong numbers here"
        except Exception as error:
            missing = f"{type(error).__name__} from Triton: {(str(error).strip().splitlines() or [''])[-1]}"
    log.warning("decoder: norms and rotary embeddings in plain torch, the same and slower (%s)", missing)
    return PlainKernels()


def agrees(fused: Kernels, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], inner: int) -> bool:
    """Whether fused functions give what the plain ones give, on a few rows of the widths that will be used."""
    generator = torch.Generator(device).manual_seed(0)
    dim, rows = heads[0] * heads[1], Rows(dtype, scaled=dtype == torch.float16)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    y, vector, weight = draw(1, 32, dim, dtype=dtype), draw(dim), draw(heads[1])
    x = draw(1, 32, dim, dtype=torch.float32 if dtype == torch.float16 else dtype)
    gate, up = draw(2, 1, 32, inner, dtype=dtype)
    turns = Rotary(*draw(2, 32, heads[1] // 2))

    def results(kernels: Kernels) -> list[torch.Tensor]:
        total = x.clone()
        normed = kernels.rms_norm(x, vector, 1e-5, Rows(dtype))
        again = kernels.add_rms_norm_twice(total, y, vector, 1e-5, vector, 1e-5, Rows(dtype))
        apart = (
            kernels.heads(y.clone(), heads[0], weight, 1e-5, turns),
            kernels.heads(y.clone(), heads[0], None, 0, None),
        )
        activated = kernels.silu_mul(gate.clone(), up, rows)
        found = (normed, again, total, *apart, activated)
        return [one.values if isinstance(one, ScaledRows) else one for one in found]

    pairs = zip(results(fused), results(PlainKernels()), strict=True)
    return all(float((a.float() - b.float()).norm()) <= 0.02 * float(b.float().norm()) for a, b in pairs)
