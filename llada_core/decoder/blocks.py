"""A decoder's blocks over the library's modules: products through its layers, all else fused (docs/model.md, Decoding).

A block is x + gate * norm(attention(norm(x) * scale)), then the same with a feed-forward. The weight of a norm and what
the time modulates it by are one vector, so a block has four, and the norm of a sum is taken while the sum is at hand.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from .kernels import LIMITS, Activations, Kernels, Rows, ScaledRows
from .products import Products
from .rotary import Rotary

# (q [batch, heads, n, head_dim], k and v [batch, heads, m, head_dim]) -> [batch, n, heads * head_dim]: every query sees
# every key.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention, by the kernel that torch prefers on the card: cuDNN's on Hopper and Blackwell, else flash."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class BlockStack:
    """Blocks that run one after the other on one device in one type, for as long as their norms stay as they are.

    Args:
        blocks: the library's, which names what is in them.
        kernels: what is computed between the products.
        products: of layers whose weights have 8 bits.
        attention: see Attend.
        device, dtype: of the activations. With float16 the sum that runs through the blocks is float32, and what goes
            into the product before a norm is scaled a row at a time, which the norm undoes: neither leaves the range.
    """

    def __init__(
        self,
        blocks: Sequence[Any],
        kernels: Kernels,
        products: Products,
        attention: Attend,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.blocks, self.dtype = list(blocks), dtype
        self.kernels, self.products, self.attention = kernels, products, attention
        weights = [norm.weight for block in blocks for norm in _norms(block)]
        self._weights = torch.stack(weights).to(device, torch.float32).unflatten(0, (len(self.blocks), 4))
        self._head_norms = [
            [_head_norm(norm, device) for norm in (block.attention.norm_q, block.attention.norm_k)] for block in blocks
        ]

    def residual(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states in the type that blocks add to."""
        return hidden.float() if self.dtype == torch.float16 else hidden

    def vectors(self, time: torch.Tensor | None = None) -> torch.Tensor:
        """The vectors of the blocks: of attention's two norms and of the feed-forward's two.

        Args:
            time: [1, width] its embedding, for blocks that it modulates.

        Returns:
            float32 [blocks, 4, dim].
        """
        if time is None:
            return self._weights
        modulation = torch.cat([block.adaLN_modulation(time) for block in self.blocks]).float()
        modulation = modulation.view_as(self._weights)
        # For each half of a block a scale of what goes in, then a gate of what comes out.
        return self._weights * torch.stack((1 + modulation[:, 0::2], modulation[:, 1::2].tanh()), 2).flatten(1, 2)

    def run(self, x: torch.Tensor, vectors: torch.Tensor, turns: Rotary, keep: int | None = None) -> torch.Tensor:
        """All blocks one after the other.

        Args:
            x: [batch, n, dim] as `residual` gives it; changed in place.
            vectors: what `vectors` returned.
            turns: of the n positions.
            keep: how many of the first positions are needed of the result; the last block computes no others.

        Returns:
            [batch, keep or n, dim] of x's type.
        """
        kernels, last = self.kernels, 2 * len(self.blocks) - 1
        vectors = vectors.flatten(0, 1)
        h = kernels.rms_norm(x, vectors[0], *self._input_norm(0))
        for half in range(last + 1):
            block = self.blocks[half // 2]
            if half % 2:
                y, y_scale = self._feed_forward(block.feed_forward, h)
            elif half < last - 1 or keep is None:
                y, y_scale = self._attention(half // 2, h, h, turns)
            else:
                y, y_scale = self._attention(half // 2, _first(h, keep), h, turns)
                x = x[:, :keep].contiguous()
            gate, eps = vectors[2 * half + 1], _norms(block)[half % 2 * 2 + 1].eps
            if half == last:
                return kernels.add_rms_norm(x, y, gate, eps, y_scale)
            h = kernels.add_rms_norm_twice(
                x, y, gate, eps, vectors[2 * half + 2], *self._input_norm(half + 1), y_scale=y_scale
            )
            del y  # or it would lie beside what the next half computes
        return x

    def _input_norm(self, half: int) -> tuple[float, Rows]:
        """Of half a block: eps of its first norm, and the form of what goes into its first products."""
        block = self.blocks[half // 2]
        norm, ffn, attention = _norms(block)[half % 2 * 2], block.feed_forward, block.attention
        products = (ffn.w1, ffn.w3) if half % 2 else (attention.to_q, attention.to_k, attention.to_v)
        forms = {self.products.rows_for(linear) for linear in products}
        return norm.eps, (forms.pop() if len(forms) == 1 else None) or Rows(self.dtype)

    def _attention(
        self, index: int, queries: Activations, h: Activations, turns: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the first positions, or all, which see all."""
        attention, heads = self.blocks[index].attention, self.kernels.heads
        (q_weight, q_eps), (k_weight, k_eps) = self._head_norms[index]
        q = heads(self._product(attention.to_q, queries), attention.heads, q_weight, q_eps, turns)
        k = heads(self._product(attention.to_k, h), attention.heads, k_weight, k_eps, turns)
        v = heads(self._product(attention.to_v, h), attention.heads, None, 0.0, None)
        return self._product_before_norm(attention.to_out[0], self.attention(q, k, v))

    def _feed_forward(self, ffn: Any, h: Activations) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate, up = self._product(ffn.w1, h), self._product(ffn.w3, h)
        act = self.kernels.silu_mul(gate, up, self._output_rows(ffn.w2))
        del gate, up
        return self._product_before_norm(ffn.w2, act)

    def _product_before_norm(self, linear: Any, x: Activations) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A product whose rows a norm takes next, and the scale that they are short of, if any."""
        rows = self._output_rows(linear)
        if rows.scaled and not isinstance(x, ScaledRows):
            x = self.kernels.scale_rows(x, rows)
        if self.dtype != torch.float16:
            return self._product(linear, x), None
        x = cast(ScaledRows, x)  # as all rows of float16 are here
        # The norm takes care of the scale, and of the same factor of all rows, so that nothing leaves float16.
        if rows.dtype == torch.float16:
            return linear(x.values), x.scale
        even = LIMITS[torch.float16] / rows.limit
        return self._product(linear, ScaledRows(x.values, torch.full_like(x.scale, even))), x.scale / even

    def _product(self, linear: Any, x: Activations) -> torch.Tensor:
        """A layer's product: of plain activations by the layer itself, of scaled ones in 8 bits."""
        return self.products(linear, x, self.dtype) if isinstance(x, ScaledRows) else linear(x)

    def _output_rows(self, linear: Any) -> Rows:
        """The form of what goes into a product before a norm."""
        return self.products.rows_for(linear) or Rows(self.dtype, scaled=self.dtype == torch.float16)


def _norms(block: Any) -> tuple[Any, ...]:
    return block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2


def _head_norm(norm: Any | None, device: torch.device) -> tuple[torch.Tensor | None, float]:
    """Weight float32 and eps of a norm of heads, which a decoder may lack."""
    return (None, 0.0) if norm is None else (norm.weight.to(device, torch.float32), norm.eps)


def _first(x: Activations, count: int) -> Activations:
    """The first positions."""
    if isinstance(x, ScaledRows):
        return ScaledRows(x.values[:, :count].contiguous(), x.scale[:, :count].contiguous())
    return x[:, :count]
