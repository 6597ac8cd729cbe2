"""Three parts of the campaign that need a host: hostile graphs, interrupts, and a long mixed use."""

import copy
import math
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from dev.hosts.base_folder import CHECKPOINT, CHECKPOINT_NAME, ROOT
from dev.hosts.scenes import CHECKPOINT as MINIATURE
from dev.hosts.server import needs_zimage
from tests.hostile.graphs import MARKER, SIDE, hostile, shipped
from tests.hostile.hosts import FAULT, RIGHT, RSS, ServerHost, controls, footprint, reseeded

CONTROL_EVERY = 50  # graphs between two that must give what they always give
WARM_GRAPHS = 200  # what the first ones allocate for good is not growth
WITHIN = 1.05  # of the memory before
# Bytes of growth that count: in this process more than what is held is measured, and a GPU's libraries and kernels grow
# as they are used. Of the allocator's a part of the miniature, which weighs 24 MB; its start is nearly nothing.
LEAST = {"allocator": 10e6, RSS: 0}
PAGES = 1.10  # of those before: a piece that stays keeps a page of what 0.33 has let go of, of which it had plenty
LEAST_OF_OTHERS = 50e6
GROWTH = 1.02  # of the memory after the first twenty runs of the soak, of which the allocator's own wandering is one
SETTLED = 20
SLOW_SECONDS = 10.0  # of a graph that is worth a line
STOP_SECONDS = 2.0  # after an interrupt was answered: a round here takes milliseconds, a request as many


Say = Callable[[str], None]


@dataclass
class Report:
    """What was tried and what came of it.

    Attributes:
        part: "graphs", "files", "interrupts" or "soak".
        counts: outcome -> how often.
        faults: what is wrong, a line each.
        notes: figures.
        say: takes a line as it comes.
    """

    part: str
    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    say: Say = field(default=lambda text: None, repr=False)

    def fault(self, text: str) -> None:
        """Note something that must not be, and say it: the table comes when all is over."""
        self.counts[FAULT] += 1
        self.faults.append(text)
        self.say(f"FAULT  {text}")


def run_graphs(host, seed: int, count: int, say: Say, ends: float = math.inf) -> Report:
    """Hostile graphs, one after the other; in between, shipped ones that must give what they always give.

    `ends`, here and below: when to try no more, on the clock of time.monotonic.
    """
    random, report, graphs = Random(seed), Report("graphs", say=say), shipped(host.zimage)
    outside = _outside(host.base)
    expected = _controls(host, report, ends)
    before, slowest = host.settled(), 0.0
    for index in range(count):
        if _is_over(report, index, count, ends):
            break
        graph, what = hostile(random, graphs)
        began = time.monotonic()
        outcome = host.run(copy.deepcopy(graph))
        took = time.monotonic() - began
        slowest = max(slowest, took)
        report.counts[outcome.kind] += 1
        if took > SLOW_SECONDS:
            say(f"graph {index} ({what}) took {took:.0f} s: {outcome.kind}")
        if outcome.kind == FAULT:
            report.faults.append(f"graph {index} ({what}): {outcome.detail}")
            say(report.faults[-1])
        if not host.answers():
            report.fault(f"graph {index} ({what}): the host is gone")
            return report
        if index == min(WARM_GRAPHS, count // 3):
            before = host.settled()
        if index % CONTROL_EVERY == CONTROL_EVERY - 1:
            name = random.choice(sorted(graphs))
            _compare(
                host, reseeded(graphs[name], index), expected[name], report, f"after graph {index} ({what}), {name}"
            )
            host.clear_history()  # the host keeps what was queued, of 10,000 prompts
            say(f"graphs: {index + 1} of {count}, {dict(report.counts)}, {host.memory()[RSS] / 1e9:.2f} GB")
    after = host.settled()
    for kind, held in after.items():
        report.notes.append(f"{kind} {before[kind] / 1e9:.3f} GB before, {held / 1e9:.3f} GB after")
        if held > (PAGES if kind == RSS else WITHIN) * before[kind] and held - before[kind] > LEAST.get(
            kind, LEAST_OF_OTHERS
        ):
            report.fault(f"{kind} grew from {before[kind] / 1e9:.3f} to {held / 1e9:.3f} GB")
    report.notes.append(f"slowest {slowest:.1f} s")
    for path in sorted(_outside(host.base) - outside):
        report.fault(f"{path} appeared outside the output and temp folders")
    return report


def _controls(host, report: Report, ends: float) -> dict[str, str]:
    """What shipped graphs give undisturbed, "" where that is not known; half of the time may go into it.

    On a CPU each gives one thing; on a GPU what does not is not compared.
    """
    began, graphs = time.monotonic(), shipped(host.zimage)
    found = controls(host, (began + ends) / 2)
    if late := [name for name in graphs if name not in found]:
        report.notes.append(f"not compared, for want of time: {', '.join(late)}")
    vary = [name for name, digest in found.items() if not digest]
    if vary and host.on_card:
        report.notes.append(f"not compared, for undisturbed runs differ on this card: {', '.join(vary)}")
    elif vary:
        report.fault(f"undisturbed runs differ: {', '.join(vary)}")
    return dict.fromkeys(graphs, "") | found


def _compare(host, graph: dict, expected: str, report: Report, what: str) -> bool:
    """Whether a shipped graph gives what it gives undisturbed, where that is known; where not, that is a fault."""
    try:
        given = host.result(graph)
    except RuntimeError as error:
        report.fault(f"{what}: {error}")
        return False
    if expected and given != expected:
        report.fault(f"{what} gives something else")
        return False
    return bool(expected)


def _is_over(report: Report, index: int, count: int, ends: float) -> bool:
    """Whether the time is up, which is noted."""
    over = time.monotonic() > ends
    if over:
        report.notes.append(f"{index} of {count}, then the time was up")
    return over


def _outside(base: Path) -> set[str]:
    """What lies where no graph may write: beside the host's own folders, in the pack, and where the paths point."""
    own = {base / name for name in ("output", "temp", "user", "server.log")}

    def ours(path: Path) -> bool:
        return "__pycache__" in path.parts or any(path == folder or folder in path.parents for folder in own)

    found = footprint(base, ours)
    found |= {str(path) for folder in ("nodes", "llada_core", "checkpoints") for path in (ROOT / folder).rglob("*.s*")}
    for place in (*base.parents, Path(tempfile.gettempdir())):
        found |= {str(path) for path in place.glob(f"*{MARKER}*")}
    return found


def run_interrupts(host, seed: int, count: int, say: Say, ends: float = math.inf) -> Report:
    """Interrupts at random moments over all shipped graphs; the same graph then gives what it gives undisturbed."""
    random, report, graphs = Random(seed), Report("interrupts", say=say), shipped(host.zimage)
    expected, slowest = _controls(host, report, ends), 0.0
    interrupt = interrupt_server if isinstance(host, ServerHost) else interrupt_process
    moments = {name: interrupt(host, reseeded(graph, 2**20 - 1), None).moments for name, graph in graphs.items()}
    for index in range(count):
        if _is_over(report, index, count, ends):
            break
        name = random.choice(sorted(graphs))
        graph = reseeded(graphs[name], 2 * index + 2)
        stop = interrupt(host, graph, random.randrange(1, moments[name]))
        slowest = max(slowest, stop.seconds)
        report.counts["stopped" if stop.status == "interrupted" else "had ended before"] += 1
        if stop.status not in ("interrupted", "success"):
            report.fault(f"interrupt {index} of {name}: {stop.status}")
        if stop.seconds > STOP_SECONDS:
            report.fault(f"interrupt {index} of {name}: stopped after {stop.seconds:.1f} s")
        again, what = reseeded(graphs[name], 2 * index + 3), f"after interrupt {index}, {name}"
        report.counts["next run equal"] += _compare(host, again, expected[name], report, what)
        if index % 20 == 19:
            say(f"interrupts: {index + 1} of {count}, {dict(report.counts)}")
    report.notes.append(f"slowest stop {slowest:.2f} s")
    tried = report.counts["stopped"] + report.counts["had ended before"]
    if report.counts["stopped"] < tried / 2:
        report.fault(f"{tried} interrupts before the end of a run stopped {report.counts['stopped']} of them")
    return report


@dataclass(frozen=True)
class Stop:
    """How a run with an interrupt ended, seconds from the interrupt to then, and how many moments it had."""

    status: str
    seconds: float
    moments: int


def interrupt_server(host: ServerHost, graph: dict, moment: int | None) -> Stop:
    """Run a graph, and interrupt it at its `moment`-th message."""
    answered: list[float] = []

    def ask() -> None:
        host.server.post("/interrupt")
        answered.append(time.monotonic())

    seen, asking = [], threading.Thread(target=ask)

    def on_message(kind, data) -> None:
        seen.append(kind)
        if len(seen) == moment:
            asking.start()

    run = host.server.run(graph, on_message, timeout=60)
    ended = time.monotonic()
    if asking.ident is not None:
        asking.join()
    late = run.status == "interrupted" and bool(answered)
    return Stop(run.status, max(0.0, ended - answered[0]) if late else 0.0, len(seen))


def interrupt_process(host, graph: dict, moment: int | None) -> Stop:
    """Run a graph in this process, and interrupt it when its `moment`-th round has been reported."""
    management = host.management()
    seen, asked = 0, []
    heed = management.throw_exception_if_processing_interrupted

    def count() -> None:
        nonlocal seen
        seen += 1
        heed()
        if seen == moment:  # from now on, so that this round is done and the next must not be
            management.interrupt_current_processing(True)
            asked.append(time.monotonic())

    management.throw_exception_if_processing_interrupted = count
    status = "success"
    try:
        host.host.run(graph)
    except Exception as error:
        cause = error.__cause__ or error
        status = "interrupted" if isinstance(cause, management.InterruptProcessingException) else f"{cause!r}"
    finally:
        management.throw_exception_if_processing_interrupted = heed
        management.interrupt_current_processing(False)
    if asked and seen > moment + 1:
        status = f"{seen - moment} rounds after the interrupt"
    return Stop(status, time.monotonic() - asked[0] if asked else 0.0, seen)


def run_soak(host, seed: int, count: int, say: Say, ends: float = math.inf) -> Report:
    """Mixed graphs with changing seeds, checkpoints that come and go: the memory stays what it was after twenty."""
    random, report, graphs = Random(seed), Report("soak", say=say), shipped(host.zimage)
    names = [CHECKPOINT_NAME, "second", MINIATURE]
    folder = host.base / "models" / "llada_uni"
    if not (folder / "second").exists():
        shutil.copytree(CHECKPOINT, folder / "second")
    sizes, native = [], 0
    for index in range(count):
        if _is_over(report, index, count, ends):
            break
        name = random.choice(sorted(graphs))
        checkpoint = random.choice(names)
        graph = _varied(random, graphs[name], checkpoint, f"{name} {index}")
        native += needs_zimage(graph)
        outcome = host.run(graph)
        report.counts[outcome.kind] += 1
        if outcome.kind != RIGHT:
            report.fault(f"run {index} of {name} on {checkpoint}: {outcome.detail}")
        if index % 10 == 9:
            (folder / "second" / "config.json").touch()  # opened anew
            sizes.append(host.settled())
            say(f"soak: {index + 1} of {count}, {sizes[-1]['memory'] / 1e9:.3f} GB")
    report.notes.append(f"{native} with the decoder as ComfyUI's own model")
    settled = SETTLED // 10
    if count > SETTLED and len(sizes) <= settled:
        report.fault(f"growth is not known: memory was measured {len(sizes)} times")
    for kind in sizes[0] if len(sizes) > settled else ():
        of = [size[kind] for size in sizes]
        first, last = max(of[:settled]), min(of[-3:])
        report.notes.append(
            f"{kind} {first / 1e9:.3f} GB after {SETTLED} runs, {last / 1e9:.3f} GB after {10 * len(sizes)}, "
            f"{max(of) / 1e9:.3f} GB at most"
        )
        least = LEAST.get(kind, LEAST_OF_OTHERS / 5)
        if last > (PAGES if kind == RSS else GROWTH) * first and last - first > least:
            report.fault(f"{kind} grew from {first / 1e9:.3f} to {last / 1e9:.3f} GB")
    return report


def _varied(random: Random, graph: dict, checkpoint: str, prompt: str) -> dict:
    """A shipped graph for a checkpoint, with another prompt, size and seeds."""
    graph = reseeded(graph, random.randrange(2**64))
    for data in graph.values():
        match data["class_type"]:
            case "LLaDAUniLoader":
                data["inputs"]["checkpoint"] = checkpoint
            case "LLaDAUniDecode" | "KSampler":
                data["inputs"]["seed"] = random.randrange(2**64)
            case "SamplerCustom":
                data["inputs"]["noise_seed"] = random.randrange(2**64)
            case "LLaDAUniSample":
                side = random.choice((SIDE, 96, 128))
                data["inputs"] |= {"width": side, "height": side, "prompt": prompt}
            case "LoraLoaderModelOnly" if checkpoint == MINIATURE:  # whose it is
                data["inputs"]["strength_model"] = random.choice((0.5, 0.8))
    return graph
