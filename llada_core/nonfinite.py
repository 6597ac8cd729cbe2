"""Numbers that are not finite: noticed without waiting for the device, and whose fault they are."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from .errors import CheckpointError, InputError

CHUNK = 2**24  # numbers of a weight that are looked at together


class FiniteWatch:
    """Says a round later whether what a round computed was finite: by then the device has long got there.

    Args:
        error: makes the error to raise; called once, where something was not finite.
    """

    def __init__(self, error: Callable[[], Exception]):
        self._error = error
        self._flag: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def note(self, x: torch.Tensor) -> None:
        """Look at what this round computed. Raises where the round before was not finite."""
        flag = x.isfinite().all()
        copied = None
        if flag.is_cuda:
            # Read back where the work of the next round does not stand between.
            flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.check()
        self._flag, self._copied = flag, copied

    def check(self) -> None:
        """Raise where the last round that was noted was not finite; waits for it."""
        if self._copied is not None:
            self._copied.synchronize()
        flag, self._flag, self._copied = self._flag, None, None
        if flag is not None and not bool(flag):
            raise self._error()


def nonfinite_error(part: str, module: nn.Module, dtype: torch.dtype, what: str) -> InputError:
    """The error to raise where a module computed something that is not finite.

    Reads all weights, so it is asked only when something is wrong.

    Args:
        part: of the checkpoint, as errors name it.
        module: whose weights are looked at.
        dtype: of the activations.
        what: was computed: "predictions", "latents".

    Returns:
        CheckpointError that names a weight which is not finite, or InputError about the type that was computed in.
    """
    half = "The model was trained in bf16: choose bf16, or fp32 where the card has no bf16."
    for name, tensor in _floating(module):
        bad = _bad_numbers(tensor)
        if bad is None:
            continue
        count, nan = bad
        if tensor.dtype == torch.float16 and not nan:
            return InputError("precision", f"{part}: {name} beyond the range of torch.float16", "finite weights", half)
        found = f"{count} numbers that are NaN or infinite"
        return CheckpointError(
            f"{part}: {name}", found, "finite weights", "Its file is damaged: download the checkpoint again."
        )
    found = f"{what} beyond the range of {dtype}, from finite weights"
    if dtype == torch.float16:
        return InputError("precision", found, f"finite {what}", half)
    remedy = "Activations overflowed. If these are the weights of this model, download the checkpoint again."
    return InputError("precision", found, f"finite {what}", remedy)


def _floating(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not tensor.is_meta:
            yield name, tensor.detach()


def _bad_numbers(tensor: torch.Tensor) -> tuple[int, bool] | None:
    """How many numbers are not finite and whether one is NaN; None where all are finite."""
    count, nan = 0, False
    for part in tensor.flatten().split(CHUNK):
        wide = part if part.element_size() > 1 else part.float()  # torch lacks this for fp8
        bad = ~wide.isfinite()
        if bool(bad.any()):
            count += int(bad.sum())
            nan |= bool(wide.isnan().any())
    return (count, nan) if count else None
