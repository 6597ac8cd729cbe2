"""The mixture of experts: router, expert banks and the grouped product (docs/model.md, Backbone)."""

import torch
import torch.nn.functional as F
from torch import nn

from ..quantization.formats import Dense, Format
from ..quantization.grouped import grouped_product, waits_for_device
from ..quantization.modules import StoredWeight
from .config import BackboneConfig


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


class ExpertBank(StoredWeight):
    """One projection of all experts: a weight [experts, out, in] in any format, and its grouped product."""

    def __init__(self, experts: int, out_features: int, in_features: int, form: Format | None = None):
        super().__init__((experts, out_features, in_features), form or Dense(torch.get_default_dtype()))

    def product(self, pairs: torch.Tensor, ends: torch.Tensor, most: int) -> torch.Tensor:
        """Each pair of a token and an expert times its expert's matrix.

        Args:
            pairs: [n, in], sorted by expert.
            ends: int32 [experts], where each expert's pairs end.
            most: how many pairs an expert has at most: the number of tokens.

        Returns:
            [n, out] of the pairs' type.
        """
        with self.stored_for(pairs.device) as stored:
            return grouped_product(self.form, stored, pairs, ends, most, self.shape)

    def waits_for_device(self, dtype: torch.dtype, tokens: int) -> bool:
        """Whether `product` of so many tokens reads something back from the device."""
        return waits_for_device(self.form, self.weight, dtype, tokens)


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
        of_pair, order = experts.flatten().to(torch.int16).sort(stable=True)
        # Where each expert's pairs end; counting them with bincount would wait for the GPU.
        every = torch.arange(self.gate_up.shape[0], device=x.device, dtype=torch.int16)
        ends = torch.searchsorted(of_pair, every, right=True, out_int32=True)
        gate, up = self.gate_up.product(x[order // k], ends, tokens).chunk(2, -1)
        out = self.down.product(F.silu(gate) * up, ends, tokens)
        # Back to token order and a plain sum: adding in place would be in random order on a GPU.
        pairs = torch.empty_like(out).index_copy_(0, order, out).unflatten(0, (tokens, k))
        return (pairs * weights[..., None]).sum(1)  # float32, as the weights are


def waits_for_gpu(module: Experts, tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens are sent to their experts in a way that reads something back from the GPU."""
    return any(bank.waits_for_device(dtype, tokens) for bank in (module.gate_up, module.down))
