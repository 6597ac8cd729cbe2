"""The backbone: a block-causal mixture-of-experts transformer (docs/model.md, Backbone)."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..quantization.formats import Dense
from ..quantization.kernel_switch import KernelSwitch
from ..quantization.modules import apply_linear, summed
from . import attention_kernels
from .cache import IndexedCache, PrefixCache, PrunedPrefix, RowsOfCache
from .config import BackboneConfig
from .experts import MLP, MixtureOfExperts, try_routing
from .head import Head


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in float32 and cast back: one kernel of torch's."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm, then times its weight."""

    def __init__(self, size: int, eps: float, kernels: KernelSwitch | None = None):
        super().__init__()
        self.eps = eps
        self.kernels = kernels or KernelSwitch()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype."""
        return rms_norm(x, self.eps) * self.weight

    def after(
        self, x: torch.Tensor, added: torch.Tensor | None, group_size: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A norm of a sum.

        Args:
            x, added: [..., size]; None where nothing is added.
            group_size: of the sums that the next product wants; 0 where it wants none.

        Returns:
            x + added (x where nothing is added), its norm, and the norm's `launch.group_sums` [rows, groups] where
            they cost nothing, else None.
        """
        if self.kernels.usable(x) and x.dtype == self.weight.dtype:
            from . import round_kernels

            return round_kernels.norm(x, self.weight, self.eps, added, group_size)
        total = x if added is None else x + added
        return total, self(total), None


class Attention(nn.Module):
    """Grouped-query attention with one fused projection, norms per head and half-turned RoPE."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        out = (self.heads + 2 * self.kv_heads) * self.dim
        self.query_key_value = nn.Linear(config.hidden_size, out, bias=False)
        self.dense = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)
        self.query_layernorm = RMSNorm(self.dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.dim, config.rms_norm_eps)

    def forward(self, x, sums, rope, context, layer, start, mask, bias, attend) -> torch.Tensor:
        """x [rows, n, hidden] -> [rows, n, hidden]; keys and values go to and come from `context`.

        sums: x's, as `RMSNorm.after` returns them for the first product.
        mask: as in `Backbone.forward`. bias: `attention_kernels.bias` of it; None where kernels read the mask itself.
        """
        if mask is not None and bias is None:
            return self._in_kernels(x, sums, rope, context, layer, mask)
        q, k, v = self.split_heads(apply_linear(self.query_key_value, x, sums), rope)
        k, v = context.extend(layer, start, k, v)
        return self.dense(attend(q, k, v, bias).transpose(1, 2).flatten(2))

    def split_heads(self, qkv: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv [rows, n, all heads * dim] -> queries, keys and values, normed and turned, each [rows, heads, n, dim]."""
        parts = qkv.unflatten(-1, (-1, self.dim)).transpose(1, 2)
        qk, v = parts.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        # Queries and keys are normed and turned together: the GPU takes as long for both as for one.
        qk = apply_rotary_emb(rms_norm(qk, self.query_layernorm.eps) * self._norm_weights(), *rope)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        return q, k, v

    def _in_kernels(self, x, sums, rope, context, layer, mask) -> torch.Tensor:
        from . import round_kernels

        weights = self.query_layernorm.weight, self.key_layernorm.weight
        keys, values, at = context.whole(layer)
        qkv = apply_linear(self.query_key_value, x, sums)
        q = round_kernels.heads(qkv, *weights, self.query_layernorm.eps, rope, at, keys, values)
        context.note(layer)
        return apply_linear(self.dense, *round_kernels.attend(q, keys, values, mask, at, summed(self.dense)))

    def _norm_weights(self) -> torch.Tensor:
        """Weights of the norms of all query heads, then of all key heads, [heads + kv, 1, dim]."""
        norms = (self.query_layernorm, self.heads), (self.key_layernorm, self.kv_heads)
        return torch.cat([norm.weight.expand(heads, 1, -1) for norm, heads in norms])


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, size: int) -> torch.Tensor:
    """RoPE, rotate-half form, over the first `size` dimensions of each head.

    Args:
        x: [rows, heads, n, dim].
        cos, sin: [rows, 1, n, dim], from `rope`: 1 and 0 over the rest, and the first half's sin negative.
    """
    first, second, rest = x.split([size // 2, size // 2, x.shape[-1] - size], -1)
    return x * cos + torch.cat((second, first, rest), -1) * sin


class Layer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: BackboneConfig, index: int, kernels: KernelSwitch):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        dense = index < config.first_k_dense_replace
        self.mlp = (
            MLP(config.hidden_size, config.intermediate_size, kernels) if dense else MixtureOfExperts(config, kernels)
        )

    def forward(self, x, added, *attention_arguments) -> tuple[torch.Tensor, torch.Tensor]:
        """x and what is to be added to it, [rows, n, hidden] or None -> the same two for what follows.

        Sums are left to the norm behind them, which reads them anyway.
        """
        x, *normed = self.input_layernorm.after(x, added, summed(self.attention.query_key_value))
        attended = self.attention(*normed, *attention_arguments)
        x, *normed = self.post_attention_layernorm.after(x, attended, self.mlp.group_size)
        return x, self.mlp(*normed)


class Backbone(nn.Module):
    """LLaDA2.0-mini: predicts every position of a block from the block and all earlier ones.

    Args:
        config: sizes.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.kernels = kernels = KernelSwitch(partial(try_kernels, config))
        self.layers = nn.ModuleList(Layer(config, i, kernels) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.lm_head = Head(config.hidden_size, config.vocab_size)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        context: PrefixCache | RowsOfCache | IndexedCache | PrunedPrefix,
        start: int,
        mask: torch.Tensor | None,
        attend: attention_kernels.Attend = attention_kernels.sdpa,
    ) -> torch.Tensor:
        """Run n positions against a context that they are written to.

        Args:
            ids: int64 [rows, n].
            positions: int64 [rows, n], for RoPE.
            context: keys and values of the positions before `start`.
            start: index in the context of the first of the n positions.
            mask: bool [rows, 1, n or 1, m], True where a query sees one of the m keys; None sees all.
            attend: the attention kernel.

        Returns:
            Hidden states after the final norm [rows, n, hidden].
        """
        return self.run(self.word_embeddings(ids), positions, context, start, mask, attend)

    def run(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        context: PrefixCache | RowsOfCache | IndexedCache | PrunedPrefix,
        start: int,
        mask: torch.Tensor | None,
        attend: attention_kernels.Attend = attention_kernels.sdpa,
    ) -> torch.Tensor:
        """As `forward`, for the ids' embeddings x [rows, n, hidden]."""
        turn = rope(self.config, positions, x.dtype)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        kernels = mask is not None and attend is attention_kernels.in_parts and self._uses_kernels(x)
        bias = None if mask is None or kernels else attention_kernels.bias(mask, x.shape[1], group, x.dtype)
        added = None
        with attention_kernels.without_planning(x.device):
            for index, layer in enumerate(self.layers):
                x, added = layer(x, added, turn, context, index, start, mask, bias, attend)
        return self.norm.after(x, added)[1]

    def used_in_rounds(self) -> Iterator[nn.Parameter]:
        """All weights but the embeddings: what the computation reads once ids are looked up."""
        table = self.word_embeddings.weight
        return (parameter for parameter in self.parameters() if parameter is not table)

    def _uses_kernels(self, x: torch.Tensor) -> bool:
        """Whether rounds in fixed shapes go through Triton's kernels between their products."""
        if not self.kernels.usable(x) or x.dtype != self.norm.weight.dtype:
            return False
        from ..quantization import launch

        return launch.can_take(Dense(x.dtype), x)


def rope(config: BackboneConfig, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What `apply_rotary_emb` takes besides x, for positions int64 [rows, n]."""
    size, rest = config.rotary_dim, config.head_dim - config.rotary_dim
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = positions[:, None, :, None].float() * config.rope_theta**-exponents  # [rows, 1, n, size / 2]
    cos, sin = angles.cos(), angles.sin()
    cos = F.pad(torch.cat((cos, cos), -1), (0, rest), value=1.0)
    sin = F.pad(torch.cat((-sin, sin), -1), (0, rest))
    return cos.to(dtype), sin.to(dtype), size


def block_causal_mask(start: int, n: int, block_length: int, pads: torch.Tensor) -> torch.Tensor | None:
    """Which of the keys 0...start + n the queries start...start + n see (docs/model.md, Backbone; Guidance).

    Args:
        start, n: the queries.
        block_length: positions of a block, counted from position 0.
        pads: int64 [rows], invisible positions at each row's left.

    Returns:
        bool [rows, 1, n or 1, start + n], or None where every query sees every key. A padding query sees other
        padding: it a softmax over a fully masked row is not a number, and no other query sees it.
    """
    key = torch.arange(start + n, device=pads.device)
    one_block = start // block_length == (start + n - 1) // block_length
    padded = bool(pads.any())
    if one_block and not padded:
        return None
    if one_block and int(pads.max()) <= start:
        return (key >= pads[:, None])[:, None, None]
    return windows_mask(torch.full_like(pads, start), n, start + n, block_length, pads)


def windows_mask(begins: torch.Tensor, n: int, end: int, block_length: int, pads: torch.Tensor) -> torch.Tensor:
    """Which of the keys 0...end the queries begins...begins + n of each row see; rows that stand at different places.

    Args:
        begins, pads: int64 [rows]; begins are multiples of the block.
        n: queries of each row, whole blocks.
        end: keys, as far as the furthest row reaches.

    Returns:
        bool [rows, 1, n, end]; padding as in `block_causal_mask`.
    """
    query = begins[:, None] + torch.arange(n, device=pads.device)  # [rows, n]
    key = torch.arange(end, device=pads.device)
    mask = key // block_length <= query[..., None] // block_length
    real = (key >= pads[:, None])[:, None] | (query < pads[:, None])[..., None]
    return (mask & real)[:, None]


def try_kernels(config: BackboneConfig, device: torch.device) -> None:
    """A few tokens through the backbone's kernels there. Raises RuntimeError where they come out wrong."""
    try_routing(config, device)
    from . import round_kernels

    generator = torch.Generator().manual_seed(0)
    n, heads, kv_heads, dim = 8, config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    norm, attention = RMSNorm(config.hidden_size, config.rms_norm_eps), Attention(config)
    weights = draw(config.hidden_size), draw(dim), draw(dim)
    for module, weight in zip((norm, attention.query_layernorm, attention.key_layernorm), weights, strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    x, added, qkv = (
        draw(2, n, config.hidden_size),
        draw(2, n, config.hidden_size),
        draw(2, n, heads + 2 * kv_heads, dim),
    )
    cache = PrefixCache(config, 2, attention_kernels.PART, torch.device("cpu"), torch.float16)
    context = IndexedCache(cache, n, attention_kernels.PART)
    context.place(70)
    keys, values, at = context.whole(0)
    for tensor in (keys, values):
        tensor[:, :, :70] = draw(2, kv_heads, 70, dim)
    their_keys, their_values, their_at = (tensor.to(device) for tensor in (keys, values, at))
    mask = torch.rand(2, 1, n, attention_kernels.PART, generator=generator) < 0.7
    mask[..., 70:] = torch.arange(70, attention_kernels.PART) < 70 + n
    turn = rope(config, torch.arange(70, 70 + n).expand(2, -1), torch.float16)
    q, k, v = attention.split_heads(qkv.flatten(2), turn)
    k, v = context.extend(0, 70, k, v)
    bias = attention_kernels.bias(mask, n, heads // kv_heads, torch.float16).float()
    exact = attention_kernels.eager(q.float(), k.float(), v.float(), bias).transpose(1, 2).flatten(2)
    total, normed, _ = round_kernels.norm(x.to(device), weights[0].to(device), norm.eps, added.to(device))
    turned = round_kernels.heads(
        qkv.flatten(2).to(device),
        weights[1].to(device),
        weights[2].to(device),
        norm.eps,
        (turn[0].to(device), turn[1].to(device), turn[2]),
        their_at,
        their_keys,
        their_values,
    )
    found, _ = round_kernels.attend(turned, their_keys, their_values, mask.to(device), their_at)
    pairs = {
        "norms": (normed, norm(x + added)),
        "sums": (total, x + added),
        "queries": (turned, q),
        "keys": (their_keys, keys),
        "values": (their_values, values),
        "attention": (found, exact),
    }
    for name, (mine, expected) in pairs.items():
        off = (mine.cpu().double() - expected.double()).norm() / expected.double().norm()
        if not float(off) < 0.01:
            raise RuntimeError(f"{name} between products came out wrong")
