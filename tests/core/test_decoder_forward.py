"""The decoder's own forward against the library's, and what it adds: shared work, float16, 8 bits."""

import copy

import pytest
import torch
from torch import nn

from llada_core.decoder.kernels import Rows
from llada_core.decoder.products import Products, choose_products, int_mm
from llada_core.decoder.transformer import SemanticDecoder
from llada_core.quantization.formats import FP8Block, Int8
from llada_core.quantization.modules import QuantizedLinear, apply_formats

CPU = torch.device("cpu")
FEATURES = 20
BLOCKS = ("layers", "noise_refiner", "context_refiner")
SIZES = {"dim": 96, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [8, 8, 8]}


def build(seed: int = 0, **changes) -> SemanticDecoder:
    """A random decoder in which every block and every gate counts."""
    generator = torch.Generator().manual_seed(seed)
    decoder = SemanticDecoder(cap_feat_dim=FEATURES, axes_lens=[4096, 64, 64], **SIZES | changes)
    for name, parameter in decoder.eval().requires_grad_(False).named_parameters():
        parameter.normal_(0, 0.1 if parameter.ndim > 1 else 0.3, generator=generator)
        if parameter.ndim == 1 and ("norm" in name or name == "cap_embedder.0.weight"):
            parameter.add_(1)
    return decoder


def inputs(h: int, w: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and features of a grid of h x w tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 16, 1, 4 * h, 4 * w, generator=generator)
    return x, torch.randn(4 * h * w, FEATURES, generator=generator)


def library(decoder: SemanticDecoder, x: torch.Tensor, t: float, features: torch.Tensor) -> torch.Tensor:
    """One evaluation by the library's own forward."""
    return decoder([x[0].to(features)], torch.tensor([t]), [features], return_dict=False)[0][0][None]


def ours(decoder: SemanticDecoder, x: torch.Tensor, t: float, features: torch.Tensor) -> torch.Tensor:
    """The same by ours."""
    return decoder.velocity(x, t, decoder.condition(features, x.shape[-2:]))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def decoder() -> SemanticDecoder:
    return build()


# Against the library


@pytest.mark.parametrize(("h", "w"), [(4, 4), (1, 1), (3, 5), (2, 8)])  # 64, 4, 60 and 64 positions: padded and not
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_it_is_the_librarys_forward(decoder, h, w, t):
    x, features = inputs(h, w)
    found = ours(decoder, x, t, features)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    assert distance(found, library(decoder, x, t, features)) < 1e-5


@pytest.mark.parametrize("changes", [{"qk_norm": False}, {"norm_eps": 0.3}, {"n_layers": 1, "n_refiner_layers": 1}])
def test_other_configurations(changes):
    decoder = build(**changes)
    x, features = inputs(2, 3)
    assert distance(ours(decoder, x, 0.4, features), library(decoder, x, 0.4, features)) < 1e-5


def test_a_step_of_guidance_shares_what_does_not_depend_on_the_conditioning(decoder):
    x, features = inputs(2, 3)
    conditionings = [decoder.condition(f, x.shape[-2:]) for f in (features, torch.zeros_like(features))]
    calls = []
    handle = decoder.noise_refiner[0].feed_forward.w1.register_forward_hook(lambda *_: calls.append(1))
    together = decoder.velocities(x, 0.3, conditionings)
    handle.remove()
    assert len(calls) == 1
    for found, conditioning in zip(together, conditionings, strict=True):
        assert torch.equal(found, decoder.velocity(x, 0.3, conditioning))
    assert distance(*together) > 0.01


def test_an_evaluation_leaves_its_conditioning_as_it_was(decoder):
    x, features = inputs(3, 5)
    conditioning = decoder.condition(features, x.shape[-2:])
    before = conditioning.hidden.clone(), conditioning.layers.vectors().clone()
    first = decoder.velocity(x, 0.3, conditioning)
    assert torch.equal(conditioning.hidden, before[0])
    assert torch.equal(conditioning.layers.vectors(), before[1])
    assert torch.equal(decoder.velocity(x, 0.3, conditioning), first)


def test_the_last_block_computes_only_the_image(decoder):
    x, features = inputs(2, 4)
    rows = []
    handle = decoder.layers[-1].feed_forward.w1.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    ours(decoder, x, 0.3, features)
    handle.remove()
    assert rows == [32]


def test_a_hosts_attention_is_used(decoder):
    x, features = inputs(2, 2)
    seen = []

    def attention(q, k, v):
        seen.append((q.shape, k.shape, v.shape))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    own = copy.copy(decoder)
    own.attention = attention
    assert distance(ours(own, x, 0.3, features), library(decoder, x, 0.3, features)) < 1e-5
    assert len(seen) == 2 + 2 + 3
    assert seen[-1] == ((1, 4, 16, 24), (1, 4, 64, 24), (1, 4, 64, 24))


# Types


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_types_come_near_float32(decoder, dtype, near):
    x, features = inputs(2, 3)
    half = nn.Module.to(copy.deepcopy(decoder), dtype)
    assert 0 < distance(ours(half, x, 0.3, features.to(dtype)), ours(decoder, x, 0.3, features)) < near


def planted(decoder: SemanticDecoder, name: str, factor: float) -> SemanticDecoder:
    """With one kind of weight so large that float16 overflows where it is used."""
    decoder = copy.deepcopy(decoder)
    for block in (*decoder.layers, *decoder.noise_refiner, *decoder.context_refiner):
        block.get_submodule(name).weight.mul_(factor)
    return decoder


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("feed_forward.w2", 2e4),  # the sum of a feed-forward's products
        ("feed_forward.w1", 300),  # what goes into it: silu(gate) * up
        ("attention.to_out.0", 1e5),  # the sum of attention's
    ],
)
def test_float16_keeps_its_range_where_the_library_loses_it(decoder, name, factor):
    x, features = inputs(2, 3)
    large = planted(decoder, name, factor)
    large.layers[0].feed_forward.w3.weight.mul_(300)
    half = nn.Module.to(copy.deepcopy(large), torch.float16)
    assert not bool(library(half, x, 0.3, features.half()).isfinite().all())
    assert distance(ours(half, x, 0.3, features.half()), ours(large, x, 0.3, features)) < 0.01


def test_float16_adds_in_float32(decoder):
    """A norm's weight so large that the sum of all blocks leaves float16."""
    x, features = inputs(2, 3)
    large = copy.deepcopy(decoder)
    for block in large.layers:
        block.ffn_norm2.weight.mul_(1e5)
    half = nn.Module.to(copy.deepcopy(large), torch.float16)
    for block, full in zip(half.layers, large.layers, strict=True):
        block.ffn_norm2.weight.data = full.ffn_norm2.weight.clone()
    assert distance(ours(half, x, 0.3, features.half()), ours(large, x, 0.3, features)) < 0.01


@pytest.mark.parametrize("name", ["attention.to_v", "attention.to_q", "attention.to_k"])
def test_products_beyond_float16_are_held_at_its_end(decoder, name):
    x, features = inputs(2, 2)
    half = nn.Module.to(planted(decoder, name, 1e5), torch.float16)
    assert all(bool(parameter.isfinite().all()) for parameter in half.parameters())
    assert not bool(library(half, x, 0.3, features.half()).isfinite().all())
    assert bool(ours(half, x, 0.3, features.half()).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pad_tokens_of_any_size_weigh_nothing(decoder, dtype):
    """1e24, as a sibling of the model has: its square overflows float32, and the norm makes it zero."""
    x, features = inputs(3, 5)
    padded = copy.deepcopy(decoder)
    padded.x_pad_token.fill_(1e24)
    padded.cap_pad_token.fill_(-1e24)
    expected = library(padded, x, 0.3, features)
    typed = nn.Module.to(copy.deepcopy(padded), dtype)
    typed.x_pad_token.data, typed.cap_pad_token.data = padded.x_pad_token.clone(), padded.cap_pad_token.clone()
    near = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.006}[dtype]
    assert distance(ours(typed, x, 0.3, features.to(dtype)), expected) < near


# 8 bits


def quantized(decoder: SemanticDecoder, form) -> SemanticDecoder:
    """The decoder with the linear layers of its blocks in a form."""
    result, weights = copy.deepcopy(decoder), {}

    def choose(name: str, shape: tuple[int, ...]):
        if name.split(".")[0] not in BLOCKS or "adaLN" in name:
            return None
        weights[name] = result.get_submodule(name).weight
        return form

    apply_formats(result, choose)
    for name, weight in weights.items():
        for suffix, tensor in form.quantize(weight).items():
            getattr(result.get_submodule(name), suffix).data.copy_(tensor)
    return result


def with_int8_products(decoder: SemanticDecoder) -> SemanticDecoder:
    """Which multiplies in 8 bits on the CPU too; the engine does so on GPUs only."""
    decoder.products = Products({Int8: int_mm})
    return decoder


@pytest.mark.parametrize(("form", "near"), [(Int8(), 0.05), (FP8Block(), 0.15)])
def test_elsewhere_weights_of_8_bits_are_dequantized(decoder, form, near):
    x, features = inputs(2, 3)
    small = quantized(decoder, form)
    assert not choose_products(CPU, torch.float32, triton=False).functions
    assert 0 < distance(ours(small, x, 0.3, features), ours(decoder, x, 0.3, features)) < near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_in_int8(decoder, dtype):
    x, features = inputs(2, 3)
    small = quantized(decoder, Int8())
    dense = ours(decoder, x, 0.3, features)
    eight = ours(with_int8_products(nn.Module.to(small, dtype)), x, 0.3, features.to(dtype))
    assert 0 < distance(eight, dense) < 0.08


def test_int8_keeps_the_range_of_float16(decoder):
    x, features = inputs(2, 3)
    large = planted(planted(decoder, "feed_forward.w2", 2e4), "attention.to_out.0", 1e5)
    small = with_int8_products(nn.Module.to(quantized(large, Int8()), torch.float16))
    assert distance(ours(small, x, 0.3, features.half()), ours(large, x, 0.3, features)) < 0.08


def test_a_layer_that_is_left_dense_takes_plain_activations(decoder):
    """Mixed forms: what shares its input with such a layer is dequantized."""
    x, features = inputs(2, 3)
    mixed = quantized(decoder, Int8())
    for index, name in ((0, "attention.to_k"), (1, "feed_forward.w2"), (2, "attention.to_out.0")):
        owner, _, leaf = name.rpartition(".")
        dense = copy.deepcopy(decoder.layers[index].get_submodule(name))
        setattr(mixed.layers[index].get_submodule(owner), leaf, dense)
    eight = ours(with_int8_products(mixed), x, 0.3, features)
    assert distance(eight, ours(decoder, x, 0.3, features)) < 0.08


def test_which_layers_multiply_in_8_bits():
    products = Products({Int8: int_mm})
    assert products.rows_for(QuantizedLinear(32, 48, Int8())) == Rows(torch.int8, scaled=True)
    assert products.rows_for(QuantizedLinear(32, 48, FP8Block())) is None
    assert products.rows_for(QuantizedLinear(24, 48, Int8())) is None
    assert products.rows_for(nn.Linear(32, 48)) is None
