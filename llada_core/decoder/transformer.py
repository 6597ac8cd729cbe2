"""The semantic decoder: diffusers' Z-Image transformer, its forward cut in two (docs/model.md, Files; Decoding).

The library computes the conditioning anew at every evaluation. It depends on the tokens alone, so here it is prepared
once a picture. The blocks, embedders and rotary tables are the library's; `tests/core/test_pixels.py` holds the two
halves equal to its forward. Importing this file imports diffusers.
"""

from dataclasses import dataclass

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from einops import rearrange

PATCH = 2  # latents each way in a position of the transformer
STEM = f"{PATCH}-1"  # the library's name for layers of that patch size


@dataclass(frozen=True)
class Conditioning:
    """Features made ready for `velocity`.

    Attributes:
        hidden: [1, n, dim] after the context refiner; its device and type are those of every evaluation.
        rotary: complex64 [1, n, head_dim / 2], the positions' turns.
    """

    hidden: torch.Tensor
    rotary: torch.Tensor


class SemanticDecoder(ZImageTransformer2DModel):
    """Z-Image's transformer with the methods `condition` and `velocity`; parameters and names are the library's."""

    def condition(self, features: torch.Tensor) -> Conditioning:
        """Features [n, cap_feat_dim] of a picture's up-sampled codes -> what every evaluation of it shares.

        Computes on the features' device and in their type.
        """
        hidden = self._padded(self.cap_embedder(features), self.cap_pad_token)
        positions = self.create_coordinate_grid((hidden.shape[1], 1, 1), (1, 0, 0), features.device)
        rotary = self.rope_embedder(positions.flatten(0, 2))[None]
        for block in self.context_refiner:
            hidden = block(hidden, None, rotary)
        return Conditioning(hidden, rotary)

    def velocity(self, x: torch.Tensor, t: float, conditioning: Conditioning) -> torch.Tensor:
        """One evaluation.

        Args:
            x: latents [1, in_channels, 1, height, width], any floating type, height and width even.
            t: the model's time, 0 (noise) to 1 (image).
            conditioning: `condition`'s answer.

        Returns:
            The velocity x1 - x0 of x's shape, float32, on the conditioning's device.
        """
        cond = conditioning.hidden
        time = self.t_embedder(torch.tensor([t * self.t_scale], dtype=torch.float32, device=cond.device)).to(cond)
        patches = rearrange(x[0].to(cond), "c f (h p) (w q) -> (f h w) (p q c)", p=PATCH, q=PATCH)
        hidden = self._padded(self.all_x_embedder[STEM](patches), self.x_pad_token)
        rotary = self._image_rotary(x, hidden.shape[1], cond)
        for block in self.noise_refiner:
            hidden = block(hidden, None, rotary, time)
        hidden = torch.cat([hidden, cond], dim=1)
        rotary = torch.cat([rotary, conditioning.rotary], dim=1)
        for block in self.layers:
            hidden = block(hidden, None, rotary, time)
        hidden = self.all_final_layer[STEM](hidden[:, : len(patches)], time)
        return self.unpatchify([hidden[0].float()], [tuple(x.shape[2:])], PATCH, 1)[0][None]

    def _padded(self, hidden: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        """[n, dim] -> [1, n rounded up to the library's multiple, dim], filled with the learned pad token."""
        missing = -len(hidden) % SEQ_MULTI_OF
        return torch.cat([hidden, pad.to(hidden).expand(missing, -1)])[None]

    def _image_rotary(self, x: torch.Tensor, length: int, cond: torch.Tensor) -> torch.Tensor:
        """Turns of the image's positions: behind the conditioning in time, a grid in space, zero where padded."""
        grid = (1, x.shape[3] // PATCH, x.shape[4] // PATCH)
        positions = self.create_coordinate_grid(grid, (cond.shape[1] + 1, 0, 0), cond.device).flatten(0, 2)
        padding = positions.new_zeros(length - len(positions), 3)
        return self.rope_embedder(torch.cat([positions, padding]))[None]
