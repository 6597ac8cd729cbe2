"""Products in 8 bits: activations with a scale a row, in the kind of numbers that the weights are stored in.

int8 in Triton (compute capability 8.0 and up) or by torch's integer product (7.5 and up), fp8 in Triton (8.9 and up).
Which one a device computes is tried there and not looked up. Elsewhere `QuantizedLinear` dequantizes its weight and
multiplies as a plain layer does.
"""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..quantization.formats import Format, FP8Block, Int8
from ..quantization.modules import QuantizedLinear
from .kernels import PlainKernels, Rows, ScaledRows

log = logging.getLogger(__name__)

ROWS: Mapping[type[Format], Rows] = {
    Int8: Rows(torch.int8, scaled=True),
    FP8Block: Rows(torch.float8_e4m3fn, scaled=True),
}
# What the products ask of a layer: widths of whole tiles of the matrix units.
MULTIPLE = 16
PART = 2**25  # numbers of int32 that `int_mm` holds at a time

# (values [n, in], scale [n, 1], weight [out, in], its scales, dtype) -> [n, out] of dtype.
RowProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


class Products:
    """The 8-bit products of a device.

    Args:
        functions: format of a weight -> its product; formats that are not listed are dequantized by their layers.
    """

    def __init__(self, functions: Mapping[type[Format], RowProduct]):
        self.functions = dict(functions)

    def rows_for(self, linear: nn.Module) -> Rows | None:
        """The 8-bit form in which a layer wants what goes into it; None where it takes plain activations."""
        if not isinstance(linear, QuantizedLinear) or type(linear.form) not in self.functions:
            return None
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            return None
        return ROWS[type(linear.form)]

    def __call__(self, linear: QuantizedLinear, x: ScaledRows, dtype: torch.dtype) -> torch.Tensor:
        """[batch, n, in] in the form of `rows_for` -> [batch, n, out] of dtype."""
        values, scale = x.values.flatten(0, -2), x.scale.flatten(0, -2)
        with linear.stored_for(values.device) as stored:
            weight, weight_scale = stored.values()
            out = self.functions[type(linear.form)](values, scale, weight, weight_scale, dtype)
        if linear.bias is not None:
            out += linear.bias.to(out)
        return out.view(*x.values.shape[:-1], -1)


def int_mm(
    values: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """torch's integer product, some rows at a time."""
    out = values.new_empty(len(values), len(weight), dtype=dtype)
    step = max(32, PART // len(weight))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        whole = torch._int_mm(values[part].contiguous(), weight.t())
        out[part] = whole.float().mul_(scale[part]).mul_(weight_scale.t()).to(dtype)
    return out


def choose_products(device: torch.device, dtype: torch.dtype, triton: bool) -> Products:
    """The 8-bit products that are right on a device.

    Args:
        device: of the activations.
        dtype: of the results.
        triton: whether Triton's kernels work there.
    """
    functions: dict[type[Format], RowProduct] = {}
    if device.type != "cuda" or torch.version.hip:
        return Products(functions)
    candidates: list[tuple[type[Format], tuple[int, int], RowProduct]] = [(Int8, (7, 5), int_mm)]
    if triton:
        from .triton_product import product8

        candidates = [(Int8, (8, 0), product8), (FP8Block, (8, 9), product8), *candidates]
    capability = torch.cuda.get_device_capability(device)
    for form, least, function in candidates:
        if form not in functions and capability >= least and agrees(form(), function, device, dtype):
            functions[form] = function
    return Products(functions)


def agrees(form: Format, function: RowProduct, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product is there, and right for a few rows; the log says where it is not."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, 320, generator=generator, device=device) for n in (32, 144))
    stored = form.quantize(weight)
    codes, scales = stored.values()
    rows = PlainKernels().scale_rows(x[None], ROWS[type(form)])
    values, scale = rows.values[0], rows.scale[0]
    expected = (values.float() * scale) @ form.dequantize(stored, 320, torch.float32).t()
    try:
        found = function(values, scale, codes, scales, dtype).float()
    except Exception as error:  # a torch or Triton that lacks it, or cannot build it, says so in many ways
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        log.warning("decoder: %s does not multiply %s weights here (%s)", function.__name__, form.name, reason)
        return False
    if float((found - expected).norm()) <= 0.02 * float(expected.norm()):
        return True
    log.warning("decoder: %s gives wrong products of %s weights here and is not used", function.__name__, form.name)
    return False
