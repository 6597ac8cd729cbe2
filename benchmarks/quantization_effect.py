"""What the stored form of each kind of layer does to a backbone's predictions, on a checkpoint that means something.

Edits of held-out pictures of the miniature's world are drawn with the weights as they are: an edit has to look things
up, so it is the first to suffer. Then the whole picture is masked again, and each position predicted with one kind of
layer stored in one format, all others as they are. Printed are the mean divergence from the unchanged predictions, in
millionths of a nat, and the share of positions whose most likely token changes. The divergence shows a loss long
before answers or pictures do.

    python -m benchmarks.quantization_effect CHECKPOINT [--pictures 12] [--device cuda] [--json FILE]
"""

import argparse
import copy
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dev.miniature.examples import example
from dev.miniature.world import render
from llada_core import prompts
from llada_core.backbone.model import Backbone
from llada_core.engine import LLaDAUni
from llada_core.image_tokens import join
from llada_core.quantization.formats import Format, FP8Block, Int4, Int8, describe

from .support import add_json, load_oracle, show

KINDS = {
    "experts": r"\.experts\.(gate_up|down)\.weight",
    "attention": r"\.attention\.(query_key_value|dense)\.weight",
    "shared experts, dense layers": r"\.mlp\.(shared_experts\.)?\w+_proj\.weight",
    "first and last layer": r"layers\.(0|{last})\..*(experts\.\w+|query_key_value|dense|_proj)\.weight",
    "embeddings": r"word_embeddings\.weight",
    "head": r"lm_head\.weight",
    "router": r"\.mlp\.gate\.weight",
}
FORMATS: list[Format] = [Int8(), FP8Block(), Int4(64), Int4(128), Int4(64, symmetric=True)]
ALL = ("experts", "attention", "shared experts, dense layers")


def masked_edits(model: LLaDAUni, count: int) -> list[tuple[list[int], list[bool]]]:
    """Prompt and masked picture of each example: ids, and which of them are masked."""
    rng, found = random.Random(0), []
    for _ in range(count):
        made = example(rng, "held-out", "edit")
        pixels = (torch.from_numpy(np.asarray(render(scene)).copy())[None] / 255 for scene in made.references)
        references = join([model.encode(one, "edit") for one in pixels])
        tokens = model.generate(made.instruction, references=references).tokens.grids[0].flatten().tolist()
        ids = prompts.edit(model.vocabulary, made.instruction, references).conditional
        found.append((ids + [model.vocabulary.mask] * len(tokens), [False] * len(ids) + [True] * len(tokens)))
    return found


def predictions(backbone: Backbone, rows: list[tuple[list[int], list[bool]]], offset: int) -> torch.Tensor:
    """Log-probabilities of image codes at every masked position, [positions, codes]."""
    forward, device = load_oracle().recomputing(backbone), backbone.lm_head.weight.device
    found = []
    for row, masked in rows:
        ids, at = torch.tensor([row], device=device), torch.arange(len(row), device=device)
        visible = (at[:, None] // 32 >= at // 32)[None]
        hidden = forward(ids, at[None], visible)[0][0][torch.tensor(masked, device=device)]
        found.append(F.log_softmax(F.linear(hidden, backbone.lm_head.weight[offset:]).float(), -1))
    return torch.cat(found)


def stored(backbone: Backbone, pattern: str, form: Format) -> tuple[Backbone, int]:
    """A copy whose matching weights are what the format stores of them, and how many those are."""
    changed, count = copy.deepcopy(backbone), 0
    expression = re.compile(pattern.replace("{last}", str(backbone.config.num_hidden_layers - 1)))
    for name, weight in changed.named_parameters():
        if expression.search(name):
            weight.data.copy_(form.dequantize(form.quantize(weight.data), weight.shape[-1], weight.dtype))
            count += 1
    return changed, count


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    add_json(parser)
    arguments = parser.parse_args()
    model = LLaDAUni(arguments.checkpoint)
    rows, offset = masked_edits(model, arguments.pictures), model.vocabulary.image_offset
    backbone = model.components["backbone"].load(torch.float32).to(arguments.device)
    plain = predictions(backbone, rows, offset)
    figures: dict[str, object] = {"masked positions": len(plain)}
    wanted = dict(KINDS.items())
    wanted["all that is quantized"] = "|".join(KINDS[kind] for kind in ALL)
    for kind, pattern in wanted.items():
        for form in FORMATS:
            changed, count = stored(backbone, pattern, form)
            if not count:
                raise RuntimeError(f"no weight of the checkpoint is one of {kind}")
            found = predictions(changed, rows, offset)
            divergence = (plain.exp() * (plain - found)).sum(-1).mean()
            moved = (plain.argmax(-1) != found.argmax(-1)).float().mean()
            name = describe(form).removesuffix(", search True").removesuffix(", part_rows 0")
            figures[f"{kind}, {name}"] = f"{float(divergence) * 1e6:12.1f}   {float(moved) * 100:6.2f} %"
    show("Divergence in millionths of a nat, and most likely tokens that change", figures, arguments.json)


if __name__ == "__main__":
    main()
