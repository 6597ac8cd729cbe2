"""The block loop (docs/model.md, Block diffusion and SPRINT)."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch

from ..backbone.attention_kernels import Attend, sdpa
from ..backbone.cache import Prefix
from ..backbone.cuda_graphs import GraphStore
from ..backbone.model import Backbone
from ..backbone.runner import CachedRunner
from ..nonfinite import nonfinite_error
from ..options import Guidance, Sampling, Sprint
from .batch import Batch, Sample
from .sprint import kept_positions, scores
from .unmask import quota
from .unmasker import Unmasker

# (index of the block, rounds done in it) after each round; an exception from it ends the work.
OnRound = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationConfig:
    """What `generate` may write, and how.

    Attributes:
        steps: rounds a block may take.
        low, high: ids allowed, low <= id < high.
        stops: ids that end the text where no mask stands before them; empty for an image body.
        sampling: block_length, threshold and drawing.
        guidance: scales; not read with one branch.
        sprint: None for plain sampling.
        keep_prefix: outputs bring along what was cached of them, for a sample that goes on from there.
    """

    steps: int
    low: int
    high: int
    stops: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    guidance: Guidance | None = None
    sprint: Sprint | None = None
    keep_prefix: bool = False


@dataclass(frozen=True)
class Output:
    """The new ids of a sample (the stop, if any, is the last of them) and the number of backbone rounds used.

    Attributes:
        prefix: what is cached of the conditional branch, where `keep_prefix` asks for it.
    """

    ids: list[int]
    rounds: int
    stopped: bool
    prefix: Prefix | None = field(default=None, compare=False)


def prepare(
    backbone: Backbone,
    samples: Sequence[Sample],
    config: GenerationConfig,
    mask_id: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attend: Attend = sdpa,
    store: GraphStore | None = None,
) -> tuple[CachedRunner, Batch]:
    """What `generate` takes, for samples with the same number of branches; arguments as those of the two."""
    batch = Batch(samples, config.sampling.block_length, mask_id, device)
    rows, capacity, scored = batch.pads.flatten(), batch.ids.shape[-1], config.sprint is not None
    then, key = following(backbone, batch, config)
    runner = CachedRunner(backbone, rows, capacity, batch.block_length, dtype, attend, store, scored, then, key)
    branches = batch.pads.shape[1]
    for index, sample in enumerate(samples):
        if sample.prefix is not None:
            runner.adopt(index * branches, sample.prefix, sample.branches[0])
    return runner, batch


def following(backbone: Backbone, batch: Batch, config: GenerationConfig) -> tuple[Callable[[], Unmasker], Hashable]:
    """What follows the backbone in each round of a batch, to be made, and what it is made of."""
    samples, branches = batch.pads.shape
    sampling = replace(
        config.sampling, steps=None, thinking_steps=1, thinking_length=1
    )  # which a round knows nothing of
    made_of = (config.low, config.high, batch.mask_id, sampling, config.guidance, config.sprint)
    make = partial(Unmasker, backbone.lm_head, samples, branches, batch.block_length, *made_of, batch.ids.device)
    return make, (samples, branches, *made_of)


def generate(
    runner: CachedRunner, batch: Batch, config: GenerationConfig, on_round: OnRound | None = None
) -> list[Output]:
    """Fill all masks among the new ids of a batch, block after block; a block without any takes no round.

    Masks of a last block behind what was asked for are filled along the way, as the reference does. The reference also
    goes on until none of them is left; nothing that was asked for can change in those rounds, so they are saved.

    Args:
        runner: over the rows of `batch`, nothing cached yet.
        batch: is filled, once.
        config: the same for all samples.
        on_round: hears of each round.

    Returns:
        An output a sample, in the order that the batch began with.

    Raises:
        CheckpointError, InputError: predictions that are not finite, found in the round in which they come.
    """
    tracks = list(batch.tracks)
    for index, start in enumerate(batch.starts):
        for step in range(config.steps):
            active = [batch.open(track, start, config.stops) for track in batch.tracks]
            if not any(active):
                break
            if config.sprint and step == config.sprint.warmup:
                prune(runner, batch, start, config.sprint)
            run_round(runner, batch, start, step, active, config)
            if on_round:
                on_round(index, step + 1)
        batch.finish(start, config.stops)
        if config.keep_prefix:
            keep_prefixes(runner, batch)
        if all(track.done for track in batch.tracks):
            break
        leave(runner, batch, config)
    return [Output(track.new, track.rounds, track.stopped, track.prefix) for track in tracks]


def run_round(
    runner: CachedRunner, batch: Batch, start: int, step: int, active: list[bool], config: GenerationConfig
) -> None:
    """One forward pass of the block at `start`, and the tokens that it fixes: one transfer back a round."""
    unmasker = cast(Unmasker, runner.then)
    if step == 0:  # later rounds go on from what the one before left there
        unmasker.ids.copy_(batch.block(start))
        unmasker.fillable.copy_(batch.fillable(start))
    unmasker.schedule[0].fill_(quota(step, config.steps, batch.block_length))
    unmasker.schedule[1].fill_(config.steps - step)
    if config.sampling.temperature > 0:
        unmasker.uniform.copy_(draws(batch, active))
    runner.block(batch.rows, start)
    batch.write(start, unmasker.ids)
    for track, busy, (*ids, finite) in zip(batch.tracks, active, unmasker.report.tolist(), strict=True):
        if busy and not finite:
            raise nonfinite_error("backbone", runner.backbone, runner.cache.keys[0].dtype, "predictions")
        track.ids[start : start + batch.block_length] = ids
        track.rounds += busy


def draws(batch: Batch, active: list[bool]) -> torch.Tensor:
    """One uniform number a position, float32 [samples, block], each sample's from its own generator on the CPU.

    So a seed means the same draws on every device and beside any other sample. A sample that waits for others to finish
    their block draws none.
    """
    nothing = torch.zeros(batch.block_length)
    return torch.stack(
        [
            torch.rand(batch.block_length, generator=track.generator) if busy else nothing
            for track, busy in zip(batch.tracks, active, strict=True)
        ]
    )


def keep_prefixes(runner: CachedRunner, batch: Batch) -> None:
    """Note what is cached of the samples that have just become done, before they leave."""
    branches = batch.pads.shape[1]
    for index, track in enumerate(batch.tracks):
        if track.done and track.prefix is None:
            track.prefix = runner.prefix(index * branches, track.ids[track.pad :])


def leave(runner: CachedRunner, batch: Batch, config: GenerationConfig) -> None:
    """Take samples that are done out of the batch.

    Where rounds are graphs only when half of them are: graphs are for a number of rows, and new ones cost more than
    some rows.
    """
    left = [at for at, track in enumerate(batch.tracks) if not track.done]
    most = len(batch.tracks) // 2 if runner.rounds.sizes else len(batch.tracks) - 1
    if len(left) <= most:
        branches = batch.pads.shape[1]
        batch.keep(left)
        rows = [at * branches + branch for at in left for branch in range(branches)]
        runner.keep(rows, *following(runner.backbone, batch, config))


def prune(runner: CachedRunner, batch: Batch, start: int, sprint: Sprint) -> None:
    """Choose what later rounds of the block at `start` see before it, each row by itself (docs/model.md, SPRINT)."""
    ids = batch.rows
    runner.catch_up(ids, start)
    visible = torch.arange(start, device=ids.device) >= runner.pads[:, None]
    # Both are kept where SPRINT is on.
    norms, confidence = cast(torch.Tensor, runner.cache.key_norms), cast(torch.Tensor, runner.confidence)
    score = scores(norms[:, :start], confidence[:, :start], visible, sprint.alpha)
    is_image = ids[:, :start] >= runner.backbone.config.image_token_offset
    kept = kept_positions(score, visible, is_image, sprint)
    if kept is not None:
        runner.prune(start, *kept)
