"""The command `python -m llada_core.batch REQUESTS.jsonl OUTPUT --checkpoint FOLDER`."""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ..bar import Bar
from ..checkpoint.layout import Layout
from ..checks import check_count
from ..engine import PRECISIONS
from ..errors import InputError
from ..options import WEIGHTS
from .devices import DEVICES, plan
from .requests import FIELDS, Request, Wrong, batches, read_requests
from .results import RESULTS, Output
from .tasks import parts_for

MAX_BATCH = 1024
_STOPPED, _SOME_WRONG, _INTERRUPTED = 1, 3, 130

_ABOUT = """Thousands of requests overnight, on as many devices and machines as there are.

Each line of REQUESTS.jsonl is a JSON object with an id and a kind: draw, think, edit, ask or decode. OUTPUT gets
results.jsonl, a line for each request, and the pictures and token files that it names, as they come. Run the same
command again after whatever stopped it: what has its result is not done again, and what failed is tried again."""

_AFTER = """Exit status: 0 where every request has its result, 3 where some have an error, 1 where the run stopped
before its end. docs/batch.md has the fields of requests and results."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, run, and say what was done; returns the exit status."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    began = time.monotonic()
    bar = Bar()
    try:
        requests, wrong = read_requests(given.requests)
        if given.check:
            return _told(wrong, len(requests))
        try:
            from . import cluster
        except ImportError as error:
            print(
                f"This runs on Ray Data ({error}). Install it: python -m pip install -r requirements-ray.txt",
                file=sys.stderr,
            )
            return _STOPPED
        if given.checkpoint is None:
            raise InputError("checkpoint", "nothing", "a checkpoint's folder", "Add --checkpoint FOLDER.")
        check_count("batch_size", given.batch_size, 1, MAX_BATCH)
        with Output(given.output) as output:
            todo = output.begin(requests, wrong)
            counts = Counter((line.kind or "?", "error") for line in wrong)
            left = {request.id: request for request in todo}
            counts.update((request.kind, "before") for request in requests if request.id not in left)
            if todo:
                try:
                    _run(given, cluster, output, left, counts, bar)
                except cluster.Stopped as error:
                    bar.end()
                    print(error, file=sys.stderr)
                    return _STOPPED
    except InputError as error:
        bar.end()
        print(error, file=sys.stderr)
        return _STOPPED
    except KeyboardInterrupt:
        bar.end()
        print("Stopped. The same command goes on where this one was.", file=sys.stderr)
        return _INTERRUPTED
    bar.end()
    print(_summary(counts, len(todo), time.monotonic() - began, given.output))
    return _SOME_WRONG if any(outcome == "error" for _, outcome in counts) else 0


def _run(given, cluster, output: Output, left: dict[str, Request], counts: Counter, bar: Bar) -> None:
    """Everything that is left through Ray, written as it comes."""
    checkpoint = given.checkpoint
    if given.address is None:
        checkpoint = Layout.open(checkpoint).root.resolve()
    with cluster.joined(given.address) as machines:
        placed = plan(machines, given.workers, given.device)
        works = batches(left.values(), given.batch_size, placed.workers)
        print(f"{len(left)} requests in {len(works)} batches; {placed}", file=sys.stderr)
        parts = parts_for(left.values())
        settings = cluster.Settings(str(checkpoint), placed.device, given.precision, given.weights, parts)
        began = time.monotonic()
        bar(0.0, "loading")
        with closing(cluster.run_batches(works, placed, settings, given.address)) as results:
            for done, result in enumerate(results, 1):
                output.add(left[result.id], result)
                counts[(result.kind, "error" if result.error else "ok")] += 1
                speed = 60 * done / (time.monotonic() - began)
                bar(done / len(left), f"{done} of {len(left)}, {speed:.3g} a minute")


def _told(wrong: Sequence[Wrong], right: int) -> int:
    """What --check says."""
    for line in wrong:
        print(f"line {line.line}: {line.error}")
    print(f"{right} requests can be run, {len(wrong)} are wrong")
    return _SOME_WRONG if wrong else 0


def _summary(counts: Counter, done: int, seconds: float, output: Path) -> str:
    """Counts by kind and outcome, and the speed."""
    outcomes = ("ok", "error", "before")
    kinds = [kind for kind in (*FIELDS, "?") if any(counts[(kind, outcome)] for outcome in outcomes)]
    lines = [f"{'kind':<8}" + "".join(f"{outcome:>8}" for outcome in outcomes)]
    lines += [f"{kind:<8}" + "".join(f"{counts[(kind, outcome)]:>8}" for outcome in outcomes) for kind in kinds]
    speed = f", {60 * done / seconds:.3g} a minute" if done else ""
    lines.append(
        f"{done} requests in {seconds:.0f} s{speed}, starting included. {output / RESULTS} has a line for each."
    )
    if counts[("?", "error")]:
        lines.append("?: lines that name no kind.")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llada_core.batch",
        description=_ABOUT,
        epilog=_AFTER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("requests", type=Path, metavar="REQUESTS.jsonl", help="files it names lie in its folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder of results")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="by the same path on every machine")
    parser.add_argument("--workers", type=int, metavar="N", help="default: one on each GPU, or one on each machine")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto takes GPUs where there are any")
    parser.add_argument("--address", help="a Ray cluster, as host:port or ray://...; default: this machine, by itself")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="auto", help="of activations (default: auto)")
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="in memory (default: as stored)")
    parser.add_argument("--check", action="store_true", help="only say what is wrong with the requests")
    return parser
