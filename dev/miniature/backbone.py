"""Stage "backbone": block diffusion over all tasks at once, with the engine's own modules."""

import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.experts import Experts, Router
from llada_core.backbone.model import Backbone, RMSNorm

from . import pools, tokenizer
from .examples import SHARES, Example, drill, example
from .packing import TAIL, TARGET, lay_out, rows_of, sequence, visible
from .sizes import BACKBONE, SEED, Schedule
from .stage import Stage, origin
from .world import Scene

LENGTH = 768  # positions of a row; the longest story fits
_PER_ROW = 4  # examples that a row holds, about
_WHOLE = 0.3  # of the copies are masked from end to end, as every block is in its first round
_HELP = 0.1  # weight of the helping head
_HELPED = 2  # layers below the helping head
PLACES = 64  # of an image body
PICTURES = 4  # of a sequence
# The norms of queries and keys begin with this. With 1, heads of 32 numbers give one key of 200 at most six tenths of
# their attention.
_SHARP = 1.5
_BIAS_RATE = 1e-3  # how fast the routers' biases even out the experts
_POOLED = tuple(task for task in SHARES if task != "understand")


class NoCache:
    """A context for `Backbone.forward` that keeps nothing: every key is in the row."""

    def extend(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values as they are."""
        return k, v


def config(vocab_size: int, image_offset: int) -> BackboneConfig:
    """The miniature's configuration for a vocabulary."""
    known = {field.name for field in fields(BackboneConfig)}
    given = {name: value for name, value in BACKBONE.items() if name in known}
    return BackboneConfig(**given, vocab_size=vocab_size, image_token_offset=image_offset)


def build(sizes: BackboneConfig) -> Backbone:
    """The backbone with random weights."""
    torch.manual_seed(SEED)
    model = Backbone(sizes)
    for name, parameter in model.named_parameters():
        if name.endswith("expert_bias"):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)  # evened out by hand, see `BackboneStage.after_step`
        elif name == "word_embeddings.weight":
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.normal_(parameter, std=0.6 * parameter.shape[-1] ** -0.5)
        if name.endswith(("attention.dense.weight", "down_proj.weight", "experts.down.weight")):
            parameter.data.mul_((2 * sizes.num_hidden_layers) ** -0.5)
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            nn.init.constant_(module.weight, _SHARP if "attention" in name.split(".") else 1.0)
    return model


def forward(model: Backbone, batch: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [rows, length, hidden] of packed rows holding `ids`."""
    return model(ids, batch["positions"], NoCache(), 0, visible(batch))


def noised(batch: dict[str, torch.Tensor], mask: int, words, generator: torch.Generator):
    """Mask a share of each copy, drawn anew for each.

    Behind an image body the engine writes image codes that nobody asked for; here they are codes of anything.

    Returns:
        ids with masks int64 [rows, length], and which of them are to be found, bool.
    """
    device = batch["ids"].device

    def chance(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    rows, length = batch["ids"].shape
    # A copy is one owner's group: number them within the row by where they change.
    key = batch["owners"] * 64 + batch["groups"]
    copies = F.pad((key[:, 1:] != key[:, :-1]).cumsum(1), (1, 0))
    share = chance(rows, length)
    share = torch.where(chance(rows, length) < _WHOLE, torch.ones_like(share), share).gather(1, copies)
    hidden = chance(rows, length) < share
    target, tail = batch["roles"] == TARGET, batch["roles"] == TAIL
    junk = torch.randint(words.image_offset, words.vocab_size, (rows, length), generator=generator, device=device)
    ids = torch.where(tail, junk, batch["ids"])
    ids = torch.where((target | tail) & hidden, torch.full_like(ids, mask), ids)
    return ids, target & hidden


def with_help(backbone: Backbone) -> nn.ModuleDict:
    """What the stage trains: the backbone and a head that is not exported."""
    return nn.ModuleDict({"model": backbone, "help": nn.Linear(BACKBONE["hidden_size"], PLACES + PICTURES)})


class BackboneStage(Stage):
    """All tasks mixed, rows packed full. Questions are asked anew at every step, about pictures of the pool."""

    name = "backbone"

    def __init__(self, schedule: Schedule, folder: Path, device: torch.device, workers: int = 0):
        self.schedule = schedule
        self.words = tokenizer.vocabulary(tokenizer.build())
        backbone = build(config(self.words.vocab_size, self.words.image_offset))
        self.module = with_help(backbone)
        self.pool = code_pool(folder, schedule.pool, device, workers)
        self.routers = [module for module in backbone.modules() if isinstance(module, Router)]
        for module in backbone.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(_in_autocast)
        self._loads: dict[int, torch.Tensor] = {}
        for index, router in enumerate(self.routers):
            _in_float32(router)
            router.register_forward_hook(lambda module, _, out, index=index: self._count(index, out[0]))
        self._early: torch.Tensor | None = None
        backbone.layers[_HELPED - 1].register_forward_hook(self._keep_early)

    def _count(self, index: int, experts: torch.Tensor) -> None:
        self._loads[index] = torch.zeros(BACKBONE["num_experts"], device=experts.device).index_add_(
            0, experts.flatten(), torch.ones(experts.numel(), device=experts.device)
        )

    def _keep_early(self, module: nn.Module, _, out: torch.Tensor) -> None:
        self._early = out

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """`packing.rows_of` for examples of the pool."""
        rng = random.Random(SEED * 15_485_863 + step)

        def packed():
            while True:
                made, codes = self._asked(rng) if rng.random() < SHARES["understand"] else self._pooled(rng)
                yield lay_out(sequence(made, codes, self.words, rng), self.words)

        return rows_of(packed(), max(1, self.schedule.batch // _PER_ROW), LENGTH, self.words.end)

    def _pooled(self, rng: random.Random) -> tuple[Example, list[torch.Tensor]]:
        index = rng.randrange(len(self.pool["starts"]))
        made = pooled_example(index)
        return made, pooled_codes(self.pool, index, made)

    def _asked(self, rng: random.Random) -> tuple[Example, list[torch.Tensor]]:
        known: dict[Scene, torch.Tensor] = {}

        def scene() -> Scene:
            made, codes = self._pooled(rng)
            known.update(zip(made.scenes, codes, strict=True))
            return made.scenes[-1]

        made = drill(rng, scene)
        return made, [known[shown] for shown in made.scenes]

    def loss(self, batch, generator):
        """Cross-entropy at masked positions, and what helps: which place of which picture is this?"""
        ids, wanted = noised(batch, self.words.mask, self.words, generator)
        model = self.module["model"]
        hidden = forward(model, batch, ids)
        right, weight, body = batch["ids"][wanted], batch["weights"][wanted], batch["places"] >= 0
        logits = model.lm_head(hidden[wanted]).float()
        error = (F.cross_entropy(logits, right, reduction="none") * weight).sum() / weight.sum()
        place, picture = self.module["help"](self._early[body]).float().split((PLACES, PICTURES), -1)
        help_ = F.cross_entropy(place, batch["places"][body]) + F.cross_entropy(picture, batch["pictures"][body])
        with torch.no_grad():
            hit, in_image, answer = (logits.argmax(-1) == right).float(), right >= self.words.image_offset, weight > 1
            # Most of a picture is background; what tells is whether the objects are right.
            shown = {
                "text": (hit * ~in_image).sum() / (~in_image).sum().clamp(min=1),
                "answers": (hit * answer).sum() / answer.sum().clamp(min=1),
                "image": (hit * in_image).sum() / in_image.sum().clamp(min=1),
                "place": (place.argmax(-1) == batch["places"][body]).float().mean(),
                "picture": (picture.argmax(-1) == batch["pictures"][body]).float().mean(),
                "busiest": torch.stack([load.max() / load.mean() for load in self._loads.values()]).max(),
            }
        return error + _HELP * help_, {"error": error, **shown}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Even out the experts: a bias rises where an expert has less than its share, and falls where it has more."""
        for index, router in enumerate(self.routers):
            load = self._loads[index]
            router.expert_bias += _BIAS_RATE * (load.mean() - load).sign()


def _in_autocast(module: nn.Module, given: tuple) -> tuple:
    """Experts multiply in the dtype of their rows: give them autocast's, so that a GPU takes the grouped product."""
    x, *rest = given
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return (x, *rest)


def _in_float32(router: Router) -> None:
    """Keep a router out of autocast: the engine computes it in float32."""
    original = router.forward

    def exact(x: torch.Tensor):
        with torch.autocast(x.device.type, enabled=False):
            return original(x)

    router.forward = exact


def pooled_example(index: int) -> Example:
    """Example `index` of the pool: any task but questions."""
    rng = random.Random(SEED * 1_299_709 + index)
    return example(rng, task=rng.choices(_POOLED, [SHARES[task] for task in _POOLED])[0])


def pooled_codes(pool: dict[str, np.ndarray], index: int, made: Example) -> list[torch.Tensor]:
    """The codes of its scenes, int16 [h, w] each."""
    at, grids = int(pool["starts"][index]), []
    for scene in made.scenes:
        rows, columns = scene.grid
        grids.append(torch.from_numpy(pool["codes"][at : at + rows * columns].reshape(rows, columns)))
        at += rows * columns
    return grids


def code_pool(folder: Path, count: int, device: torch.device, workers: int) -> dict[str, np.ndarray]:
    """The codes of all scenes of `count` examples, one after the other, and where each example's begin.

    Made once and kept in the folder of the run.
    """
    path, made_from = folder / "pool-codes.npz", f"{count} of {SHARES}, {origin(folder, 'vision')}"
    if not path.exists() or str(np.load(path)["made_from"]) != made_from:
        made = [pooled_example(index).scenes for index in range(count)]
        grids = pools.codes(folder, [scene for scenes in made for scene in scenes], device, workers)
        flat = [grid.flatten().numpy() for grid in grids]
        sizes = np.array([sum(scene.grid[0] * scene.grid[1] for scene in scenes) for scenes in made])
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, codes=np.concatenate(flat), starts=np.cumsum(sizes) - sizes, made_from=made_from)
        path.with_suffix(".part").replace(path)
        print(f"codes of {len(grids)} pictures in {count} examples", flush=True)
    with np.load(path) as file:
        return {"codes": file["codes"], "starts": file["starts"]}
