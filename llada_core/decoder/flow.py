"""The two samplers of the decoder, as functions over tensors (docs/model.md, Decoding).

Latents are [1, channels, 1, height, width]. t is the model's time: 0 is noise, 1 the image. A velocity is x1 - x0.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from ..checks import check_count
from ..options import MAX_DECODER_STEPS
from ..progress import Progress, ProgressCallback, report

log = logging.getLogger(__name__)

WARP = 6.0  # of the normal decoder's times
STAGE = "decoder"

Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def normal_times(steps: int) -> list[float]:
    """`steps` times, 2 to 1000, from 0 to 1, evenly spaced and then warped t/(t + 6 - 6t): densest near the noise."""
    check_count("steps", steps, 2, MAX_DECODER_STEPS)
    even = (i / (steps - 1) for i in range(steps))
    return [t / (t + WARP - WARP * t) for t in even]


def turbo_times(steps: int) -> list[float]:
    """`steps` + 1 even times from 0 to 1, steps from 1 to 1000."""
    check_count("steps", steps, 1, MAX_DECODER_STEPS)
    return [i / steps for i in range(steps + 1)]


def noise_stream(seed: int, shape: Sequence[int]) -> Iterator[torch.Tensor]:
    """Unit noise without end, float32 on the CPU: first the initial noise, then turbo's fresh noise round by round.

    One generator of its own, so that a seed gives the same picture on every device and whatever else draws.
    Seeds wrap at 2**64, so that a batch may start near the end.
    """
    generator = torch.Generator("cpu").manual_seed(seed % 2**64)
    while True:
        yield torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. Metal, DirectML and some of Intel's say by an error that they do not."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        return float(torch.full((1,), 1.5, dtype=torch.float64, device=device) * 2) == 3
    except (RuntimeError, TypeError, NotImplementedError) as error:
        log.info("%s has no float64 (%s); the turbo sampler keeps its state in float32", device, str(error)[:80])
        return False


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """p + scale·(p - n), scaled down to the norm of p where its own, over the whole tensor, is larger."""
    guided = conditional + scale * (conditional - unconditional)
    norm = torch.linalg.vector_norm(guided).clamp(min=torch.finfo(guided.dtype).tiny)
    return guided * (torch.linalg.vector_norm(conditional) / norm).clamp(max=1.0)


def sample_normal(
    velocity: Velocity, x: torch.Tensor, times: Sequence[float], progress: ProgressCallback | None = None
) -> torch.Tensor:
    """Euler steps from time to time: len(times) - 1 evaluations.

    Args:
        velocity: (x, t) -> velocity of x's shape.
        x: the noise, float32.
        times: rising, as `normal_times` gives them.
        progress: called after every round; its preview is the estimate of the clean latents [1, channels, h, w].

    Returns:
        The latents, float32, of x's shape.
    """
    for done, (t, after) in enumerate(pairwise(times), start=1):
        v = velocity(x, t)

        def clean(x=x, v=v, t=t) -> torch.Tensor:
            return (x + (1 - t) * v).squeeze(2)

        x = x + (after - t) * v
        report(progress, Progress(done, len(times) - 1, STAGE, clean))
    return x


def sample_turbo(
    velocity: Velocity,
    x: torch.Tensor,
    times: Sequence[float],
    noise: Iterator[torch.Tensor],
    progress: ProgressCallback | None = None,
) -> torch.Tensor:
    """Each round goes to the estimated image and back by fresh noise: len(times) - 1 evaluations.

    Args:
        velocity, x, times, progress: as for `sample_normal`; times from `turbo_times`.
        noise: gives one draw of x's shape a round, the last of which has no weight.

    Returns:
        The latents, float32, of x's shape.
    """
    # As in the reference; on a device without float64, float32 is near enough.
    x = x.to(torch.float64 if has_float64(x.device) else torch.float32)
    for done, (t, after) in enumerate(pairwise(times), start=1):
        clean = x + (1 - t) * velocity(x, t)
        x = after * clean + (1 - after) * next(noise).to(x)

        def estimate(clean=clean) -> torch.Tensor:
            return clean.squeeze(2).float()

        report(progress, Progress(done, len(times) - 1, STAGE, estimate))
    return x.to(torch.float32)
