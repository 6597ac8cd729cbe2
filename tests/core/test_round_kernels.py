"""What Triton computes between a layer's products against plain torch: on the GPU where there is one, else interpreted.

Whole rounds are run in the fixed shapes of CUDA graphs, with these kernels and without.
"""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed")

from llada_core.backbone import attention_kernels, round_kernels  # noqa: E402
from llada_core.backbone.cache import PrefixCache  # noqa: E402
from llada_core.backbone.cuda_graphs import GraphedForward  # noqa: E402
from llada_core.backbone.experts import Router  # noqa: E402
from llada_core.backbone.model import try_kernels  # noqa: E402
from llada_core.quantization import launch  # noqa: E402
from llada_core.quantization.kernel_switch import KernelSwitch  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROUNDING = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # relative, of what three layers of a round make

try:  # Triton 3.6 cannot interpret loops with the newest numpy
    launch.try_out(DEVICE)
except Exception as error:
    if CUDA:
        raise
    pytest.skip(f"Triton's interpreter does not run here: {error}", allow_module_level=True)


def close(found: torch.Tensor, expected: torch.Tensor, within: float) -> bool:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm()) < within


def drawn(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@dtypes
@pytest.mark.parametrize("width", [48, 128])
@pytest.mark.parametrize("added", [False, True])
def test_norm_of_a_sum(dtype, width, added):
    x, y, weight = (
        drawn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate([(2, 9, width)] * 2 + [(width,)])
    )
    total, normed, none = round_kernels.norm(x, weight, 1e-6, y if added else None)
    expected = x + y if added else x
    assert torch.equal(total, expected)
    assert none is None
    plain = torch.nn.functional.rms_norm(expected, (width,), eps=1e-6) * weight
    assert close(normed, plain, 2e-3 if dtype == torch.bfloat16 else 3e-4)  # sums are in another order


@dtypes
@pytest.mark.parametrize("width", [64, 192, 2048])
def test_a_norm_brings_the_sums_of_its_groups(dtype, width):
    x, weight = drawn(2, 9, width, dtype=dtype), drawn(width, dtype=dtype, seed=1)
    _, normed, sums = round_kernels.norm(x, weight, 1e-6, None, 64)
    assert same_sums(sums, normed)
    assert torch.equal(normed, round_kernels.norm(x, weight, 1e-6)[1])
    assert round_kernels.norm(x[..., :48].contiguous(), weight[:48], 1e-6, None, 64)[2] is None  # no whole groups


@dtypes
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_attention_brings_the_sums_of_its_groups(dtype, dim):
    q, keys, values = (drawn(2, 2, n, dim, dtype=dtype, seed=n) for n in (4, 256, 257))
    mask = (drawn(2, 1, 4, 256, seed=3) < 0.3).contiguous()
    given = q, keys, values[:, :, :256].contiguous(), mask, torch.arange(252, 256, device=DEVICE).repeat(2, 1)
    found, sums = round_kernels.attend(*given, 64)
    assert same_sums(sums, found)
    assert torch.equal(found, round_kernels.attend(*given)[0])
    assert (round_kernels.attend(*given, 128)[1] is None) == (dim != 128)  # groups that reach over two heads


def same_sums(found: torch.Tensor, x: torch.Tensor) -> bool:
    expected = launch.group_sums(x.flatten(0, -2), 64)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@dtypes
@pytest.mark.parametrize("extent", [256, 2304])  # short parts, and long ones
@pytest.mark.parametrize(("n", "heads", "kv_heads", "dim"), [(32, 4, 2, 16), (5, 3, 3, 24)])
def test_attention_sees_what_the_mask_shows(dtype, extent, n, heads, kv_heads, dim):
    end, rows, earlier = extent - 70, 2, 9  # the second row stands a little before the first
    q = drawn(rows, heads, n, dim, dtype=dtype)
    keys, values = (drawn(rows, kv_heads, extent + 40, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    mask = (drawn(rows, 1, n, extent, seed=3) < 0.3).contiguous()
    mask[..., round_kernels.SHORT_PART : 2 * round_kernels.SHORT_PART] = False  # one part holds nothing to see
    ends = torch.tensor([end, end - earlier], device=DEVICE)
    at = ends[:, None] - n + torch.arange(n, device=DEVICE)
    for row, last in enumerate(ends.tolist()):
        mask[row, ..., last - n : last], mask[row, ..., last:] = True, False
        keys[row, :, last:] = values[row, :, last:] = float("nan")  # what lies behind is not read
    found, _ = round_kernels.attend(q, keys, values, mask, at)
    bias = attention_kernels.bias(mask[..., :end], n, heads // kv_heads, torch.float32)
    plain = attention_kernels.eager(q.float(), *(of[:, :, :end].nan_to_num().float() for of in (keys, values)), bias)
    assert close(found, plain.transpose(1, 2).flatten(2), 5e-3)


def test_a_query_that_sees_nothing_gives_no_nan():
    """Padding in a short row; no other query sees what it gives."""
    q, keys, values = drawn(1, 2, 4, 16), drawn(1, 2, 256, 16), drawn(1, 2, 256, 16)
    mask = torch.zeros(1, 1, 4, 256, dtype=torch.bool, device=DEVICE)
    found, _ = round_kernels.attend(q, keys, values, mask, torch.arange(60, 64, device=DEVICE)[None])
    assert not found.any()


def test_trying_out_finds_what_is_wrong(oracle, monkeypatch):
    config = oracle.tiny_config()
    try_kernels(config, DEVICE)
    for name, spoil in {
        "norm": lambda total, normed, sums: (total, normed * 1.1, sums),
        "heads": lambda *q: q[0].flip(1),
        "attend": lambda out, sums: (out.roll(1, -1), sums),
    }.items():
        right = getattr(round_kernels, name)

        def wrong(*given, right=right, spoil=spoil):
            out = right(*given)
            return spoil(*(out if isinstance(out, tuple) else (out,)))

        monkeypatch.setattr(round_kernels, name, wrong)
        with pytest.raises(RuntimeError, match="came out wrong"):
            try_kernels(config, DEVICE)
        monkeypatch.setattr(round_kernels, name, right)


@dtypes
def test_rounds_compute_in_kernels_what_they_compute_without(dtype, oracle, monkeypatch):
    """Hidden states, keys, and the norms of keys that SPRINT ranks by; with padding at the left of a row."""
    backbone = oracle.tiny_backbone(1).to(DEVICE, dtype)
    for part in backbone.modules():
        if isinstance(part, Router):
            part.float()
    made = []
    for kernels in (False, True):
        monkeypatch.setattr(KernelSwitch, "usable", lambda self, x, kernels=kernels: kernels)
        cache = PrefixCache(backbone.config, 2, 512, DEVICE, dtype, key_norms=True)
        for seed, tensor in enumerate((*cache.keys, *cache.values)):
            tensor[:, :, :40] = drawn(*tensor[:, :, :40].shape, dtype=dtype, seed=seed)
        fixed = GraphedForward(backbone, cache, 8, 256)
        ids = torch.arange(16, device=DEVICE).view(2, 8) * 5
        mask = torch.ones(2, 1, 1, 48, dtype=torch.bool, device=DEVICE)
        mask[1, ..., :7] = False
        with torch.no_grad():
            fixed.load(ids, torch.arange(40, 48, device=DEVICE).expand(2, -1), 40, mask)
            fixed.compute()
        made.append((fixed.hidden, cache.keys[2], cache.values[2], cache.key_norms))
    for plain, found in zip(*made, strict=True):
        assert close(found, plain, ROUNDING[dtype])
    assert not torch.equal(made[0][0], made[1][0]), "these are two computations"
