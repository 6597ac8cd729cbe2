"""Write what a run has learnt so far as a checkpoint in the released layout (docs/model.md, Files), with its card.

    python -m dev.miniature.export RUN CHECKPOINT [--world signs]

Parts whose stage has not begun are left out. The engine opens whatever has the backbone.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from llada_core.backbone.keys import released_keys
from llada_core.decoder.conditioning import NAMES
from llada_core.decoder.decode import released_key

from . import backbone, decoder, tokenizer, vae, vision
from .pools import factors_of
from .stage import trained
from .worlds import WORLDS, World

DTYPE = torch.bfloat16
STAGES = ("vae", "vision", "decoder", "turbo", "backbone")


def export(world: World, run: Path, target: Path) -> Path:
    """Write the checkpoint; returns its folder.

    Args:
        world: that the run learns.
        run: folder of a training run.
        target: made anew.
    """
    fresh = target.with_name(f"{target.name}.{os.getpid()}.part")  # two programs may export at the same time
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "image_tokenizer").mkdir(parents=True)
    words, sizes = tokenizer.build(world), world.sizes
    tokenizer.save(words, fresh)
    _backbone(world, run, fresh, tokenizer.vocabulary(words, sizes))
    if (model := trained(run, "vision", vision.VisionTrainer(world))) is not None:
        folder = fresh / "image_tokenizer"
        _json(folder / "config.json", {"vision_config": sizes.vision, "vq_config": sizes.vq})
        _json(folder / "preprocessor_config.json", sizes.preprocessor)
        weights = {f"model.{key}": value for key, value in model.model.state_dict().items()}
        _save(weights, folder / "image_tokenizer.safetensors")
    _decoders(world, run, fresh)
    if (model := trained(run, "vae", vae.build(sizes))) is not None:
        (fresh / "vae").mkdir()
        _json(fresh / "vae" / "config.json", {"_class_name": "AutoencoderKL", **sizes.vae, **factors_of(run)})
        _save(model.state_dict(), fresh / "vae" / "diffusion_pytorch_model.safetensors")
    (fresh / "README.md").write_text(card(world, run, fresh))
    shutil.rmtree(target, ignore_errors=True)
    fresh.replace(target)
    return target


def _backbone(world: World, run: Path, target: Path, vocabulary) -> None:
    config = {"vocab_size": vocabulary.vocab_size, "image_token_offset": vocabulary.image_offset}
    config |= world.sizes.backbone
    config |= {"architectures": ["LLaDA2MoeModelLM"], "torch_dtype": "bfloat16", "use_cache": False}
    config |= {"pad_token_id": vocabulary.end, "eos_token_id": vocabulary.end}
    _json(target / "config.json", config)
    sizes = backbone.config(world.sizes, vocabulary.vocab_size, vocabulary.image_offset)
    model = backbone.build(sizes)
    if trained(run, "backbone", backbone.with_help(model, world)) is not None:
        weights = {
            key: tensor[part] for name, tensor in model.state_dict().items() for key, part in released_keys(name, sizes)
        }
        _save(weights, target / "model.safetensors", keep=("gate.weight", "expert_bias"))


def _decoders(world: World, run: Path, target: Path) -> None:
    for stage, name in (("decoder", "decoder"), ("turbo", "decoder-turbo")):
        if (model := trained(run, stage, decoder.build(world))) is None:
            continue
        (target / name).mkdir()
        _json(target / name / "config.json", {"_class_name": "ZImageTransformer2DModel", **world.sizes.decoder})
        weights = {released_key(name): value for name, value in model["transformer"].state_dict().items()}
        _save(weights, target / name / "decoder_model.safetensors")
        ours = model["embedder"].state_dict()  # the same in both stages
        released = {key: ours[mine].to(DTYPE).clone() for key, mine in NAMES.items()}
        torch.save(released, target / "image_tokenizer" / "sigvq_embedding.pt")


def _save(weights: dict[str, torch.Tensor], path: Path, keep: tuple[str, ...] = ()) -> None:
    """Safetensors in DTYPE, but for what stays float32."""
    cast = {key: (value if key.endswith(keep or ("\0",)) else value.to(DTYPE)) for key, value in weights.items()}
    save_file({key: value.contiguous().clone() for key, value in cast.items()}, str(path), metadata={"format": "pt"})


def _json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def card(world: World, run: Path, target: Path) -> str:
    """The README of the checkpoint: what it is, how long each stage trained, with which last figures."""
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
    lines = []
    for stage in STAGES:
        if (path := run / f"{stage}.pt").exists():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            figures = ", ".join(f"{name} {value:.4g}" for name, value in state["figures"].items())
            lines.append(
                f"| {stage} | {state['step']:,} | {state['seconds'] / 60:.1f} | {state['device']} | {figures} |"
            )
    measured = run / "quality.md"
    quality = measured.read_text() if measured.exists() else "Not measured yet: `python -m benchmarks.quality`.\n"
    return _CARD.format(size=size, knows=_KNOWS[world.name], name=world.name, stages="\n".join(lines), quality=quality)


_KNOWS = {
    "shapes": "one to three coloured shapes on plain backgrounds, at\n256 x 256 and at 256 wide x 192 high.",
    "signs": "one to six objects with fills, one in front of\nanother, written words and numbers, plain grounds and "
    "scenes, at 512 wide and 384 to 640 high.",
}
_CARD = """---
license: apache-2.0
---

# A miniature of LLaDA2.0-Uni

A checkpoint in the released layout, {size:.1f} MB, of the released architecture at small size. It draws, plans, edits,
questions and tells stories about one small world: {knows}
It knows nothing else, and no weight of it comes from another model.

Trained from nothing by `python -m dev.miniature.train --world {name}` with a fixed seed, on drawings and texts that the
project makes itself. One scene in ten is held out by a hash of its content.

| stage | steps | minutes | on | last figures in training |
|---|---|---|---|---|
{stages}

## Measured on held-out prompts

{quality}"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--world", choices=WORLDS, default="shapes")
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    export(WORLDS[options.world](), options.run, options.checkpoint)
