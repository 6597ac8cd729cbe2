"""Layers whose weights are stored in a format: what a host sees, moves and keeps off the card."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .formats import Dense, Format


class StoredWeight(nn.Module):
    """A weight [..., out, in] as the parameters of its format: `weight`, and `weight_scale` or what else it has.

    Args:
        shape: of the dense weight.
        form: how it is stored.

    A host that keeps weights off the card replaces the class by one whose `stored_for` brings them there.
    """

    weight: nn.Parameter  # of every format; the other stored tensors have the format's names

    def __init__(self, shape: tuple[int, ...], form: Format):
        super().__init__()
        self.shape = tuple(shape)
        self.form = form
        self._allocate(None)

    def set_format(self, form: Format) -> None:
        """Store the weight in another format from now on. Its numbers are lost: this is for modules without weights."""
        device = self.weight.device
        for suffix in self.form.tensors(self.shape):
            delattr(self, suffix)
        self.form = form
        self._allocate(device)

    @contextmanager
    def stored_for(self, device: torch.device) -> Iterator[Mapping[str, torch.Tensor]]:
        """The stored tensors by suffix, where they are used: on `device`, as long as the context lasts."""
        yield {suffix: getattr(self, suffix).to(device) for suffix in self.form.tensors(self.shape)}

    def _allocate(self, device: torch.device | None) -> None:
        for suffix, (shape, dtype) in self.form.tensors(self.shape).items():
            empty = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Codes and scales go to other devices, never to other types: `module.bfloat16()` means the rest."""
        if isinstance(self.form, Dense):
            return super()._apply(fn, recurse)
        stored = {id(getattr(self, suffix)) for suffix in self.form.tensors(self.shape)}

        def keeping_types(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            kept = id(tensor) in stored and result.dtype != tensor.dtype
            return tensor.to(result.device) if kept else result

        return super()._apply(keeping_types, recurse)


class QuantizedLinear(StoredWeight):
    """nn.Linear with a weight that is stored in a format.

    Args:
        in_features, out_features: as in nn.Linear.
        form: how the weight is stored.
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, form: Format, bias: bool = False):
        super().__init__((out_features, in_features), form)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] of x's type."""
        bias = None if self.bias is None else self.bias.to(x)
        with self.stored_for(x.device) as stored:
            return F.linear(x, self.form.dequantize(stored, self.in_features, x.dtype), bias)


def apply_formats(module: nn.Module, choose: Callable[[str, tuple[int, ...]], Format | None]) -> nn.Module:
    """Give layers of a module without weights (on the meta device) the formats that are chosen; returns the module.

    Args:
        module: changed in place: an nn.Linear becomes a QuantizedLinear, a StoredWeight (an expert bank) another form.
        choose: (the layer's name, the dense weight's shape) -> its format; None leaves the layer as it is.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, StoredWeight):
            form = choose(name, layer.shape)
            if form is not None:
                layer.set_format(form)
        elif type(layer) is nn.Linear:
            form = choose(name, tuple(layer.weight.shape))
            if form is not None:
                owner, _, leaf = name.rpartition(".")
                with layer.weight.device:
                    new = QuantizedLinear(layer.in_features, layer.out_features, form, layer.bias is not None)
                setattr(module.get_submodule(owner), leaf, new.train(layer.training))
    return module
