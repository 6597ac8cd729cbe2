"""Partial loading: modules whose weights the host may keep off the card and bring there for each use.

Modules are built by the engine or by a library, plain, and adopted here by exchanging their class. So neither needs
to know the host, and the large weights of every component can stay in main memory where the card is small.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import nn

from ...llada_core.engine import ExpertBank, QuantizedLinear, StoredWeight

# A host without this class never loads a model in part, and nothing needs adopting.
_Castable = getattr(comfy.ops, "CastWeightBiasOp", None)
_Base: Any = _Castable or object


def _away(module) -> bool:
    """Whether the host keeps this module's weights off the device, or patches them on the way."""
    return module.comfy_cast_weights or len(module.weight_function) > 0 or len(module.bias_function) > 0


def _bring(module, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    return comfy.ops.cast_bias_weight(module, device=device, dtype=dtype, bias_dtype=dtype)


class CastLinear(nn.Linear, _Base):
    """nn.Linear with weights that may be away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, *_bring(self, x.device, x.dtype)) if _away(self) else super().forward(x)


class CastConv2d(nn.Conv2d, _Base):
    """nn.Conv2d with weights that may be away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in, h, w] -> [batch, out, h', w']."""
        return self._conv_forward(x, *_bring(self, x.device, x.dtype)) if _away(self) else super().forward(x)


class CastEmbedding(nn.Embedding, _Base):
    """nn.Embedding with weights that may be away."""

    bias = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [...] -> [..., width]."""
        if not _away(self):
            return super().forward(ids)
        if self.weight_function:  # a patch is of the whole table
            return F.embedding(ids, _bring(self, ids.device, self.weight.dtype)[0])
        # The table is hundreds of MB, and a round looks up a few rows of it.
        return F.embedding(ids.to(self.weight.device), self.weight).to(ids.device)


class _CastStored(StoredWeight):
    """What brings the stored tensors of a quantized or fused weight to the card."""

    @contextmanager
    def stored_for(self, device: torch.device) -> Iterator[Mapping[str, torch.Tensor]]:
        """The stored tensors by suffix, on the device; codes keep their type."""
        if _away(self):
            # The host's cast knows `weight` and `bias`; scales are small.
            scales = [name for name in self.form.tensors(self.shape) if name != "weight"]
            weight = _bring(self, device, self.weight.dtype)[0]
            yield {"weight": weight} | {name: getattr(self, name).to(device) for name in scales}
        else:
            with super().stored_for(device) as stored:
                yield stored


class CastExpertBank(_CastStored, ExpertBank, _Base):
    """The engine's expert bank with weights that may be away."""

    bias = None


class CastQuantizedLinear(_CastStored, QuantizedLinear, _Base):
    """The engine's quantized linear layer with weights that may be away."""


_CASTABLE_CLASSES = {
    nn.Linear: CastLinear,
    nn.Conv2d: CastConv2d,
    nn.Embedding: CastEmbedding,
    ExpertBank: CastExpertBank,
    QuantizedLinear: CastQuantizedLinear,
}


def make_castable(module: nn.Module) -> nn.Module:
    """Make every large layer of a component one that the host can keep off the card; returns the same module."""
    if _Castable is not None:
        for layer in module.modules():
            if type(layer) in _CASTABLE_CLASSES:
                layer.__class__ = _CASTABLE_CLASSES[type(layer)]
    return module


def fully_resident(module: nn.Module, device: torch.device) -> bool:
    """Whether every weight lies on the device and is used there as it is."""
    if any(parameter.device != device for parameter in module.parameters()):
        return False
    return not any(_away(layer) for layer in module.modules() if isinstance(layer, tuple(_CASTABLE_CLASSES.values())))


def move_uncast_parameters(module: nn.Module, device: torch.device) -> None:
    """Bring to the device what the host passes over when it loads in part: norms, biases of their own, buffers.

    These are small; the host leaves them where they are if they do not fit or hang on a module with children.
    """
    for layer in module.modules():
        if isinstance(layer, tuple(_CASTABLE_CLASSES.values())):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.device != device:
                setattr(layer, name, nn.Parameter(parameter.to(device), requires_grad=False))
        for name, buffer in layer.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(layer, name, buffer.to(device))
