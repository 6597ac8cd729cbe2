"""Milliseconds of asynchronous work, in parts."""

import time
from collections.abc import Callable
from contextlib import contextmanager

import torch


class Clock:
    """Milliseconds of named parts of asynchronous work."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: dict[str, list] = {}

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str):
        """What is started inside counts as `name`."""
        began = self._now()
        yield
        self.spans.setdefault(name, []).append((began, self._now()))

    def around(self, name: str, function: Callable) -> Callable:
        """`function`, timed as `name`."""

        def timed(*args, **kwargs):
            with self.span(name):
                return function(*args, **kwargs)

        return timed

    def total(self, name: str) -> float:
        """Milliseconds of all its spans."""
        if not self.cuda:
            return sum(1000 * (end - began) for began, end in self.spans.get(name, []))
        torch.cuda.synchronize()
        return sum(began.elapsed_time(end) for began, end in self.spans.get(name, []))


def milliseconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """The median of some runs after one that does not count."""
    work()
    clock = Clock(device)
    for run in range(repeats):
        with clock.span(str(run)):
            work()
    return sorted(clock.total(str(run)) for run in range(repeats))[repeats // 2]
