"""Seconds a GB and peak memory of opening a checkpoint and loading its parts, on the CPU or straight onto a GPU.

A folder of random numbers in the released layout is written first: bf16 or FP8 with an expert a key, as released, or 8
or 4 bits with banks, as converted. A process of its own opens and loads its parts as they are stored; its peak resident
memory is compared with that before opening, so that the interpreter, its libraries and the GPU's driver do not count.
The files were just written, so they come from the page cache where that has room. Expected on a CPU: at most 1.15 times
the weights as they lie in memory, plus 500 MB; on a GPU: 500 MB.

    python -m benchmarks.loading [--files bf16|fp8|8-bit|4-bit] [--gigabytes 2] [--folder DIR] [--json FILE]
    python -m benchmarks.loading --files 4-bit --released --device cuda      the released sizes, a decoder with them
    python -m benchmarks.loading --files fp8 --dtype bf16                    FP8 widened while it is read
    python -m benchmarks.loading --weights 4-bit                             quantized while it is read
    python -m benchmarks.loading --convert int4                              written anew, as the command does it
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.keys import converted_key, open_backbone, released_keys
from llada_core.backbone.model import Backbone
from llada_core.checkpoint.component import Component
from llada_core.checkpoint.layout import Layout
from llada_core.checkpoint.weights import companions
from llada_core.conversion.convert import convert
from llada_core.conversion.options import Conversion
from llada_core.conversion.shards import ShardWriter
from llada_core.decoder.decode import open_decoder, released_key
from llada_core.options import WEIGHTS
from llada_core.placement import PRECISIONS
from llada_core.quantization.choices import FORMS, asked_form, quantizable
from llada_core.quantization.formats import METADATA_SUFFIX, Dense, Format, FP8Block, encode_metadata

from .fullsize import released
from .support import ROOT, add_json, show

MB = 2**20
SHARD = 256 * MB
FACTOR, ALLOWANCE = 1.15, 500 * MB
FILES = ("bf16", "fp8", "8-bit", "4-bit")


def config_of(gigabytes: float) -> dict:
    """A small backbone with as many experts as the wanted size in bf16 has room for."""
    hidden, inner, layers = 1024, 512, 4
    expert = 3 * hidden * inner * 2
    experts = max(16, round(gigabytes * 2**30 / expert / (layers - 1) / 8) * 8)
    return {
        "vocab_size": 8192,
        "image_token_offset": 4096,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 2560,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "rope_theta": 600_000,
        "max_position_embeddings": 8192,
    }


def weights_of(config: BackboneConfig, files: str) -> Iterator[tuple[str, tuple[int, ...], Format]]:
    """Key, dense shape and form of each weight of a backbone's files."""
    with torch.device("meta"):
        module = Backbone(config)
    layers = quantizable(
        "backbone", module, lambda name: config.moe_intermediate_size if name.endswith(".gate_up") else 0
    )
    form = FP8Block() if files == "fp8" else asked_form("as stored" if files == "bf16" else files, "backbone")
    for name, tensor in module.state_dict().items():
        stored = form if form is not None and name in layers else Dense(torch.bfloat16)
        if files.endswith("-bit"):
            yield converted_key(name), tuple(tensor.shape), stored
            continue
        for key, part in released_keys(name, config):
            yield key, tuple(tensor[part].shape), stored


def decoder_weights(module: nn.Module, files: str) -> Iterator[tuple[str, tuple[int, ...], Format]]:
    """The same of a decoder: 8 bits in a converted folder, bf16 in the others."""
    form = asked_form(files, "decoder") if files.endswith("-bit") else None
    layers = quantizable("decoder", module)
    for name, tensor in module.state_dict().items():
        stored = form if form is not None and name in layers else Dense(torch.bfloat16)
        yield released_key(name), tuple(tensor.shape), stored


class Filler:
    """Tensors of any type and shape, from the same few random bytes again and again."""

    def __init__(self):
        # Numbers that are finite in every type: no exponent of bfloat16 or float8 is all ones.
        self._bytes = torch.randint(0, 64, (16 * MB,), dtype=torch.uint8)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        data = torch.empty(size, dtype=torch.uint8)
        for start in range(0, size, len(self._bytes)):
            part = data[start : start + len(self._bytes)]
            part.copy_(self._bytes[: len(part)])
        return data.view(dtype).view(shape)


def write_files(
    folder: Path, weights: Iterator[tuple[str, tuple[int, ...], Format]], name: str, filler: Filler
) -> dict[str, str]:
    """Shards of 256 MB or one bank; returns key -> file."""
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = name.format(len(set(index.values())) + 1)
        tensors = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in shard.items()}
        with ShardWriter(folder / file, tensors) as writer:
            for key, tensor in shard.items():
                writer.write(key, tensor)
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for key, shape, form in weights:
        keys = companions(key, form, shape)
        for suffix, (stored, dtype) in form.tensors(shape).items():
            shard[keys[suffix]] = filler(stored, dtype)
        said = form.metadata(shape)
        if said is not None:
            shard[keys[METADATA_SUFFIX]] = encode_metadata(said)
        if "{" in name and sum(part.nbytes for part in shard.values()) >= SHARD:
            flush()
    if shard:
        flush()
    return index


def write_folder(folder: Path, files: str, config: Mapping, decoder: dict | None) -> None:
    """The files of a backbone, and of a decoder where its configuration is given."""
    filler = Filler()
    weights = weights_of(BackboneConfig.from_dict(config), files)
    index = write_files(folder, weights, "model-{:05}.safetensors", filler)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    if decoder is not None:
        from llada_core.decoder.transformer import SemanticDecoder

        with torch.device("meta"):
            module = SemanticDecoder(**decoder)
        (folder / "decoder-turbo").mkdir()
        (folder / "decoder-turbo" / "config.json").write_text(json.dumps(decoder))
        write_files(folder / "decoder-turbo", decoder_weights(module, files), "decoder_model.safetensors", filler)


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmHWM is the peak of the resident memory, VmRSS its size now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def load(
    folder: Path, device: torch.device, dtype: torch.dtype | None, weights: str, target: Path | None, form: str
) -> dict[str, float | str]:
    """What the process of its own does: load the parts, or convert them into `target`."""
    config = BackboneConfig.from_dict(json.loads((folder / "config.json").read_text()))
    torch.zeros(8, device=device).bfloat16().float()  # what torch itself needs for a first computation
    before = status("VmHWM")
    began = time.perf_counter()
    if target is not None:
        convert(folder, target, Conversion(form), device)
        return {"load_s": time.perf_counter() - began, "peak": status("VmHWM") - before}
    layout = Layout.look(folder)
    parts: dict[str, Component] = {"backbone": open_backbone(layout.backbone_files(), config)}
    if layout.has("decoder-turbo"):
        width = json.loads((folder / "decoder-turbo" / "config.json").read_text())["cap_feat_dim"]
        parts["decoder-turbo"] = open_decoder(layout.require("decoder-turbo"), width)
    opened = time.perf_counter()
    modules, took, forms = {}, {}, {}
    for part, component in parts.items():
        start = time.perf_counter()
        forms[part] = component.asked(weights, part, dtype, device)
        modules[part] = component.load(dtype or component.dtype, device=device, asked=forms[part])
        took[f"{part}, s"] = time.perf_counter() - start
    tensors = [tensor for module in modules.values() for tensor in module.state_dict().values()]
    loaded = ", ".join(parts[part].describe(dtype or parts[part].dtype, asked) for part, asked in forms.items())
    return took | {
        "loaded": loaded,
        "open_s": opened - began,
        "load_s": time.perf_counter() - opened,
        "weights": sum(tensor.nbytes for tensor in tensors),
        "peak": status("VmHWM") - before,
        "after": status("VmRSS") - before,
    }


def main() -> None:
    """Write, load in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", choices=FILES, default="bf16", help="what the files hold")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the weights in bfloat16")
    parser.add_argument("--released", action="store_true", help="the released sizes instead, with a decoder")
    parser.add_argument("--device", default="cpu", help="where the weights will lie")
    parser.add_argument("--dtype", choices=PRECISIONS, default="auto", help="of the weights; auto is as stored")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="as stored", help="what layers become while they are read"
    )
    parser.add_argument("--convert", choices=[*FORMS], help="convert the folder instead of loading it")
    parser.add_argument("--folder", type=Path, help="where to write the temporary checkpoint")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.load:
        target = arguments.load.with_name("converted") if arguments.convert else None
        device, dtype = torch.device(arguments.device), PRECISIONS[arguments.dtype]
        found = load(arguments.load, device, dtype, arguments.weights, target, arguments.convert or "")
        print(json.dumps(found))
        return
    if not Path("/proc/self/status").exists():
        sys.exit("This benchmark reads peak memory from /proc, which this system has not.")
    sizes = released()
    config, decoder = config_of(arguments.gigabytes), None
    if arguments.released:
        config = vars(sizes.backbone) | {"tie_word_embeddings": False}
        decoder = sizes.decoder | {"cap_feat_dim": sizes.features}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        write_folder(folder, arguments.files, config, decoder)
        on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shards = len(list(folder.rglob("*.safetensors")))
        command = [sys.executable, "-m", "benchmarks.loading", "--load", str(folder)]
        command += ["--device", arguments.device, "--dtype", arguments.dtype, "--weights", arguments.weights]
        command += ["--convert", arguments.convert] if arguments.convert else []
        result = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    if arguments.convert:
        figures = {
            "on disk, GB": on_disk / 1e9,
            f"converted to {arguments.convert}, s": result["load_s"],
            "GB of the source a second": on_disk / 1e9 / result["load_s"],
            "peak, MB": result["peak"] / MB,
        }
        show(f"Converting, {arguments.files} files", figures, arguments.json)
        return
    in_memory = result["weights"] if torch.device(arguments.device).type == "cpu" else 0
    bound = FACTOR * in_memory + ALLOWANCE
    parts = {name: seconds for name, seconds in result.items() if name.endswith(", s")}
    figures = {
        "files": shards,
        "on disk, MB": math.ceil(on_disk / MB),
        "loaded": result["loaded"],
        "weights in memory, MB": result["weights"] / MB,
        "opening, s": result["open_s"],
        "loading, s": result["load_s"],
        **(parts if len(parts) > 1 else {}),
        "loading, s a GB of files": result["load_s"] / (on_disk / 1e9),
        "GB of files a second": on_disk / 1e9 / result["load_s"],
        "peak, MB": result["peak"] / MB,
        "peak / weights": result["peak"] / result["weights"],
        "left after loading, MB": result["after"] / MB,
        f"bound ({FACTOR if in_memory else 0} x + 500 MB), MB": bound / MB,
        "within the bound": "yes" if result["peak"] <= bound else "NO",
    }
    form = "" if arguments.weights == "as stored" else f", as {arguments.weights}"
    show(f"Loading, {arguments.files} files{form}", figures, arguments.json)
    sys.exit(result["peak"] > bound)


if __name__ == "__main__":
    main()
