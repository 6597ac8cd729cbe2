"""The grouped product in each of its forms, for each format, against one product a pair in double precision."""

import pytest
import torch

from llada_core.backbone.experts import ExpertBank
from llada_core.quantization import grouped
from llada_core.quantization.formats import Dense, FP8Block, Int4, Int8, describe
from llada_core.quantization.modules import QuantizedLinear, apply_formats

FORMATS = [Dense(torch.float32), FP8Block(part_rows=72), Int8(), Int4(64), Int4(128, symmetric=True)]
forms = pytest.mark.parametrize("form", FORMATS, ids=describe)
EXPERTS, OUT, IN = 9, 144, 200


def bank_of(form, seed: int = 0) -> tuple[ExpertBank, torch.Tensor]:
    """A bank with weights, and the dense weights that it stands for."""
    weight = torch.randn(EXPERTS, OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.1
    bank = ExpertBank(EXPERTS, OUT, IN, form).requires_grad_(False)
    stored = form.quantize(weight)
    for suffix, tensor in stored.items():
        getattr(bank, suffix).copy_(tensor)
    return bank, form.dequantize(stored, IN, torch.float64)


def sorted_pairs(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs, where each expert's end, and the expert of each pair."""
    counts = torch.tensor(counts)
    pairs = torch.randn(int(counts.sum()), IN, generator=torch.Generator().manual_seed(5))
    return pairs, counts.cumsum(0, dtype=torch.int32), torch.arange(EXPERTS).repeat_interleave(counts)


COUNTS = {
    "some without": [3, 0, 1, 7, 0, 0, 12, 1, 0],
    "one has all": [0, 0, 0, 0, 30, 0, 0, 0, 0],
    "all": [2] * EXPERTS,
    "one pair": [0] * 8 + [1],
}


@forms
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("kind", ["looped", "batched", "batched, counted"])
@pytest.mark.parametrize("batch", [1, 2**20], ids=["one at a time", "many at a time"])
def test_forms_agree_with_a_product_a_pair(form, counts, kind, batch, monkeypatch):
    monkeypatch.setattr(grouped, "BATCH_BYTES", batch)
    bank, dense = bank_of(form)
    pairs, ends, of_pair = sorted_pairs(counts)
    with bank.stored_for(pairs.device) as stored:
        if kind == "looped":
            found = grouped._looped(form, stored, pairs, ends, bank.shape)
        else:
            most = None if kind == "batched, counted" else max(counts) + 2
            found = grouped._batched(form, stored, pairs, ends, most, bank.shape)
    expected = torch.einsum("noi,ni->no", dense[of_pair], pairs.double())
    assert found.shape == (len(pairs), OUT)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@forms
def test_the_bank_computes_its_product(form):
    bank, dense = bank_of(form)
    pairs, ends, of_pair = sorted_pairs(COUNTS["some without"])
    expected = torch.einsum("noi,ni->no", dense[of_pair], pairs.double())
    assert torch.allclose(bank.product(pairs, ends, 30).double(), expected, atol=1e-5)
    half = bank.product(pairs.bfloat16(), ends, 30)
    assert half.dtype == torch.bfloat16
    assert float((half - expected).norm() / expected.norm()) < 0.01


def test_torchs_own_grouped_product_agrees_where_it_runs():
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped product")
    form = Dense(torch.bfloat16)
    bank, _ = bank_of(form)
    pairs, ends, _ = sorted_pairs(COUNTS["some without"])
    pairs = pairs.bfloat16()
    try:
        found = torch._grouped_mm(pairs, bank.weight.transpose(1, 2), offs=ends)
    except RuntimeError as error:
        pytest.skip(f"this torch has no grouped product on the CPU: {error}")
    expected = grouped._looped(form, {"weight": bank.weight}, pairs, ends, bank.shape)
    assert torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.05)


def test_few_pairs_are_never_counted(monkeypatch):
    """On a device that would have to be waited for; meta has nothing to read."""
    with torch.device("meta"):
        bank = ExpertBank(EXPERTS, OUT, IN, Int8())
        pairs, ends = torch.empty(40, IN), torch.empty(EXPERTS, dtype=torch.int32)
    assert bank.product(pairs, ends, 20).shape == (40, OUT)
    assert not bank.waits_for_device(torch.float32, 20)
    assert bank.waits_for_device(torch.float32, grouped.FEW_TOKENS + 1)


@forms
def test_quantized_linear(form):
    weight = torch.randn(144, 70, generator=torch.Generator().manual_seed(1))
    layer = QuantizedLinear(70, 144, form, bias=True).requires_grad_(False)
    for suffix, tensor in form.quantize(weight).items():
        getattr(layer, suffix).copy_(tensor)
    layer.bias.normal_()
    x = torch.randn(2, 5, 70)
    dense = form.dequantize(form.quantize(weight), 70, torch.float32)
    assert torch.allclose(layer(x), x @ dense.T + layer.bias, atol=1e-4)
    assert set(layer.state_dict()) == {"bias", *form.tensors((144, 70))}


@forms
def test_codes_and_scales_keep_their_types(form):
    """`module.bfloat16()` and the like are for what is not quantized."""
    layer = QuantizedLinear(70, 144, form, bias=True).bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    for suffix, (shape, dtype) in form.tensors((144, 70)).items():
        tensor = getattr(layer, suffix)
        expected = torch.bfloat16 if isinstance(form, Dense) else dtype
        assert (tuple(tensor.shape), tensor.dtype) == (shape, expected)
    moved = layer.to("meta", torch.float16)
    assert moved.weight.is_meta
    assert moved.weight.dtype == torch.float16 if isinstance(form, Dense) else form.tensors((144, 70))["weight"][1]


def test_formats_are_given_to_layers_by_name():
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"bank": ExpertBank(3, 8, 16), "plain": torch.nn.Linear(16, 8)})
        module["inner"] = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False), torch.nn.SiLU())
    seen = {}

    def choose(name, shape):
        seen[name] = shape
        return {"bank": Int4(64), "inner.0": Int8()}.get(name)

    apply_formats(module, choose)
    assert seen == {"bank": (3, 8, 16), "plain": (8, 16), "inner.0": (8, 16)}
    assert {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()} == {
        "bank.weight": ((3, 8, 8), torch.int8),
        "bank.weight_scale": ((3, 1, 8), torch.bfloat16),
        "bank.weight_zeros": ((3, 1, 8), torch.bfloat16),
        "plain.weight": ((8, 16), torch.float32),
        "plain.bias": ((8,), torch.float32),
        "inner.0.weight": ((8, 16), torch.int8),
        "inner.0.weight_scale": ((8, 1), torch.float32),
    }
    assert all(tensor.is_meta for tensor in module.state_dict().values())
