"""The decoder as ComfyUI's own Z-Image against the engine's: how near, how long, and how much memory.

One evaluation of the released width with random weights, of as many layers as are asked for, in float32 on a processor
or in bfloat16 on a GPU. Both are given the same file. It runs inside a ComfyUI's modules, in that ComfyUI's Python:

    python -m benchmarks.native_decoder COMFYUI [--layers 2] [--grid 4] [--cpu] [--json FILE]
    python -m benchmarks.native_decoder COMFYUI --tiny --cpu       the same path with small sizes, in seconds
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from dev.hosts.inside import enter, pack

from .support import add_json, show

VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
TIMES = (0.0, 0.4, 0.9)
WARM_UPS, RUNS = 2, 5


@dataclass(frozen=True)
class Sizes:
    """What differs between the release and --tiny."""

    config: dict
    features: int


def released(layers: int) -> Sizes:
    """The released decoder of so many main layers."""
    config = {"dim": 3840, "n_layers": layers, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30}
    return Sizes(config | {"in_channels": 16, "axes_dims": [32, 48, 48]}, 4096)


def tiny(layers: int) -> Sizes:
    """Small enough for a test, of sizes that the host's detection does not know."""
    config = {"dim": 96, "n_layers": layers, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3}
    return Sizes(config | {"in_channels": 16, "axes_dims": [8, 12, 12]}, 64)


@contextmanager
def random_decoder(sizes: Sizes) -> Iterator[Path]:
    """A decoder's folder with random weights, bfloat16, for as long as it is used."""
    transformer, decode = pack("llada_core.decoder.transformer"), pack("llada_core.decoder.decode")
    with torch.device("meta"):
        names = transformer.SemanticDecoder(**sizes.config, cap_feat_dim=sizes.features).state_dict()
    generator = torch.Generator().manual_seed(0)

    def random(name: str, shape: torch.Size) -> torch.Tensor:
        value = torch.randn(shape, generator=generator)
        return (1 + 0.1 * value if "norm" in name else value / max(shape[-1], 1) ** 0.5).bfloat16()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decoder"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(sizes.config))
        tensors = {name: random(name, tensor.shape) for name, tensor in names.items()}
        file = {decode.released_key(name): tensor for name, tensor in tensors.items()}
        save_file(file, path / "decoder_model.safetensors")
        yield path


def timed(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, int]:
    """Median seconds of a run, and the most memory that it allocated beside what lay there, in bytes (0 on a CPU)."""
    cuda = device.type == "cuda"
    for _ in range(WARM_UPS):
        work()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[RUNS // 2], torch.cuda.max_memory_allocated() - before if cuda else 0


def engines(folder: Path, sizes: Sizes, side: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Velocities of the engine's decoder at TIMES, seconds and memory of one."""
    decoder = pack("llada_core.decoder.decode").open_decoder(folder, sizes.features).load(dtype).to(device)
    features, x = inputs(sizes, side, device)
    conditioning = decoder.condition(features.to(dtype), tuple(x.shape[2:]))
    found = [decoder.velocity(x[:, :, None], t, conditioning)[:, :, 0].cpu() for t in TIMES]
    seconds, peak = timed(lambda: decoder.velocity(x[:, :, None], TIMES[1], conditioning), device)
    return {"velocities": found, "seconds": seconds, "peak": peak}


def hosts(folder: Path, sizes: Sizes, side: int, device: torch.device, dtype: torch.dtype) -> dict:
    """The same of the host's, through its memory management and sampling model, and what it says it needs."""
    zimage, front = pack("nodes.host.zimage.decoder"), pack("llada_core.zimage")
    files = front.DecoderFiles("decoder", folder / "decoder_model.safetensors", sizes.config)
    patcher = zimage.load_decoder(files, VAE, dtype)
    features, x = inputs(sizes, side, device)
    shapes = {"c_crossattn": [[1, *features.shape]]}
    told = patcher.model.memory_required(list(x.shape), shapes)
    zimage.management.load_models_gpu([patcher], memory_required=told)
    patcher.pre_run()

    def velocity(t: float) -> torch.Tensor:
        sigma = torch.tensor([1 - t], device=device)
        more = {"c_crossattn": features[None], "num_tokens": len(features), "transformer_options": {}}
        return (patcher.model.apply_model(x, sigma, **more) - x) / sigma

    found = [velocity(t).cpu() for t in TIMES]
    seconds, peak = timed(lambda: velocity(TIMES[1]), device)
    return {"velocities": found, "seconds": seconds, "peak": peak, "told": told, "dynamic": is_dynamic(patcher)}


def is_dynamic(patcher) -> bool:
    """Whether the host manages the model's memory page by page."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def inputs(sizes: Sizes, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and latents of a square grid, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4 * side * side, sizes.features, generator=generator)
    return features.to(device), torch.randn(1, 16, 4 * side, 4 * side, generator=generator).to(device)


def compare(options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    sizes = (tiny if options.tiny else released)(options.layers)
    device = torch.device("cpu" if options.cpu else "cuda")
    dtype = torch.float32 if options.cpu else torch.bfloat16
    with random_decoder(sizes) as folder:
        ours = engines(folder, sizes, options.grid, device, dtype)
        theirs = hosts(folder, sizes, options.grid, device, dtype)
    pairs = zip(theirs["velocities"], ours["velocities"], strict=True)
    figures: dict[str, object] = {
        "width, layers, grid": f"{sizes.config['dim']}, {options.layers}, {options.grid} x {options.grid}",
        "type": str(dtype).removeprefix("torch."),
        "largest relative difference": f"{max(float((a - b).norm() / b.norm()) for a, b in pairs):.2e}",
        "engine, ms": 1000 * ours["seconds"],
        "host, ms": 1000 * theirs["seconds"],
        "host by engine": theirs["seconds"] / ours["seconds"],
        "DynamicVRAM": "on" if theirs["dynamic"] else "off",
        "the host is told, MB": theirs["told"] / 1e6,
    }
    if device.type == "cuda":
        figures |= {"the host takes, MB": theirs["peak"] / 1e6, "the engine takes, MB": ours["peak"] / 1e6}
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", help="the folder of a ComfyUI that knows Z-Image")
    parser.add_argument("--layers", type=int, default=2, help="main layers; the release has 30")
    parser.add_argument("--grid", type=int, default=4, help="tokens each way; 32 is 1024 x 1024 pixels")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test")
    parser.add_argument("--cpu", action="store_true", help="in float32 on the processor")
    add_json(parser)
    options = parser.parse_args()
    kept = enter(options.comfyui, ["--cpu"] if options.cpu else [])
    with torch.no_grad():
        figures = compare(options)
    del kept
    show("The decoder as ComfyUI's Z-Image against the engine's, one evaluation", figures, options.json)


if __name__ == "__main__":
    main()
