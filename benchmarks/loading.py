"""Peak memory of opening a checkpoint and loading its backbone, against the size of the weights.

A random checkpoint in the released layout (an expert a key, shards of 256 MB, bfloat16 or FP8 with block scales) is
written to a temporary folder. A process of its own opens and loads it in the dtype that it has by itself; its peak
resident memory is compared with the peak before opening, so that the interpreter and its libraries do not count.
Expected: at most 1.15 times the weights as they lie in memory, plus 500 MB.

    python -m benchmarks.loading [--gigabytes 2] [--fp8] [--folder DIR] [--json FILE]
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.keys import open_backbone
from llada_core.checkpoint.layout import Layout
from llada_core.quantization.formats import FP8Block

from .support import ROOT, add_json, show

MB = 2**20
SHARD = 256 * MB
FACTOR, ALLOWANCE = 1.15, 500 * MB


def config_of(gigabytes: float) -> dict:
    """A small backbone with as many experts as the wanted size has room for."""
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


def released_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Keys of the release and their shapes: our own names, the banks taken apart into experts."""
    from llada_core.backbone.model import Backbone

    with torch.device("meta"):
        module = Backbone(config)
    shapes = {}
    for name, tensor in module.state_dict().items():
        name = name if name == "lm_head.weight" else f"model.{name}"
        stem, found, bank = name.partition(".experts.")
        if not found:
            shapes[name] = tuple(tensor.shape)
            continue
        for expert in range(config.num_experts):
            out, inner = tensor.shape[1:]
            if bank.startswith("down"):
                shapes[f"{stem}.experts.{expert}.down_proj.weight"] = (out, inner)
            else:
                for kind in ("gate", "up"):
                    shapes[f"{stem}.experts.{expert}.{kind}_proj.weight"] = (out // 2, inner)
    return shapes


def write_checkpoint(folder: Path, config: dict, fp8: bool) -> None:
    """Random shards of 256 MB, their index and config.json; the rest of a checkpoint is not read here."""
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    keys = released_shapes(BackboneConfig.from_dict(config))
    for left, (key, shape) in zip(reversed(range(len(keys))), keys.items(), strict=True):
        tensor = torch.randn(shape, dtype=torch.bfloat16) * 0.02
        if fp8 and "_proj." in key:
            shard[key] = (tensor.float() * 4096).clamp(-448, 448).to(torch.float8_e4m3fn)
            scales, _ = FP8Block().tensors(shape)["weight_scale_inv"]
            shard[key.removesuffix(".weight") + ".weight_scale_inv"] = torch.full(scales, 1 / 4096)
        else:
            shard[key] = tensor
        if not left or sum(part.nbytes for part in shard.values()) >= SHARD:
            name = f"model-{len(set(index.values())) + 1:05}.safetensors"
            save_file(shard, folder / name)
            index |= dict.fromkeys(shard, name)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmHWM is the peak of the resident memory, VmRSS its size now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def load(folder: Path) -> dict[str, float]:
    """What the process of its own does."""
    config = BackboneConfig.from_dict(json.loads((folder / "config.json").read_text()))
    torch.zeros(8).bfloat16().float()  # what torch itself needs for a first computation
    before = status("VmHWM")
    began = time.perf_counter()
    component = open_backbone(Layout.open(folder).backbone_files(), config)
    opened = time.perf_counter()
    module = component.load(component.dtype)
    return {
        "dtype": str(component.dtype),
        "open_s": opened - began,
        "load_s": time.perf_counter() - opened,
        "weights": sum(tensor.nbytes for tensor in module.state_dict().values()),
        "peak": status("VmHWM") - before,
        "after": status("VmRSS") - before,
    }


def main() -> None:
    """Write, load in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the weights in bfloat16")
    parser.add_argument("--fp8", action="store_true", help="write FP8 blocks with scales")
    parser.add_argument("--folder", type=Path, help="where to write the temporary checkpoint")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return
    if not Path("/proc/self/status").exists():
        sys.exit("This benchmark reads peak memory from /proc, which this system has not.")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_checkpoint(folder, config_of(arguments.gigabytes), arguments.fp8)
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
        shards = len(list(folder.glob("*.safetensors")))
        command = [sys.executable, "-m", "benchmarks.loading", "--load", str(folder)]
        result = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    bound = FACTOR * result["weights"] + ALLOWANCE
    figures = {
        "shards": shards,
        "on disk, MB": math.ceil(on_disk / MB),
        "loaded as": result["dtype"],
        "weights in memory, MB": result["weights"] / MB,
        "opening, s": result["open_s"],
        "loading, s": result["load_s"],
        "peak, MB": result["peak"] / MB,
        "peak / weights": result["peak"] / result["weights"],
        "left after loading, MB": result["after"] / MB,
        "bound (1.15 x + 500 MB), MB": bound / MB,
        "within the bound": "yes" if result["peak"] <= bound else "NO",
    }
    show(f"Loading, {'FP8' if arguments.fp8 else 'bfloat16'} files", figures, arguments.json)
    sys.exit(result["peak"] > bound)


if __name__ == "__main__":
    main()
