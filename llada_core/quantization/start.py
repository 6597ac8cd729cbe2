"""Starting a kernel of Triton's, also where torch's allocator hides from it what a graph being captured allocates."""

from typing import Any

import torch


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """What `kernel[grid](*arguments, **constants)` does.

    Triton asks the driver whether each tensor's address is one on the card. Where torch allocates by cudaMallocAsync,
    which is ComfyUI's choice, what is allocated in the capture of a CUDA graph has its address at once and its memory
    when the graph first runs, so the driver says no. The compiled kernel takes addresses as numbers and asks nothing.

    Args:
        kernel: of triton.jit; the first arguments are those of the call, the rest its constants.
        arguments: tensors and numbers.
        constants: by name, with num_warps and the like.
    """
    if not _hidden(arguments[0]):
        kernel[grid](*arguments, **constants)
        return
    compiled = kernel.warmup(*arguments, grid=grid, **constants)
    given = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
    rest = [constants[name] for name in kernel.arg_names[len(arguments) :]]
    compiled[(*grid, 1, 1)[:3]](*given, *rest)


def _hidden(tensor: torch.Tensor) -> bool:
    """Whether what is allocated now on the tensor's device has no memory yet."""
    return (
        tensor.is_cuda and torch.cuda.is_current_stream_capturing() and torch.cuda.get_allocator_backend() != "native"
    )
