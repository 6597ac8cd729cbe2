"""The output head: logits of a stretch of the vocabulary, and their spread over all of it."""

import torch
import torch.nn.functional as F
from torch import nn

from ..quantization.kernel_switch import KernelSwitch

PART = 4096  # tokens of the vocabulary whose products are summed at once


class Head(nn.Linear):
    """Hidden states to logits.

    The standard deviation of all logits of a position needs none of them: they are W x, so their variance is
    x' C x / (V - 1) with C = W' W, W less its mean over the vocabulary. With C = R' R it is |R x|^2 / (V - 1): a
    product with a square matrix as wide as a hidden state in place of one as long as the vocabulary.

    Args:
        hidden: width of a hidden state.
        vocabulary: number of ids.
    """

    def __init__(self, hidden: int, vocabulary: int):
        super().__init__(hidden, vocabulary, bias=False)
        self.kernels = KernelSwitch(try_best)
        self._factor: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, low: int = 0, high: int | None = None) -> torch.Tensor:
        """x [..., hidden] -> logits of the ids low <= id < high [..., high - low], all by default."""
        return F.linear(x, self.weight[low:high])

    def best(self, x: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The most probable of the ids low <= id < high at each position, and its probability among them.

        x [..., hidden] -> int64 [...] counted from low, float32 [...]; the latter is not finite where a logit is not.
        """
        logits = self(x, low, high)
        if self.kernels.usable(logits):
            from . import head_kernels

            return head_kernels.best(logits)
        logits = logits.float()
        chosen = logits.argmax(-1)
        return chosen, logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]

    def factor(self, device: torch.device, weight: torch.Tensor | None = None) -> torch.Tensor | None:
        """R, float32 [hidden, hidden] on the device: computed once. None where the weights are not finite.

        weight: the head's, where a host has brought it from elsewhere.
        """
        if self._factor is None:
            self._factor = centred_factor(self.weight.detach() if weight is None else weight, device)
        return None if self._factor is None else self._factor.to(device)

    def std(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Standard deviation of all logits at each position, x [..., hidden] -> float32 [..., 1]."""
        return F.linear(x.float(), factor).norm(dim=-1, keepdim=True) / (self.out_features - 1) ** 0.5


def centred_factor(weight: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """R with R' R = W' W, W [vocabulary, hidden] less its mean; None where W is not finite.

    Products of a part of the vocabulary are float32, as precise as logits are; they are summed in float64 on the CPU.
    """
    parts, width = weight.split(PART), weight.shape[1]
    mean = sum(part.to(device).float().sum(0).cpu().double() for part in parts) / len(weight)
    near = mean.to(device=device, dtype=torch.float32)
    second = torch.zeros(width, width, dtype=torch.float64)
    for part in parts:
        centred = part.to(device=device, dtype=torch.float32) - near
        second += (centred.T @ centred).cpu()
    if not bool(second.isfinite().all()):
        return None
    lower, failed = torch.linalg.cholesky_ex(second)
    if bool(failed):  # fewer tokens than the hidden state is wide, or rounding at the lowest eigenvalues
        values, vectors = torch.linalg.eigh(second)
        lower = vectors * values.clamp_min(0).sqrt()
    return lower.T.contiguous().to(device=device, dtype=torch.float32)


def try_best(device: torch.device) -> None:
    """Choose among a few logits by kernels there. Raises RuntimeError where they come out wrong."""
    from . import head_kernels

    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    logits[1, 4000] = logits[1, 70] = logits[1].max() + 1  # of equal ones the first
    logits[2, 9] = float("nan")
    chosen, probability = (found.cpu() for found in head_kernels.best(logits.to(device)))
    expected, at = logits[:2].softmax(-1).max(-1)
    at[1] = 70
    close = torch.allclose(probability[:2], expected, rtol=1e-4)
    if not close or not torch.equal(chosen[:2], at) or bool(probability[2].isfinite()):
        raise RuntimeError("the best of some logits came out wrong")
