"""The decoder's Triton kernels against the plain functions: on a GPU if there is one, else in the interpreter."""

import os

import pytest
import torch

from llada_core.decoder.kernels import PlainKernels, Rows, ScaledRows, agrees, choose_kernels
from llada_core.decoder.products import Products, choose_products, int_mm
from llada_core.decoder.products import agrees as agrees_in_products
from llada_core.decoder.rotary import Rotary
from llada_core.quantization.formats import FP8Block, Int8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed")

from llada_core.decoder.triton_kernels import TritonKernels  # noqa: E402
from llada_core.decoder.triton_product import product8  # noqa: E402

BATCH, POSITIONS, HEADS, DIM = 2, 5, 3, 24  # no power of two among them
WIDTH, INNER = HEADS * DIM, 200
FORMS = [
    Rows(torch.float32),
    Rows(torch.bfloat16),
    Rows(torch.float16),
    Rows(torch.float16, scaled=True),
    Rows(torch.int8, scaled=True),
]
if DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):  # the interpreter rounds fp8 otherwise
    FORMS.append(Rows(torch.float8_e4m3fn, scaled=True))
# A step of each type, as the interpreter cuts bfloat16 off where a GPU rounds.
STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.int8: 1.01, torch.float8_e4m3fn: 2**-2}


@pytest.fixture
def fused() -> TritonKernels:
    return TritonKernels()


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return draw


def dense(x) -> torch.Tensor:
    """What activations of any form stand for."""
    return x.values.float() * x.scale if isinstance(x, ScaledRows) else x.float()


def same(a, b, values: torch.dtype) -> None:
    """Equal but for a step of the type that they are rounded to."""
    a, b = (tuple(x) if isinstance(x, (list, tuple)) else (x,) for x in (a, b))
    for one, other in zip(a, b, strict=True):
        if isinstance(one, ScaledRows):
            assert torch.allclose(one.scale, other.scale, rtol=1e-2)
            one, other = one.values, other.values
        assert one.dtype == other.dtype
        step = STEP[values]
        one, other = one.float(), other.float()
        if values == torch.int8:
            assert float((one - other).abs().max()) <= step
        else:
            assert torch.allclose(one, other, rtol=step, atol=step)


def activations(rows: Rows) -> torch.dtype:
    """The type of the activations that take such a form."""
    return rows.dtype if rows.dtype.itemsize > 1 else torch.bfloat16


@pytest.mark.parametrize("rows", FORMS, ids=str)
def test_rms_norm(fused, draw, rows):
    x, vector = draw(BATCH, POSITIONS, WIDTH, dtype=activations(rows)), draw(WIDTH)
    same(*(k.rms_norm(x, vector, 1e-5, rows) for k in (fused, PlainKernels())), rows.dtype)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows", FORMS, ids=str)
def test_sums_and_their_norm(fused, draw, rows, scaled):
    dtype = activations(rows)
    x = draw(BATCH, POSITIONS, WIDTH, dtype=torch.float32 if dtype == torch.float16 else dtype)
    y, first, second = draw(BATCH, POSITIONS, WIDTH, dtype=dtype), draw(WIDTH), draw(WIDTH)
    y_scale = draw(BATCH, POSITIONS, 1).abs() if scaled else None

    def both(kernels):
        total = x.clone()
        normed = kernels.add_rms_norm_twice(total, y, first, 1e-5, second, 1e-3, rows, y_scale)
        alone = kernels.add_rms_norm(x.clone(), y, first, 1e-5, y_scale)
        assert torch.equal(total, alone)
        assert not torch.equal(total, x)
        return normed, total

    (normed, total), (expected, sums) = both(fused), both(PlainKernels())
    same(total, sums, x.dtype)
    if rows.dtype != torch.int8 or DEVICE.type == "cuda":
        same(normed, expected, rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normed", [True, False])
def test_heads(fused, draw, dtype, normed):
    turns = Rotary(draw(POSITIONS, DIM // 2), draw(POSITIONS, DIM // 2))
    x, weight = draw(BATCH, POSITIONS, WIDTH, dtype=dtype), draw(DIM) if normed else None
    for part, turn in ((x, turns), (x[:, :3].contiguous(), turns), (x, None)):
        scale = weight if turn else None
        results = [k.heads(part.clone(), HEADS, scale, 1e-5, turn) for k in (fused, PlainKernels())]
        assert results[0].shape == (BATCH, HEADS, part.shape[1], DIM)
        same(*results, dtype)


@pytest.mark.parametrize("rows", FORMS, ids=str)
def test_silu_mul(fused, draw, rows):
    gate, up = (draw(BATCH, POSITIONS, INNER, dtype=activations(rows)) for _ in range(2))
    same(*(k.silu_mul(gate.clone(), up, rows) for k in (fused, PlainKernels())), rows.dtype)


@pytest.mark.parametrize("rows", [rows for rows in FORMS if rows.scaled], ids=str)
def test_scaled_rows(fused, draw, rows):
    x = draw(BATCH, POSITIONS, WIDTH, dtype=activations(rows))
    x[0, 1] = 0
    found, expected = (k.scale_rows(x, rows) for k in (fused, PlainKernels()))
    same(found, expected, rows.dtype)
    assert not dense(found)[0, 1].any()
    error = (dense(found) - x.float()).abs().amax(-1) / x.float().abs().amax(-1).clamp(min=1e-9)
    assert float(error.max()) < {torch.int8: 0.005, torch.float16: 1e-3, torch.float8_e4m3fn: 0.13}[rows.dtype]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [rows for rows in FORMS if rows.scaled], ids=str)
@pytest.mark.parametrize("which", ["fused", "plain"])
def test_a_row_that_is_not_finite_stays_so(fused, draw, rows, bad, which):
    """A code of 8 bits has no NaN: its scale says it."""
    x = draw(BATCH, POSITIONS, WIDTH, dtype=torch.bfloat16)
    x[0, 1, 2] = bad
    scale = (fused if which == "fused" else PlainKernels()).scale_rows(x, rows).scale
    assert not bool(scale[0, 1].isfinite())
    assert int(scale.isfinite().sum()) == scale.numel() - 1


@pytest.mark.parametrize("which", ["fused", "plain"])
def test_float16_ends_where_its_numbers_end(fused, draw, which):
    kernels = fused if which == "fused" else PlainKernels()
    half = torch.float16
    gate, up = draw(1, 1, INNER, dtype=half), draw(1, 1, INNER, dtype=half)
    gate[0, 0, 0], up[0, 0, 0], up[0, 0, 1] = 1000, 1000, float("inf")
    assert bool(kernels.silu_mul(gate.clone(), up, Rows(half)).isfinite().all())
    assert bool(dense(kernels.silu_mul(gate.clone(), up, Rows(half, scaled=True))).isfinite().all())
    q = draw(1, 2, WIDTH, dtype=half)
    q[0, 0, 0] = float("-inf")
    turns = Rotary(torch.ones(2, DIM // 2, device=DEVICE), torch.zeros(2, DIM // 2, device=DEVICE))
    assert bool(kernels.heads(q.clone(), HEADS, draw(DIM), 1e-5, turns).isfinite().all())
    assert bool(kernels.heads(q.clone(), HEADS, None, 0.0, None).isfinite().all())
    q[0, 1, 0] = float("nan")
    assert bool(kernels.heads(q.clone(), HEADS, None, 0.0, None).isnan().any()), "what was no number stays none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 16, 32), (130, 272, 144), (128, 256, 64)])
def test_product_of_int8(draw, shape, dtype):
    rows, width, columns = shape
    a, b = Int8().quantize(draw(rows, width)), Int8().quantize(draw(columns, width))
    operands = a["weight"], a["weight_scale"], b["weight"], b["weight_scale"]
    found = product8(*operands, dtype)
    expected = Int8().dequantize(a, width, torch.float64) @ Int8().dequantize(b, width, torch.float64).t()
    assert found.dtype == dtype
    assert float((found.double() - expected).norm() / expected.norm()) < {4: 1e-6, 2: 0.005}[dtype.itemsize]
    if rows > 16 or DEVICE.type == "cpu":  # torch's own wants more than 16 rows on a GPU
        assert float((int_mm(*operands, dtype).double() - expected).norm() / expected.norm()) < 0.005


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(130, 272, 144), (128, 384, 256), (20, 128, 300)])
def test_product_of_weights_with_a_scale_a_block(draw, shape, codes):
    """The FP8 release's blocks. int8 codes stand for fp8 where the interpreter has no arithmetic of those."""
    if codes not in {rows.dtype for rows in FORMS}:
        pytest.skip("fp8 needs a GPU of compute capability 8.9")
    rows, width, columns = shape
    a = PlainKernels().scale_rows(draw(1, rows, width), Rows(codes, scaled=True))
    if codes == torch.int8:
        weight = draw(columns, width).mul(40).round().clamp(-127, 127).to(codes)
        scales = draw(-(-columns // 128), -(-width // 128)).abs()
    else:
        weight, scales = FP8Block().quantize(draw(columns, width)).values()
    wide = scales.repeat_interleave(128, 0)[:columns].repeat_interleave(128, 1)[:, :width]
    expected = dense(a)[0].double() @ (weight.double() * wide).t()
    found = product8(a.values[0], a.scale[0], weight, scales, torch.float32)
    assert float((found.double() - expected).norm() / expected.norm()) < (1e-6 if codes == torch.int8 else 1e-3)


def test_a_wrong_product_is_not_used(caplog):
    assert agrees_in_products(Int8(), int_mm, DEVICE, torch.float32)
    assert not caplog.records
    assert not agrees_in_products(Int8(), lambda *operands: 1.1 * int_mm(*operands), DEVICE, torch.float32)
    assert "wrong products of int8 weights" in caplog.text

    def missing(*operands):
        raise RuntimeError("no such kernel")

    assert not agrees_in_products(Int8(), missing, DEVICE, torch.float32)
    assert "missing does not multiply int8 weights here (RuntimeError: no such kernel)" in caplog.text


# The choice


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_takes_the_fused_kernels(dtype, caplog):
    assert type(choose_kernels(DEVICE, dtype, (HEADS, DIM), INNER)).__name__ == "TritonKernels"
    products = choose_products(DEVICE, dtype, triton=True)
    assert products.functions[Int8] is product8
    assert (FP8Block in products.functions) == (torch.cuda.get_device_capability() >= (8, 9))
    assert not caplog.records


def test_wrong_kernels_are_not_used():
    class Wrong(TritonKernels):
        def silu_mul(self, gate, up, rows):
            return super().silu_mul(gate, up * 1.1, rows)

    for kernels, right in ((TritonKernels(), True), (Wrong(), False)):
        assert agrees(kernels, DEVICE, torch.float32, (HEADS, DIM), INNER) == right


def test_a_cpu_takes_the_plain_functions():
    assert isinstance(choose_kernels(torch.device("cpu"), torch.float32, (HEADS, DIM), INNER), PlainKernels)
    assert isinstance(choose_products(torch.device("cpu"), torch.float32, triton=False), Products)
