"""Triton's kernels against plain torch: on the GPU where there is one, else a few in Triton's interpreter on the CPU.

The interpreter computes no bfloat16 and no inline assembly, so a CPU checks the kernels' logic and not their bits.
"""

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed")

from llada_core.backbone import head_kernels, routing_kernels  # noqa: E402
from llada_core.backbone.config import BackboneConfig  # noqa: E402
from llada_core.backbone.experts import ExpertBank, MixtureOfExperts, Router, try_routing, waits_for_gpu  # noqa: E402
from llada_core.backbone.head import try_best  # noqa: E402
from llada_core.quantization import launch  # noqa: E402
from llada_core.quantization.formats import Dense, FP8Block, Int4, Int8, describe  # noqa: E402
from llada_core.quantization.modules import QuantizedLinear  # noqa: E402
from llada_core.quantization.tiles import Tile  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FORMATS = [Dense(), FP8Block(), Int8(), *(Int4(g, s) for g in (64, 128) for s in (False, True))]
forms = pytest.mark.parametrize("form", FORMATS, ids=describe)
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative, of a product and of the weights' own rounding

try:  # Triton 3.6 cannot interpret loops with the newest numpy
    launch.try_out(DEVICE)
except Exception as error:
    if CUDA:
        raise
    pytest.skip(f"Triton's interpreter does not run here: {error}", allow_module_level=True)


def stored_bank(form, dtype, experts: int, out: int, width: int) -> tuple[dict, torch.Tensor]:
    """Stored tensors on the device, and the weights that they stand for in double precision."""
    weight = torch.randn(experts, out, width, generator=torch.Generator().manual_seed(out)) * 0.1
    stored = form.quantize(weight) if not isinstance(form, Dense) else {"weight": weight.to(dtype)}
    return {name: t.to(DEVICE) for name, t in stored.items()}, form.dequantize(stored, width, torch.float64)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next tensor of this size is likely to get."""
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.double().cpu() - expected).norm() / expected.norm()
    return float(error) < ROUNDING[found.dtype]


def gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


COUNTS = {"few": [3, 0, 1, 7, 0], "more than a tile": [0, 40, 0, 1, 19]}
SIZES = {"even": (128, 256), "ragged": (72, 150)}


@forms
@dtypes
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_product_of_sorted_pairs(form, dtype, sizes, counts):
    if not CUDA and counts is COUNTS["few"] and sizes is SIZES["even"]:
        pytest.skip("the other cases cover this on a CPU")
    (out, width), ends = sizes, torch.tensor(counts).cumsum(0)
    form = FP8Block(part_rows=out // 2) if isinstance(form, FP8Block) else form
    stored, dense = stored_bank(form, dtype, 5, out, width)
    pairs = int(ends[-1])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(-(-pairs // 2), width, generator=generator).to(dtype)
    order = torch.randperm(pairs, generator=generator).int()
    of_pair = torch.arange(5).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("noi,ni->no", dense[of_pair], x[order.long() // 2].double())
    arguments = form, stored, x.to(DEVICE), (5, out, width), ends.int().to(DEVICE)
    for tile in (
        Tile(16, 32, 64, 4, 3),
        Tile(32, 64, 128, 4, 2, steps=2, split=2),
        Tile(16, 64, 64, 4, 2, swapped=True),
        Tile(8, 64, 64, 4, 3, steps=2, swapped=True),
    ):
        poisoned((pairs, out), dtype)
        found = launch.product(*arguments, gather=order.to(DEVICE), share=2, tile=tile)
        assert close(found, expected)
        poisoned((pairs, out // 2), dtype)
        found = launch.product(*arguments, gather=order.to(DEVICE), share=2, gated=True, tile=tile)
        assert close(found, gated(expected))
    x = torch.randn(pairs, width, generator=generator).to(dtype)
    poisoned((pairs, out), dtype)
    found = launch.product(form, stored, x.to(DEVICE), *arguments[3:], scatter=order.to(DEVICE), tile=tile)
    expected = torch.einsum("noi,ni->no", dense[of_pair], x.double())
    assert close(found[order.long()], expected)


@forms
@dtypes
def test_quantized_linear(form, dtype):
    """As a layer of a module, and gate and up of two layers."""
    out, width = 96, 200
    stored, dense = stored_bank(form, dtype, 2, out, width)
    gate, up = ({name: tensor[i] for name, tensor in stored.items()} for i in (0, 1))
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    arguments = form, gate, x.to(DEVICE), (1, out, width)
    exact = x.double() @ dense.mT
    assert close(launch.product(*arguments), exact[0])
    assert close(launch.product(*arguments, gated=True, up=up), F.silu(exact[0]) * exact[1])


@forms
def test_every_code_becomes_its_number(form):
    """Products with an identity are the weights themselves, bit for bit in the type of x."""
    dtype = DTYPES[0]
    if isinstance(form, Dense):
        pytest.skip("has no codes")
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    width = 256 if isinstance(form, Int4) else 128
    if isinstance(form, FP8Block):
        codes[codes & 0x7F == 0x7F] = 0  # no NaN
    stored = {}
    for name, (shape, kind) in form.tensors((2, width)).items():
        plain = torch.ones(shape) if name != "weight_zeros" else torch.zeros(shape)
        stored[name] = (codes.view(kind) if name == "weight" else plain.to(kind)).to(DEVICE)
    found = launch.product(form, stored, torch.eye(width, dtype=dtype, device=DEVICE), (1, 2, width))
    expected = form.dequantize({name: t.cpu() for name, t in stored.items()}, width, torch.float32)
    assert torch.equal(found.T.float().cpu(), expected)


@dtypes
@pytest.mark.parametrize("swapped", [False, True])
def test_sums_of_groups_come_with_the_product(dtype, swapped):
    """What the next product with zeros needs, and what it computes itself without."""
    form = Int4(64)
    stored, _ = stored_bank(form, dtype, 3, 512, 128)
    x = torch.randn(21, 128, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    ends, sums = torch.tensor([2, 2, 21], dtype=torch.int32, device=DEVICE), torch.full((21, 4), float("nan"))
    sums = sums.to(DEVICE)
    tile = Tile(16, 128, 64, 4, 2, swapped=swapped)
    out = launch.product(form, stored, x, (3, 512, 128), ends, gated=True, out_sums=sums, tile=tile)
    assert torch.allclose(sums, out.float().unflatten(1, (4, 64)).sum(-1), rtol=1e-4, atol=1e-3)
    assert torch.allclose(launch.group_sums(out, 64), sums, rtol=1e-4, atol=1e-3)


def test_no_pairs_at_all():
    form = Int8()
    stored, _ = stored_bank(form, torch.float16, 3, 32, 64)
    empty, ends = torch.empty(0, 64, dtype=torch.float16, device=DEVICE), torch.zeros(3, dtype=torch.int32)
    assert launch.product(form, stored, empty, (3, 32, 64), ends.to(DEVICE)).shape == (0, 32)


CONFIGS = [
    {"num_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    {"num_experts": 8, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 3},  # groups of one expert
    {"num_experts": 12, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 12},  # every expert, no power of two
]


def config_of(changes: dict) -> BackboneConfig:
    fields = {
        "vocab_size": 160,
        "image_token_offset": 96,
        "hidden_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "rope_theta": 100.0,
        "max_position_embeddings": 4096,
    }
    return BackboneConfig(**fields | changes)


@pytest.mark.parametrize("changes", CONFIGS)
def test_router_chooses_what_the_plain_one_chooses(changes):
    config = config_of(changes)
    router = Router(config).requires_grad_(False).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.3)
    router.expert_bias.copy_(torch.randn(router.expert_bias.shape, generator=generator) * 0.3)
    x = torch.randn(21, config.hidden_size, generator=generator).half()
    chosen, weights = routing_kernels.route(x.to(DEVICE), router.weight, router.expert_bias, config)
    plain = router.cpu()(x)
    for row in range(len(x)):
        expected = dict(zip(plain[0][row].tolist(), plain[1][row].tolist(), strict=True))
        found = dict(zip(chosen[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("changes", CONFIGS)
def test_trying_out_finds_what_is_wrong(changes, monkeypatch):
    config = config_of(changes)
    try_routing(config, DEVICE)
    for name, spoil in {
        "route": lambda chosen, weights: ((chosen + 1) % config.num_experts, weights),
        "sort": lambda order, ends: (order.flip(0), ends),
    }.items():
        right = getattr(routing_kernels, name)
        monkeypatch.setattr(routing_kernels, name, lambda *given, right=right, spoil=spoil: spoil(*right(*given)))
        with pytest.raises(RuntimeError, match="came out wrong"):
            try_routing(config, DEVICE)
        monkeypatch.setattr(routing_kernels, name, right)
    pieces = launch._pointers
    monkeypatch.setattr(launch, "_pointers", lambda *given: {k: v.roll(1) for k, v in pieces(*given).items()})
    with pytest.raises(RuntimeError, match="came out wrong"):
        launch.try_out(DEVICE)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 3), (40, 16), (150, 5)])
def test_sort_is_stable_and_counts(tokens, experts):
    chosen = torch.randint(0, experts, (tokens, 3), generator=torch.Generator().manual_seed(tokens), dtype=torch.int32)
    poisoned((tokens * 3,), torch.float32)
    order, ends = (value.cpu() for value in routing_kernels.sort(chosen.to(DEVICE), experts))
    of_pair, expected = chosen.flatten().sort(stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(ends, torch.searchsorted(of_pair, torch.arange(experts), right=True, out_int32=True))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("by_expert", [None, torch.int32, torch.int64], ids=str)  # as the two sorts give it
def test_combine_weighs_and_sums(by_expert, added):
    generator = torch.Generator().manual_seed(0)
    pairs, weights = torch.randn(5 * 3, 70, generator=generator).half(), torch.rand(5, 3, generator=generator)
    extra = torch.randn(5, 70, generator=generator).half() if added else None
    order = torch.randperm(5 * 3, generator=generator).to(by_expert) if by_expert else None
    given = (pairs if order is None else pairs[order], weights, extra, order)
    found = routing_kernels.combine(*(of if of is None else of.to(DEVICE) for of in given))
    expected = (pairs.unflatten(0, (5, 3)).float() * weights[..., None]).sum(1)
    if added:
        expected = (expected.half() + extra).float()
    assert found.dtype == (torch.float16 if added else torch.float32)
    assert torch.allclose(found.float().cpu(), expected, rtol=2e-3, atol=2e-3)


@dtypes
@pytest.mark.parametrize("width", [1, 70, 4096, 20_001])
def test_best_is_the_first_of_the_largest_and_its_probability(dtype, width):
    logits = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(width)).mul(3).to(DEVICE, dtype)
    logits[0, 1, width // 2 :] = logits[0, 1].max()
    found, probability = head_kernels.best(logits)
    expected = logits.float().cpu().softmax(-1)
    largest = logits.cpu() == logits.cpu().amax(-1, keepdim=True)
    assert torch.equal(found.cpu(), largest.int().argmax(-1))
    assert torch.allclose(probability.cpu(), expected.amax(-1), rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_probability(value):
    logits = torch.zeros(2, 3000, device=DEVICE)
    logits[1, 2500] = value
    _, probability = head_kernels.best(logits)
    assert probability.isfinite().tolist() == [True, False]


def test_trying_out_the_best_finds_what_is_wrong(monkeypatch):
    try_best(DEVICE)
    right = head_kernels.best
    monkeypatch.setattr(head_kernels, "best", lambda logits: (right(logits)[0] + 1, right(logits)[1]))
    with pytest.raises(RuntimeError, match="came out wrong"):
        try_best(DEVICE)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@forms
def test_a_mixture_computes_in_kernels_what_it_computes_without(form):
    config = config_of(CONFIGS[0] | {"hidden_size": 128, "moe_intermediate_size": 64})
    torch.manual_seed(0)
    module = MixtureOfExperts(config).requires_grad_(False).to(DEVICE, torch.bfloat16)
    module.gate.float()
    for parameter in module.parameters():
        parameter.normal_(0, 0.1)
    for bank in module.modules():
        if isinstance(bank, ExpertBank):
            kind = FP8Block(part_rows=64) if isinstance(form, FP8Block) and bank.shape[1] == 128 else form
            stored = kind.quantize(bank.weight)
            bank.set_format(kind)
            for name, tensor in stored.items():
                getattr(bank, name).data.copy_(tensor)
    shared = module.shared_experts
    for name, layer in list(shared.named_children()):
        new = QuantizedLinear(layer.in_features, layer.out_features, form, kernels=shared.kernels).to(DEVICE)
        for suffix, tensor in form.quantize(layer.weight).items():
            getattr(new, suffix).data.copy_(tensor)
        setattr(shared, name, new.requires_grad_(False))
    x = torch.randn(2, 33, 128, device=DEVICE, dtype=torch.bfloat16)
    assert not waits_for_gpu(module.experts, 66, x.dtype)
    found = module(x)
    for part in module.modules():
        if hasattr(part, "kernels"):
            part.kernels._usable = {DEVICE: False, x.device: False}
    plain = module(x)
    assert float((found.float() - plain.float()).norm() / plain.float().norm()) < 0.02
    assert not torch.equal(found, plain), "these are two computations"
