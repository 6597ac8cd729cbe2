"""Whether Triton's kernels run on a device, and come out right there."""

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

# Runs kernels on a device, and raises where they fail or come out wrong.
TryOut = Callable[[torch.device], None]


class KernelSwitch:
    """Says whether to compute with Triton's kernels: on a GPU of NVIDIA's, where small examples come out right.

    They are tried once a device, at the first use there, since only that tells: Triton needs a C compiler, on Windows
    it is another package, and few cards have been at hand. Where they do not run the log says so once, and torch's
    own kernels serve.

    Args:
        also: kernels to try besides the products'.
    """

    def __init__(self, also: TryOut | None = None):
        self._also = also
        self._usable: dict[torch.device, bool] = {}

    def usable(self, x: torch.Tensor) -> bool:
        """Whether kernels run where x is. Never where x is trained through: they have no derivative."""
        device = x.device
        if device.type != "cuda" or torch.version.hip or x.requires_grad:
            return False
        if device not in self._usable:
            self._usable[device] = self._try_out(device)
        return self._usable[device]

    def _try_out(self, device: torch.device) -> bool:
        try:
            from . import launch
        except ImportError:
            log.info("expert products run without Triton, which is not installed here; with it they are faster")
            return False
        if launch.capability(device) < (7, 5):
            return False
        try:
            launch.try_out(device)
            if self._also is not None:
                self._also(device)
        except Exception as error:  # a missing compiler, a driver too old: Triton has no class of its own for them
            log.warning("expert products run without Triton, which fails here (%s: %s)", type(error).__name__, error)
            return False
        return True
