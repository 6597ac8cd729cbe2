"""Rotary embeddings of the decoder's positions as cosines and sines (docs/model.md, Decoding)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """What turns the queries and keys of some positions: pair i of a head turns by its position's angle i.

    Attributes:
        cos, sin: float32 [positions, head_dim / 2], contiguous.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __getitem__(self, positions: slice) -> "Rotary":
        """Those of some positions."""
        return Rotary(self.cos[positions], self.sin[positions])


def rotary(positions: torch.Tensor, axes_dims: Sequence[int], theta: float, device: torch.device) -> Rotary:
    """The turns of positions on several axes, one axis behind the other within a head.

    Args:
        positions: int64 [n, axes] from 0 up, on the CPU.
        axes_dims: how many dimensions of a head turn with each axis, all even.
        theta: of the frequencies theta ** (-2 i / dimensions of the axis).
        device: where the answer goes.
    """
    cos, sin = [], []
    for axis, dim in enumerate(axes_dims):
        distinct, which = positions[:, axis].unique(return_inverse=True)
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        # The library rounds angles to float32 before it takes their cosine; the model was trained with that.
        angles = torch.outer(distinct.double(), frequencies).float()
        which = which.to(device)
        cos.append(angles.cos().to(device)[which])
        sin.append(angles.sin().to(device)[which])
    return Rotary(torch.cat(cos, 1), torch.cat(sin, 1))
