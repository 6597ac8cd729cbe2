"""Quantized weights: how far what is read back may be from what was stored, and the layout of what is stored."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_core.errors import CheckpointError, InputError
from llada_core.quantization import int4
from llada_core.quantization.formats import (
    Dense,
    FP8Block,
    Int4,
    Int8,
    decode_metadata,
    describe,
    encode_metadata,
    format_of,
)

FORMATS = [
    Dense(torch.float32),
    FP8Block(),
    Int8(),
    *(Int4(size, symmetric) for size in (64, 128) for symmetric in (False, True)),
]
INT4 = [form for form in FORMATS if isinstance(form, Int4)]
ids = pytest.mark.parametrize("form", FORMATS, ids=describe)


def heavy(*shape: int, seed: int = 0, df: float = 3.0) -> torch.Tensor:
    """Numbers with heavy tails: normal ones over the root of a chi-square."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator)
    chi = torch.randn(*shape, int(df), generator=generator).square().sum(-1) / df
    return 0.02 * normal / chi.sqrt()


@st.composite
def weights(draw) -> torch.Tensor:
    """Of one to three dimensions before `in`, of ragged sizes, of any magnitude, some rows zero or constant."""
    lead = draw(st.sampled_from([(), (1,), (3,)]))
    out, width = draw(st.integers(1, 140)), draw(st.integers(1, 270))
    weight = heavy(*lead, out, width, seed=draw(st.integers(0, 2**20)))
    weight *= 10.0 ** draw(st.integers(-20, 20))
    kind = draw(st.sampled_from(["plain", "zeros", "equal row", "one outlier", "one sign"]))
    if kind == "zeros":
        weight[..., : out // 2, :] = 0
    elif kind == "equal row":
        weight[..., 0, :] = float(weight.flatten()[0])
    elif kind == "one outlier":
        weight[..., 0, width // 2] *= 1000
    elif kind == "one sign":
        weight = weight.abs()
    return weight


def back(form, weight: torch.Tensor) -> torch.Tensor:
    return form.dequantize(form.quantize(weight), weight.shape[-1], torch.float32)


@given(weights())
@settings(max_examples=40, deadline=None)
def test_int8_is_within_half_a_step(weight):
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((back(Int8(), weight) - weight).abs() <= step * 0.501).all()


@given(weights())
@settings(max_examples=40, deadline=None)
def test_fp8_has_three_bits_behind_the_first(weight):
    """e4m3: a relative error of 1/16 at most, or half of the smallest step where that is more."""
    form = FP8Block()
    scale = form.quantize(weight)["weight_scale_inv"].repeat_interleave(128, -1).repeat_interleave(128, -2)
    scale = scale[..., : weight.shape[-2], : weight.shape[-1]]
    bound = torch.maximum(weight.abs() / 16, scale * 2.0**-10) * 1.001
    assert ((back(form, weight) - weight).abs() <= bound).all()


@given(weights(), st.sampled_from(INT4))
@settings(max_examples=60, deadline=None)
def test_int4_is_within_a_step_and_the_search_never_makes_it_worse(weight, form):
    width = weight.shape[-1]

    def by_group(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, -width % form.group_size)).unflatten(-1, (-1, form.group_size))

    groups = by_group(weight)
    plain = Int4(form.group_size, form.symmetric, search=False)
    off = by_group(back(plain, weight) - weight)
    largest = groups.abs().amax(-1, keepdim=True)
    if form.symmetric:
        bound = largest / 8 * 1.03  # eight codes on one side, seven on the other, of a scale rounded to 8 bits
    else:
        span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)  # padding counts as a number here
        bound = torch.maximum(span / 15, largest / 256) / 2 + largest * 2.0**-6
    assert float((off.abs() / bound.clamp_min(1e-38)).max()) <= 1
    searched = by_group(back(form, weight) - weight)
    size = largest.clamp_min(1e-30)
    errors = [(x / size).square().sum(-1) for x in (searched, off)]
    assert (errors[0] <= errors[1] * 1.001 + 1e-9).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_search_pays_on_heavy_tails(size, symmetric):
    weight = heavy(64, 1024)

    def error(search: bool) -> float:
        return float((back(Int4(size, symmetric, search), weight) - weight).norm() / weight.norm())

    assert error(True) < 0.97 * error(False)


@ids
@pytest.mark.parametrize("value", [0.0, 1.0, -3e38, 3.3e38, 1e-20, -7.25])
def test_equal_numbers_come_back(form, value):
    weight = torch.full((2, 5, 131), value)
    found = back(form, weight)
    assert found.isfinite().all()
    assert torch.allclose(found, weight, rtol=4e-3)


@ids
def test_the_largest_numbers_of_both_signs_stay_finite(form):
    largest = torch.finfo(torch.bfloat16).max
    weight = torch.tensor([largest, -largest]).repeat(4, 65)
    found = back(form, weight)
    assert found.isfinite().all()
    assert torch.allclose(found, weight, rtol=0.13)


@ids
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(form, bad):
    if isinstance(form, Dense):
        pytest.skip("a dense weight is not looked at")
    weight = heavy(2, 40, 70)
    weight[1, 3, 69] = bad
    with pytest.raises(InputError, match=r"model\.layers\.1: found 1 numbers that are NaN or infinite"):
        form.quantize(weight, "model.layers.1")


@ids
@pytest.mark.parametrize("shape", [(7, 33), (4, 130, 200), (1, 1, 1), (128, 128)])
def test_tensors_says_what_quantize_makes(form, shape):
    stored = form.quantize(heavy(*shape))
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    assert found == form.tensors(shape)
    form.check(found, shape, "x")
    assert form.bytes(shape) == sum(tensor.nbytes for tensor in stored.values())
    assert all(tensor.is_contiguous() for tensor in stored.values())
    for dtype in (torch.float32, torch.bfloat16):
        assert form.dequantize(stored, shape[-1], dtype).dtype == dtype
        assert form.dequantize(stored, shape[-1], dtype).shape == shape


@ids
def test_a_piece_lies_where_place_says(form):
    """An expert's gate and up quantized alone are what the whole bank has at their places."""
    inner, width = 144, 200
    bank = heavy(3, 2 * inner, width)
    alone = form
    if isinstance(form, FP8Block):
        form = FP8Block(part_rows=inner)
    stored = form.quantize(bank)
    for expert in range(3):
        for rows in (slice(0, inner), slice(inner, None)):
            pieces = alone.quantize(bank[expert, rows])
            places = form.place(tuple(bank.shape), (expert, rows))
            assert places.keys() == stored.keys()
            for name, index in places.items():
                assert torch.equal(stored[name][index].float(), pieces[name].float())
    for name, index in form.place(tuple(bank.shape), (slice(None), slice(None))).items():
        assert stored[name][index].shape == stored[name].shape


def test_blocks_that_are_cut_cannot_be_placed():
    with pytest.raises(InputError, match="whole blocks"):
        FP8Block().place((300, 64), (slice(100, 200),))
    with pytest.raises(InputError, match="a divisor of 300"):
        FP8Block(part_rows=128).tensors((300, 64))


def test_layout_of_int4_number_by_number():
    """Two columns a byte, the even one in the low half; scales and zeros [groups, out]; (nibble - 8) x scale + zero."""
    form, weight = Int4(64), heavy(3, 5, 150)
    stored = form.quantize(weight)
    found = form.dequantize(stored, 150, torch.float32)
    for expert, row, column in [(0, 0, 0), (1, 4, 1), (2, 3, 63), (0, 2, 64), (2, 1, 149)]:
        byte = int(stored["weight"][expert, row, column // 2]) & 255
        nibble = byte >> 4 if column % 2 else byte & 15
        scale = float(stored["weight_scale"][expert, column // 64, row])
        zero = float(stored["weight_zeros"][expert, column // 64, row])
        assert float(found[expert, row, column]) == pytest.approx((nibble - 8) * scale + zero)


def test_layout_of_fp8_number_by_number():
    form, weight = FP8Block(part_rows=150), heavy(300, 150)
    stored = form.quantize(weight)
    found = form.dequantize(stored, 150, torch.float32)
    for row, column, block in [(0, 0, (0, 0)), (149, 149, (1, 1)), (150, 127, (2, 0)), (299, 128, (3, 1))]:
        expected = float(stored["weight"][row, column].float() * stored["weight_scale_inv"][block])
        assert float(found[row, column]) == pytest.approx(expected)


def test_all_numbers_of_fp8_are_read_exactly():
    """With NaN among them and without: the CPU has two ways."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    stored = {"weight": every, "weight_scale_inv": torch.ones(1, 1)}
    expected = every.float()
    assert torch.equal(FP8Block().dequantize(stored, 128, torch.float32).nan_to_num(999), expected.nan_to_num(999))
    finite = every[:, :127].contiguous()  # the last of each row is NaN
    stored = {"weight": finite, "weight_scale_inv": torch.full((1, 1), 2.0**-100)}
    assert torch.equal(FP8Block().dequantize(stored, 127, torch.float32), expected[:, :127] * 2.0**-100)


@given(st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_unpack_undoes_pack(rows, width):
    nibbles = torch.randint(0, 16, (rows, width), dtype=torch.uint8)
    assert torch.equal(int4.unpack(int4.pack(nibbles), width) + 8, nibbles)


@pytest.mark.parametrize("form", [Int8(), *INT4], ids=describe)
@pytest.mark.parametrize("shape", [(8, 64), (4, 8, 64)])
def test_metadata_is_read_back(form, shape):
    metadata = form.metadata(shape)
    assert metadata.get("num_experts") == (4 if len(shape) == 3 else None)
    assert format_of(decode_metadata(encode_metadata(metadata), "x"), "x") == form


def test_the_hosts_names():
    """ComfyUI reads int8 by rows and 4 bits with zeros by these names."""
    assert Int8().metadata((8, 64)) == {"format": "int8_tensorwise"}
    assert Int4(64).metadata((2, 8, 64)) == {"format": "awq_w4a16", "group_size": 64, "num_experts": 2}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "nvfp4"},
        {"format": "awq_w4a16", "group_size": 32},
        {"format": "awq_w4a16", "group_size": "64"},
        {"format": ["int8_tensorwise"]},
        {"format": "int8_tensorwise", "convrot": True},
    ],
)
def test_other_formats_are_refused(metadata):
    with pytest.raises(CheckpointError, match="layer: found the format"):
        format_of(metadata, "layer")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_unreadable_metadata_is_refused(content):
    with pytest.raises(CheckpointError, match="comfy_quant"):
        decode_metadata(torch.tensor(list(content), dtype=torch.uint8), "layer")
    assert json.loads(b'{"a": 1}') == decode_metadata(torch.tensor(list(b'{"a": 1}'), dtype=torch.uint8), "layer")


@ids
def test_stored_tensors_of_another_weight_are_refused(form):
    right = form.tensors((8, 130))
    for suffix, (shape, dtype) in right.items():
        for wrong in ((*shape[:-1], shape[-1] + 1), dtype), (shape, torch.float64):
            with pytest.raises(CheckpointError, match=f"layer: found {suffix} of shape"):
                form.check(right | {suffix: wrong}, (8, 130), "layer")
        with pytest.raises(CheckpointError, match=f"layer: found no {suffix}"):
            form.check({name: value for name, value in right.items() if name != suffix}, (8, 130), "layer")


def test_group_sizes():
    with pytest.raises(InputError, match="group_size: found 32"):
        Int4(32)


def test_the_hosts_library_reads_the_same_numbers():
    """comfy-kitchen, where it is installed: its own reading of int8 by rows and of 4 bits with zeros."""
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    weight = heavy(48, 256)
    int8 = Int8().quantize(weight)
    params = tensor.TensorWiseINT8Layout.Params(
        scale=int8["weight_scale"], orig_dtype=torch.float32, orig_shape=(48, 256)
    )
    found = tensor.TensorWiseINT8Layout.dequantize(int8["weight"], params)
    assert torch.allclose(found, Int8().dequantize(int8, 256, torch.float32))
    four = Int4(64).quantize(weight)
    params = tensor.TensorCoreAWQW4A16Layout.Params(
        scale=four["weight_scale"].float(),
        zeros=four["weight_zeros"].float(),
        group_size=64,
        orig_dtype=torch.float32,
        orig_shape=(48, 256),
    )
    found = tensor.TensorCoreAWQW4A16Layout.dequantize(four["weight"], params)
    assert torch.allclose(found, Int4(64).dequantize(four, 256, torch.float32))
