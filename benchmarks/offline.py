"""Requests a minute: python -m llada_core.batch with one worker and more, and the same requests in a ComfyUI's queue.

For each number of workers: requests a minute, from the first results on and starting included; the time until every
worker has given a result; the peak of memory of all processes, shared pages once; and the speed against so many times
the first run's. With --kill the run of the most workers is done again, and one of them is killed in the middle. With
COMFYUI_PATH set, the same prompts go through a ComfyUI's queue, after one that loads the model.

    python -m benchmarks.offline [--count 32] [--workers 1 2] [--kill] [--json FILE]
    python -m benchmarks.offline --checkpoint FOLDER --size 1024 --workers 1 2 4 8    # on a machine with 8 GPUs

--placement prints where workers would go on machines of 1, 2, 4 and 8 GPUs, and starts nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import psutil

from dev.hosts.server import ComfyServer, find_comfyui
from llada_core.batch.devices import Machine, plan

from .support import ROOT, add_json, show

MINIATURE = ROOT / "checkpoints" / "miniature"
WORDS = (("small", "large"), ("red", "green", "blue", "yellow"), ("circle", "square", "triangle"), ("white", "black"))
LIMIT = 1800  # seconds of a run


def prompts(count: int) -> list[str]:
    """So many, all different: what the miniature knows, then the same with a number behind it."""
    known = [f"a {size} {colour} {shape} on a {ground} background" for size, colour, shape, ground in product(*WORDS)]
    return [known[i % len(known)] + (f" {i // len(known)}" if i >= len(known) else "") for i in range(count)]


@dataclass
class Run:
    """One run of the program.

    Attributes:
        seconds: all of it.
        times: when each result came, since its start.
        ready: when every worker had given one.
        peak: bytes of all its processes, and of the workers alone.
        again: whether a batch was begun again.
    """

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    ready: float = 0.0
    peak: tuple[int, int] = (0, 0)
    again: bool = False

    @property
    def speed(self) -> float:
        """Requests a minute from the first results on, which those are not counted for."""
        later = [t for t in self.times if t > self.times[0] + 0.2]
        return 60 * len(later) / (self.times[-1] - self.times[0]) if later else 0.0


def offline(workers: int, arguments: argparse.Namespace, folder: Path, kill: bool = False) -> Run:
    """The requests through so many workers."""
    request = {"kind": "draw", "height": arguments.size, "width": arguments.size}
    lines = [json.dumps({"id": f"r{i}", "prompt": text, **request}) for i, text in enumerate(prompts(arguments.count))]
    folder.mkdir()
    (folder / "requests.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "llada_core.batch", str(folder / "requests.jsonl"), str(folder / "out")]
    command += ["--checkpoint", str(arguments.checkpoint), "--workers", str(workers), "--device", arguments.device]
    command += ["--batch-size", str(arguments.batch_size), "--weights", arguments.weights]
    began = time.monotonic()
    with (folder / "log").open("w") as log:
        program = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    run, seen, sampled = Run(), set(), 0.0
    try:
        while program.poll() is None and time.monotonic() - began < LIMIT:
            time.sleep(0.05)
            _look(folder / "out" / "results.jsonl", run, seen, began)
            if len(seen) >= workers and not run.ready:
                run.ready = run.times[-1]
            if time.monotonic() - sampled > 1:
                sampled = time.monotonic()
                run.peak = tuple(map(max, run.peak, _memory(program)))
            if kill and len(run.times) >= arguments.count // 3:
                kill = not _kill_busiest(program)
    finally:
        program.kill()
    run.seconds = time.monotonic() - began
    _look(folder / "out" / "results.jsonl", run, seen, began)
    said = (folder / "log").read_text()
    if program.wait() or len(run.times) != arguments.count:
        raise RuntimeError(f"{len(run.times)} of {arguments.count} results:\n{said[-3000:]}")
    run.again = "run again" in said
    return run


def _look(results: Path, run: Run, seen: set[str], began: float) -> None:
    """Note what has come since the last look."""
    whole = results.read_bytes().rpartition(b"\n")[0].splitlines() if results.exists() else []
    for line in whole[len(run.times) :]:
        record = json.loads(line)
        if record["outcome"] != "ok":
            raise RuntimeError(f"{record['id']}: {record['error']}")
        seen.add(record["worker"])
        run.times.append(time.monotonic() - began)


def _workers(program: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(program.pid).children(recursive=True)
    return [p for p in children if p.is_running() and "MapWorker" in " ".join(p.cmdline()[:1])]


def _memory(program: subprocess.Popen) -> tuple[int, int]:
    """Bytes now: of all processes of the run, and of the workers; a page that several have counts once."""
    try:
        workers = {p.pid for p in _workers(program)}
        everyone = [psutil.Process(program.pid), *psutil.Process(program.pid).children(recursive=True)]
        sizes = {p.pid: p.memory_full_info().pss for p in everyone}
    except psutil.Error:  # one has just ended
        return 0, 0
    return sum(sizes.values()), sum(size for pid, size in sizes.items() if pid in workers)


def _kill_busiest(program: subprocess.Popen) -> bool:
    """Kill the worker that computes most just now; False where there is none yet."""
    found = _workers(program)
    before = {p.pid: p.cpu_times().user for p in found}
    time.sleep(0.3)
    if found:
        max(found, key=lambda p: p.cpu_times().user - before[p.pid]).send_signal(signal.SIGKILL)
    return bool(found)


def queued(comfyui: Path, arguments: argparse.Namespace, folder: Path) -> float:
    """Requests a minute of a ComfyUI's queue, the model loaded and every prompt new."""
    graph = json.loads((ROOT / "workflows" / "api" / "text-to-image.json").read_text(encoding="utf-8"))
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    by_kind["LLaDAUniLoader"] |= {"checkpoint": arguments.checkpoint.name, "weights": arguments.weights}
    by_kind["LLaDAUniSample"] |= {"width": arguments.size, "height": arguments.size}
    with ComfyServer(comfyui, folder) as server:
        shown = server.base / "models" / "llada_uni" / arguments.checkpoint.name
        if arguments.checkpoint != MINIATURE:
            shown.symlink_to(arguments.checkpoint.resolve(), target_is_directory=True)
        server.run(graph)
        began = time.monotonic()
        ids = []
        for text in prompts(arguments.count):
            by_kind["LLaDAUniSample"]["prompt"] = text
            ids.append(server.post("/prompt", {"prompt": graph})["prompt_id"])
        while any(server.get("/queue").values()):
            time.sleep(0.1)
        seconds = time.monotonic() - began
        outcomes = {server.get(f"/history/{one}")[one]["status"]["status_str"] for one in ids}
    if outcomes != {"success"}:
        raise RuntimeError(f"the queue ended in {outcomes}")
    return 60 * arguments.count / seconds


def placements() -> None:
    """Plans for machines that are not here."""
    for gpus in (1, 2, 4, 8):
        for workers in (gpus, 2 * gpus):
            planned = plan([Machine(16.0 * gpus, gpus)], workers)
            where = ", ".join(f"GPU {place.gpu}" for place in planned.places)
            print(f"{gpus} GPU: {planned}: {where}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="requests of each run")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="pixels each way")
    parser.add_argument("--checkpoint", type=Path, default=MINIATURE)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights", default="as stored")
    parser.add_argument("--kill", action="store_true", help="and once more with the most workers, one of them killed")
    parser.add_argument("--placement", action="store_true", help="only show plans for 1, 2, 4 and 8 GPUs")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.placement:
        return placements()
    figures: dict[str, object] = {"requests of each run": arguments.count, "threads": os.environ.get("OMP_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), {}
        for workers in arguments.workers:
            run = runs[workers] = offline(workers, arguments, folder / str(workers))
            label = f"{workers} worker{'s' * (workers > 1)}"
            figures[f"{label}: requests a minute"] = run.speed
            figures[f"{label}: the same, starting included"] = 60 * arguments.count / run.seconds
            figures[f"{label}: until each had a result, s"] = run.ready
            figures[f"{label}: peak memory of all, of the workers, MB"] = " ".join(f"{b / 1e6:,.0f}" for b in run.peak)
            if workers != arguments.workers[0]:
                first = arguments.workers[0]
                figures[f"{label}: of linear"] = run.speed / runs[first].speed * first / workers
        if arguments.kill:
            most = max(arguments.workers)
            run = offline(most, arguments, folder / "killed", kill=True)
            figures[f"one of {most} workers killed: seconds more"] = run.seconds - runs[most].seconds
            figures["its batch was run again"] = "yes" if run.again else "no, it was between two"
        comfyui = find_comfyui()
        if comfyui:
            speed = figures["ComfyUI's queue: requests a minute"] = queued(comfyui, arguments, folder / "comfyui")
            for workers, run in runs.items():
                figures[f"{workers} against the queue"] = run.speed / speed
        else:
            print("no real ComfyUI (COMFYUI_PATH): its queue is not measured")
    return show("Offline", figures, arguments.json)


if __name__ == "__main__":
    main()
