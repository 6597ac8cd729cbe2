"""The semantic decoder: diffusers' Z-Image transformer with a forward of our own (docs/model.md, Files; Decoding).

Parameters, their names and the embedders are the library's. Its forward is taken apart: what depends on the tokens
alone is prepared once a picture (`condition`), what guidance shares is computed once a step, and what lies between the
products of a block is fused (`kernels`). `tests/core/test_decoder_forward.py` holds it equal to the library's forward.
Importing this file imports diffusers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from einops import rearrange

from .blocks import Attend, BlockStack, sdpa
from .kernels import Kernels, PlainKernels, choose_kernels
from .products import Products, choose_products
from .rotary import Rotary, rotary

PATCH = 2  # latents each way in a position of the transformer
STEM = f"{PATCH}-1"  # the library's name for layers of that patch size


@dataclass(frozen=True)
class Conditioning:
    """Features made ready for `velocity`.

    Attributes:
        hidden: [1, n, dim] after the context refiner.
        rotary: of the image's positions, padded, and then of the conditioning's.
        size: (height, width) of the latents.
        refiner, layers: the blocks that refine the image, and those of both together.
    """

    hidden: torch.Tensor
    rotary: Rotary
    size: tuple[int, int]
    refiner: BlockStack
    layers: BlockStack


class SemanticDecoder(ZImageTransformer2DModel):
    """Z-Image's transformer with the methods `condition` and `velocities`; parameters and names are the library's.

    Attributes:
        attention: computes attention; a host may set its own.
        kernels, products: the fused functions of a block, and the products of layers in 8 bits; None chooses those of
            the device.
    """

    attention: Attend = staticmethod(sdpa)
    kernels: Kernels | None = None
    products: Products | None = None
    _chosen: tuple[tuple[torch.device, torch.dtype], tuple[Kernels, Products]] | None = None

    def condition(self, features: torch.Tensor, size: tuple[int, int]) -> Conditioning:
        """Features of a picture's up-sampled codes -> what every evaluation of it shares.

        Args:
            features: [n, cap_feat_dim]; their device and type are those of all that follows.
            size: (height, width) of the latents, both even.
        """
        device, dtype = features.device, features.dtype
        kernels, products = self.functions_for(device, dtype)
        context, refiner, layers = (
            BlockStack(blocks, kernels, products, self.attention, device, dtype)
            for blocks in (self.context_refiner, self.noise_refiner, self.layers)
        )
        hidden = self._padded(context.residual(self.cap_embedder(features)), self.cap_pad_token)
        turns = self.turns(hidden.shape[1], size, device)
        hidden = context.run(hidden, context.vectors(), turns[-hidden.shape[1] :])
        return Conditioning(hidden, turns, size, refiner, layers)

    def velocity(self, x: torch.Tensor, t: float, conditioning: Conditioning) -> torch.Tensor:
        """One evaluation; see `velocities`."""
        return self.velocities(x, t, [conditioning])[0]

    def velocities(self, x: torch.Tensor, t: float, conditionings: Sequence[Conditioning]) -> list[torch.Tensor]:
        """An evaluation for each of some conditionings of one size; what they share is computed once.

        Args:
            x: latents [1, in_channels, 1, height, width], any floating type.
            t: the model's time, 0 (noise) to 1 (image).
            conditionings: `condition`'s answers.

        Returns:
            For each the velocity x1 - x0 of x's shape, float32, on the conditioning's device.
        """
        first = conditionings[0]
        device, dtype = first.hidden.device, first.layers.dtype
        time = torch.tensor([t * self.t_scale], dtype=torch.float32, device=device)
        time = self.t_embedder(time).to(dtype)
        patches = rearrange(x[0].to(device, dtype), "c f (h p) (w q) -> (f h w) (p q c)", p=PATCH, q=PATCH)
        image = self._padded(first.refiner.residual(self.all_x_embedder[STEM](patches)), self.x_pad_token)
        image = first.refiner.run(image, first.refiner.vectors(time), first.rotary[: image.shape[1]])
        vectors, scale = first.layers.vectors(time), self.all_final_layer[STEM].adaLN_modulation(time)
        out = []
        # One after the other: a batch of two is no faster (benchmarks/decoder.py) and takes twice the memory.
        for conditioning in conditionings:
            hidden = torch.cat([image, conditioning.hidden], dim=1)
            hidden = conditioning.layers.run(hidden, vectors, conditioning.rotary, keep=len(patches))
            out.append(self._unpatched(self._final(hidden, scale), conditioning.size))
        return out

    def functions_for(self, device: torch.device, dtype: torch.dtype) -> tuple[Kernels, Products]:
        """What blocks compute with on a device in a type; chosen once."""
        if self._chosen is None or self._chosen[0] != (device, dtype):
            heads = self.n_heads, self.dim // self.n_heads
            kernels = choose_kernels(device, dtype, heads, self.layers[0].feed_forward.w1.out_features)
            products = choose_products(device, dtype, triton=not isinstance(kernels, PlainKernels))
            self._chosen = (device, dtype), (kernels, products)
        kernels, products = self._chosen[1]
        return self.kernels or kernels, self.products or products

    def _final(self, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        final: Any = self.all_final_layer[STEM]
        return final.linear((final.norm_final(hidden) * (1.0 + scale)).to(scale.dtype))

    def _unpatched(self, patches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """[1, positions, patch] -> float32 [1, channels, 1, height, width]."""
        return rearrange(patches[0].float(), "(h w) (p q c) -> 1 c 1 (h p) (w q)", h=size[0] // PATCH, p=PATCH, q=PATCH)

    def _padded(self, hidden: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        """[n, dim] -> [1, n rounded up to the library's multiple, dim], filled with the learned pad token."""
        missing = -len(hidden) % SEQ_MULTI_OF
        return torch.cat([hidden, pad.to(hidden).expand(missing, -1)])[None]

    def turns(self, conditioning: int, size: tuple[int, int], device: torch.device) -> Rotary:
        """Turns of all positions of a picture, the image's, padded, first.

        The conditioning counts in time from 1, the image is one moment behind it and a grid in space; what pads it is
        at zero.
        """
        rows, columns = (side // PATCH for side in size)
        image = torch.cartesian_prod(torch.tensor([conditioning + 1]), torch.arange(rows), torch.arange(columns))
        padding = image.new_zeros(-len(image) % SEQ_MULTI_OF, 3)
        moments = torch.arange(1, conditioning + 1)[:, None]
        context = torch.cat([moments, moments.new_zeros(conditioning, 2)], 1)
        return rotary(torch.cat([image, padding, context]), self.config.axes_dims, self.config.rope_theta, device)
