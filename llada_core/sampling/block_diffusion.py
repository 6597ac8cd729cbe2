"""The block loop (docs/model.md, Block diffusion and SPRINT)."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar, cast

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

# (index of the block, rounds done in it), of the sample that is furthest behind, after each round; an exception from it
# ends the work.
OnRound = Callable[[int, int], None]
Value = TypeVar("Value")

# Rounds for which graphs are made when samples leave a batch. They take a tenth of a second and more to make; half the
# rows take some 3 ms off a round of the released model.
WORTH_GRAPHS = 64


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


def following(
    backbone: Backbone, batch: Batch, config: GenerationConfig, samples: int | None = None
) -> tuple[Callable[[], Unmasker], Hashable]:
    """What follows the backbone in each round of a batch, or of so many of its samples, to be made, and what it is made
    of."""
    branches = batch.pads.shape[1]
    samples = len(batch.pads) if samples is None else samples
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

    Each sample goes on to its next block when it has filled one (docs/model.md, Batches). Masks of a last block behind
    what was asked for are filled along the way, as the reference does. The reference also goes on until none of them is
    left; nothing that was asked for can change in those rounds, so they are saved.

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
    while True:
        for track in batch.tracks:
            batch.advance(track, config.steps, config.stops)
        if config.keep_prefix:
            keep_prefixes(runner, batch)
        if all(track.done for track in batch.tracks):
            break
        left = leave(runner, batch, config)
        at = run_round(runner, batch, config, left)
        if on_round:
            on_round(batch.starts.index(at[0]), at[1])
    return [Output(track.new, track.rounds, track.stopped, track.prefix) for track in tracks]


def run_round(runner: CachedRunner, batch: Batch, config: GenerationConfig, anew: bool) -> tuple[int, int]:
    """One forward pass of a block of each sample, and the tokens that it fixes: one transfer back a round.

    Args:
        runner, batch, config: as in `generate`.
        anew: what follows the backbone has nothing yet of the round before.

    Returns:
        Where the sample that is furthest behind has come to: the start of its block, and rounds done in it.
    """
    unmasker, branches = cast(Unmasker, runner.then), batch.pads.shape[1]
    going = [track for track in batch.tracks if not track.done]
    if config.sprint:
        prune(runner, batch, config.sprint)
    places = {track.start for track in going}
    # What is done runs along with the others until it leaves.
    starts = [track.start if len(places) > 1 else going[0].start for track in batch.tracks]
    runner.retire([row for row, over in enumerate(each_row([track.done for track in batch.tracks], branches)) if over])
    shown = runner.turns(each_row(starts, branches))[::branches]
    busy = [not of.done and at == start for of, at, start in zip(batch.tracks, shown, starts, strict=True)]
    if anew or any(track.step == 0 for track in going):  # later rounds go on from what the one before left there
        unmasker.ids.copy_(batch.block(shown))
        unmasker.fillable.copy_(batch.fillable(shown) & torch.tensor(busy, device=batch.ids.device)[:, None])
    least = [max(quota(track.step, config.steps, batch.block_length), 1) for track in batch.tracks]
    left_over = [max(config.steps - track.step, 1) for track in batch.tracks]
    # CUDA has copied what lies in pageable memory before it returns; it need not wait until the GPU has it as well.
    on_cuda = unmasker.schedule.is_cuda
    unmasker.schedule.copy_(torch.tensor([least, left_over]), non_blocking=on_cuda)
    if config.sampling.temperature > 0:
        unmasker.uniform.copy_(draws(batch, busy), non_blocking=on_cuda)
    runner.block(batch.rows, each_row(starts, branches), each_row(shown, branches))
    batch.write(shown, unmasker.ids)
    for track, draws_now, (*ids, finite) in zip(batch.tracks, busy, unmasker.report.tolist(), strict=True):
        if not draws_now:
            continue
        if not finite:
            raise nonfinite_error("backbone", runner.backbone, runner.cache.keys[0].dtype, "predictions")
        track.ids[track.start : track.start + batch.block_length] = ids
        track.rounds += 1
        track.step += 1
    return min((track.start, track.step) for track in going)


def each_row(of_samples: Sequence[Value], branches: int) -> list[Value]:
    """A value of each sample, for each of its rows."""
    return [value for value in of_samples for _ in range(branches)]


def draws(batch: Batch, active: list[bool]) -> torch.Tensor:
    """One uniform number a position, float32 [samples, block], each sample's from its own generator on the CPU.

    So a seed means the same draws on every device and beside any other sample. A sample that only has its last block
    cached in a round draws none.
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


def leave(runner: CachedRunner, batch: Batch, config: GenerationConfig) -> bool:
    """Take samples that are done out of the batch; whether any was taken.

    Where rounds are graphs only when half of them are: graphs are for a number of rows, and new ones cost more than
    some rows. They also cost more than a few rounds with those for all, so where no graphs are kept for so few samples,
    there must be a longer way to go.
    """
    left = [at for at, track in enumerate(batch.tracks) if not track.done]
    graphs, branches = bool(runner.rounds.sizes), batch.pads.shape[1]
    if len(left) > (len(batch.tracks) // 2 if graphs else len(batch.tracks) - 1):
        return False
    then, key = following(runner.backbone, batch, config, len(left))
    ahead = max(batch.rounds_ahead(batch.tracks[at], config.steps) for at in left)
    if graphs and ahead < WORTH_GRAPHS and not runner.has_graphs(len(left) * branches, key):
        return False
    batch.keep(left)
    runner.keep([at * branches + branch for at in left for branch in range(branches)], then, key)
    return True


def prune(runner: CachedRunner, batch: Batch, sprint: Sprint) -> None:
    """Choose what later rounds see before their block, for the samples whose warm-up rounds are over (docs/model.md,
    SPRINT); each row by itself."""
    ids, branches = batch.rows, batch.pads.shape[1]
    ripe = [not track.done and track.step == sprint.warmup for track in batch.tracks]
    rows = [row for row, now in enumerate(each_row(ripe, branches)) if now]
    if not rows:
        return
    starts = each_row([track.start for track in batch.tracks], branches)
    runner.catch_up(ids, [start if row in rows else 0 for row, start in enumerate(starts)])
    end, at = max(starts[row] for row in rows), torch.tensor(rows, device=ids.device)
    place = torch.arange(end, device=ids.device)
    ends = torch.tensor([starts[row] for row in rows], device=ids.device)
    visible = (place >= runner.pads[at, None]) & (place < ends[:, None])
    # Both are kept where SPRINT is on.
    norms, confidence = cast(torch.Tensor, runner.cache.key_norms), cast(torch.Tensor, runner.confidence)
    score = scores(norms[at, :end], confidence[at, :end], visible, sprint.alpha)
    is_image = ids[at, :end] >= runner.backbone.config.image_token_offset
    kept = kept_positions(score, visible, is_image, sprint)
    if kept is not None:
        runner.prune(rows, starts, *kept)
