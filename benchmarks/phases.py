"""What a generation's time goes to, by when its rounds end, and how its passes were started.

A round ends with what it fixed on the processor, so that the clock can be read there without waiting for anything more.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from llada_core.backbone.cuda_graphs import CUDAGraphRunner, GraphedForward
from llada_core.backbone.model import Backbone


@dataclass
class Phases:
    """Seconds and passes of a generation, or of several one after the other.

    Attributes:
        prepare: until the cache is there.
        prefix: from then on until the first round has ended.
        rounds: of each round after it.
        rest: from the last round on.
        passes: of the backbone before the first round; the end of a prompt goes along with that.
        eager: rounds that were started kernel by kernel.
        warm_ups, captures: of graphs; a capture is also replayed.
        replays: of graphs.
    """

    prepare: float = 0.0
    prefix: float = 0.0
    rounds: list[float] = field(default_factory=list)
    rest: float = 0.0
    passes: int = 0
    eager: int = 0
    warm_ups: int = 0
    captures: int = 0
    replays: int = 0

    def figures(self) -> dict[str, object]:
        """By name, for a table."""
        each = sorted(self.rounds) or [0.0]
        return {
            "prepared, s": self.prepare,
            "prefix and first round, s": self.prefix,
            "rounds after it, s": sum(self.rounds),
            "the end, s": self.rest,
            "a round, ms: median, longest": f"{1000 * each[len(each) // 2]:.2f}, "
            + " ".join(f"{1000 * seconds:.1f}" for seconds in each[:-5:-1]),
            "passes of the prefix": self.passes,
            "rounds kernel by kernel, warm-ups, captures, replays": f"{self.eager} {self.warm_ups} {self.captures} "
            f"{self.replays}",
        }


class Watch:
    """Notes the phases of a generation. The device is waited for only where the generation itself does.

    Args:
        backbone: that runs.
        phases: take what is noted.
    """

    def __init__(self, backbone: Backbone, phases: Phases):
        self._backbone, self._phases = backbone, phases
        self._last = time.perf_counter()
        self._plain = self._graphed = self._computed = self._captures = self._ended = 0

    def _since(self) -> float:
        now = time.perf_counter()
        self._last, spent = now, now - self._last
        return spent

    def prepared(self) -> None:
        """The cache is there."""
        self._phases.prepare += self._since()

    def on_round(self, block: int, done: int) -> None:
        """A round has ended."""
        if self._ended:
            self._phases.rounds.append(self._since())
        else:
            self._phases.prefix += self._since()
        self._ended += 1

    def over(self) -> None:
        """The generation has ended, and the device has nothing left to do."""
        of = self._phases
        of.rest += self._since()
        eager = self._ended - self._graphed
        of.passes += self._plain - eager
        of.eager += eager
        of.captures += self._captures
        of.warm_ups += self._computed - self._captures
        of.replays += self._graphed - (self._computed - self._captures)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count passes while this is entered."""
        run, compute = CUDAGraphRunner.run, GraphedForward.compute

        def plain(*_: object) -> None:
            self._plain += 1

        def graphed(*arguments: object) -> torch.Tensor | None:
            hidden = run(*arguments)
            self._graphed += hidden is not None
            return hidden

        def computed(fixed: GraphedForward) -> None:
            self._computed += 1
            self._captures += torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            compute(fixed)

        hook = self._backbone.register_forward_pre_hook(plain)
        CUDAGraphRunner.run, GraphedForward.compute = graphed, computed
        try:
            yield
        finally:
            CUDAGraphRunner.run, GraphedForward.compute = run, compute
            hook.remove()
