"""The block loop (docs/model.md, Block diffusion and SPRINT)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from ..backbone.attention_kernels import Attend, sdpa
from ..backbone.model import Backbone
from ..backbone.runner import CachedRunner
from ..nonfinite import nonfinite_error
from ..options import Guidance, Sampling, Sprint
from .batch import Batch, Sample
from .guidance import merge
from .sprint import kept_positions, least_accepted, scores
from .unmask import accept, predict, quota

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
    """

    steps: int
    low: int
    high: int
    stops: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    guidance: Guidance | None = None
    sprint: Sprint | None = None


@dataclass(frozen=True)
class Output:
    """The new ids of a sample (the stop, if any, is the last of them) and the number of backbone rounds used."""

    ids: list[int]
    rounds: int
    stopped: bool


def prepare(
    backbone: Backbone,
    samples: Sequence[Sample],
    config: GenerationConfig,
    mask_id: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attend: Attend = sdpa,
    graphs: bool = False,
) -> tuple[CachedRunner, Batch]:
    """What `generate` takes, for samples with the same number of branches; arguments as those of the two."""
    batch = Batch(samples, config.sampling.block_length, mask_id, device)
    rows, capacity, scored = batch.pads.flatten(), batch.ids.shape[-1], config.sprint is not None
    return CachedRunner(backbone, rows, capacity, batch.block_length, dtype, attend, graphs, scored), batch


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
        if all(track.done for track in batch.tracks):
            break
        leave(runner, batch)
    return [Output(track.new, track.rounds, track.stopped) for track in tracks]


def run_round(
    runner: CachedRunner, batch: Batch, start: int, step: int, active: list[bool], config: GenerationConfig
) -> None:
    """One forward pass of the block at `start`, and the tokens that it fixes."""
    hidden = runner.block(batch.rows, start).unflatten(0, batch.pads.shape)
    logits = merge(runner.backbone.lm_head(hidden).float(), config.guidance)[..., config.low : config.high]
    masked = batch.masked(start)
    kind = config.sprint.confidence if config.sprint else "low_confidence"
    chosen, confidence = predict(logits, config.sampling, kind, draws(batch, active, config.sampling))
    if config.sprint:
        threshold, least = config.sprint.threshold, least_accepted(masked.sum(-1), config.steps - step)
    else:
        threshold = config.sampling.threshold
        least = torch.full_like(masked[:, 0], quota(step, config.steps, batch.block_length), dtype=torch.int64)
    batch.write(start, chosen + config.low, accept(confidence, masked, threshold, least))
    read_back(runner, batch, start, active, confidence)


def draws(batch: Batch, active: list[bool], sampling: Sampling) -> torch.Tensor | None:
    """One uniform number a position, float32 [samples, block], each sample's from its own generator on the CPU.

    So a seed means the same draws on every device and beside any other sample. A sample that waits for others to finish
    their block draws none.
    """
    if sampling.temperature == 0:
        return None
    uniform = [
        torch.rand(batch.block_length, generator=track.generator) if busy else torch.zeros(batch.block_length)
        for track, busy in zip(batch.tracks, active, strict=True)
    ]
    return torch.stack(uniform).to(batch.ids.device)


def read_back(runner: CachedRunner, batch: Batch, start: int, active: list[bool], confidence: torch.Tensor) -> None:
    """Bring what a round wrote to the tracks, and whether its predictions were finite: one transfer a round."""
    stop = start + batch.block_length
    finite = confidence.isfinite().all(-1, keepdim=True)
    state = torch.cat((batch.ids[:, 0, start:stop], finite), -1).tolist()
    for track, busy, (*ids, is_finite) in zip(batch.tracks, active, state, strict=True):
        if busy and not is_finite:
            raise nonfinite_error("backbone", runner.backbone, runner.cache.keys[0].dtype, "predictions")
        track.ids[start:stop] = ids
        track.rounds += busy


def leave(runner: CachedRunner, batch: Batch) -> None:
    """Take samples that are done out of the batch.

    Where rounds are graphs only when half of them are: graphs are for a number of rows, and new ones cost more than
    some rows.
    """
    left = [at for at, track in enumerate(batch.tracks) if not track.done]
    most = len(batch.tracks) // 2 if runner.graphs.sizes else len(batch.tracks) - 1
    if len(left) <= most:
        branches = batch.pads.shape[1]
        batch.keep(left)
        runner.keep([at * branches + branch for at in left for branch in range(branches)])


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
