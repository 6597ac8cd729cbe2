"""A whole picture in a real ComfyUI on a card with so much memory free: seconds, bytes moved, main memory.

Another process holds the rest of the card. A folder of released sizes with random weights that route evenly is written
where there is none (17 GB with a backbone of 4 bits, 46 GB in bf16; see random_folder.py), a server is started for each
amount, and the graph is queued over HTTP: a 1024 x 1024 picture with the turbo decoder twice, then questions about a
picture and edits of it, two each. The second of each is what counts: the first reads files and captures graphs.

    COMFYUI_PATH=... python -m benchmarks.small_cards --folder DIR [--free 24 12] [--json FILE]
    COMFYUI_PATH=... python -m benchmarks.small_cards --tiny        the same path on the CPU with small sizes

Main memory is the largest sum of RssAnon and RssShmem of the server: pages of files that it maps are left out, as the
system takes them back when others need the memory. The largest VmRSS, with those pages, stands beside it.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from dev.hosts.server import ComfyServer, Run, find_comfyui
from llada_core.engine import LLaDAUni
from llada_core.options import WEIGHTS

from .fullsize import released, tiny
from .random_folder import Vision, share_of_experts, write_folder
from .support import add_json, show

NAME = "benchmark"
# As long as people's prompts are: the more there is to attend to, the more masks differ, and experts are hit.
PROMPT = (
    "a red fox asleep under an old oak at the edge of a village, first snow on the roofs, smoke from one chimney, "
    "soft morning light from the left, long shadows, in the manner of a woodcut with three colours, number"
)
MOVED = re.compile(r"LLaDA-Uni: (\S+): \S+ GB stay on the device, (\S+) brought now; (\S+) brought when used")
HOLD = """
import sys, time, torch
free = int(float(sys.argv[1]) * 2**30)
kept = []
while (spare := torch.cuda.mem_get_info()[0] - free) > 2**24:
    kept.append(torch.empty(min(spare, 2**32), dtype=torch.uint8, device="cuda"))
print("held", flush=True)
time.sleep(10**6)
"""


def node(kind: str, **inputs) -> dict:
    """One node of an API graph."""
    return {"class_type": kind, "inputs": inputs}


def loader(weights: str) -> dict:
    """Load the benchmark's checkpoint."""
    return node("LLaDAUniLoader", checkpoint=NAME, precision="auto", attention="auto", weights=weights)


def drawing(weights: str, side: int, seed: int) -> dict:
    """Prompt to picture with the turbo decoder."""
    sample = {"steps": 8, "guidance": 2.0, "seed": seed, "thinking": False}
    return {
        "load": loader(weights),
        "sample": node(
            "LLaDAUniSample", model=["load", 0], prompt=f"{PROMPT} {seed}", width=side, height=side, **sample
        ),
        "decode": node("LLaDAUniDecode", model=["load", 0], tokens=["sample", 0], turbo=True, steps=0, seed=seed),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="small_cards"),
    }


def picture(side: int) -> dict:
    """A picture of one colour: what is seen does not change how long it takes."""
    return node("EmptyImage", width=side, height=side, batch_size=1, color=0x4060A0)


def question(weights: str, side: int, tokens: int, text: str) -> dict:
    """A question about a picture."""
    asked = {"question": text, "steps": 32, "max_new_tokens": tokens, "seed": 1}
    return {
        "load": loader(weights),
        "image": picture(side),
        "answer": node("LLaDAUniImageQA", model=["load", 0], image=["image", 0], **asked),
        "show": node("PreviewAny", source=["answer", 0]),
    }


def edit(weights: str, side: int, pixels: int, prompt: str) -> dict:
    """An edit of a picture, in tokens: what follows is the decoder, as in `drawing`."""
    sample = {"width": 1024, "height": 1024, "steps": 8, "guidance": 4.0, "seed": 5, "thinking": False}
    return {
        "load": loader(weights),
        "image": picture(side),
        "encode": node(
            "LLaDAUniEncode", model=["load", 0], image=["image", 0], purpose="edit", fit="cover", pixels=pixels
        ),
        "sample": node("LLaDAUniSample", model=["load", 0], prompt=prompt, references=["encode", 0], **sample),
        "save": node("LLaDAUniSaveTokens", tokens=["sample", 0], filename_prefix="small_cards"),
    }


class Memory(threading.Thread):
    """Watches the main memory of a process, in GB, until it is stopped."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self.own = self.all = 0.0

    def run(self) -> None:
        """Note the largest values, ten times a second."""
        while not self._over.wait(0.1):
            try:
                lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
                sizes = {name: int(lines[name].split()[0]) / 1e6 for name in ("RssAnon", "RssShmem", "VmRSS")}
            except (OSError, ValueError, KeyError):  # it has ended
                return
            self.own = max(self.own, sizes["RssAnon"] + sizes["RssShmem"])
            self.all = max(self.all, sizes["VmRSS"])

    def stop(self) -> None:
        """End the watch."""
        self._over.set()
        self.join()


@contextmanager
def only_free(gigabytes: float | None):
    """While it lasts another process holds the card, but for so many GiB; None leaves the card alone."""
    if gigabytes is None:
        yield
        return
    command = [sys.executable, "-c", HOLD, str(gigabytes)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if holder.stdout.readline().strip() != "held":
            raise RuntimeError(f"the card could not be held but for {gigabytes} GiB")
        yield
    finally:
        holder.kill()
        holder.wait()


def timed(server: ComfyServer, graph: dict) -> float:
    """Seconds from queueing to the end. Raises RuntimeError where the graph fails."""
    began = time.perf_counter()
    run: Run = server.run(graph, timeout=600)
    if run.status != "success":
        raise RuntimeError(f"{run.status}: {run.error.get('exception_message')}\n{server.log[-4000:]}")
    return time.perf_counter() - began


def opened(folder: Path, device: torch.device) -> dict[str, object]:
    """How long the parts of a picture take from their files to the device, and where the router sends masks."""
    figures = Figures()
    for which in ("first", "second"):
        began = time.perf_counter()
        model = LLaDAUni(folder)
        figures[f"opening the folder, {which} time, s"] = time.perf_counter() - began
        for part in ("backbone", "sigvq", "decoder-turbo", "vae"):
            start, component = time.perf_counter(), model.components[part]
            loaded = component.load(component.dtype, device=device)
            figures[f"{part} to the device, {which} time, s"] = time.perf_counter() - start
            if part == "backbone" and which == "second":
                figures["experts that a round hits, share"] = share_of_experts(loaded)
            del loaded
    torch.cuda.empty_cache()
    return figures


def measure(comfyui: Path, folder: Path, free: float | None, arguments: argparse.Namespace) -> dict[str, object]:
    """Figures of one server."""
    small, quick, logs, weights = arguments.tiny, arguments.quick, arguments.logs, arguments.weights
    figures = Figures()
    label = "" if free is None else f"{free:g} GiB free: "
    side = 64 if small else 1024
    with tempfile.TemporaryDirectory() as base, only_free(free):
        models = Path(base) / "models" / "llada_uni"
        models.mkdir(parents=True)
        (models / NAME).symlink_to(folder.resolve(), target_is_directory=True)
        with ComfyServer(comfyui, Path(base), tuple(arguments.option)) as server:
            memory = Memory(server.pid)
            memory.start()
            try:
                first = "small first picture" if quick else "first picture"
                figures[f"{label}{first}, s"] = timed(
                    server, drawing(weights, max(32, side // 4) if quick else side, 1)
                )
                marker = len(server.log)
                figures[f"{label}second picture, s"] = timed(server, drawing(weights, side, 2))
                lines = MOVED.findall(server.log[marker:])
                figures[f"{label}brought in the second, GB"] = sum(float(now) for _, now, _ in lines)
                figures[f"{label}brought at each use, GB"] = sum(float(away) for _, _, away in lines)
                asked = arguments.questions is None or free in arguments.questions
                if not quick and not arguments.pictures and asked:
                    length, pixels = (8, side * side // 4) if small else (128, 0)
                    for which, text in (("", "What is shown?"), ("second ", "Which colour is it?")):
                        figures[f"{label}{which}question, s"] = timed(server, question(weights, side, length, text))
                    for which, prompt in (("", "in snow"), ("second ", "at night")):
                        figures[f"{label}{which}edit, tokens alone, s"] = timed(
                            server, edit(weights, side, pixels, prompt)
                        )
            finally:
                memory.stop()
                if logs:
                    (logs / f"server-{free}.log").write_text(server.log)
            figures[f"{label}server's main memory, GB"] = memory.own
            figures[f"{label}with mapped file pages, GB"] = memory.all
    return figures


class Figures(dict):
    """What was measured, printed as it comes: a run that is cut short has told what it had."""

    def __setitem__(self, name: str, value: object) -> None:
        super().__setitem__(name, value)
        print(f"{name}: {value}", flush=True)


def main() -> None:
    """Write the folder where it is not there, run the servers, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="the checkpoint; written where it is not there")
    parser.add_argument("--files", choices=WEIGHTS, default="4-bit", help="what is written then; as stored: bf16")
    parser.add_argument("--free", type=float, nargs="*", default=[24, 16, 12, 8], help="GiB, a server each")
    parser.add_argument("--option", action="append", default=[], help="more options for ComfyUI")
    parser.add_argument("--weights", default="as stored", help="as the loader offers: 8-bit, 4-bit")
    parser.add_argument("--opening", action="store_true", help="before that, how long the parts take to the device")
    parser.add_argument("--questions", type=float, nargs="*", help="only at these amounts a question and an edit")
    parser.add_argument("--pictures", action="store_true", help="no question and no edit")
    parser.add_argument("--quick", action="store_true", help="as --pictures, and the first one small")
    parser.add_argument("--logs", type=Path, help="a folder that takes what the servers log")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    add_json(parser)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends, and its log is kept
    comfyui = find_comfyui()
    if comfyui is None:
        print("no real ComfyUI: set COMFYUI_PATH")
        return
    if not arguments.tiny and not torch.cuda.is_available():
        print("no GPU at hand; --tiny runs the same path on the CPU")
        return
    figures, device = Figures(), torch.device("cpu" if arguments.tiny else "cuda")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "checkpoint"
        if not folder.exists():
            began = time.perf_counter()
            if arguments.tiny:
                backbone = replace(tiny().backbone, vocab_size=704, image_token_offset=448)  # the tokenizer's text fits
                sizes = replace(tiny(), backbone=backbone)
                write_folder(folder, sizes, Vision(2, 32, 2, 64, 256, 16), device, arguments.files)
            else:
                write_folder(folder, released(), Vision(), device, arguments.files)
            figures["writing the folder, s"] = time.perf_counter() - began
        if arguments.opening:
            figures |= opened(folder, device)
        figures["folder, GB"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
        for free in [None] if arguments.tiny else arguments.free:
            figures |= measure(comfyui, folder, free, arguments)
    show("Small cards, ComfyUI over HTTP", figures, arguments.json)


if __name__ == "__main__":
    main()
