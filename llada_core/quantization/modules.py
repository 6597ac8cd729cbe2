"""Layers whose weights are stored in a format: what a host sees, moves and keeps off the card."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from .formats import Dense, Format, Int4, Stored
from .kernel_switch import KernelSwitch

# Rows up to which a linear layer's product takes as long as reading its weights; beyond, dequantizing them once and
# torch's own product are faster.
FEW_ROWS = 256


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
            # Only a dense weight can be trained.
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=isinstance(self.form, Dense)))

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
        kernels: whether Triton's kernels run; layers of one module share it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: Format,
        bias: bool = False,
        kernels: KernelSwitch | None = None,
    ):
        super().__init__((out_features, in_features), form)
        self.kernels = kernels or KernelSwitch()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out] of x's type. sums: x's `launch.group_sums`, where what made x made them too."""
        bias = None if self.bias is None else self.bias.to(x)
        with self.stored_for(x.device) as stored:
            if x.numel() // self.in_features <= FEW_ROWS and self.kernels.usable(x):
                from . import launch

                if launch.can_take(self.form, x):
                    flat = x.reshape(-1, self.in_features)
                    out = launch.product(self.form, stored, flat, (1, *self.shape), sums=sums)
                    out = out.view(*x.shape[:-1], -1)
                    return out if bias is None else out + bias
            return F.linear(x, self.form.dequantize(stored, self.in_features, x.dtype), bias)


def summed(*layers: nn.Module) -> int:
    """The groups' size of the sums that the product of a layer wants besides x: 4 bits with zeros; 0 for others.

    Of several layers over the same x: 0 where they differ, or where one of them has another form.
    """
    forms = [layer.form if isinstance(layer, StoredWeight) else None for layer in layers]
    sizes = {of.group_size if isinstance(of, Int4) and not of.symmetric else 0 for of in forms}
    return sizes.pop() if len(sizes) == 1 else 0


def apply_linear(layer: nn.Module, x: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
    """A linear layer over x, whose `launch.group_sums` of the size that `summed` says are there or None."""
    return layer(x) if sums is None else layer(x, sums)


def stored_of(layer: nn.Linear | StoredWeight, device: torch.device) -> tuple[Format, AbstractContextManager[Stored]]:
    """The format of a layer's weight, and the context in which its stored tensors are on the device.

    An nn.Linear is dense; one that a host has made castable has a `stored_for` of its own.
    """
    form = layer.form if isinstance(layer, StoredWeight) else Dense(layer.weight.dtype)
    own = getattr(layer, "stored_for", None)
    return form, nullcontext({"weight": layer.weight.to(device)}) if own is None else own(device)


def apply_formats(module: nn.Module, choose: Callable[[str, tuple[int, ...]], Format | None]) -> nn.Module:
    """Give layers of a module without weights (on the meta device) the formats that are chosen; returns the module.

    Args:
        module: changed in place: an nn.Linear becomes a QuantizedLinear, a StoredWeight (an expert bank) another form.
        choose: (the layer's name, the dense weight's shape) -> its format; None leaves the layer as it is.
    """
    kernels = KernelSwitch()
    for name, layer in list(module.named_modules()):
        if isinstance(layer, StoredWeight):
            form = choose(name, layer.shape)
            if form is not None:
                layer.set_format(form)
        elif type(layer) is nn.Linear:
            form = choose(name, tuple(layer.weight.shape))
            if form is not None:
                owner, _, leaf = name.rpartition(".")
                sizes = layer.in_features, layer.out_features
                with layer.weight.device:
                    new = QuantizedLinear(*sizes, form, layer.bias is not None, kernels)
                setattr(module.get_submodule(owner), leaf, new.train(layer.training))
    return module
