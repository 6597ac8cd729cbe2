"""Stage "backbone": block diffusion over all tasks at once, with the engine's own modules."""

import random
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.experts import Experts, Router
from llada_core.backbone.model import Backbone, RMSNorm

from . import pools, tokenizer
from .examples import Example
from .packing import TAIL, TARGET, Manner, lay_out, rows_of, sequence, sparsely_visible, visible
from .sizes import SEED, Schedule, Sizes
from .stage import Stage
from .worlds import World

_WHOLE = 0.3  # of the copies are masked from end to end, as every block is in its first round
_HELP = 0.1  # weight of the helping head
_HELPED = 2  # layers below the helping head
# The norms of queries and keys begin with this. With 1, heads of 32 numbers give one key of 200 at most six tenths of
# their attention.
_SHARP = 1.5
_BIAS_RATE = 1e-3  # how fast the routers' biases even out the experts
_ASKED = "understand"  # the task whose kinds are drawn by a drill


class NoCache:
    """A context for `Backbone.forward` that keeps nothing: every key is in the row."""

    def extend(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values as they are."""
        return k, v


def config(sizes: Sizes, vocab_size: int, image_offset: int) -> BackboneConfig:
    """A world's configuration for a vocabulary."""
    known = {field.name for field in fields(BackboneConfig)}
    given = {name: value for name, value in sizes.backbone.items() if name in known}
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


def forward(model: Backbone, batch: dict[str, torch.Tensor], ids: torch.Tensor, sparse: bool = False) -> torch.Tensor:
    """Hidden states [rows, length, hidden] of packed rows holding `ids`; `sparse` leaves out a mask's empty squares."""
    if sparse:
        return model(ids, batch["positions"], NoCache(), 0, None, sparsely_visible(batch))
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


def answers(world: World) -> list[int]:
    """How many places and pictures the helping head tells apart."""
    return [max(rows * columns for rows, columns in world.grids), world.sizes.pictures]


def with_help(backbone: Backbone, world: World) -> nn.ModuleDict:
    """What the stage trains: the backbone and a head that is not exported."""
    head = nn.Linear(backbone.config.hidden_size, sum(answers(world)))
    return nn.ModuleDict({"model": backbone, "help": head})


class BackboneStage(Stage):
    """All tasks mixed, rows packed full. Every example is made anew: what is seen twice may be learnt by heart.

    Codes come from a table (`pools.code_table`), so pictures cost no pass through the vision tower.
    """

    name = "backbone"

    def __init__(self, schedule: Schedule, world: World, folder: Path, device: torch.device, workers: int = 0):
        self.schedule, self.world, self.sparse = schedule, world, False
        self.words = tokenizer.vocabulary(tokenizer.build(world), world.sizes)
        backbone = build(config(world.sizes, self.words.vocab_size, self.words.image_offset))
        self.module = with_help(backbone, world)
        self.manner = Manner(world.grids[0], world.sizes.object_weight, world.sizes.length)
        self.table = pools.code_table(world, folder)
        self.routers = [module for module in backbone.modules() if isinstance(module, Router)]
        for module in backbone.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(_in_autocast)
        for router in self.routers:
            _in_float32(router)
            # A buffer of the router's: compiled layers share their code, and may count for each other on the stage.
            router.register_buffer("load", torch.zeros(router.config.num_experts), persistent=False)
            router.register_forward_hook(_count)
        self._early: torch.Tensor | None = None
        backbone.layers[_HELPED - 1].register_forward_hook(self._keep_early)

    def _keep_early(self, module: nn.Module, _, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        x, added = out  # the next layer's norm sums them
        self._early = x + added

    def compile(self, backend: str = "inductor") -> None:
        """Compile the layers, with FlexAttention in them: their hundreds of small kernels become a few dozen."""
        self.sparse = True
        layers = self.module["model"].layers
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(layers))
        for layer in layers:
            layer.compile(backend=backend, dynamic=False)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """`packing.rows_of` for examples made for this step."""
        rng = random.Random(SEED * 15_485_863 + step)
        shares = self.world.shares

        def packed():
            while True:
                (task,) = rng.choices(tuple(shares), shares.values())
                made = self._asked(rng) if task == _ASKED else self.world.example(rng, task)
                codes = [pools.codes_by_look(self.world, self.table, scene) for scene in made.scenes]
                yield lay_out(sequence(made, codes, self.words, rng, self.manner), self.words)

        sizes = self.world.sizes
        return rows_of(packed(), max(1, self.schedule.batch // sizes.per_row), sizes.length, self.words.end)

    def _asked(self, rng: random.Random) -> Example:
        return self.world.drill(rng, lambda: self.world.sample(rng, rng.choice(self.world.shown)))

    def loss(self, batch, generator):
        """Cross-entropy at masked positions, and what helps: which place of which picture is this?"""
        ids, wanted = noised(batch, self.words.mask, self.words, generator)
        model = self.module["model"]
        hidden = forward(model, batch, ids, self.sparse)
        right, weight, body = batch["ids"][wanted], batch["weights"][wanted], batch["places"] >= 0
        logits = model.lm_head(hidden[wanted]).float()
        error = (F.cross_entropy(logits, right, reduction="none") * weight).sum() / weight.sum()
        place, picture = self.module["help"](self._early[body]).float().split(answers(self.world), -1)
        help_ = F.cross_entropy(place, batch["places"][body]) + F.cross_entropy(picture, batch["pictures"][body])
        with torch.no_grad():
            hit, in_image = (logits.argmax(-1) == right).float(), right >= self.words.image_offset
            answer, shown_things = ~in_image & (weight > 1), in_image & (weight > 1)
            # Most of a picture is background; what tells is whether the objects are right.
            shown = {
                "text": (hit * ~in_image).sum() / (~in_image).sum().clamp(min=1),
                "answers": (hit * answer).sum() / answer.sum().clamp(min=1),
                "image": (hit * in_image).sum() / in_image.sum().clamp(min=1),
                "objects": (hit * shown_things).sum() / shown_things.sum().clamp(min=1),
                "place": (place.argmax(-1) == batch["places"][body]).float().mean(),
                "picture": (picture.argmax(-1) == batch["pictures"][body]).float().mean(),
                "busiest": torch.stack([router.load.max() / router.load.mean() for router in self.routers]).max(),
            }
        return error + _HELP * help_, {"error": error, **shown}

    def matrices(self) -> list[nn.Parameter]:
        """Projections of attention and of all MLPs and experts."""
        named = self.module["model"].layers.named_parameters()
        return [p for name, p in named if p.ndim >= 2 and not name.endswith("mlp.gate.weight")]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Even out the experts: a bias rises where an expert has less than its share, and falls where it has more."""
        for router in self.routers:
            router.expert_bias += _BIAS_RATE * (router.load.mean() - router.load).sign()


@torch.no_grad()
def _count(router: Router, _, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """How many of the tokens chose each expert."""
    experts = out[0].flatten()
    ones = torch.ones_like(experts, dtype=router.load.dtype)
    router.load.copy_(torch.zeros_like(router.load).index_add_(0, experts, ones))


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
