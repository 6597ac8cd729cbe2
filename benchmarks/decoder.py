"""Where an evaluation of the decoder goes, at released sizes: 1024 x 1024 pixels, 8,192 positions.

One run times the library's own forward, which is the official one, beside ours, each taken apart: products, attention,
and what lies between them. Floors are counted (operations of the products and of attention, bytes of what lies between
if every tensor is read and written once) and divided by what the card was measured to do. Weights are random, so
nothing is downloaded; gates are drawn so that every block counts. The same weights in 8 bits are timed too, and what
they compute is compared with bfloat16's; how far that is from float32 is the measure for it.

    python -m benchmarks.decoder [--normal] [--json FILE]      a GPU of 24 GB or more
    python -m benchmarks.decoder --tiny                        the same path on the CPU with small sizes, in seconds
"""

import argparse
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.transformers import transformer_z_image
from torch import nn

from llada_core.decoder.decode import AXES_LENS, sample_latents
from llada_core.decoder.transformer import SemanticDecoder
from llada_core.options import Decoding
from llada_core.quantization.formats import Format, FP8Block, Int8
from llada_core.quantization.modules import apply_formats

from .clock import Clock, milliseconds
from .support import add_json, show

NEEDED = 22e9  # bytes: what a card sold as 24 GB has
NEEDED_FLOAT32 = 44e9  # the same weights in float32 besides
TURBO, NORMAL = 8, 98  # evaluations of a picture


@dataclass(frozen=True)
class Sizes:
    """What differs between the release and --tiny."""

    decoder: dict
    features: int
    grid: int  # tokens a side
    dtype: torch.dtype
    repeats: int


RELEASED = Sizes(
    {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30},
    features=4096,
    grid=32,
    dtype=torch.bfloat16,
    repeats=5,
)
TINY = Sizes(
    {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12]},
    features=32,
    grid=2,
    dtype=torch.float32,
    repeats=2,
)


def random_decoder(sizes: Sizes, device: torch.device) -> SemanticDecoder:
    """With weights of heavy tails and gates that let every block count."""
    with torch.device("meta"):
        decoder = SemanticDecoder(
            in_channels=16, cap_feat_dim=sizes.features, axes_lens=list(AXES_LENS), **sizes.decoder
        )
        decoder = nn.Module.to(decoder, sizes.dtype)  # past diffusers' own, which warns
    decoder = decoder.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in decoder.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.ndim > 1 and "pad_token" not in name:
            # A row in 16 is four times as large, as outlying channels are.
            parameter.mul_(0.5 * parameter.shape[1] ** -0.5)[::16].mul_(4)
        elif name.endswith("bias"):
            parameter.mul_(0.3 if "adaLN" in name else 0.02)
        elif "pad_token" not in name:
            parameter.mul_(0.1).add_(1)
    return decoder


PARTS = {  # a function of the kernels -> what it replaces
    "rms_norm": "norms, modulation, gates",
    "add_rms_norm": "norms, modulation, gates",
    "add_rms_norm_twice": "norms, modulation, gates",
    "heads": "norms of heads, rotary",
    "silu_mul": "activation",
    "scale_rows": "rows of attention",
}


class TimedKernels:
    """A decoder's kernels, each function timed."""

    def __init__(self, clock: Clock, kernels):
        for function, part in PARTS.items():
            setattr(self, function, clock.around(part, getattr(kernels, function)))


@contextmanager
def taken_apart(decoder: SemanticDecoder, clock: Clock, dtype: torch.dtype):
    """Inside, products, attention and (in the library's forward) norms and activations are timed."""
    handles = []

    def time_module(module: nn.Module, part: str) -> None:
        open_spans = []

        def before(*_):
            open_spans.append(clock.span(part))
            open_spans[-1].__enter__()

        handles.append(module.register_forward_pre_hook(before))

        def after(*_):
            open_spans.pop().__exit__(None, None, None)

        handles.append(module.register_forward_hook(after))

    for block in blocks_of(decoder):
        for name, module in block.named_modules():
            if "adaLN" in name:
                continue
            if isinstance(module, nn.Linear) or type(module).__name__ == "QuantizedLinear":
                time_module(module, "products")
            elif type(module).__name__ == "RMSNorm":
                time_module(module, "norms of heads" if "attention.norm" in name else "norms")
        block.feed_forward._forward_silu_gating = clock.around("activation", block.feed_forward._forward_silu_gating)
    dispatch, attention = transformer_z_image.dispatch_attention_fn, decoder.attention
    device = next(decoder.parameters()).device
    kernels, products = decoder.functions_for(device, dtype)
    decoder.kernels = TimedKernels(clock, kernels)
    functions = dict(products.functions)
    products.functions.update({form: clock.around("products", function) for form, function in functions.items()})
    transformer_z_image.dispatch_attention_fn = clock.around("attention", dispatch)
    decoder.attention = clock.around("attention", attention)
    yield
    transformer_z_image.dispatch_attention_fn = dispatch
    decoder.attention, decoder.kernels = attention, None
    products.functions.update(functions)
    for block in blocks_of(decoder):
        del block.feed_forward._forward_silu_gating
    for handle in handles:
        handle.remove()


def quantize(decoder: SemanticDecoder, form: Format) -> None:
    """Store the linear layers of all blocks in a form, in place."""
    for block in blocks_of(decoder):
        weights: dict[str, torch.Tensor] = {}

        def choose(name: str, shape: tuple[int, ...], block=block, weights=weights) -> Format | None:
            if "adaLN" in name:
                return None
            weights[name] = block.get_submodule(name).weight
            return form

        apply_formats(block, choose)
        for name, weight in weights.items():
            for suffix, tensor in form.quantize(weight).items():
                getattr(block.get_submodule(name), suffix).data.copy_(tensor)


def blocks_of(decoder: SemanticDecoder) -> list[nn.Module]:
    """All blocks."""
    return [*decoder.noise_refiner, *decoder.context_refiner, *decoder.layers]


class Bench:
    """One decoder, its inputs, and what is measured of it.

    Args:
        sizes, device: of the decoder.
        figures: where figures are noted.
        form: of its weights; None is dense.
    """

    def __init__(self, sizes: Sizes, device: torch.device, figures: dict[str, object], form: Format | None = None):
        self.sizes, self.device, self.figures = sizes, device, figures
        self.decoder = random_decoder(sizes, device)
        if form is not None:
            quantize(self.decoder, form)
        side = 4 * sizes.grid
        generator = torch.Generator(device).manual_seed(1)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.size = (side, side)
        self.features = draw(side * side // 4, sizes.features).to(sizes.dtype)
        self.x = draw(1, 16, 1, side, side)

    def velocity(self) -> torch.Tensor:
        """One evaluation by our forward, conditioning and all; on the CPU."""
        return self.decoder.velocity(self.x, 0.3, self.decoder.condition(self.features, self.size)).cpu()

    def official(self) -> torch.Tensor:
        """One evaluation by the library's forward, conditioning and all."""
        t = torch.full((1,), 0.3, device=self.device)
        x = self.x[0].to(self.sizes.dtype)
        return self.decoder([x], t, [self.features], return_dict=False)[0][0][None]

    def count(self) -> tuple[float, float, float]:
        """Operations of an evaluation's products and of its attention, and bytes of what lies between."""
        dim, inner = self.decoder.dim, self.decoder.layers[0].feed_forward.w1.out_features
        image = self.size[0] * self.size[1] // 4
        layers, refiners = len(self.decoder.layers), len(self.decoder.noise_refiner)
        rows = 2 * image * layers + image * refiners
        products = rows * 2 * (4 * dim * dim + 3 * dim * inner)
        attention = 4 * dim * (layers * (2 * image) ** 2 + refiners * image**2)
        # Norms: read the sum and what is added, write the sum and its norm, twice. Heads: q and k. Activation: three.
        between = rows * self.sizes.dtype.itemsize * (2 * 4 * dim + 2 * 2 * dim + 3 * inner)
        return products, attention, between

    def measure(self, name: str, work: Callable[[], object]) -> float:
        """Note the milliseconds of `work`."""
        self.figures[name] = milliseconds(self.device, work, self.sizes.repeats)
        return self.figures[name]

    def breakdown(self, name: str, prepare: Callable[[], Callable[[], object]], rest: str) -> None:
        """Note how the milliseconds of the work that `prepare` returns divide; what no part explains is `rest`."""
        clock = Clock(self.device)
        with taken_apart(self.decoder, clock, self.sizes.dtype):
            work = prepare()
            clock.spans.clear()
            with clock.span("all"):
                work()
        parts = {part: clock.total(part) for part in clock.spans}
        whole = parts.pop("all")
        for part, taken in (parts | {rest: whole - sum(parts.values())}).items():
            self.figures[f"{name}: {part}, ms"] = taken


def ceilings(bench: Bench) -> tuple[float, float]:
    """Operations and bytes a second that the device does at best; noted."""
    if bench.device.type == "cuda":
        n, copied = 8192, 2**31
    else:
        n, copied = 256, 2**22
    a, b = (torch.randn(n, n, device=bench.device).to(bench.sizes.dtype) for _ in range(2))
    operations = 2 * n**3 / milliseconds(bench.device, lambda: a @ b, 10) * 1000
    source = torch.randint(255, (copied,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    moved = 2 * copied / milliseconds(bench.device, lambda: target.copy_(source), 10) * 1000
    bench.figures["measured: product, TFLOP/s"], bench.figures["measured: copy, TB/s"] = operations / 1e12, moved / 1e12
    return operations, moved


def timed_evaluation(bench: Bench) -> Callable[[], object]:
    """Our evaluation with a decoder whose attention is timed already, and its kernels too."""
    conditioning = bench.decoder.condition(bench.features, bench.size)
    return lambda: bench.decoder.velocity(bench.x, 0.3, conditioning)


def evaluations(bench: Bench) -> None:
    """The library's evaluation and ours, floors, and the two of a guided step."""
    decoder, x = bench.decoder, bench.x
    operations, moved = ceilings(bench)
    products, attention, between = bench.count()
    bench.figures["counted: products, TFLOP"] = products / 1e12
    bench.figures["counted: attention, TFLOP"] = attention / 1e12
    bench.figures["counted: between, GB"] = between / 1e9
    bench.figures["floor, ms"] = 1000 * ((products + attention) / operations + between / moved)

    began = time.perf_counter()
    first = bench.velocity()
    first_run = 1000 * (time.perf_counter() - began)
    ours = evaluation(bench, "ours")
    bench.figures["ours: first run longer by, ms"] = first_run - ours
    official = bench.measure("official: evaluation, ms", bench.official)
    bench.breakdown("official", lambda: bench.official, "rotary, modulation, gates, rest")
    bench.figures["times as fast as the official"] = official / ours
    bench.figures["difference from the official, relative"] = distance(first, bench.official().cpu())

    conditionings = [decoder.condition(f, bench.size) for f in (bench.features, torch.zeros_like(bench.features))]
    pair = bench.measure("a guided step, ms", lambda: decoder.velocities(x, 0.3, conditionings))
    bench.figures["a guided step, times one evaluation"] = pair / ours


def evaluation(bench: Bench, name: str) -> float:
    """Note the milliseconds of one of our evaluations, what pictures take by that, and where it goes; returned."""
    conditioning = bench.decoder.condition(bench.features, bench.size)
    taken = bench.measure(f"{name}: evaluation, ms", lambda: bench.decoder.velocity(bench.x, 0.3, conditioning))
    bench.figures[f"{name}: turbo picture, {TURBO} evaluations, s"] = TURBO * taken / 1000
    bench.figures[f"{name}: normal picture, {NORMAL} evaluations, s"] = NORMAL * taken / 1000
    bench.breakdown(name, lambda: timed_evaluation(bench), "embedding, modulation vectors, rest")
    return taken


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the norm of the whole tensor."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def pictures(bench: Bench, name: str, normal: bool) -> torch.Tensor:
    """Whole pictures, from features to latents; the turbo one's latents."""
    grid = (bench.sizes.grid,) * 2
    latents = {}
    for kind in ("turbo", *(["normal"] if normal else [])):
        began = time.perf_counter()
        decoding = Decoding(turbo=kind == "turbo")
        latents[kind] = sample_latents(
            bench.decoder, bench.features, grid, decoding, 0, bench.device, bench.sizes.dtype
        )
        bench.figures[f"{name}: {kind} picture, whole run, s"] = time.perf_counter() - began
    return latents["turbo"]


def eight_bits(bench: Bench, name: str, expected: torch.Tensor, latents: torch.Tensor, normal: bool) -> None:
    """A decoder in 8 bits: its times, and how far it is from the velocity and the turbo latents of the dense one."""
    _, products = bench.decoder.functions_for(bench.device, bench.sizes.dtype)
    rows = products.rows_for(bench.decoder.layers[0].feed_forward.w1)
    bench.figures[f"{name}: activations"] = "dequantized weights" if rows is None else str(rows.dtype)
    evaluation(bench, name)
    bench.figures[f"{name}: velocity from the dense one, relative"] = distance(bench.velocity(), expected)
    found = pictures(bench, name, normal)
    bench.figures[f"{name}: turbo latents from the dense one, relative"] = distance(found, latents)


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normal", action="store_true", help="run a whole picture of the normal decoder too")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.tiny:
        sizes, device, name = TINY, torch.device("cpu"), "tiny sizes on the CPU"
    elif torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= NEEDED:
        sizes, device, name = RELEASED, torch.device("cuda"), torch.cuda.get_device_name(0)
    else:
        print("no GPU of 24 GB or more at hand")
        return
    figures: dict[str, object] = {}
    bench = Bench(sizes, device, figures)
    evaluations(bench)
    expected, latents = bench.velocity(), pictures(bench, "ours", arguments.normal)
    if device.type == "cuda":
        figures["peak memory, GB"] = torch.cuda.max_memory_allocated() / 2**30
    if device.type == "cpu" or torch.cuda.get_device_properties(0).total_memory >= NEEDED_FLOAT32:
        nn.Module.float(bench.decoder)
        bench.features = bench.features.float()
        figures["ours: velocity from float32's, relative"] = distance(expected, bench.velocity())
    for form in (Int8(), FP8Block()):
        del bench  # or two would lie on the card
        bench = Bench(sizes, device, figures, form)
        eight_bits(bench, form.name, expected, latents, arguments.normal)
    show(f"Decoder, {name}, {sizes.dtype}, random weights", figures, arguments.json)


if __name__ == "__main__":
    main()
