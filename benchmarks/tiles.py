"""Which tiles are fastest for the product kernels: every tile of a list, for each format and number of tokens.

Compiles side by side in several processes first, then times each in a CUDA graph over several layers' weights, and
prints the best of each. What it finds goes into llada_core/quantization/tiles.py.

    python -m benchmarks.tiles [--tokens 32 64 256 1024] [--formats bf16 int8] [--json FILE]     a GPU of NVIDIA's
"""

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from llada_core.quantization import launch
from llada_core.quantization.formats import Dense, Format, FP8Block, Int8
from llada_core.quantization.modules import QuantizedLinear
from llada_core.quantization.tiles import Tile, fit, shared_bytes

from .expert_product import FORMATS, HIDDEN, INNER, TOP, Layers, balanced, fill, time_graph
from .support import add_json, show

SHARED = 220 * 1024  # bytes that a program may take on Hopper
# Linear layers: out, in, gated.
LINEARS = {
    "linear 3072 x 2048": (3072, 2048, False),
    "shared gate": (512, 2048, True),
    "shared down": (2048, 512, False),
}
KINDS = ("gate and up", "down", *LINEARS)


def tiles_of(form: Format, kind: str, tokens: int) -> list[Tile]:
    """Tiles worth a try that fit into shared memory."""
    gated = kind in ("gate and up", "shared gate")
    wide = isinstance(form, (Dense, Int8))
    found = []
    if kind in LINEARS:
        rows = [r for r in (16, 64) if r <= max(tokens, 16)]
        shapes = itertools.product(rows, (False,), (16, 32, 64), (128, 256) if wide else (128,), (1,), (2, 4), (4,))
    elif tokens <= 256:
        columns, steps = ((128, 256), (1,)) if wide else ((128,), (1, 2, 4))
        rest = (32, 64, 128), columns, steps, (2, 4, 8), (2, 3)
        shapes = itertools.chain(*(itertools.product((rows,), (rows < 16,), *rest) for rows in (8, 16)))
    else:
        columns, steps = ((64, 128), (1,)) if wide else ((128,), (1, 2))
        shapes = itertools.product((32, 64), (False, True), (64, 128), columns, steps, (4, 8), (2, 3))
    for rows, swapped, width, depth, steps, warps, stages in shapes:
        split = -(-tokens // rows) if kind in LINEARS else 1
        tile = fit(Tile(rows, width, depth, warps, stages, steps, split, swapped), form, INNER)
        weights = shared_bytes(replace(tile, rows=0, stages=1), form, gated)
        shared = shared_bytes(tile, form, gated)
        if shared <= SHARED and 1024 <= weights <= 32768 and warps * 512 <= weights and tile.columns * steps <= 256:
            found.append(tile)
    # Fewer registers a thread let more programs wait for memory at once.
    return [replace(tile, registers=most) for tile in dict.fromkeys(found) for most in (0, 128)]


def runner(name: str, kind: str, tokens: int, count: int, random: bool = True) -> Callable[[Tile], None]:
    """What runs one product with a tile, for each of `count` layers."""
    form = FORMATS[name]
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    inner = torch.randn(tokens * TOP, INNER, device="cuda", dtype=torch.bfloat16)
    if kind in LINEARS:
        out, width, gated = LINEARS[kind]
        form = FP8Block() if isinstance(form, FP8Block) else form
        with torch.device("cuda"):
            layers = [QuantizedLinear(width, out, form) for _ in range(2 * count)]
        stored = [dict((fill(layer) if random else layer).named_parameters()) for layer in layers]
        given = x if width == HIDDEN else inner[:tokens]

        def linear(tile: Tile) -> None:
            for first, second in zip(stored[:count], stored[count:], strict=True):
                up = second if gated else None
                launch.product(form, first, given, (1, out, width), gated=gated, up=up, tile=tile)

        return linear
    layers = Layers(form, count, random)
    generator = torch.Generator("cuda").manual_seed(tokens)
    sorts = [balanced(tokens, generator) for _ in range(count)]

    def expert(tile: Tile) -> None:
        for layer, (order, ends, _) in enumerate(sorts):
            if kind == "down":
                layers.down(inner, order, ends, layer, tile)
            else:
                layers.gate_up(x, order, ends, layer, tile)

    return expert


def compile_some(job: tuple[str, str, int, list[Tile]]) -> None:
    """Compile kernels into Triton's cache by running each once."""
    name, kind, tokens, tiles = job
    run = runner(name, kind, tokens, 1, random=False)
    for tile in tiles:
        try:
            run(tile)
        except Exception as error:  # one that does not fit is left out below
            print(f"{name} {kind} {tile}: {type(error).__name__} {str(error)[:80]}", flush=True)


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "fp8_block", "int4 64", "int4 128"])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--seconds", type=float, default=100.0, help="start nothing new after so long")
    parser.add_argument("--best", type=int, default=3, help="tiles that are printed of each case")
    add_json(parser)
    arguments = parser.parse_args()
    began = time.perf_counter()
    cases = list(itertools.product(arguments.formats, arguments.kinds, arguments.tokens))
    wanted = {case: tiles_of(FORMATS[case[0]], *case[1:]) for case in cases}
    jobs = [(*case, tiles[i : i + 8]) for case, tiles in wanted.items() for i in range(0, len(tiles), 8)]
    print(f"{sum(map(len, wanted.values()))} kernels", flush=True)
    with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1)) as pool:
        pool.map(compile_some, jobs, chunksize=1)
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    figures: dict[str, object] = {}
    for case, tiles in wanted.items():
        run, results = runner(*case, 3), []
        for tile in tiles:
            if time.perf_counter() - began > arguments.seconds:
                break
            try:
                results.append((time_graph(lambda run=run, tile=tile: run(tile), 5) / 3 * 1e3, tile))
            except Exception as error:  # too much shared memory, say
                print(f"{case} {tile}: {type(error).__name__} {str(error)[:80]}", flush=True)
        name, kind, tokens = case
        for rank, (microseconds, tile) in enumerate(sorted(results, key=lambda r: r[0])[: arguments.best]):
            shape = (
                tile.rows,
                tile.features,
                tile.columns,
                tile.warps,
                tile.stages,
                tile.steps,
                int(tile.swapped),
                tile.registers,
            )
            figures[f"{name}, {kind}, {tokens}, {rank}"] = f"{microseconds:.1f} {shape}"
        del run
        torch.cuda.empty_cache()
    figures["seconds"] = time.perf_counter() - began
    show("Tiles of the product kernels, microseconds", figures, arguments.json)


if __name__ == "__main__":
    main()
