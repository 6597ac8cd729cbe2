"""The mixture of experts: the router against a loop over tokens, the banks against every expert on its own."""

import pytest
import torch
import torch.nn.functional as F

from llada_core.backbone.experts import Experts, Router, waits_for_gpu
from llada_core.quantization import grouped


def slow_router(x, weight, bias, c) -> list[dict[int, float]]:
    """docs/model.md, Backbone, a token at a time in plain numbers: expert -> weight."""
    size = c.num_experts // c.n_group
    chosen = []
    for row in (x.double() @ weight.double().T).sigmoid().tolist():
        biased = [score + b for score, b in zip(row, bias.tolist(), strict=True)]
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
        groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
        inside = [e for group in groups[: c.topk_group] for e in group]
        best = sorted(inside, key=lambda e: -biased[e])[: c.num_experts_per_tok]
        total = sum(row[e] for e in best) + 1e-20
        chosen.append({e: row[e] / total * c.routed_scaling_factor for e in best})
    return chosen


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
        {"num_experts": 8, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 3},  # groups of one expert
        {"num_experts": 12, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 12},  # every expert
    ],
)
def test_router_equals_a_slow_loop(sizes, oracle):
    config = oracle.tiny_config(**sizes)
    generator = torch.Generator().manual_seed(0)
    router = oracle.randomise(Router(config), generator, 0.3)
    router.expert_bias.normal_(0, 0.3, generator=generator)
    x = torch.randn(200, config.hidden_size, generator=generator)
    found, weights = router(x)
    for row, chosen in enumerate(slow_router(x, router.weight, router.expert_bias, config)):
        assert dict(zip(found[row].tolist(), weights[row].tolist(), strict=True)) == pytest.approx(chosen, rel=1e-4)


def test_bias_selects_but_does_not_weigh(oracle):
    """Weights are the unbiased scores of the chosen: an expert chosen for its bias alone has a small weight."""
    config = oracle.tiny_config(num_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    router = Router(config).requires_grad_(False)
    router.weight.zero_()
    router.weight[:, 0] = torch.tensor([-2.0, 1.0, 0.0, -1.0])
    router.expert_bias.copy_(torch.tensor([10.0, 0.0, 0.0, 0.0]))
    found, weights = router(torch.eye(config.hidden_size)[:1])
    scores = torch.tensor([-2.0, 1.0]).sigmoid()
    expected = dict(zip([0, 1], (scores / scores.sum() * 2.5).tolist(), strict=True))
    assert dict(zip(found[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx(expected)


def test_router_decides_in_float32(oracle):
    """bfloat16 would tie experts whose scores differ in the third digit."""
    config = oracle.tiny_config(num_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1)
    router = Router(config).requires_grad_(False)
    router.weight.zero_()
    router.weight[:, 0] = torch.tensor([1.000, 1.002, 1.001, 0.999])
    router.expert_bias.zero_()
    x = torch.eye(config.hidden_size)[:1].bfloat16()
    found, weights = router(x)
    assert found.item() == 1
    assert weights.dtype == torch.float32


@pytest.fixture
def bank(oracle):
    config = oracle.tiny_config(num_experts=8, num_experts_per_tok=3)
    return oracle.randomise(Experts(config), torch.Generator().manual_seed(3), 0.2)


def every_expert(bank, x, chosen, weights):
    """Each token through each of its experts, one product at a time."""
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = bank.gate_up.weight[expert].chunk(2)
            inner = F.silu(gate @ x[token]) * (up @ x[token])
            out[token] += weight * (bank.down.weight[expert] @ inner)
    return out


def routed(tokens: int, experts: list[int], k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 48, generator=generator)
    order = torch.stack([torch.randperm(len(experts), generator=generator)[:k] for _ in range(tokens)])
    return x, torch.tensor(experts)[order], torch.rand(tokens, k, generator=generator)


@pytest.mark.parametrize("experts", [list(range(8)), [1, 4, 6], [0, 1, 7]])  # some experts have no token at all
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_experts_equal_every_expert_computed_densely(bank, tokens, experts):
    x, chosen, weights = routed(tokens, experts)
    out = bank(x, chosen, weights)
    assert out.dtype == torch.float32
    assert torch.allclose(out, every_expert(bank, x, chosen, weights), atol=1e-4)


def test_grouped_product_gets_what_the_kernel_asks_for(bank, monkeypatch):
    """A stand-in for torch's kernel with its contract: row ends per group int32, banks [experts, in, out]."""

    def grouped_mm(rows, banks, offs):
        assert offs.dtype == torch.int32
        assert int(offs[-1]) == len(rows)
        out = rows.new_empty(len(rows), banks.shape[2])
        for expert, end in enumerate(offs.tolist()):
            start = offs[expert - 1] if expert else 0
            out[start:end] = rows[start:end] @ banks[expert]
        return out

    monkeypatch.setattr(grouped, "can_group", lambda bank, dtype: True)
    monkeypatch.setattr(torch, "_grouped_mm", grouped_mm, raising=False)
    x, chosen, weights = routed(17, [0, 2, 3, 5, 7])
    assert torch.allclose(bank(x, chosen, weights), every_expert(bank, x, chosen, weights), atol=1e-4)


def test_a_cpu_reads_the_numbers_of_pairs(bank):
    assert not grouped.can_group(bank.gate_up.weight.bfloat16(), torch.bfloat16)
    assert waits_for_gpu(bank, 1, torch.float32)


def test_sum_over_experts_does_not_lose_small_terms(bank):
    """bfloat16 experts are summed in float32: a large first term would swallow the others."""
    half = bank.bfloat16()
    x, chosen, weights = routed(5, list(range(8)))
    one_by_one = sum(half(x.bfloat16(), chosen[:, i : i + 1], weights[:, i : i + 1]) for i in range(3))
    assert torch.equal(half(x.bfloat16(), chosen, weights), one_by_one)
