"""Where hostile graphs run: a real server over HTTP, or the nodes in this process; and what came of each."""

import gc
import hashlib
import inspect
import math
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from dev.hosts.server import ZIMAGE_NODES, ComfyServer, Rejected
from tests.hostile.graphs import shipped

REFUSED, ERROR, RIGHT, HOST, FAULT = (
    "refused (400)",
    "clear error",
    "right result",
    "error of a core node",
    "FAULT",
)
CLEAR = ("InputError", "CheckpointError")
RUN_SECONDS = 90
LAST_SECONDS = 30  # of pixels of a picture as large as a graph may ask for, which are one call of the VAE
SILENT_SECONDS = 60
RSS = "pages"  # of the process, free ones among them
# A server's environment, so that memory which is held is what counts: large blocks go back to the system at once
# (mallopt, glibc), and Python's objects lie in the same heap, which tells `settled` what is in use. With the thresholds
# that glibc adapts and Python's own arenas the pages would stay as many as there ever were, such as ComfyUI 0.33 takes
# until /free: the keys of the nodes that a failed prompt did not reach, 50 kB a prompt in a graph of core nodes alone.
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "PYTHONMALLOC": "malloc"}
SETTLING = 15  # measurements until memory is taken as it is
STEADY = 1e6  # bytes between two that agree
ANYTHING = Path(__file__).with_name("anything")
SEEDED = ("LLaDAUniSample", "LLaDAUniImageQA", "LLaDAUniInterleave")


@dataclass(frozen=True)
class Outcome:
    """What came of a graph: one of the five kinds, and a word on it."""

    kind: str
    detail: str = ""


def reseeded(graph: dict, seed: int) -> dict:
    """A graph that the host runs anew and that gives the same.

    At temperature 0 the seeds of texts change nothing. Sample gives what it has drawn of late where nothing but the
    seed has changed, so its guidance changes too, by less than float32 sees.
    """
    done = {}
    for node, data in graph.items():
        inputs = dict(data["inputs"])
        if data["class_type"] in SEEDED:
            inputs["seed"] = seed
        if data["class_type"] == "LLaDAUniSample" and isinstance(inputs.get("guidance"), float):
            inputs["guidance"] *= 1 + (1 + seed % 2**20) * 2.0**-52
        done[node] = data | {"inputs": inputs}
    return done


class ServerHost:
    """A real ComfyUI.

    Args:
        server: it, with the base folder that `prepare` made.
        run_seconds: a run that takes longer is interrupted, and has to end then.
    """

    def __init__(self, server: ComfyServer, run_seconds: float = RUN_SECONDS):
        self.server, self._run_seconds = server, run_seconds
        self._process = psutil.Process(server._process.pid)

    @staticmethod
    def prepare(base: Path) -> Path:
        """A base folder with the node whose output fits every socket."""
        shutil.copytree(ANYTHING, base / "custom_nodes" / "anything", dirs_exist_ok=True)
        return base

    @property
    def base(self) -> Path:
        """The host's base folder."""
        return self.server.base

    @cached_property
    def zimage(self) -> bool:
        """Whether it offers the decoder as its own model."""
        return set(ZIMAGE_NODES) <= set(self.server.get("/object_info"))

    def run(self, graph: dict) -> Outcome:
        """Queue a graph and look at what comes of it."""
        timer = threading.Timer(self._run_seconds, lambda: self.server.post("/interrupt"))
        began = time.monotonic()
        timer.start()
        try:
            run = self.server.run(graph, timeout=SILENT_SECONDS)
        except Rejected as rejected:
            took = time.monotonic() - began
            return Outcome(REFUSED if took < 10 else FAULT, f"{took:.1f} s: {rejected}"[:300])
        except (OSError, urllib.error.HTTPError, RuntimeError) as error:
            return Outcome(FAULT, f"{type(error).__name__}: {error}")
        except Exception as error:  # the websocket's own
            return Outcome(FAULT, f"no word for {SILENT_SECONDS} s ({type(error).__name__})")
        finally:
            timer.cancel()
        if run.status == "interrupted":
            took = time.monotonic() - began
            in_time = took < self._run_seconds + LAST_SECONDS
            return Outcome(RIGHT if in_time else FAULT, f"interrupted, ended after {took:.1f} s")
        if run.status == "error":
            node, kind = run.error.get("node_type", ""), run.error.get("exception_type", "").rpartition(".")[2]
            text = f"{node}: {kind}: {run.error.get('exception_message', '')}"[:300]
            if not node.startswith("LLaDAUni") or kind == "DependencyCycleError" or _slot_is_unknown(run):
                return Outcome(HOST, text)
            return Outcome(ERROR if kind in CLEAR else FAULT, text)
        return self._look(run)

    def _look(self, run) -> Outcome:
        for shown in run.outputs.values():
            for image in shown.get("images", []):
                path = self.base / image["type"] / image["subfolder"] / image["filename"]
                with Image.open(path) as picture:
                    picture.load()
                    if min(picture.size) < 2:  # two tokens each way, a pixel each in a preview of tokens
                        return Outcome(FAULT, f"a picture of {picture.size}")
            if not all(isinstance(text, str) for text in shown.get("text", [])):
                return Outcome(FAULT, f"texts {shown['text']!r:.100}")
        return Outcome(RIGHT)

    def result(self, graph: dict) -> str:
        """A digest of all that a graph shows and saves. Raises RuntimeError where it fails."""
        run = self.server.run(graph, timeout=SILENT_SECONDS)
        if run.status != "success":
            raise RuntimeError(f"a graph as shipped ended in {run.status}: {run.error.get('exception_message')}")
        return self.digest(run)

    def digest(self, run) -> str:
        """A digest of what a run showed and saved: pixels, texts and, where a text names a file, what is in it."""
        digest = hashlib.sha256()
        for node in sorted(run.outputs):
            for image in run.outputs[node].get("images", []):
                with Image.open(self.base / image["type"] / image["subfolder"] / image["filename"]) as picture:
                    digest.update(repr(picture.size).encode() + picture.tobytes())
            for text in run.outputs[node].get("text", []):
                saved = self.base / "output" / text if text.endswith(".safetensors") else None
                digest.update(saved.read_bytes() if saved is not None and saved.is_file() else text.encode())
        return digest.hexdigest()

    def answers(self) -> bool:
        """Whether the server still does."""
        try:
            return bool(self.server.get("/system_stats"))
        except OSError:
            return False

    def clear_history(self) -> None:
        """Have the host forget the prompts that it ran."""
        self.server.post("/history", {"clear": True})

    def let_go(self) -> None:
        """Have the host drop what it caches, its models and its history."""
        self.clear_history()
        self.server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(2)

    @cached_property
    def on_card(self) -> bool:
        """Whether it computes on a GPU."""
        return self.server.get("/system_stats")["devices"][0]["type"] != "cpu"

    def memory(self) -> dict[str, int]:
        """Bytes that the server's process takes, and on a GPU of the card and of torch's allocator in use."""
        held = {RSS: self._process.memory_info().rss}
        if self.on_card:
            card = self.server.get("/system_stats")["devices"][0]
            held["card"] = self._of_card() or card["vram_total"] - card["vram_free"]
            held["allocator"] = card["torch_vram_total"] - card["torch_vram_free"]
        return held

    def _of_card(self) -> int:
        """Bytes of the card that are this process's, its context among them, as NVIDIA's driver tells; 0 if not."""
        command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        if shutil.which(command[0]) is None:
            return 0
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        lines = [line.split(", ") for line in told.splitlines()]
        own = [line[1] for line in lines if len(line) == 2 and line[0] == str(self._process.pid)]
        return sum(int(size) * 2**20 for size in own if size.isdigit())

    def settled(self) -> dict[str, int]:
        """The same once the host has let go, and of its memory what is held (anything/__init__.py).

        Its worker takes seconds to let go of what thousands of prompts have left in its caches, so this waits until two
        measurements in a row agree.
        """
        self.let_go()
        before = float("inf")
        for _ in range(SETTLING):
            held = self.server.post("/hostile/held")["held"]
            if abs(held - before) < STEADY:
                break
            before = held
            time.sleep(2)
        return {"memory": held, "mapped files": self._mapped()} | self.memory()

    def _mapped(self) -> int:
        """Bytes of files that lie in the process's memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(status.partition("RssFile:")[2].split()[0])


class ProcessHost:
    """The nodes in this process, with as much of a host's validation as decides what reaches a node."""

    def __init__(self, host):
        self.host = host

    @property
    def base(self) -> Path:
        """The folder for models, input and output."""
        return self.host.base

    on_card = False

    @property
    def zimage(self) -> bool:
        """Its nodes are ours and a few of the host's; KSampler is none of them."""
        return False

    def management(self):
        """The model_management that the nodes hold: the package may import a second one of that name later."""
        pack = self.host.node_class("LLaDAUniSample").__module__.rpartition(".")[0]
        return sys.modules[f"{pack}.host.progress"].management

    def run(self, graph: dict) -> Outcome:
        """Validate and run a graph, and look at what comes of it."""
        try:
            graph, complaint = self._validated(graph)
        except (TypeError, KeyError, IndexError, RecursionError) as error:  # as a host answers to these
            complaint = f"{type(error).__name__}: {error}"
        if complaint:
            return Outcome(REFUSED, complaint)
        try:
            done = self.host.run(graph)
        except Exception as error:
            cause = error.__cause__ or error
            text = f"{error} ({type(cause).__name__})"[:300]
            if "LLaDAUni" not in str(error):
                return Outcome(HOST, text)
            return Outcome(ERROR if type(cause).__name__ in CLEAR else FAULT, text)
        for node, data in graph.items():
            if data["class_type"] == "SaveImage":
                for call in done[node]:
                    for path in call:
                        Image.open(path).load()
        return Outcome(RIGHT)

    def _validated(self, graph: dict) -> tuple[dict, str]:
        """The graph without inputs that no node has, and why it would be refused, "" where it would not."""
        kept = {}
        for node, data in graph.items():
            kind = data["class_type"]
            if not kind.startswith("LLaDAUni"):
                if kind == "HostileAnything" or not kind:
                    return graph, f"no node {kind}"
                kept[node] = data
                continue
            if kind not in self.host.node_ids:
                return graph, f"no node {kind}"
            cls = self.host.node_class(kind)
            specs = {spec.id: spec for spec in cls.define_schema().inputs}
            inputs = {name: value for name, value in data["inputs"].items() if name in specs}
            missing = [name for name, spec in specs.items() if not spec.optional and name not in inputs]
            if missing:
                return graph, f"{missing[0]} is missing"
            complaint = self._complaint(cls, specs, inputs, graph)
            if complaint:
                return graph, complaint
            kept[node] = data | {"inputs": inputs}
        return kept, "there is a circle" if _circular(kept) else ""

    def _complaint(self, cls: type, specs: dict, inputs: dict[str, Any], graph: dict) -> str:
        linked = {}
        for name, value in inputs.items():
            if isinstance(value, list):
                if len(value) != 2:
                    return f"{name} is a bad link"
                source = graph[value[0]]["class_type"]
                if source in self.host.node_ids:
                    outputs = self.host.node_class(source).define_schema().outputs
                    linked[name] = outputs[value[1]].get_io_type()
                    if linked[name] != specs[name].get_io_type():
                        return f"{name} is linked to {linked[name]}"
                else:
                    linked[name] = specs[name].get_io_type()
        known = inspect.getfullargspec(cls.validate_inputs).args if "validate_inputs" in vars(cls) else []
        if not known:
            return ""
        given = {name: None if name in linked else value for name, value in inputs.items() if name in known}
        answer = cls.validate_inputs(input_types=linked, **given)
        return "" if answer is True else str(answer)

    def result(self, graph: dict) -> str:
        """A digest of all that a graph shows and saves."""
        done = self.host.run(graph)
        digest = hashlib.sha256()
        for node in sorted(graph):
            if graph[node]["class_type"] == "SaveImage":
                for path in sorted(path for call in done[node] for path in call):
                    with Image.open(path) as picture:
                        digest.update(repr(picture.size).encode() + picture.tobytes())
            elif graph[node]["class_type"] == "PreviewAny":
                digest.update(repr(done[node]).encode())
        return digest.hexdigest()

    def answers(self) -> bool:
        """It does as long as this process lives."""
        return True

    def clear_history(self) -> None:
        """There is none."""

    def let_go(self) -> None:
        """Drop what nobody refers to."""
        gc.collect()

    def memory(self) -> dict[str, int]:
        """Bytes of this process."""
        return {RSS: psutil.Process().memory_info().rss}

    def settled(self) -> dict[str, int]:
        """The same after a collection, and as what is held."""
        self.let_go()
        return {"memory": self.memory()[RSS]}


def _slot_is_unknown(run) -> bool:
    """Whether the host failed when it handed on what a node gave: a slot that is none, where no schema was asked."""
    return "output_link_callback" in "".join(run.error.get("traceback", ())[-1:])


def _circular(graph: dict) -> bool:
    done, open_ = set(), set()

    def visit(node: str) -> bool:
        if node in open_:
            return True
        if node in done:
            return False
        open_.add(node)
        links = [v[0] for v in graph[node]["inputs"].values() if isinstance(v, list) and len(v) == 2]
        found = any(visit(source) for source in links if source in graph)
        open_.discard(node)
        done.add(node)
        return found

    return any(visit(node) for node in graph)


def footprint(base: Path, ignore: Callable[[Path], bool]) -> set[str]:
    """Every file and folder at and under a folder, but for what `ignore` says."""
    return {str(path) for path in base.rglob("*") if not ignore(path)}


def controls(host, until: float = math.inf) -> dict[str, str]:
    """Shipped graph -> the digest of what it gives undisturbed, "" where that differs from run to run.

    What a first run sets up for good (memory, kernels) is set up then. Graphs not begun by `until` are left out.
    """
    graphs, found = shipped(host.zimage), {}
    for name, graph in graphs.items():
        if time.monotonic() > until:
            break
        found[name] = [host.result(reseeded(graph, seed)) for seed in (0, 1)]
        if len(set(found[name])) > 1 and host.on_card:  # a first run there may choose other kernels than the next
            found[name].append(host.result(reseeded(graph, 2)))
    return {name: results[-1] if results[-1] == results[-2] else "" for name, results in found.items()}
