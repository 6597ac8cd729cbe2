"""The expert products of a layer at released sizes, by format: our kernels, torch's grouped product, the floor.

Every layer has 256 experts of which a token takes 8, hidden 2,048 and inner 512; tokens are spread as a balanced
router spreads them (the hits are printed). Times are of CUDA-graph replays that go round several layers, so that no
weight is found in the L2 cache. The floor is the bytes of the experts that are hit over the bandwidth of a copy.

    python -m benchmarks.expert_product [--tokens 32 64 256 1024] [--layers 4] [--json FILE]     a GPU of NVIDIA's

The table's second part is a whole mixture of experts (router, sort, products, shared expert); the third linear layers.
"""

import argparse
import multiprocessing
from collections.abc import Callable

import torch
from torch import nn

from llada_core.backbone import routing_kernels
from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.experts import ExpertBank, MixtureOfExperts
from llada_core.quantization import launch
from llada_core.quantization.formats import Dense, Format, FP8Block, Int4, Int8
from llada_core.quantization.modules import QuantizedLinear, StoredWeight

from .support import add_json, released_backbone, show

EXPERTS, TOP, HIDDEN, INNER = 256, 8, 2048, 512
FORMATS: dict[str, Format] = {
    "bf16": Dense(torch.bfloat16),
    "fp8_block": FP8Block(part_rows=INNER),
    "int8": Int8(),
    "int4 64": Int4(64),
    "int4 64 symmetric": Int4(64, symmetric=True),
    "int4 128": Int4(128),
    "int4 128 symmetric": Int4(128, symmetric=True),
}


def fill(module: nn.Module) -> nn.Module:
    """Random contents of the right size for every stored tensor, made where it lies; returns the module."""
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if parameter.dtype == torch.float8_e4m3fn:
                parameter.copy_(torch.randn(parameter.shape, device=parameter.device).to(parameter.dtype))
            elif not parameter.is_floating_point():
                parameter.random_(-128, 128)
            elif isinstance(layer, StoredWeight) and name != "weight":
                parameter.uniform_(1e-4, 3e-4)
            else:
                parameter.normal_(0, 0.02)
    return module


def time_graph(run: Callable[[], object], repeats: int = 30) -> float:
    """Milliseconds of a replay of `run`, the median of several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    graph.replay()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def balanced(tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pairs sorted by expert: order int32 and ends int32, as of a router that likes all experts alike; and the hits."""
    chosen = torch.rand(tokens, EXPERTS, device="cuda", generator=generator).topk(TOP).indices
    of_pair, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(of_pair, torch.arange(EXPERTS, device="cuda"), right=True, out_int32=True)
    return order.int(), ends, len(of_pair.unique())


def bandwidth() -> float:
    """Bytes a second that a kernel reads and writes; a copy in a graph is no kernel, and slower."""
    source = torch.empty(2**30, device="cuda", dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_graph(lambda: torch.neg(source, out=target), 10) / 1e3)


class Layers:
    """Both banks of several layers in one format."""

    def __init__(self, form: Format, count: int, random: bool = True):
        with torch.device("cuda"):
            down = FP8Block() if isinstance(form, FP8Block) else form
            banks = [
                (ExpertBank(EXPERTS, 2 * INNER, HIDDEN, form), ExpertBank(EXPERTS, HIDDEN, INNER, down))
                for _ in range(count)
            ]
        self.banks = [tuple(fill(bank) for bank in pair) for pair in banks] if random else banks

    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return sum(p.nbytes for bank in self.banks[0] for p in bank.parameters()) / EXPERTS

    def gate_up(self, x, order, ends, layer: int, tile=None) -> torch.Tensor:
        """The first product with its gating, by our kernel."""
        bank = self.banks[layer][0]
        stored = dict(bank.named_parameters())
        return launch.product(bank.form, stored, x, bank.shape, ends, order, TOP, gated=True, tile=tile)

    def down(self, inner, order, ends, layer: int, tile=None) -> torch.Tensor:
        """The second product, written to the order of tokens, by our kernel."""
        bank = self.banks[layer][1]
        stored = dict(bank.named_parameters())
        return launch.product(bank.form, stored, inner, bank.shape, ends, scatter=order, tile=tile)

    def error(self, x, order, ends) -> float:
        """Relative error of both products against double precision, for rows of some experts."""
        inner = self.gate_up(x, order, ends, 0)
        out = self.down(inner, order, ends, 0)
        first, second = (bank.form.dequantize(dict(bank.named_parameters()), bank.shape[2], torch.float32)
                         for bank in self.banks[0])  # fmt: skip
        off, size, start = 0.0, 0.0, 0
        for expert, end in enumerate(ends.tolist()):
            if end > start and expert % 8 == 0:
                rows = order[start:end].long()
                gate, up = (x[rows // TOP].double() @ first[expert].double().T).chunk(2, -1)
                exact = nn.functional.silu(gate) * up
                off += float((inner[start:end] - exact).norm() ** 2 / exact.norm() ** 2)
                exact = inner[start:end].double() @ second[expert].double().T
                off += float((out[rows] - exact).norm() ** 2 / exact.norm() ** 2)
                size += 2
            start = end
        return (off / size) ** 0.5


def time_products(names: list[str], tokens: list[int], count: int) -> dict[str, object]:
    """Milliseconds of a layer's two products, by format and number of tokens, with the floor and the error."""
    figures: dict[str, object] = {}
    speed = bandwidth()
    figures["copy, TB/s"] = speed / 1e12
    for name in names:
        form, layers = FORMATS[name], Layers(FORMATS[name], count)
        for number in tokens:
            generator = torch.Generator("cuda").manual_seed(number)
            sorts = [balanced(number, generator) for _ in range(count)]
            hits = sum(hit for *_, hit in sorts) / count
            x = torch.randn(number, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator)

            def ours(layers=layers, sorts=sorts, x=x) -> None:
                for layer, (order, ends, _) in enumerate(sorts):
                    layers.down(layers.gate_up(x, order, ends, layer), order, ends, layer)

            def torchs(layers=layers, sorts=sorts, x=x) -> None:
                for (first, second), (order, ends, _) in zip(layers.banks, sorts, strict=True):
                    pairs = x[order // TOP]
                    both = torch._grouped_mm(pairs, first.weight.transpose(1, 2), offs=ends)
                    gate, up = both.chunk(2, -1)
                    torch._grouped_mm(nn.functional.silu(gate) * up, second.weight.transpose(1, 2), offs=ends)

            key = f"{name}, {number} tokens"
            figures[f"{key}: hit"] = hits
            figures[f"{key}: floor, ms"] = hits * layers.expert_bytes() / speed * 1e3
            figures[f"{key}: kernel, ms"] = time_graph(ours) / count
            if isinstance(form, Dense):
                figures[f"{key}: torch, ms"] = time_graph(torchs) / count
            figures[f"{key}: error"] = f"{layers.error(x, *sorts[0][:2]):.2e}"
        del layers
        torch.cuda.empty_cache()
    return figures


def mixture(config: BackboneConfig, form: Format) -> MixtureOfExperts:
    """A layer's experts with their router and shared expert in one format, random weights, a balanced router."""
    with torch.device("cuda"):
        module = MixtureOfExperts(config).to(torch.bfloat16)
        module.gate.float()
        if not isinstance(form, Dense):
            plain = FP8Block() if isinstance(form, FP8Block) else form
            module.experts.gate_up.set_format(form)
            module.experts.down.set_format(plain)
            shared = module.shared_experts
            for name, layer in list(shared.named_children()):
                new = QuantizedLinear(layer.in_features, layer.out_features, plain, kernels=module.experts.kernels)
                setattr(shared, name, new)
    module = fill(module)
    module.gate.expert_bias.zero_()
    return module


@torch.no_grad()
def time_mixtures(names: list[str], tokens: list[int], count: int) -> dict[str, object]:
    """Milliseconds of a whole mixture of experts."""
    figures: dict[str, object] = {}
    for name in names:
        form = FORMATS[name]
        modules = [mixture(released_backbone(), form) for _ in range(count)]
        for number in tokens:
            x = torch.randn(1, number, HIDDEN, device="cuda", dtype=torch.bfloat16)
            hits = len(modules[0].gate(x[0])[0].unique())
            figures[f"mixture, {name}, {number} tokens: hit"] = hits
            run = lambda modules=modules, x=x: [module(x) for module in modules]  # noqa: E731
            figures[f"mixture, {name}, {number} tokens: ms"] = time_graph(run) / count
        if isinstance(form, Dense):
            for module in modules:
                for part in module.modules():
                    if hasattr(part, "kernels"):
                        part.kernels._usable[torch.device("cuda", 0)] = False
            x = torch.randn(1, 64, HIDDEN, device="cuda", dtype=torch.bfloat16)
            run = lambda modules=modules, x=x: [module(x) for module in modules]  # noqa: E731
            figures["mixture, bf16, 64 tokens, without our kernels: ms"] = time_graph(run) / count
        del modules
        torch.cuda.empty_cache()
    return figures


@torch.no_grad()
def time_routing(tokens: list[int]) -> dict[str, object]:
    """Microseconds of what stands around the products, each by itself."""
    figures: dict[str, object] = {}
    config = released_backbone()
    module = mixture(config, Int8())
    for number in tokens:
        x = torch.randn(number, HIDDEN, device="cuda", dtype=torch.bfloat16)
        chosen, weights = module.gate(x)
        pairs = torch.randn(number * TOP, HIDDEN, device="cuda", dtype=torch.bfloat16)
        runs = {
            "router": lambda x=x: module.gate(x),
            "sort": lambda chosen=chosen: routing_kernels.sort(chosen, EXPERTS),
            "sums of groups": lambda x=x: launch.group_sums(x, 64),
            "shared expert": lambda x=x: module.shared_experts(x),
            "weighing and summing": lambda pairs=pairs, weights=weights, x=x: routing_kernels.combine(
                pairs, weights, x
            ),
        }
        for name, run in runs.items():
            figures[f"{name}, {number} tokens: us"] = time_graph(lambda run=run: [run() for _ in range(10)]) * 100
    return figures


def time_linears(names: list[str], tokens: list[int]) -> dict[str, object]:
    """Milliseconds of linear layers: our kernel, dequantizing and torch's product, torch's product of bf16."""
    figures: dict[str, object] = {}
    for out, width in ((3072, 2048), (2048, 2048), (5120, 2048), (2048, 5120), (16_384, 2048)):
        count = max(2, 200 * 2**20 // (out * width))
        for name in names:
            form = FP8Block() if name == "fp8_block" else FORMATS[name]
            with torch.device("cuda"):
                layers = [fill(QuantizedLinear(width, out, form)) for _ in range(count)]
            for number in tokens:
                x = torch.randn(number, width, device="cuda", dtype=torch.bfloat16)
                stored = [dict(layer.named_parameters()) for layer in layers]

                def kernel(stored=stored, x=x, form=form, out=out, width=width) -> None:
                    for weights in stored:
                        launch.product(form, weights, x, (1, out, width))

                def dequantized(stored=stored, x=x, form=form, width=width) -> None:
                    for weights in stored:
                        nn.functional.linear(x, form.dequantize(weights, width, x.dtype))

                key = f"linear {out} x {width}, {name}, {number} rows"
                figures[f"{key}: kernel, us"] = time_graph(kernel, 10) / count * 1e3
                figures[f"{key}: torch, us"] = time_graph(dequantized, 10) / count * 1e3
            del layers, stored
            torch.cuda.empty_cache()
    return figures


@torch.no_grad()
def compile_kernels(name: str, tokens: list[int]) -> None:
    """Fill Triton's cache with the kernels of a format: for each it takes seconds, and processes work side by side."""
    module = mixture(released_backbone(), FORMATS[name])
    for number in tokens:
        x = torch.randn(1, number, HIDDEN, device="cuda", dtype=torch.bfloat16)
        module(x)
        module.shared_experts.gate_proj(x[0])


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 256, 1024])
    parser.add_argument("--layers", type=int, default=4, help="layers whose weights take turns")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--parts", nargs="+", default=["products", "mixtures", "routing", "linears"])
    add_json(parser)
    arguments = parser.parse_args()
    names, tokens = arguments.formats, arguments.tokens
    with multiprocessing.get_context("fork").Pool(len(names)) as pool:
        pool.starmap(compile_kernels, [(name, tokens) for name in names], chunksize=1)
    figures: dict[str, object] = {"device": torch.cuda.get_device_name()}
    if "products" in arguments.parts:
        figures |= time_products(names, tokens, arguments.layers)
    if "mixtures" in arguments.parts:
        figures |= time_mixtures(names, tokens, arguments.layers)
    if "routing" in arguments.parts:
        figures |= time_routing(tokens)
    if "linears" in arguments.parts:
        figures |= time_linears(names, [number for number in tokens if number <= 1024])
    show("Expert products, released sizes", figures, arguments.json)


if __name__ == "__main__":
    main()
