"""The mixture of experts: router, expert banks and the grouped product (docs/model.md, Backbone)."""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .config import BackboneConfig

# (rows sorted by expert, gate and up bank, down bank, where each expert's rows end) -> [rows, hidden]
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Up to so many tokens, a product takes about as long as reading its weights, whatever rows it is padded to.
FEW_TOKENS = 128


class Router(nn.Module):
    """Chooses experts for each token, all in float32: sigmoid scores, biased selection inside the best groups."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, hidden] -> experts [tokens, k] int64 and their weights [tokens, k] float32."""
        c = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        biased = (scores + self.expert_bias.float()).unflatten(-1, (c.n_group, -1))  # [tokens, group, expert]
        group_scores = biased.topk(min(2, biased.shape[-1]), dim=-1, sorted=False).values.sum(-1)
        best_groups = group_scores.topk(c.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best_groups, False)
        biased = biased.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
        experts = biased.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(-1, experts)
        return experts, weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor


class ExpertBank(nn.Module):
    """One projection of all experts as a single tensor [experts, out, in].

    A host that keeps weights off the card replaces this class with one whose `tensor_for` brings them there.
    """

    def __init__(self, experts: int, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))

    def tensor_for(self, x: torch.Tensor) -> torch.Tensor:
        """The bank where x is and in x's dtype."""
        return self.weight.to(device=x.device, dtype=x.dtype)


class Experts(nn.Module):
    """All routed experts of a layer: SiLU-gated MLPs with gate and up fused in one bank."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up = ExpertBank(config.num_experts, 2 * inner, hidden)
        self.down = ExpertBank(config.num_experts, hidden, inner)

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], experts and weights [tokens, k] -> weighted sum [tokens, hidden] float32."""
        tokens, k = experts.shape
        # Sorting takes a GPU as long as its keys have bits.
        of_row, order = experts.flatten().to(torch.int16).sort(stable=True)
        # Where each expert's rows end; counting them with bincount would wait for the GPU.
        every = torch.arange(self.gate_up.weight.shape[0], device=x.device, dtype=torch.int16)
        ends = torch.searchsorted(of_row, every, right=True, out_int32=True)
        gate_up, down = self.gate_up.tensor_for(x), self.down.tensor_for(x)
        rows = x[order // k]  # a row a (token, expert) pair, expert after expert
        out = _product(gate_up, down, tokens)(rows, gate_up, down, ends)
        # Back to token order and a plain sum: adding in place would be in random order on a GPU.
        pairs = torch.empty_like(out).index_copy_(0, order, out).unflatten(0, (tokens, k))
        return (pairs * weights[..., None]).sum(1)  # float32, as the weights are


def can_group(bank: torch.Tensor) -> bool:
    """Whether torch has a kernel for the grouped product of this bank: bf16, rows of 16 bytes, Hopper or Blackwell.

    Elsewhere, and on Windows, torch computes it one expert after the other, and reads their sizes back for that.
    """
    if not bank.is_cuda or bank.dtype != torch.bfloat16 or bank.shape[-1] % 8 or bank.shape[-2] % 8:
        return False
    if not hasattr(torch, "_grouped_mm") or torch.version.hip or sys.platform == "win32":
        return False
    return torch.cuda.get_device_capability(bank.device)[0] in (9, 10)


def waits_for_gpu(module: Experts, tokens: int) -> bool:
    """Whether so many tokens are sent to their experts in a way that reads something back from the GPU."""
    return _product(module.gate_up.weight, module.down.weight, tokens) is _looped


def _product(gate_up: torch.Tensor, down: torch.Tensor, tokens: int) -> Product:
    """The fastest form of the grouped product that the device has for so many tokens."""
    if can_group(gate_up) and can_group(down):
        return _grouped
    if gate_up.is_cuda and tokens <= FEW_TOKENS:
        return partial(_padded, most=tokens)  # a token picks an expert at most once
    return _looped


def _gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _grouped(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    inner = _gate(torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    return torch._grouped_mm(inner, down.transpose(1, 2), offs=ends)


def _padded(
    rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor, most: int
) -> torch.Tensor:
    """Every expert's rows filled up to `most` and multiplied as one batch: two products instead of hundreds."""
    starts = F.pad(ends[:-1], (1, 0))
    row = torch.arange(len(rows), device=rows.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, row, right=True)
    slot = row - starts[expert]
    padded = rows.new_zeros(len(ends), most, rows.shape[-1])
    padded[expert, slot] = rows
    return torch.bmm(_gate(torch.bmm(padded, gate_up.transpose(1, 2))), down.transpose(1, 2))[expert, slot]


def _looped(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(rows)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = F.linear(_gate(F.linear(rows[start:end], gate_up[expert])), down[expert])
            start = end
    return out
