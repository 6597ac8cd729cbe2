"""Token ids of several samples side by side, laid out so that all share block boundaries (docs/model.md, Guidance)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backbone.cache import Prefix


@dataclass(frozen=True)
class Sample:
    """One text or image to generate.

    Attributes:
        branches: the prompts that guidance combines, token ids each, the conditional one first.
        new: the ids that follow the prompts: the mask id where one is to be generated, any other where it is given.
        generator: CPU generator of the draws at temperature > 0; torch's own where it is None.
        prefix: what is cached of a sequence that the conditional branch goes on from.
    """

    branches: Sequence[Sequence[int]]
    new: Sequence[int]
    generator: torch.Generator | None = None
    prefix: Prefix | None = None


@dataclass
class Track:
    """How far a sample of a batch has come.

    Attributes:
        ids: those of its conditional branch, padding included, as the device has them.
        pad: how much of that is padding.
        begin, end: where its new ids stand.
        final: position up to which nothing can change any more.
        rounds: what it took by now, counted while something that was asked for was masked.
        done: whether there is nothing more to generate; its new ids end at `final`.
        stopped: whether a stop ended it.
        drew_mask: a final block of it holds a mask: no text ends behind one.
        prefix: what was cached of it when it was done, where that is wanted.
    """

    ids: list[int]
    pad: int
    begin: int
    end: int
    final: int
    generator: torch.Generator | None
    rounds: int = 0
    done: bool = False
    stopped: bool = False
    drew_mask: bool = False
    prefix: Prefix | None = None

    @property
    def new(self) -> list[int]:
        """The new ids that are final."""
        return self.ids[self.begin : self.final]


class Batch:
    """Samples with the same number of branches.

    Branches of other lengths are padded with masks at their left, up to the longest of their sample and further by
    whole blocks, so that the first block to generate begins at the same position in all samples. A sample's blocks are
    cut as they are when it is alone.

    Args:
        samples: what to generate.
        block_length: positions of a block.
        mask_id: id of the mask token.
        device: of the computation.

    Attributes:
        ids: int64 [samples, branches, positions].
        pads: int64 [samples, branches], padding positions at the left.
        tracks: a sample each.
        starts: where the blocks begin that hold new ids.
    """

    def __init__(self, samples: Sequence[Sample], block_length: int, mask_id: int, device: torch.device | str = "cpu"):
        self.block_length, self.mask_id = block_length, mask_id
        longest = [max(map(len, sample.branches)) for sample in samples]
        whole = max(longest) // block_length
        begins = [length + (whole - length // block_length) * block_length for length in longest]
        ends = [begin + len(sample.new) for begin, sample in zip(begins, samples, strict=True)]
        capacity = -(-max(ends) // block_length) * block_length
        rows = [
            [
                [mask_id] * (begin - len(branch)) + [*branch, *sample.new] + [mask_id] * (capacity - end)
                for branch in sample.branches
            ]
            for sample, begin, end in zip(samples, begins, ends, strict=True)
        ]
        self.ids = torch.tensor(rows, device=device)
        self.pads = torch.tensor(
            [
                [begin - len(branch) for branch in sample.branches]
                for sample, begin in zip(samples, begins, strict=True)
            ],
            device=device,
        )
        self._begins = torch.tensor(begins, device=device)
        self._fillable: tuple[int, torch.Tensor] | None = None
        self.tracks = [
            Track(row[0], begin - len(sample.branches[0]), begin, end, begin, sample.generator)
            for sample, row, begin, end in zip(samples, rows, begins, ends, strict=True)
        ]
        self.starts = range(whole * block_length, capacity, block_length)

    @property
    def rows(self) -> torch.Tensor:
        """The ids as the backbone takes them, int64 [samples * branches, positions]."""
        return self.ids.flatten(0, 1)

    def block(self, start: int) -> torch.Tensor:
        """The new ids of the block at `start`, which all branches share, int64 [samples, block]."""
        return self.ids[:, 0, start : start + self.block_length]

    def fillable(self, start: int) -> torch.Tensor:
        """Which positions of the block at `start` are neither padding nor prompt, bool [samples, block]."""
        if self._fillable is None or self._fillable[0] != start:  # each round of a block asks twice
            at = torch.arange(start, start + self.block_length, device=self.ids.device)
            self._fillable = start, at >= self._begins[:, None]
        return self._fillable[1]

    def write(self, start: int, ids: torch.Tensor) -> None:
        """Write what a round made of the block at `start`, int64 [samples, block], to all branches."""
        window = self.ids[:, :, start : start + self.block_length]
        window.copy_(torch.where(self.fillable(start)[:, None], ids[:, None], window))

    def open(self, track: Track, start: int, stops: frozenset[int]) -> bool:
        """Whether something that was asked for is masked in the block at `start`."""
        if track.done or self.end_of_text(track, start, stops) is not None:
            return False
        return self.mask_id in track.ids[track.final : min(start + self.block_length, track.end)]

    def end_of_text(self, track: Track, start: int, stops: frozenset[int]) -> int | None:
        """Position after the first stop of the block at `start` that no mask stands before, if there is one."""
        if not stops or track.drew_mask:
            return None
        for at in range(track.final, min(start + self.block_length, track.end)):
            if track.ids[at] in stops:
                return at + 1
            if track.ids[at] == self.mask_id:
                return None
        return None

    def finish(self, start: int, stops: frozenset[int]) -> None:
        """The block at `start` is final: nothing in it changes any more, and samples that end in it are done."""
        for track in self.tracks:
            if track.done:
                continue
            stop, end = self.end_of_text(track, start, stops), min(start + self.block_length, track.end)
            track.drew_mask |= self.mask_id in track.ids[track.final : end]
            track.stopped = stop is not None
            track.final = end if stop is None else stop
            track.done = track.stopped or end == track.end

    def keep(self, samples: list[int]) -> None:
        """Go on with some of the samples, in the order given."""
        at = torch.tensor(samples, device=self.ids.device)
        self.ids, self.pads, self._begins = self.ids[at], self.pads[at], self._begins[at]
        self._fillable = None
        self.tracks = [self.tracks[sample] for sample in samples]
