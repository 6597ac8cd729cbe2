"""A second device where no GPU is: tensors that say they lie on a card and refuse to meet the processor's.

The numbers lie in main memory and are computed there; what is stood in for is the card's rule that an operation takes
tensors of one device. So a weight that was forgotten off the card is an error here as it is there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("lazy", 0)  # of the types torch knows, one whose name needs no backend
_ATEN = torch.ops.aten
# What crosses devices on a real card too: copies, and indices of the processor.
_CROSSING = {_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN.index.Tensor, _ATEN.index_put_.default}


class OnCard(torch.Tensor):
    """A tensor of the stand-in card; `inner` holds its numbers. `arrived` counts bytes that came from the processor."""

    arrived = 0
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=CARD, strides=inner.stride()
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


@contextmanager
def stand_in_card() -> Iterator[None]:
    """Inside, tensors can be made on CARD and moved there."""
    with _Literals(), _Operations():
        yield


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """What asks for the device before any operation is seen: torch.tensor, brackets, and tolist."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == CARD.type:
            return func(*args, **kwargs | {"device": None}).to(CARD)
        if func is torch.Tensor.tolist and isinstance(args[0], OnCard):
            return args[0].inner.tolist()
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnCard):
            return OnCard(func(args[0].inner, tree_map(_inner, args[1])))
        if func is torch.Tensor.__setitem__ and isinstance(args[0], OnCard):
            if isinstance(args[2], torch.Tensor) and args[2].dim() and not isinstance(args[2], OnCard):
                args = (*args[:2], args[2].to(CARD))  # as torch does
            return func(*(tree_map(_inner, argument) for argument in args))
        return func(*args, **kwargs)


def compute(func, args: tuple, kwargs: dict):
    """One operation. Raises RuntimeError where it would mix devices, as torch does on a card."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    on_card = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnCard) and tensor.dim() > 0]
    if on_card and strangers and func not in _CROSSING:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {CARD} and {strangers[0].device}")
    target = kwargs.get("device")
    wrapping = bool(on_card) if target is None else torch.device(target).type == CARD.type
    if func is _ATEN.copy_.default:
        wrapping = isinstance(args[0], OnCard)
    if target is not None and wrapping:
        kwargs = kwargs | {"device": torch.device("cpu")}
    known = {id(tensor.inner): tensor for tensor in on_card}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known and wrapping:
            return known[id(value)]
        if not wrapping:  # on the way off the card the bytes are others
            return value.clone() if id(value) in known else value
        if func is _ATEN._to_copy.default and strangers:
            OnCard.arrived += value.nbytes
        # On the way to the card they are others too.
        return OnCard(value.clone() if any(value is tensor for tensor in strangers) else value)

    return tree_map(wrap, out)


def _inner(value):
    return value.inner if isinstance(value, OnCard) else value
