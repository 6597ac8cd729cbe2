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
        start: where the block begins that it has come to.
        step: rounds done in that block.
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
    start: int
    generator: torch.Generator | None
    step: int = 0
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
    cut as they are when it is alone. From there on each goes from block to block by itself.

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
        self._places: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None
        self.starts = range(whole * block_length, capacity, block_length)
        self.tracks = [
            Track(row[0], begin - len(sample.branches[0]), begin, end, begin, self.starts[0], sample.generator)
            for sample, row, begin, end in zip(samples, rows, begins, ends, strict=True)
        ]

    @property
    def rows(self) -> torch.Tensor:
        """The ids as the backbone takes them, int64 [samples * branches, positions]."""
        return self.ids.flatten(0, 1)

    def block(self, starts: int | Sequence[int]) -> torch.Tensor:
        """The new ids of a block of each sample, which its branches share, int64 [samples, block].

        starts: where the blocks begin: one position for all samples, or one of each.
        """
        return self.ids[:, 0].gather(1, self._at(starts)[0])

    def fillable(self, starts: int | Sequence[int]) -> torch.Tensor:
        """Which positions of the blocks at `starts` are neither padding nor prompt, bool [samples, block]."""
        return self._at(starts)[1]

    def write(self, starts: int | Sequence[int], ids: torch.Tensor) -> None:
        """Write what a round made of the blocks at `starts`, int64 [samples, block], to all branches."""
        at, fillable = (of[:, None].expand(-1, self.ids.shape[1], -1) for of in self._at(starts))
        self.ids.scatter_(2, at, torch.where(fillable, ids[:, None], self.ids.gather(2, at)))

    def _at(self, starts: int | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of a block of each sample, int64 [samples, block], and which are fillable."""
        places = (starts,) * len(self.tracks) if isinstance(starts, int) else tuple(starts)
        if self._places is None or self._places[0] != places:  # each round of a block asks several times
            begins = torch.tensor(places, device=self.ids.device)[:, None]
            at = begins + torch.arange(self.block_length, device=self.ids.device)
            self._places = places, at, at >= self._begins[:, None]
        return self._places[1:]

    def advance(self, track: Track, steps: int, stops: frozenset[int]) -> None:
        """Take a sample on to its next block with something to generate, or to its end.

        steps: rounds that a block may take; stops: ids that end a text.
        """
        while not track.done and not (track.step < steps and self._open(track, stops)):
            self._finish(track, stops)
            if not track.done:
                track.start, track.step = track.start + self.block_length, 0

    def rounds_ahead(self, track: Track, steps: int) -> int:
        """Rounds that a sample that is going may still take, at most."""
        return -(-(track.end - track.start) // self.block_length) * steps - track.step

    def _open(self, track: Track, stops: frozenset[int]) -> bool:
        """Whether something that was asked for is masked in a sample's block."""
        if self._end_of_text(track, stops) is not None:
            return False
        return self.mask_id in track.ids[track.final : self._end(track)]

    def _end(self, track: Track) -> int:
        """Where a sample's block ends, or what was asked for does."""
        return min(track.start + self.block_length, track.end)

    def _end_of_text(self, track: Track, stops: frozenset[int]) -> int | None:
        """Position after the first stop of a sample's block that no mask stands before, if there is one."""
        if not stops or track.drew_mask:
            return None
        for at in range(track.final, self._end(track)):
            if track.ids[at] in stops:
                return at + 1
            if track.ids[at] == self.mask_id:
                return None
        return None

    def _finish(self, track: Track, stops: frozenset[int]) -> None:
        """A sample's block is final: nothing in it changes any more, and it may be the last one."""
        stop, end = self._end_of_text(track, stops), self._end(track)
        track.drew_mask |= self.mask_id in track.ids[track.final : end]
        track.stopped = stop is not None
        track.final = end if stop is None else stop
        track.done = track.stopped or end == track.end

    def keep(self, samples: list[int]) -> None:
        """Go on with some of the samples, in the order given."""
        at = torch.tensor(samples, device=self.ids.device)
        self.ids, self.pads, self._begins = self.ids[at], self.pads[at], self._begins[at]
        self._places = None
        self.tracks = [self.tracks[sample] for sample in samples]
