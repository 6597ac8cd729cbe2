"""The backbone: a block-causal mixture-of-experts transformer (docs/model.md, Backbone)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..quantization.kernel_switch import KernelSwitch
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

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype."""
        return rms_norm(x, self.eps) * self.weight


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

    def forward(self, x, rope, context, layer, start, bias, attend) -> torch.Tensor:
        """x [rows, n, hidden] -> [rows, n, hidden]; keys and values go to and come from `context`."""
        parts = self.query_key_value(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)  # [rows, heads + 2 kv, n, dim]
        qk, v = parts.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        # Queries and keys are normed and turned together: the GPU takes as long for both as for one.
        qk = apply_rotary_emb(rms_norm(qk, self.query_layernorm.eps) * self._norm_weights(), *rope)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        k, v = context.extend(layer, start, k, v)
        return self.dense(attend(q, k, v, bias).transpose(1, 2).flatten(2))

    def _norm_weights(self) -> torch.Tensor:
        """Weights of the norms of all query heads, then of all key heads, [heads + kv, 1, dim]."""
        norms = (self.query_layernorm, self.heads), (self.key_layernorm, self.kv_heads)
        return torch.cat([norm.weight.expand(heads, 1, -1) for norm, heads in norms])


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, size: int) -> torch.Tensor:
    """RoPE, rotate-half form, over the first `size` dimensions of each head.

    Args:
        x: [rows, heads, n, dim].
        cos, sin: [rows, 1, n, dim], from `Backbone._rope`: 1 and 0 over the rest, and the first half's sin negative.
    """
    first, second, rest = x.split([size // 2, size // 2, x.shape[-1] - size], -1)
    return x * cos + torch.cat((second, first, rest), -1) * sin


class Layer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: BackboneConfig, index: int, kernels: KernelSwitch):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index < config.first_k_dense_replace
        self.mlp = (
            MLP(config.hidden_size, config.intermediate_size, kernels) if dense else MixtureOfExperts(config, kernels)
        )

    def forward(self, x, *attention_arguments) -> torch.Tensor:
        """x [rows, n, hidden] -> [rows, n, hidden]."""
        x = x + self.attention(self.input_layernorm(x), *attention_arguments)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """LLaDA2.0-mini: predicts every position of a block from the block and all earlier ones.

    Args:
        config: sizes.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        kernels = KernelSwitch(partial(try_routing, config))
        self.layers = nn.ModuleList(Layer(config, i, kernels) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        x = self.word_embeddings(ids)
        rope = self._rope(positions, x.dtype)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        bias = None if mask is None else attention_kernels.bias(mask, ids.shape[1], group, x.dtype)
        with attention_kernels.without_planning(x.device):
            for index, layer in enumerate(self.layers):
                x = layer(x, rope, context, index, start, bias, attend)
        return self.norm(x)

    def _rope(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What `apply_rotary_emb` takes besides x."""
        size, rest = self.config.rotary_dim, self.config.head_dim - self.config.rotary_dim
        exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles = positions[:, None, :, None].float() * self.config.rope_theta**-exponents  # [rows, 1, n, size / 2]
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
    device = pads.device
    query = torch.arange(start, start + n, device=device)
    key = torch.arange(start + n, device=device)
    one_block = start // block_length == (start + n - 1) // block_length
    padded = bool(pads.any())
    if one_block and not padded:
        return None
    if one_block and int(pads.max()) <= start:
        return (key >= pads[:, None])[:, None, None]
    mask = key // block_length <= query[:, None] // block_length
    real = (key >= pads[:, None])[:, None] | (query < pads[:, None])[:, :, None]
    return (mask & real)[:, None]
