"""One round of a guided picture on one GPU: its time as a CUDA graph, its kernels, and the 1,024 tokens that it is for.

The released backbone with random weights that spread tokens over the experts as a trained router does; the experts that
are hit are printed. A round runs a block of 32 positions of two branches, or where a block begins two blocks, against a
cache that is half full. Kernels are those of one replay: how many, how long they take together, what lies between them,
and each layer's in their order.

    python -m benchmarks.rounds [--weights "as stored" 8-bit 4-bit] [--kernels FILE] [--json FILE]    a GPU of 80 GB
    python -m benchmarks.rounds --tiny               the same path on the CPU with small sizes, kernel by kernel
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llada_core.backbone.cuda_graphs import CUDAGraphRunner, GraphStore
from llada_core.options import WEIGHTS, Guidance
from llada_core.sampling.batch import Sample
from llada_core.sampling.block_diffusion import GenerationConfig, generate, prepare

from .batches import GRID, STEPS, Bench, even_backbone
from .clock import milliseconds
from .support import add_json, load_oracle, released_backbone, show

BLOCK, BRANCHES, PROMPT = 32, 2, 100
REPEATS = 40
ANCHOR = "choose_kernel"  # once a layer


@dataclass(frozen=True)
class Kernel:
    """A kernel of a replay; times in microseconds."""

    name: str
    start: float
    duration: float


def kernels_of(work: Callable[[], object]) -> list[Kernel]:
    """What runs on the GPU, in order; on the CPU torch's operators."""
    cuda = torch.cuda.is_available()
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        work()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "trace.json"
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = [Kernel(e["name"], float(e["ts"]), float(e["dur"])) for e in events if e.get("cat") in kinds]
    return sorted(found, key=lambda kernel: kernel.start)


def layer_of(kernels: list[Kernel]) -> list[Kernel]:
    """Those of the layer in the middle; none where no layer has kernels of ours."""
    at = [index for index, kernel in enumerate(kernels) if ANCHOR in kernel.name]
    return kernels[at[len(at) // 2 - 1] : at[len(at) // 2]] if len(at) > 1 else []


def measure(bench: Bench, weights: str, grid: int) -> list[Kernel]:
    """Note the figures of one form of the weights; returns a replay's kernels."""
    config = GenerationConfig(STEPS, bench.mask + 1, bench.backbone.config.vocab_size, guidance=Guidance(2.0))
    sample = Sample([bench.text(PROMPT, 0), bench.text(PROMPT - 20, 1)], [bench.mask] * grid)

    def draw() -> tuple[CUDAGraphRunner, float, int]:
        began = time.perf_counter()
        runner, batch = prepare(
            bench.backbone, [sample], config, bench.mask, bench.device, bench.dtype, store=bench.store
        )
        (output,) = generate(runner, batch, config)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        runner.finish()
        return runner.rounds, seconds, output.rounds

    bench.note(f"{weights}: experts hit by {BLOCK * BRANCHES} tokens", bench.hits(BLOCK * BRANCHES))
    draw()
    rounds, seconds, count = draw()
    bench.note(f"{weights}: {grid} tokens, s", seconds)
    bench.note(f"{weights}: rounds", count)
    bench.note(f"{weights}: ms a round, with what the processor does between", 1000 * seconds / count)
    if bench.device.type != "cuda":
        sizes = (BLOCK, 2 * BLOCK)
        rounds = CUDAGraphRunner(bench.backbone, rounds.cache, sizes, then=rounds.then, block=BLOCK, capture=False)
    begin = (PROMPT + grid // 2) // BLOCK * BLOCK
    replays = {}
    for n in (2 * BLOCK, BLOCK):
        ids = torch.full((BRANCHES, n), bench.mask, device=bench.device)
        positions = torch.arange(begin, begin + n, device=bench.device).expand(BRANCHES, -1)

        def replay(ids=ids, positions=positions) -> None:
            rounds.run(ids, positions, begin, None)

        replay()
        replay()  # now it is a graph in any case
        replays[n] = replay
        bench.note(f"{weights}: a graph of {n} positions x {BRANCHES}, ms", milliseconds(bench.device, replay, REPEATS))
    kernels = kernels_of(replays[BLOCK])
    busy = sum(kernel.duration for kernel in kernels) / 1000
    span = (kernels[-1].start + kernels[-1].duration - kernels[0].start) / 1000
    bench.note(f"{weights}: kernels", len(kernels))
    bench.note(f"{weights}: kernels of a layer", len(layer_of(kernels)))
    bench.note(f"{weights}: kernels together, ms", busy)
    bench.note(f"{weights}: between them, ms", span - busy)
    rounds.close()
    return kernels


def write_kernels(file: Path, by_weights: dict[str, list[Kernel]]) -> None:
    """By form of the weights: kernels by name, the longest first, then a layer's one by one."""
    with file.open("w") as out:
        for weights, kernels in by_weights.items():
            names = {kernel.name: [k.duration for k in kernels if k.name == kernel.name] for kernel in kernels}
            print(f"{weights}: ms, how many, us each", file=out)
            for name, each in sorted(names.items(), key=lambda item: -sum(item[1])):
                print(f"{sum(each) / 1000:9.3f} {len(each):5} {sum(each) / len(each):8.2f}  {name[:160]}", file=out)
            print(f"{weights}: a layer, us", file=out)
            for kernel in layer_of(kernels):
                print(f"{kernel.duration:9.2f}  {kernel.name[:160]}", file=out)


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=list(WEIGHTS))
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="a table of all kernels goes there")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    add_json(parser)
    options = parser.parse_args()
    if options.tiny:
        device, dtype, config, grid = torch.device("cpu"), torch.float32, load_oracle().tiny_config(), 64
    elif torch.cuda.is_available():
        device, dtype, config, grid = torch.device("cuda"), torch.bfloat16, released_backbone(), GRID
    else:
        print("no GPU at hand; --tiny runs the same path on the CPU")
        return
    figures: dict[str, object] = {}
    by_weights = {}
    for weights in options.weights:
        bench = Bench(even_backbone(config, device, dtype, weights), device, dtype, None)
        bench.store = GraphStore(2**40)  # of whatever size, for its graphs are looked into
        by_weights[weights] = measure(bench, weights, grid)
        figures |= bench.figures
        bench.store.close()
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.kernels:
        write_kernels(options.kernels, by_weights)
    show(f"Rounds, {device.type}, {dtype}", figures, options.json)


if __name__ == "__main__":
    main()
