"""The mixture of experts: router, expert banks and the grouped product (docs/model.md, Backbone)."""

import torch
import torch.nn.functional as F
from torch import nn

from ..quantization.formats import Dense, Format, FP8Block, Int4
from ..quantization.grouped import can_group, grouped_product, waits_for_device
from ..quantization.kernel_switch import KernelSwitch
from ..quantization.modules import FEW_ROWS, StoredWeight, apply_linear, stored_of, summed
from .config import BackboneConfig

# Tokens beyond which torch's grouped product of dense banks is faster than the kernel.
MANY_TOKENS = 2048


class Router(nn.Module):
    """Chooses experts for each token, all in float32: sigmoid scores, biased selection inside the best groups."""

    def __init__(self, config: BackboneConfig, kernels: KernelSwitch | None = None):
        super().__init__()
        self.config = config
        self.kernels = kernels or KernelSwitch()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, hidden] -> experts [tokens, k], whole numbers, and their weights [tokens, k] float32."""
        c = self.config
        if self.kernels.usable(x):
            from . import routing_kernels

            return routing_kernels.route(x, self.weight, self.expert_bias, c)
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        biased = (scores + self.expert_bias.float()).unflatten(-1, (c.n_group, -1))  # [tokens, group, expert]
        group_scores = biased.topk(min(2, biased.shape[-1]), dim=-1, sorted=False).values.sum(-1)
        best_groups = group_scores.topk(c.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best_groups, False)
        biased = biased.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
        experts = biased.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(-1, experts)
        return experts, weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor


def try_routing(config: BackboneConfig, device: torch.device) -> None:
    """Route, sort and sum up a few tokens by kernels there. Raises RuntimeError where they come out wrong."""
    from . import routing_kernels

    tokens, k = 24, config.num_experts_per_tok
    generator = torch.Generator().manual_seed(0)
    router = Router(config).requires_grad_(False)
    router.weight.normal_(0, config.hidden_size**-0.5, generator=generator)
    router.expert_bias.normal_(0, 0.01, generator=generator)
    x = torch.randn(tokens, config.hidden_size, generator=generator).half()
    expected, weights = router(x)
    chosen, found = routing_kernels.route(x.to(device), router.weight.to(device), router.expert_bias.to(device), config)
    order, ends = routing_kernels.sort(chosen, config.num_experts)
    one = torch.ones(tokens * k, config.hidden_size, dtype=x.dtype, device=device)
    total, sorted_total = (routing_kernels.combine(one, found, None, of).cpu() for of in (None, order))
    chosen, found = chosen.cpu().long(), found.cpu()
    each = torch.zeros(tokens, config.num_experts).scatter_(1, chosen, found)
    off = each - torch.zeros_like(each).scatter_(1, expected, weights)
    of_pair, place = chosen.flatten().sort(stable=True)
    right = [
        int((off.abs() > 1e-3).any(-1).sum()) <= 2,  # experts of all but equal scores may take each other's place
        torch.equal(order.cpu().long(), place),
        torch.equal(ends.cpu(), torch.searchsorted(of_pair, torch.arange(len(ends)), right=True, out_int32=True)),
        torch.allclose(total, found.sum(-1, keepdim=True).expand_as(total), rtol=1e-3)
        and torch.equal(total, sorted_total),
    ]
    if not all(right):
        names = ("the choice of experts", "sorting", "counting", "summing up")
        raise RuntimeError(f"{names[right.index(False)]} came out wrong")


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

    def __init__(self, config: BackboneConfig, kernels: KernelSwitch | None = None):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.kernels = kernels or KernelSwitch()
        self.gate_up = ExpertBank(config.num_experts, 2 * inner, hidden)
        self.down = ExpertBank(config.num_experts, hidden, inner)

    def forward(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        added: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [tokens, hidden].
            experts, weights: [tokens, k], as the router returns them.
            added: [tokens, hidden] of x's type, what the sum is added to (the shared expert's output).
            sums: x's, as in `MixtureOfExperts`.

        Returns:
            [tokens, hidden] float32, or of x's type where something is added.
        """
        if self.uses_kernels(x, len(x)):
            return self._in_kernels(x, experts, weights, added, sums)
        tokens, k = experts.shape
        # Sorting takes a GPU as long as its keys have bits.
        of_pair, order = experts.flatten().to(torch.int16).sort(stable=True)
        # Where each expert's pairs end; counting them with bincount would wait for the GPU.
        every = torch.arange(self.gate_up.shape[0], device=x.device, dtype=torch.int16)
        ends = torch.searchsorted(of_pair, every, right=True, out_int32=True)
        gate, up = self.gate_up.product(x[order // k], ends, tokens).chunk(2, -1)
        out = self.down.product(F.silu(gate) * up, ends, tokens)
        if self.kernels.usable(x):
            from . import routing_kernels

            return routing_kernels.combine(out, weights, added, order)
        # Back to token order and a plain sum: adding in place would be in random order on a GPU.
        pairs = torch.empty_like(out).index_copy_(0, order, out).unflatten(0, (tokens, k))
        total = (pairs * weights[..., None]).sum(1)  # float32, as the weights are
        return total if added is None else total.to(added.dtype) + added

    def uses_kernels(self, x: torch.Tensor, tokens: int) -> bool:
        """Whether so many tokens of x's type go through Triton's kernels where x is."""
        if not self.kernels.usable(x):
            return False
        from ..quantization import launch

        banks = (self.gate_up, self.down)
        if tokens > MANY_TOKENS and all(isinstance(b.form, Dense) and can_group(b.weight, x.dtype) for b in banks):
            return False
        form, inner = self.gate_up.form, self.gate_up.shape[1] // 2
        if isinstance(form, FP8Block) and inner % (form.part_rows or form.block):
            return False  # blocks that reach over both gate and up
        return launch.can_take(form, x) and launch.can_take(self.down.form, x)

    def _in_kernels(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        added: torch.Tensor | None,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        from ..quantization import launch
        from . import routing_kernels

        order, ends = routing_kernels.sort(experts, self.gate_up.shape[0])
        bank, k, form = self.gate_up, experts.shape[1], self.down.form
        inner_sums = None
        if isinstance(form, Int4) and not form.symmetric and self.down.shape[2] % form.group_size == 0:
            groups = self.down.shape[2] // form.group_size
            inner_sums = torch.empty(len(order), groups, dtype=torch.float32, device=x.device)
        with bank.stored_for(x.device) as stored:
            inner = launch.product(
                bank.form,
                stored,
                x,
                bank.shape,
                ends,
                gather=order,
                share=k,
                gated=True,
                sums=sums,
                out_sums=inner_sums,
            )
        bank = self.down
        with bank.stored_for(x.device) as stored:
            pairs = launch.product(bank.form, stored, inner, bank.shape, ends, scatter=order, sums=inner_sums)
        return routing_kernels.combine(pairs, weights, added)


class MLP(nn.Module):
    """SiLU-gated MLP: the dense layers and the shared experts."""

    def __init__(self, hidden: int, inner: int, kernels: KernelSwitch | None = None):
        super().__init__()
        self.kernels = kernels or KernelSwitch()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    @property
    def group_size(self) -> int:
        """As `modules.summed`, of what x is multiplied with."""
        return summed(self.gate_proj, self.up_proj)

    def forward(self, x: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., hidden] -> [..., hidden]. sums: x's over groups of `group_size`, or None."""
        flat = x.flatten(0, -2)
        if len(flat) <= FEW_ROWS and self.kernels.usable(x):
            return self._in_kernels(flat, sums).view_as(x)
        return self._one_by_one(x, sums)

    def _one_by_one(self, x: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        gate, up = (apply_linear(layer, x, sums) for layer in (self.gate_proj, self.up_proj))
        return self.down_proj(F.silu(gate) * up)

    def _in_kernels(self, x: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        from ..quantization import launch

        (form, gate), (other, up) = (stored_of(layer, x.device) for layer in (self.gate_proj, self.up_proj))
        if form != other or not launch.can_take(form, x):
            return self._one_by_one(x, sums)
        shape = (1, self.gate_proj.out_features, self.gate_proj.in_features)
        with gate as gate_weights, up as up_weights:
            inner = launch.product(form, gate_weights, x, shape, gated=True, up=up_weights, sums=sums)
        form, down = stored_of(self.down_proj, x.device)
        if not launch.can_take(form, inner):
            return self.down_proj(inner)
        with down as weights:
            return launch.product(form, weights, inner, (1, *shape[:0:-1]))


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: BackboneConfig, kernels: KernelSwitch | None = None):
        super().__init__()
        kernels = kernels or KernelSwitch()
        self.gate = Router(config, kernels)
        self.experts = Experts(config, kernels)
        inner = config.moe_intermediate_size * config.num_shared_experts
        self.shared_experts = MLP(config.hidden_size, inner, kernels)

    @property
    def group_size(self) -> int:
        """As `modules.summed`, of what x is multiplied with."""
        return summed(self.experts.gate_up, self.shared_experts.gate_proj, self.shared_experts.up_proj)

    def forward(self, x: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, n, hidden] -> [rows, n, hidden]. sums: x's over groups of `group_size`, or None."""
        flat = x.flatten(0, 1)
        shared = self.shared_experts(flat, sums)
        return self.experts(flat, *self.gate(flat), shared, sums).view_as(x)


def waits_for_gpu(module: Experts, tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens are sent to their experts in a way that reads something back from the GPU."""
    x = torch.empty(0, module.gate_up.shape[-1], dtype=dtype, device=module.gate_up.weight.device)
    return not module.uses_kernels(x, tokens) and any(
        bank.waits_for_device(dtype, tokens) for bank in (module.gate_up, module.down)
    )
