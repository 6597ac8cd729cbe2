"""Attention kernels against the formula with keys repeated for every head, and the block-causal mask by brute force."""

import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llada_core.backbone import attention_kernels
from llada_core.backbone.attention_kernels import PART, bias, choose, eager, flash, in_parts, sdpa
from llada_core.backbone.model import apply_rotary_emb, block_causal_mask, rope
from llada_core.errors import InputError

ROWS, HEADS, KV_HEADS, DIM = 2, 6, 2, 8


def random_qkv(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + m)
    shapes = [(ROWS, HEADS, n, DIM), (ROWS, KV_HEADS, m, DIM), (ROWS, KV_HEADS, m, DIM)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def repeated(q, k, v, mask):
    """Query head i reads key head i // (heads per key head), written with copies of the keys."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("rhnd,rhmd->rhnm", q, k) / DIM**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("rhnm,rhmd->rhnd", scores.softmax(-1), v)


def masks(n: int, m: int):
    generator = torch.Generator().manual_seed(1)
    per_query = torch.rand(ROWS, 1, n, m, generator=generator) < 0.5
    per_query[..., 0] = True
    per_row = torch.arange(m)[None, None, None] >= torch.tensor([3, 0])[:, None, None, None]
    return [None, per_query, per_row]


def bias_of(mask, n: int):
    return None if mask is None else bias(mask, n, HEADS // KV_HEADS, torch.float32)


@pytest.mark.parametrize("kernel", [sdpa, eager])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 4), (5, 13), (32, 40)])
def test_kernels_equal_the_formula(kernel, n, m):
    q, k, v = random_qkv(n, m)
    for mask in masks(n, m) if m > 4 else [None]:
        out = kernel(q, k, v, bias_of(mask, n))
        assert out.shape == q.shape
        assert torch.allclose(out, repeated(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 32])
def test_parts_equal_the_formula(parts, n):
    q, k, v = random_qkv(n, parts * PART)
    nothing_of_a_part = masks(n, parts * PART)[1]
    nothing_of_a_part[:, :, : n // 2 + 1, 1:PART] = False
    nothing_of_a_part[..., PART : 2 * PART] = False
    for mask in [*masks(n, parts * PART)[1:], nothing_of_a_part]:
        out = in_parts(q, k, v, bias_of(mask, n))
        assert out.shape == q.shape
        assert torch.allclose(out, repeated(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize(("kind", "kernel"), [("auto", sdpa), ("sdpa", sdpa), ("eager", eager)])
def test_kinds(kind, kernel):
    assert choose(kind) is kernel


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(InputError, match=r"attention: found 'fast'; expected one of auto, sdpa.*eager\. Choose one"):
        choose("fast")


# flash-attn


@pytest.fixture
def flash_calls(monkeypatch):
    """A stand-in for the package that checks its layout, [rows, n, heads, dim], and records the mask-less calls."""
    calls = []

    def flash_attn_func(q, k, v):
        calls.append((tuple(q.shape), tuple(k.shape)))
        assert q.shape[2] == HEADS
        assert k.shape[2] == v.shape[2] == KV_HEADS
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        attention_kernels.importlib.util,
        "find_spec",
        lambda name: name == "flash_attn" or find_spec(name),
        raising=True,
    )
    return calls


def test_what_flash_leaves_to_sdpa_is_said_when_it_is_chosen(flash_calls, caplog):
    with caplog.at_level("INFO"):
        choose("flash_attention_2")
    assert len([record for record in caplog.records if "take sdpa" in record.getMessage()]) == 1


def test_flash_takes_rounds_without_a_mask(flash_calls):
    q, k, v = random_qkv(8, 40)
    assert choose("flash_attention_2") is flash
    assert torch.allclose(flash(q, k, v, None), repeated(q, k, v, None), atol=1e-5)
    assert flash_calls == [((ROWS, 8, HEADS, DIM), (ROWS, 40, KV_HEADS, DIM))]


def test_flash_leaves_masks_to_sdpa(flash_calls):
    q, k, v = random_qkv(8, 40)
    for mask in masks(8, 40)[1:]:
        assert torch.allclose(flash(q, k, v, bias_of(mask, 8)), repeated(q, k, v, mask), atol=1e-5)
    assert flash_calls == []


def test_flash_without_its_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(attention_kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        choose("flash_attention_2")
    message = str(caught.value)
    assert message.startswith("attention: found flash_attention_2 without the flash-attn package")
    assert "expected sdpa" in message
    assert "Install flash-attn" in message


# The mask


@given(
    start_block=st.integers(0, 4),
    n=st.integers(1, 40),
    block=st.integers(1, 16),
    pads=st.lists(st.integers(0, 60), min_size=1, max_size=3),
)
def test_block_causal_mask_by_brute_force(start_block, n, block, pads):
    """Every real query sees exactly the real keys of its own and earlier blocks; every padding query sees something."""
    start = start_block * block
    mask = block_causal_mask(start, n, block, torch.tensor(pads))
    m = start + n
    full = torch.ones(len(pads), 1, n, m).bool() if mask is None else mask.expand(-1, -1, n, -1)
    assert full.shape == (len(pads), 1, n, m)
    for row, pad in enumerate(pads):
        for i in range(n):
            query = start + i
            if query < pad:
                assert bool(full[row, 0, i].any()), "a softmax over nothing is NaN"
                continue
            seen = [pad <= key and key // block <= query // block for key in range(m)]
            assert full[row, 0, i].tolist() == seen


def test_a_round_without_padding_needs_no_mask():
    """So that it can take the fastest kernel."""
    assert block_causal_mask(64, 32, 32, torch.tensor([0, 0])) is None
    assert block_causal_mask(64, 33, 32, torch.tensor([0, 0])) is not None
    assert block_causal_mask(64, 32, 32, torch.tensor([0, 5])).shape == (2, 1, 1, 96)


def test_rope_turns_pairs_of_halves_and_leaves_the_rest(oracle):
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    config = oracle.tiny_config(head_dim=8, partial_rotary_factor=0.5, rope_theta=100.0)
    turn = rope(config, torch.tensor([[3]]), torch.float32)
    turned, x = apply_rotary_emb(x, *turn).flatten().tolist(), x.flatten()
    for i, angle in enumerate((3.0, 0.3)):  # dimension i pairs with i + 2, of the 4 that turn
        pair = complex(x[i], x[i + 2]) * complex(math.cos(angle), math.sin(angle))
        assert (turned[i], turned[i + 2]) == pytest.approx((pair.real, pair.imag), abs=1e-6)
    assert turned[4:] == x[4:].tolist()
