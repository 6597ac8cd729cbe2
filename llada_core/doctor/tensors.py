"""Every tensor, one at a time: non-finite values, values beyond float16, ranges unlike those of its neighbours."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from ..checkpoint.component import Component
from ..checkpoint.reading import Stretch, read
from ..checkpoint.weights import PickledTensors, TensorFiles
from ..quantization.formats import METADATA_SUFFIX
from .findings import Findings, progress

HALF = torch.finfo(torch.float16).max
SAMPLE = 1 << 18  # values of a piece that a spread is estimated from
PIECE = 2**25  # bytes read at a time
FAR = 10.0  # times the median of the same tensor in the other layers: worth a look
FEWEST = 4  # tensors of a kind that make a median
NAMED = 3  # tensors named in a line


@dataclass
class Range:
    """What was seen of a tensor so far.

    Attributes:
        largest: absolute value of all that is finite.
        finite: whether all is.
        total, squares, count: sums over a sample.
    """

    largest: float = 0.0
    finite: bool = True
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    @property
    def spread(self) -> float:
        """Standard deviation of the sample."""
        mean = self.total / max(self.count, 1)
        return max(self.squares / max(self.count, 1) - mean * mean, 0.0) ** 0.5

    def look(self, tensor: torch.Tensor) -> None:
        """Take in a piece of the tensor, of any type."""
        if not tensor.numel():
            return
        flat = tensor.flatten()
        flat = flat.to(torch.float32) if tensor.is_floating_point() and tensor.element_size() == 1 else flat
        low, high = (float(value) for value in flat.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):  # NaN fails it too
            self.finite = False
            flat = flat[flat.isfinite()]
            low, high = (float(value) for value in flat.aminmax()) if flat.numel() else (0.0, 0.0)
        self.largest = max(self.largest, -low, high)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].double()
        self.total += float(sample.sum())
        self.squares += float(sample.square().sum())
        self.count += sample.numel()


def examine_tensors(components: dict[str, Component], findings: Findings) -> None:
    """A line or more for every part."""
    for part, component in components.items():
        ranges: dict[str, Range] = {}
        with findings.part(part):
            for key, tensor in _pieces(component.source):
                if key not in ranges:
                    progress(f"{part}: tensor {len(ranges) + 1} of {len(component.source.entries)}")
                ranges.setdefault(key, Range()).look(tensor)
        progress("")
        _judge(part, ranges, findings)


def _pieces(source: TensorFiles | PickledTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a part's files but what describes others, piece by piece."""
    keys = [key for key in source.entries if not key.endswith(METADATA_SUFFIX)]
    if isinstance(source, PickledTensors):
        yield from source.read(keys)
        return
    for key, tensors in read(_stretches(source, keys)):
        yield key, tensors["piece"]


def _stretches(source: TensorFiles, keys: list[str]) -> Iterator[tuple[str, dict[str, Stretch]]]:
    for key in keys:
        entry = source.entries[key]
        rows = entry.shape[0] if entry.shape else 1
        row = Stretch(entry, 0, 1).nbytes
        step = max(PIECE // max(row, 1), 1)
        for start in range(0, rows, step):
            yield key, {"piece": Stretch(entry, start, min(start + step, rows))}


def _judge(part: str, ranges: dict[str, Range], findings: Findings) -> None:
    if not ranges:
        return
    broken = [key for key, seen in ranges.items() if not seen.finite]
    if broken:
        advice = "Non-finite weights: the file is damaged or was converted badly. Download or convert it again."
        findings.add("wrong", part, f"NaN or infinity in {_named(broken)}", advice)
    half = [key for key, seen in ranges.items() if seen.largest > HALF]
    if half:
        advice = "bf16 and fp32 hold them. In fp16 they become infinite, unless they are pad tokens, which are guarded."
        findings.add("look", part, f"values beyond float16 in {_named(half)}", advice)
    zero = [key for key, seen in ranges.items() if seen.finite and seen.largest == 0 and not key.endswith("bias")]
    if zero:
        findings.add("look", part, f"nothing but zeros in {_named(zero)}", "A trained weight is not.")
    odd = _out_of_line(ranges)
    if odd:
        advice = f"Their spread is over {FAR:.0f} times that of the same tensor in other layers, or under a tenth."
        findings.add("look", part, f"out of line: {_named(odd)}", advice)
    if not (broken or half or zero or odd):
        largest = max(seen.largest for seen in ranges.values())
        findings.add("ok", f"{part} values", f"finite, in line, none beyond {largest:.3g}")


def _out_of_line(ranges: dict[str, Range]) -> list[str]:
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for key, seen in ranges.items():
        if seen.finite and seen.spread > 0:
            kinds[re.sub(r"\.\d+\.", ".N.", re.sub(r"\.experts\.\d+\.", ".experts.E.", key))][key] = seen.spread
    odd = []
    for spreads in kinds.values():
        if len(spreads) >= FEWEST:
            middle = median(spreads.values())
            odd += [key for key, spread in spreads.items() if not middle / FAR <= spread <= middle * FAR]
    return odd


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more
