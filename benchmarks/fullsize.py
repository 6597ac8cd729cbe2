"""The released sizes on one GPU: seconds from prompt to picture at 1024 x 1024, answers in tokens/s, peak memory.

Weights are random, so nothing needs to be downloaded: they fill the released configurations on the GPU itself, in
bfloat16, one part after the other. Random weights are never sure of a token, so blocks take all their rounds, but for
a last one that reaches behind the picture: these are the times of the worst case, and a trained model is faster. Text
is worst too, a token a round. The backbone is timed twice, with its rounds as CUDA graphs and without; graphs are
captured anew in each generation, so their time is in it.

    python -m benchmarks.fullsize [--normal] [--json FILE]     a GPU of 80 GB or more
    python -m benchmarks.fullsize --tiny                       the same path on the CPU with small sizes, in seconds
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.cuda_graphs import GraphStore
from llada_core.backbone.experts import Experts, Router
from llada_core.backbone.model import Backbone
from llada_core.decoder.conditioning import SigVQEmbedder
from llada_core.decoder.decode import AXES_LENS, decode_latents, sample_latents
from llada_core.options import Decoding, Guidance
from llada_core.quantization.grouped import can_group
from llada_core.sampling.batch import Sample
from llada_core.sampling.block_diffusion import GenerationConfig, Output, generate, prepare

from .support import add_json, load_oracle, released_backbone, show

NEEDED = 79e9  # bytes: what a card sold as 80 GB has
GB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Everything that differs between the release and --tiny. Grids are in tokens."""

    backbone: BackboneConfig
    decoder: dict
    vae: dict
    features: int  # width of the SigVQ embedder
    grid: int  # side of the picture drawn
    question_image: int  # side of the picture asked about
    answer: int  # new tokens
    dtype: torch.dtype


def released() -> Sizes:
    """docs/model.md, Parts to 3; the decoder's and VAE's fields are those of Z-Image and the Flux family."""
    return Sizes(
        released_backbone(),
        {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30},
        {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
        features=4096,
        grid=32,
        question_image=50,
        answer=128,
        dtype=torch.bfloat16,
    )


def tiny() -> Sizes:
    """Small enough for a test."""
    decoder = {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12]}
    vae = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    return Sizes(load_oracle().tiny_config(), decoder, vae, 32, 2, 3, 40, torch.float32)


class Bench:
    """Builds parts, times work and notes figures."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.figures: dict[str, object] = {}
        self._randomise = load_oracle().randomise

    def build(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module with random weights on the device; the router's stay float32, as the engine loads them."""
        with torch.device("meta"):
            module = nn.Module.to(make(), self.dtype)  # past diffusers' own, which warns
        for part in module.modules():
            if isinstance(part, Router):
                part.float()
        module = module.to_empty(device=self.device)
        return self._randomise(module, torch.Generator(self.device).manual_seed(0))

    def time(self, name: str, work: Callable[[], object], warm_up: Callable[[], object]) -> tuple[float, object]:
        """Seconds of `work` after `warm_up`, and its result; notes the time and the peak memory, weights included."""
        warm_up()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = work()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.figures[f"{name}, s"] = seconds
        if cuda:
            self.figures[f"{name}, peak GB"] = torch.cuda.max_memory_allocated() / GB
        return seconds, result


def time_backbone(bench: Bench, sizes: Sizes) -> None:
    """A picture with guidance, then an answer about a picture."""
    config = sizes.backbone
    backbone = bench.build(lambda: Backbone(config))
    banks = [part for part in backbone.modules() if isinstance(part, Experts)]
    bench.figures["grouped expert product"] = "yes" if can_group(banks[0].gate_up.weight, sizes.dtype) else "no, a loop"
    mask = config.image_token_offset - 1

    def fill(prompts: list[list[int]], config: GenerationConfig, count: int, graphs: bool) -> Output:
        sample = Sample(prompts, [mask] * count)
        runner, batch = prepare(
            backbone, [sample], config, mask, bench.device, sizes.dtype, store=GraphStore() if graphs else None
        )
        try:
            (output,) = generate(runner, batch, config)
        finally:
            runner.close()
        return output

    def both(name: str, prompts: list[list[int]], config: GenerationConfig, count: int) -> tuple[float, Output]:
        """Seconds with graphs, and what was generated; notes both times and their ratio."""
        times = {}
        for graphs, label in ((False, f"{name} without graphs"), (True, name)):
            work = partial(fill, prompts, config, count, graphs)
            before = partial(fill, prompts, replace(config, steps=2), min(count, 64), graphs)
            times[graphs], output = bench.time(label, work, before)
            bench.figures[f"{label}, ms a round"] = 1000 * times[graphs] / output.rounds
        bench.figures[f"{name}, rounds"] = output.rounds
        bench.figures[f"{name}, times as fast with graphs"] = times[False] / times[True]
        return times[True], output

    def text(count: int) -> list[int]:
        return [(7 * i) % mask for i in range(count)]

    draw = GenerationConfig(8, config.image_token_offset, config.vocab_size, guidance=Guidance(2.0))
    both("drawing tokens", [text(100), text(80)], draw, sizes.grid**2)

    image = [config.image_token_offset + i % 64 for i in range(sizes.question_image**2)]
    answer = GenerationConfig(32, 0, config.image_token_offset)
    seconds, output = both("answering", [text(60) + image + text(40)], answer, sizes.answer)
    bench.figures["answering, tokens/s"] = len(output.ids) / seconds


def time_decoders(bench: Bench, sizes: Sizes, normal: bool) -> torch.Tensor:
    """Tokens to latents with the turbo decoder, whose latents are returned, and where asked for the normal one."""
    from llada_core.decoder.transformer import SemanticDecoder

    config, width = sizes.backbone, sizes.features
    codes = config.vocab_size - config.image_token_offset
    embedder = bench.build(lambda: SigVQEmbedder(codes, width, width, width))
    decoder = bench.build(
        lambda: SemanticDecoder(in_channels=16, cap_feat_dim=width, axes_lens=list(AXES_LENS), **sizes.decoder)
    )
    grid = torch.arange(sizes.grid**2).remainder(codes).view(sizes.grid, sizes.grid)

    def sample(decoding: Decoding) -> torch.Tensor:
        return sample_latents(
            decoder, embedder(grid.to(bench.device)), tuple(grid.shape), decoding, 0, bench.device, sizes.dtype
        )

    _, latents = bench.time(
        "turbo decoder, 8 rounds", lambda: sample(Decoding(turbo=True)), lambda: sample(Decoding(turbo=True, steps=1))
    )
    if normal:
        bench.time(
            "normal decoder, 50 steps",
            lambda: sample(Decoding(turbo=False)),
            lambda: sample(Decoding(turbo=False, steps=2)),
        )
    return latents


def time_vae(bench: Bench, sizes: Sizes, latents: torch.Tensor) -> None:
    """Latents to pixels."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    fixed = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    quantless = {"use_quant_conv": False, "use_post_quant_conv": False}
    vae = bench.build(lambda: AutoencoderKL(**kinds, **fixed, **quantless, **sizes.vae))

    def decode() -> torch.Tensor:
        return decode_latents(vae, latents, bench.device, sizes.dtype)

    _, image = bench.time("VAE", decode, decode)
    bench.figures["picture"] = " x ".join(str(side) for side in image.shape[1:3])


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normal", action="store_true", help="time the normal decoder too, 49 guided evaluations")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.tiny:
        device, sizes, name = torch.device("cpu"), tiny(), "tiny sizes on the CPU"
    elif torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= NEEDED:
        device, sizes, name = torch.device("cuda"), released(), torch.cuda.get_device_name(0)
    else:
        print("no GPU of 80 GB or more at hand")
        return
    bench = Bench(device, sizes.dtype)
    time_backbone(bench, sizes)
    latents = time_decoders(bench, sizes, arguments.normal)
    time_vae(bench, sizes, latents)
    parts = ("drawing tokens, s", "turbo decoder, 8 rounds, s", "VAE, s")
    bench.figures["text to image, turbo, s"] = sum(bench.figures[part] for part in parts)
    show(f"Full size, {name}, {sizes.dtype}, random weights", bench.figures, arguments.json)


if __name__ == "__main__":
    main()
