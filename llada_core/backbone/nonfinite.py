"""Predictions that are not finite: whose fault they are."""

import torch
from torch import nn

from ..errors import CheckpointError, InputError


def nonfinite_error(module: nn.Module, dtype: torch.dtype) -> InputError:
    """The error to raise where a module's predictions are not finite.

    Reads all weights, once, so it is asked only when something is wrong.

    Args:
        module: whose weights are looked at.
        dtype: of the activations.

    Returns:
        CheckpointError naming a weight that is not finite, or InputError about what the activations are computed in.
    """
    name = nonfinite_parameter(module)
    if name is not None:
        remedy = "A download broke off or a disk failed: download the checkpoint again."
        return CheckpointError(f"backbone: {name}", "values that are no finite numbers", "finite weights", remedy)
    found = f"predictions beyond the range of {dtype}, from finite weights"
    if dtype == torch.float16:
        remedy = "The model was trained in bf16: choose bf16, or fp32 where the card has no bf16."
    else:
        remedy = "Activations overflowed. Are these the weights of this model? Download the checkpoint again."
    return InputError("precision", found, "finite predictions", remedy)


def nonfinite_parameter(module: nn.Module) -> str | None:
    """Name of the first parameter or buffer with a value that is not finite; None where all are."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_floating_point() and not all(_finite(part) for part in _parts(tensor)):
            return name
    return None


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A large tensor in parts: a check takes memory of its own."""
    return tensor.split(1024) if tensor.ndim == 2 else tensor.unbind() if tensor.ndim > 2 else (tensor,)


def _finite(tensor: torch.Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # FP8 has no kernel of its own for it
    return bool(wide.isfinite().all())
