"""Requests a minute: python -m llada_core.batch with one worker and more, and the same requests in a ComfyUI's queue.

For each number of workers: requests a minute, of every worker between its first results and its last, summed, and with
starting and end included; the time until every worker has given a result; the peak of memory of all processes, shared
pages once, and of the machine, with the pages that it keeps of files; and the speed against so many times the first
run's. With --kill one run more is done with the most workers, and one of them is killed in the middle. With
COMFYUI_PATH set, the same prompts go through a ComfyUI's queue, after one that loads the model.

With --seconds a run is stopped as soon as every worker has given results for so long. Figures are printed, and written,
after each run.

    python -m benchmarks.offline [--count 32] [--workers 1 2] [--kill] [--json FILE]
    python -m benchmarks.offline --checkpoint FOLDER --size 1024 --count 2000 --seconds 60 --workers 1 2 4 8 --kill 100

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

from llada_core.batch.devices import Machine, plan

from .support import ROOT, add_json, show, write_figures

MINIATURE = ROOT / "checkpoints" / "miniature"
WORDS = (("small", "large"), ("red", "green", "blue", "yellow"), ("circle", "square", "triangle"), ("white", "black"))
LIMIT = 1800  # seconds of a run
BUNCH = 0.3  # seconds within which the results of a batch come


def prompts(count: int) -> list[str]:
    """So many, all different: what the miniature knows, then the same with a number behind it."""
    known = [f"a {size} {colour} {shape} on a {ground} background" for size, colour, shape, ground in product(*WORDS)]
    return [known[i % len(known)] + (f" {i // len(known)}" if i >= len(known) else "") for i in range(count)]


@dataclass
class Run:
    """One run of the program.

    Attributes:
        seconds: all of it.
        whole: whether it went to its end.
        times: when each result came, since its start, by the worker that gave it.
        peak: bytes of all its processes, and of the workers alone.
        machine: bytes in use in the machine at most, and kept of files.
        killed: when a worker was killed.
        again: whether a batch was begun again.
    """

    seconds: float = 0.0
    whole: bool = True
    times: dict[str, list[float]] = field(default_factory=dict)
    peak: tuple[int, int] = (0, 0)
    machine: tuple[int, int] = (0, 0)
    killed: float = 0.0
    again: bool = False

    @property
    def results(self) -> int:
        """How many came."""
        return sum(map(len, self.times.values()))

    @property
    def ready(self) -> float:
        """When every worker had given one."""
        return max(times[0] for times in self.times.values())

    @property
    def speed(self) -> float:
        """Requests a minute of each worker from its first results on, which are not counted, to its last, summed."""
        total = 0.0
        for times in self.times.values():
            first = [t for t in times if t <= times[0] + BUNCH]
            if len(times) > len(first):
                total += 60 * (len(times) - len(first)) / (times[-1] - first[-1])
        return total

    def steady(self, workers: int) -> float:
        """For how long all of so many workers have given results by now, seconds."""
        if len(self.times) < workers:
            return 0.0
        return min(times[-1] - times[0] for times in self.times.values())


def offline(
    workers: int, arguments: argparse.Namespace, folder: Path, count: int, seconds: float = 0.0, kill: bool = False
) -> Run:
    """The requests through so many workers; with `seconds` until all have given results for so long."""
    request = {"kind": "draw", "height": arguments.size, "width": arguments.size}
    lines = [json.dumps({"id": f"r{i}", "prompt": text, **request}) for i, text in enumerate(prompts(count))]
    folder.mkdir()
    (folder / "requests.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "llada_core.batch", str(folder / "requests.jsonl"), str(folder / "out")]
    command += ["--checkpoint", str(arguments.checkpoint), "--workers", str(workers), "--device", arguments.device]
    command += ["--batch-size", str(arguments.batch_size), "--weights", arguments.weights]
    began = time.monotonic()
    with (folder / "log").open("w") as log:
        program = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    run, sampled, results = Run(), 0.0, folder / "out" / "results.jsonl"
    try:
        while program.poll() is None and time.monotonic() - began < arguments.limit:
            time.sleep(0.05)
            _look(results, run, began)
            if time.monotonic() - sampled > 1:
                sampled = time.monotonic()
                run.peak = tuple(map(max, run.peak, _memory(program)))
                now = psutil.virtual_memory()
                run.machine = tuple(map(max, run.machine, (now.used, now.cached)))
            if kill and not run.killed and run.results >= count // 3 and _kill_busiest(program):
                run.killed = time.monotonic() - began
            if seconds and run.whole and run.steady(workers) > seconds:
                run.whole = False
                program.send_signal(signal.SIGINT)
    finally:
        program.kill()
    run.seconds = time.monotonic() - began
    _look(results, run, began)
    said = (folder / "log").read_text()
    ended = program.wait()
    if run.whole and (ended or run.results != count):
        raise RuntimeError(f"{run.results} of {count} results:\n{said[-3000:]}")
    run.again = "run again" in said
    return run


def _look(results: Path, run: Run, began: float) -> None:
    """Note what has come since the last look."""
    whole = results.read_bytes().rpartition(b"\n")[0].splitlines() if results.exists() else []
    for line in whole[run.results :]:
        record = json.loads(line)
        if record["outcome"] != "ok":
            raise RuntimeError(f"{record['id']}: {record['error']}")
        run.times.setdefault(record["worker"], []).append(time.monotonic() - began)


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


def queued(arguments: argparse.Namespace, folder: Path) -> float:
    """Requests a minute of a ComfyUI's queue, the model loaded and every prompt new."""
    from dev.hosts.server import ComfyServer, find_comfyui  # wants packages that a machine without one need not have

    comfyui = find_comfyui()
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
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="pixels each way")
    parser.add_argument("--checkpoint", type=Path, default=MINIATURE)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights", default="as stored")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop a run when all have worked for so long")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a run may take")
    parser.add_argument(
        "--kill",
        type=int,
        nargs="*",
        metavar="N",
        help="one run more, of a worker killed; of N requests (default: as many) and N workers (default: the most)",
    )
    parser.add_argument("--placement", action="store_true", help="only show plans for 1, 2, 4 and 8 GPUs")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.placement:
        return placements()
    figures: dict[str, object] = {"threads": os.environ.get("OMP_NUM_THREADS", "as they are")}
    named = f"of {arguments.weights}" if arguments.weights != "as stored" else arguments.checkpoint.name

    def note(found: dict[str, object]) -> None:
        """Print what a run gave, and write all that there is so far."""
        figures.update(found)
        show(f"{named}, {time.strftime('%H:%M:%S')}", found, None)
        if arguments.json:
            write_figures("So far", figures, arguments.json)

    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), {}
        for workers in arguments.workers:
            run = runs[workers] = offline(workers, arguments, folder / str(workers), arguments.count, arguments.seconds)
            note(of_run(run, workers, runs))
        if arguments.kill is not None:
            count = arguments.kill[0] if arguments.kill else arguments.count
            most = arguments.kill[1] if len(arguments.kill) > 1 else max(arguments.workers, default=2)
            run = offline(most, arguments, folder / "killed", count, kill=True)
            note(of_killed(run, most, count, runs.get(most)))
        if os.environ.get("COMFYUI_PATH"):
            speed = queued(arguments, folder / "comfyui")
            against = {f"{workers} against the queue": run.speed / speed for workers, run in runs.items()}
            note({"ComfyUI's queue: requests a minute": speed, **against})
        else:
            print("no real ComfyUI (COMFYUI_PATH): its queue is not measured")
    return show("Offline", figures, arguments.json)


def of_run(run: Run, workers: int, runs: dict[int, Run]) -> dict[str, object]:
    """The figures of a run, against the first of all."""
    label, first = f"{workers} worker{'s' * (workers > 1)}", min(runs)
    found = {
        "requests a minute": run.speed,
        "results, and seconds of all": f"{run.results}, {run.seconds:.1f}" + " until stopped" * (not run.whole),
        "the first result, and the first of the last worker, s": f"{min(t[0] for t in run.times.values()):.1f} "
        f"{run.ready:.1f}",
        "peak memory of all, of the workers, MB": " ".join(f"{size / 1e6:,.0f}" for size in run.peak),
        "peak of the machine, in use, kept of files, MB": " ".join(f"{size / 1e6:,.0f}" for size in run.machine),
    }
    if run.whole:
        found["requests a minute, starting included"] = 60 * run.results / run.seconds
    if workers != first:
        found["of linear"] = run.speed / runs[first].speed * first / workers
    return {f"{label}: {name}": value for name, value in found.items()}


def of_killed(run: Run, workers: int, count: int, calm: Run | None) -> dict[str, object]:
    """What a killed worker costs, also against a calm run of as many requests where there is one."""
    label = f"one of {workers} workers killed"
    after = [times[0] for times in run.times.values() if times[0] > run.killed]
    found: dict[str, object] = {
        "results": f"{run.results} of {count}",
        "killed after, s": run.killed,
        "seconds of all": run.seconds,
    }
    if after:
        found["until its successor had a result, s"] = after[0] - run.killed
    if calm is not None and calm.whole and calm.results == count:
        found["seconds more"] = run.seconds - calm.seconds
    found["its batch was run again"] = "yes" if run.again else "no, it was between two"
    return {f"{label}: {name}": value for name, value in found.items()}


if __name__ == "__main__":
    main()
