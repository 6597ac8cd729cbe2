"""Layers whose weights the host may keep off the card and bring there for each use.

Modules are built by the engine or by a library, plain, and adopted here by exchanging the classes of their large
layers. So neither needs to know the host, and the weights of every component can stay in main memory where the card is
small. The host knows two tensors of a layer, by name: `weight` and `bias`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.ops
import torch
import torch.nn.functional as F
from torch import nn

from ...llada_core.engine import ExpertBank, Head, QuantizedLinear, StoredWeight

# A host without this class never loads a model in part, and nothing needs adopting.
_Castable = getattr(comfy.ops, "CastWeightBiasOp", None)
_Base: Any = _Castable or object


def _away(module) -> bool:
    """Whether the host keeps this module's weights off the device, or patches them on the way."""
    return module.comfy_cast_weights or len(module.weight_function) > 0 or len(module.bias_function) > 0


@contextmanager
def _brought(
    module, device: torch.device, dtype: torch.dtype, bias_dtype: torch.dtype | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """A layer's weight and bias on the device, given back at the end.

    Hosts with `uncast_bias_weight` copy on a stream of their own, while the layer before still computes.
    """
    wanted = {"device": device, "dtype": dtype, "bias_dtype": bias_dtype or dtype}
    if hasattr(comfy.ops, "uncast_bias_weight"):
        weight, bias, stream = comfy.ops.cast_bias_weight(module, offloadable=True, **wanted)
        try:
            yield weight, bias
        finally:
            comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    else:
        yield comfy.ops.cast_bias_weight(module, **wanted)


_ROWS = 2**14  # of a head that is away, brought at a time: as many as there are image codes


class _Cast(nn.Module):
    """What all adopted layers share: on the way to the card their copy in main memory is kept, if there is room.

    On the way back it is taken again, where hosts would copy every byte from the card to fresh memory.
    """

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        kept: dict[str, torch.Tensor] = vars(self).setdefault("_kept", {})
        own: dict[str, Any] = self._parameters
        for name, copy in kept.items():
            target = fn(own[name].new_empty(0))  # what it would become
            if target.device == copy.device != own[name].device and target.dtype == copy.dtype:
                own[name] = nn.Parameter(copy, requires_grad=False)
        before = {name: old.data for name, old in own.items() if old is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if own[name].device == old.device:
                continue
            if management.is_device_cpu(old.device) and _room_to_keep():
                kept[name] = old
        for name in [name for name, copy in kept.items() if own[name].device == copy.device]:
            del kept[name]
        return self


def _room_to_keep() -> bool:
    """Whether a quarter of main memory is free: what is kept must never be what a computer runs out of it for."""
    cpu = torch.device("cpu")
    return management.get_free_memory(cpu) > management.get_total_memory(cpu) / 4


class CastLinear(_Cast, nn.Linear, _Base):
    """nn.Linear with weights that may be away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if not _away(self):
            return super().forward(x)
        with _brought(self, x.device, x.dtype) as (weight, bias):
            return F.linear(x, weight, bias)

    @contextmanager
    def stored_for(self, device: torch.device) -> Iterator[Mapping[str, torch.Tensor]]:
        """The weight on the device, for kernels that take several layers at once."""
        if not _away(self):
            yield {"weight": self.weight}
            return
        with _brought(self, device, self.weight.dtype) as (weight, _):
            yield {"weight": weight}


class CastHead(_Cast, Head, _Base):
    """The engine's output head with weights that may be away."""

    _sent: torch.Tensor | None = None  # a copy of them that a GPU reads by itself

    def forward(self, x: torch.Tensor, low: int = 0, high: int | None = None) -> torch.Tensor:
        """x [..., hidden] -> logits of the ids low <= id < high."""
        if not _away(self):
            self._sent = None
            return super().forward(x, low, high)
        # The head is hundreds of MB, and a round of an image needs a tenth of it. A patch is of the whole head.
        if self.weight_function or self.weight.device == x.device:
            with _brought(self, x.device, x.dtype) as (weight, _):
                return F.linear(x, weight[low:high])
        parts = self._to_send(x.device)[low:high].split(_ROWS)
        logits = [F.linear(x, part.to(device=x.device, dtype=x.dtype, non_blocking=True)) for part in parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits, -1)

    def _to_send(self, device: torch.device) -> torch.Tensor:
        """The weight in memory that a GPU reads by itself, where there is room for it."""
        weight: torch.Tensor = self.weight
        if device.type != "cuda" or weight.is_pinned():
            return weight
        if self._sent is None and _room_to_keep():
            self._sent = torch.empty_like(weight, pin_memory=True).copy_(weight)
        return weight if self._sent is None else self._sent

    def factor(self, device: torch.device, weight: torch.Tensor | None = None) -> torch.Tensor | None:
        """As Head.factor; None where the host patches the weights on the way, for patches come and go."""
        if self.weight_function:
            return None
        if not _away(self) or self.weight.device != device:
            return super().factor(device, weight)
        with _brought(self, device, self.weight.dtype) as (brought, _):
            return super().factor(device, brought)


class CastConv2d(_Cast, nn.Conv2d, _Base):
    """nn.Conv2d with weights that may be away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in, h, w] -> [batch, out, h', w']."""
        if not _away(self):
            return super().forward(x)
        with _brought(self, x.device, x.dtype) as (weight, bias):
            return self._conv_forward(x, weight, bias)


class CastEmbedding(_Cast, nn.Embedding, _Base):
    """nn.Embedding with weights that may be away."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [...] -> [..., width]."""
        if not _away(self):
            return super().forward(ids)
        # The table is hundreds of MB, and a round looks up a few rows of it. A patch is of the whole table.
        if self.weight_function or self.weight.device == ids.device:
            with _brought(self, ids.device, self.weight.dtype) as (weight, _):
                return F.embedding(ids, weight)
        return F.embedding(ids.to(self.weight.device), self.weight).to(ids.device)


class _CastStored(_Cast, StoredWeight):
    """What brings the stored tensors of a quantized or fused weight to the card."""

    @contextmanager
    def stored_for(self, device: torch.device) -> Iterator[Mapping[str, torch.Tensor]]:
        """The stored tensors by suffix, on the device; codes keep their type."""
        if not _away(self):
            with super().stored_for(device) as stored:
                yield stored
            return
        companions = [name for name in self.form.tensors(self.shape) if name != "weight"]
        beside: Any = self.bias
        bias_dtype = None if beside is None else beside.dtype
        with _brought(self, device, self.weight.dtype, bias_dtype) as (weight, bias):
            brought = {name: self._companion(name, bias).to(device) for name in companions}
            yield {"weight": weight} | brought

    def _companion(self, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        return getattr(self, name)


class CastExpertBank(_CastStored, ExpertBank, _Base):
    """The engine's expert bank with weights that may be away.

    A bank has no bias, and scales of a hundredth of its size: the first of them goes by that name, so that the host
    moves it along with the codes.
    """

    _as_bias = ""

    def adopt(self) -> None:
        """Give the first companion of the codes the name that the host knows."""
        companions = [name for name in self.form.tensors(self.shape) if name != "weight"]
        if companions:
            self._as_bias = companions[0]
            self._parameters["bias"] = self._parameters.pop(self._as_bias)

    def __getattr__(self, name: str):
        return super().__getattr__("bias" if name == vars(self).get("_as_bias") else name)

    def _companion(self, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        return bias if bias is not None and name == self._as_bias else getattr(self, name)


class CastQuantizedLinear(_CastStored, QuantizedLinear, _Base):
    """The engine's quantized linear layer with weights that may be away."""


_CASTABLE_CLASSES = {
    nn.Linear: CastLinear,
    Head: CastHead,
    nn.Conv2d: CastConv2d,
    nn.Embedding: CastEmbedding,
    ExpertBank: CastExpertBank,
    QuantizedLinear: CastQuantizedLinear,
}


def castable_layers(module: nn.Module) -> list[Any]:
    """The layers of a module that were adopted."""
    return [layer for layer in module.modules() if isinstance(layer, tuple(_CASTABLE_CLASSES.values()))]


def make_castable(module: nn.Module, smallest: int = 0) -> nn.Module:
    """Make every large layer of a component one that the host can keep off the card; returns the same module.

    Layers of fewer bytes than `smallest` stay what they are.
    """
    if _Castable is not None:
        for layer in module.modules():
            if type(layer) in _CASTABLE_CLASSES and management.module_size(layer) >= smallest:
                layer.__class__ = _CASTABLE_CLASSES[type(layer)]
                if isinstance(layer, CastExpertBank):
                    layer.adopt()
                if not hasattr(layer, "bias"):
                    layer.register_parameter("bias", None)  # the host asks every layer for it
    return module


def keep_companions(module: nn.Module, device: torch.device) -> None:
    """Bring to the device, for good, what the host's cast does not know of adopted layers: a hundredth of their codes.

    They become buffers: parameters of other names than it knows are copied anew whenever the part is asked for.
    """
    for layer in castable_layers(module):
        for name in [name for name in layer._parameters if name not in ("weight", "bias")]:
            layer.register_buffer(name, layer._parameters.pop(name).data.to(device))


def fully_resident(module: nn.Module, device: torch.device) -> bool:
    """Whether every weight lies on the device and is used there as it is; of embeddings it is enough that nobody
    patches them, for they are looked up where they lie."""
    tables = {id(layer.weight) for layer in module.modules() if isinstance(layer, CastEmbedding)}
    if any(parameter.device != device for parameter in module.parameters() if id(parameter) not in tables):
        return False
    return not any(layer.weight_function or layer.bias_function for layer in castable_layers(module))


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
