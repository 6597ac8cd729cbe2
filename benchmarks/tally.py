"""What a quality benchmark counts: shares of what was right, by name, with confidence intervals; rounds and speed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import numpy as np

from llada_core.sampling.pipeline import Usage

_DRAWS = 2000  # of the bootstrap


class Tally:
    """Judgements by name, and what the sampling took."""

    def __init__(self):
        self.right: dict[str, list[float]] = {}
        self.usages: list[Usage] = []
        self.seconds = 0.0

    def add(self, name: str, right: bool | float) -> None:
        """One more judgement."""
        self.right.setdefault(name, []).append(float(right))

    @contextmanager
    def sampling(self) -> Iterator[list[Usage]]:
        """Time what samples; its usages are appended to the list that this gives."""
        began, usages = time.perf_counter(), []
        yield usages
        self.seconds += time.perf_counter() - began
        self.usages += usages

    def figures(self) -> dict[str, float]:
        """Per cent by name, then rounds a generation and tokens a second."""
        shares = {name: 100 * sum(values) / len(values) for name, values in self.right.items()}
        if self.usages:
            total = sum(self.usages, Usage(0, 0, 0.0))
            shares["rounds"] = total.rounds / len(self.usages)
            shares["tokens/s"] = total.tokens / max(self.seconds or total.seconds, 1e-9)
        return shares

    def raw(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {"right": self.right, "usages": [astuple(one) for one in self.usages], "seconds": self.seconds}

    def add_raw(self, raw: dict[str, Any]) -> None:
        """Take in what `raw` of another gave."""
        for name, values in raw["right"].items():
            self.right.setdefault(name, []).extend(values)
        self.usages += [Usage(*one) for one in raw["usages"]]
        self.seconds += raw["seconds"]

    def interval(self, name: str, seed: int = 0) -> tuple[float, float]:
        """The middle 95 % of a name's share in per cent, by bootstrap over its judgements."""
        values = np.array(self.right[name])
        rng = np.random.default_rng(seed)
        means = values[rng.integers(len(values), size=(_DRAWS, len(values)))].mean(1)
        low, high = np.quantile(100 * means, [0.025, 0.975])
        return float(low), float(high)
