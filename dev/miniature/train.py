"""Train the miniature from nothing, in stages that each end in a file; start again after a kill and it goes on.

    python -m dev.miniature.train --out DIR [--world signs] [--device cuda] [--minutes 240] [--stages vae ...]

After the last stage (and after every one that is chosen alone) DIR/checkpoint holds what there is so far, in the
released layout; with the backbone trained it opens. Two stages that do not need each other (vae and vision; then
decoder and backbone) may run at the same time as two programs, each with its own --stages.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from .backbone import BackboneStage
from .decoder import DecoderStage, TurboStage
from .export import STAGES, export
from .sizes import SEED, Schedule
from .stage import Budget, Stage, run, spent
from .vae import VaeStage
from .vision import VisionStage
from .worlds import WORLDS, World


def make(
    name: str,
    world: World,
    folder: Path,
    schedule: Schedule,
    device: torch.device,
    workers: int = 0,
    start: Path | None = None,
) -> Stage:
    """A stage by its name; what it builds on must have been trained."""
    torch.manual_seed(SEED)
    if name == "vae":
        return VaeStage(schedule, world, folder, device, workers, start)
    stages = {"vision": VisionStage, "decoder": DecoderStage, "turbo": TurboStage, "backbone": BackboneStage}
    return stages[name](schedule, world, folder, device, workers)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--world", choices=WORLDS, default="shapes")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="begin with its VAE, of the same sizes")
    parser.add_argument("--more", action="store_true", help="go on with stages that had used up an earlier budget")
    parser.add_argument("--whole-mask", action="store_true", help="compile nothing, and do without FlexAttention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="of all chosen stages together; without it, all their steps")
    parser.add_argument(
        "--deadline", type=float, metavar="TIME", help="seconds since 1970 at which all must have ended"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--workers", type=int, help="processes that prepare data; by default 0 on a CPU, 12 on a GPU")
    parser.add_argument("--steps", type=int, help="at most so many steps a stage (a trial)")
    parser.add_argument("--pool", type=int, help="at most so many prepared pictures a stage (a trial)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches are prepared in forked processes
    device = torch.device(options.device)
    workers = options.workers if options.workers is not None else (12 if device.type == "cuda" else 0)
    torch.set_float32_matmul_precision("high")
    options.out.mkdir(parents=True, exist_ok=True)
    world = WORLDS[options.world]()
    schedules = world.sizes.schedules["cuda" if device.type == "cuda" else "cpu"]
    shares = sum(schedules[name].share for name in options.stages)
    for name in STAGES:
        if name not in options.stages:
            continue
        schedule = schedules[name]
        schedule = replace(schedule, steps=min(schedule.steps, options.steps or schedule.steps))
        schedule = replace(schedule, pool=min(schedule.pool, options.pool or schedule.pool))
        minutes = options.minutes and options.minutes * schedule.share / shares
        stage = make(name, world, options.out, schedule, device, workers, options.start)
        if isinstance(stage, BackboneStage) and device.type == "cuda" and not options.whole_mask:
            stage.compile()
        if options.deadline:
            # What is left is shared with the stages that follow; what the stage has had already is counted too.
            left = sum(schedules[other].share for other in options.stages if STAGES.index(other) >= STAGES.index(name))
            minutes = (options.deadline - time.time()) / 60 * schedule.share / left + spent(options.out, name)
        run(stage, options.out, Budget(schedule.steps, minutes), device, workers, options.more)
        del stage
        if device.type == "cuda":
            torch.cuda.empty_cache()
    export(world, options.out, options.out / "checkpoint")


if __name__ == "__main__":
    main()
