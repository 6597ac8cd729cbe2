"""Image codes -> the continuous features that condition the decoder (docs/model.md, Files; Decoding)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint.component import Component, build_on_meta
from ..checkpoint.weights import PickledTensors, Slot, plan
from ..errors import CheckpointError
from ..image_tokens import UPSAMPLING
from ..nonfinite import nonfinite_error

LABEL = "image_tokenizer"
FILE = "sigvq_embedding.pt"

CODES_KEY = "prior_token_embedding.weight"

# File names -> ours.
NAMES = {
    CODES_KEY: "codes.weight",
    "prior_projector.net.0.proj.weight": "inner.weight",
    "prior_projector.net.0.proj.bias": "inner.bias",
    "prior_projector.net.2.weight": "outer.weight",
    "prior_projector.net.2.bias": "outer.bias",
}


class SigVQEmbedder(nn.Module):
    """Code -> feature: an embedding, then Linear, SiLU, Linear.

    Args:
        codes: size of the codebook.
        width: of the embedding.
        hidden: between the two linear layers.
        features: width of the result.
    """

    def __init__(self, codes: int, width: int, hidden: int, features: int):
        super().__init__()
        self.codes = nn.Embedding(codes, width)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, features)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Codes [..., h, w] int64 on the compute device -> features [..., 4·h·w, features] of the grid up-sampled 2x.

        Raises:
            InputError: features beyond the range of the weights' type.
            CheckpointError: features that are not finite because a weight is not.
        """
        # Up-sampling the features of h·w codes gives the same numbers as up-sampling the codes, at a quarter the work.
        features = self.outer(F.silu(self.inner(self.codes(grid))))
        if not bool(features.isfinite().all()):
            raise nonfinite_error("sigvq", self, features.dtype, "features")
        return upsample(features).flatten(-3, -2)


def upsample(grid: torch.Tensor, factor: int = UPSAMPLING) -> torch.Tensor:
    """Nearest-neighbour up-sampling: [..., h, w, features] -> [..., factor·h, factor·w, features]."""
    return grid.repeat_interleave(factor, -3).repeat_interleave(factor, -2)


def open_embedder(folder: Path) -> Component:
    """The SigVQ embedder of a checkpoint, its sizes taken from the file; nothing but tensors is unpickled.

    Args:
        folder: image_tokenizer/, with sigvq_embedding.pt.

    Raises:
        CheckpointError: the file is missing, damaged, holds anything but tensors, or is of another model.
    """
    source = PickledTensors(LABEL, folder / FILE)
    weights = [name for name in NAMES if name.endswith("weight")]
    shapes = [source.entries[name].shape for name in weights if name in source.entries]
    if [len(shape) for shape in shapes] != [2, 2, 2]:
        found = f"tensors {sorted(source.entries)[:6]}"
        expected = "the matrices " + ", ".join(weights)
        raise CheckpointError(f"{LABEL}: {FILE}", found, expected, "Download the file again.")
    (codes, width), (hidden, _), (features, _) = shapes
    module = build_on_meta(LABEL, lambda: SigVQEmbedder(codes, width, hidden, features))
    return Component(module, source, plan(module, source, lambda key: Slot(NAMES.get(key, key))))
