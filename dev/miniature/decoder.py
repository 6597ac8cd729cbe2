"""Stages "decoder" and "turbo": codes to VAE latents by flow matching (docs/model.md, Decoding).

Two things are learnt only with help, because the architecture tells a conditioning vector its place by a turn of its
head alone: which vector belongs to which piece of the picture. Two heads, thrown away afterwards, ask for it.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from llada_core.decoder.conditioning import SigVQEmbedder
from llada_core.decoder.decode import AXES_LENS
from llada_core.decoder.flow import normal_times, turbo_times
from llada_core.decoder.transformer import PATCH, STEM, SemanticDecoder

from .pools import latent_pool
from .sizes import SEED, Schedule
from .stage import Stage, trained
from .worlds import World

_NOTHING = 0.1  # of the examples are drawn from zero features, for guidance
_HELP = 0.2  # weight of the two helping heads
TURBO_ROUNDS = 8


def widths(world: World) -> list[int]:
    """Rows and columns of positions that a picture has at most."""
    return [2 * max(side) for side in zip(*world.grids, strict=True)]


def build(world: World) -> nn.ModuleDict:
    """Embedder and transformer with random weights, and the heads that help."""
    torch.manual_seed(SEED)
    sizes = world.sizes
    embedder = SigVQEmbedder(sizes.codes, sizes.features, 2 * sizes.features, sizes.features)
    transformer = SemanticDecoder(**{**sizes.decoder, "axes_lens": list(AXES_LENS)})
    dim = sizes.decoder["dim"]
    for parameter in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(parameter, std=0.02)
    # Blocks that are open from the start, and contents with a part that is always the same: attention by position alone
    # needs it, and noise on its own would give it nothing to hold on to.
    for name, parameter in transformer.named_parameters():
        if name.endswith("adaLN_modulation.0.bias") and len(parameter) == 4 * dim:
            parameter.data.view(4, -1)[1::2] = 1.0  # the two gates
        elif name in (f"all_x_embedder.{STEM}.bias", "cap_embedder.1.bias"):
            nn.init.normal_(parameter, std=0.5)
    help_ = nn.ModuleDict({"code": nn.Linear(dim, sizes.codes), "place": nn.Linear(dim, sum(widths(world)))})
    return nn.ModuleDict({"embedder": embedder, "transformer": transformer, "help": help_})


def velocity(
    model: SemanticDecoder, x: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`SemanticDecoder`'s condition and velocity for a batch of pictures of one size.

    Args:
        model: the transformer.
        x: latents [n, 16, 1, 4 h, 4 w].
        t: times [n], 0 (noise) to 1.
        conditions: features [n, 4·h·w, FEATURES].

    Returns:
        The velocity, of x's shape, and the hidden states [n, positions, dim] after each joint layer, picture first.
    """
    n, height, width = len(x), x.shape[3] // PATCH, x.shape[4] // PATCH

    def padded(hidden: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden, pad.to(hidden).expand(n, -hidden.shape[1] % 32, -1)], 1)

    cond = padded(model.cap_embedder(conditions), model.cap_pad_token)
    # The library's blocks, which are trained through, take a turn as a complex number.
    turns = model.turns(cond.shape[1], x.shape[3:], x.device)
    turns = torch.complex(turns.cos, turns.sin)[None]
    image_turns, cond_turns = turns.split([turns.shape[1] - cond.shape[1], cond.shape[1]], 1)
    for block in model.context_refiner:
        cond = block(cond, None, cond_turns)
    time = model.t_embedder(t * model.t_scale)
    patches = rearrange(x, "n c f (h p) (w q) -> n (f h w) (p q c)", p=PATCH, q=PATCH)
    hidden = padded(model.all_x_embedder[STEM](patches), model.x_pad_token)
    for block in model.noise_refiner:
        hidden = block(hidden, None, image_turns, time)
    hidden = torch.cat([hidden, cond], 1)
    states = []
    for block in model.layers:
        hidden = block(hidden, None, turns, time)
        states.append(hidden)
    out = model.all_final_layer[STEM](hidden[:, : height * width], time)
    out = rearrange(out, "n (h w) (p q c) -> n c (h p) (w q)", h=height, w=width, p=PATCH, q=PATCH)
    return out[:, :, None].float(), states


class DecoderStage(Stage):
    """Flow matching with times dense near the noise, where the normal sampler takes most of its steps."""

    name = "decoder"
    busy = False

    def __init__(self, schedule: Schedule, world: World, folder: Path, device: torch.device, workers: int = 0):
        self.schedule, self.world = schedule, world
        self.module = build(world)
        pool = latent_pool(world, folder, schedule.pool, device, workers)
        self.pool = {key: value.to(device) for key, value in pool.items()}  # small: it lies where it is used

    def batch(self, step: int) -> dict:
        """Which grid this step is about; the rest is drawn where the pool lies."""
        return {"grid": self.world.turn(step)}

    def _draw(self, batch: dict, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents [n, 16, 1, 4 h, 4 w] and their codes [n, h, w]."""
        latents, codes = self.pool[f"latents{batch['grid']}"], self.pool[f"codes{batch['grid']}"]
        chosen = torch.randint(len(latents), (self.schedule.batch,), generator=generator, device=latents.device)
        return latents[chosen].float()[:, :, None], codes[chosen].long()

    def loss(self, batch, generator):
        """Mean squared error of the velocity, and what helps."""
        clean, codes = self._draw(batch, generator)
        n, device = len(clean), clean.device
        u = torch.rand(n, generator=generator, device=device)
        even = torch.rand(n, generator=generator, device=device) < 0.3
        t = torch.where(even, u, u / (6 - 5 * u))
        noise = torch.randn(clean.shape, generator=generator, device=device)
        at = t.view(-1, 1, 1, 1, 1)
        conditions = self.module["embedder"](codes)
        nothing = torch.rand(n, generator=generator, device=device) < _NOTHING
        conditions = torch.where(nothing[:, None, None], torch.zeros_like(conditions), conditions)
        v, states = velocity(self.module["transformer"], (1 - at) * noise + at * clean, t, conditions)
        error = F.mse_loss(v, clean - noise)
        found, placed = self._helping(states, codes, ~nothing)
        return error + _HELP * (found["code"] + placed), {"velocity": error, **found, "places": placed}

    def _helping(self, states: list[torch.Tensor], codes: torch.Tensor, told: torch.Tensor):
        """Does each piece of the picture know its code; and each vector and piece its row and column?"""
        heads, (n, h, w) = self.module["help"], codes.shape
        pieces = 4 * h * w
        own = codes.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        logits = heads["code"](states[-2][:, :pieces]).float().transpose(1, 2)
        code = (F.cross_entropy(logits, own, reduction="none") * told[:, None]).mean()
        rows, columns = torch.meshgrid(
            torch.arange(2 * h, device=codes.device), torch.arange(2 * w, device=codes.device), indexing="ij"
        )
        start = states[0].shape[1] - -(-pieces // 32) * 32  # where the conditioning begins
        known = torch.cat([states[1][:, :pieces], states[1][:, start : start + pieces]], 1)
        row, column = heads["place"](known).float().split(widths(self.world), -1)
        placed = F.cross_entropy(row.transpose(1, 2), rows.flatten().repeat(2).expand(n, -1))
        placed = placed + F.cross_entropy(column.transpose(1, 2), columns.flatten().repeat(2).expand(n, -1))
        with torch.no_grad():
            right = ((logits.argmax(1) == own) & told[:, None]).sum() / (told.sum() * pieces).clamp(min=1)
        return {"code": code, "codes_right": right}, placed

    def matrices(self) -> list[nn.Parameter]:
        """Projections of attention and of feed-forwards."""
        named = self.module["transformer"].named_parameters()
        inner = (".attention.", ".feed_forward.")
        return [p for name, p in named if p.requires_grad and p.ndim == 2 and any(part in name for part in inner)]


class TurboStage(DecoderStage):
    """From the trained decoder: the clean latents at the turbo sampler's eight times, from where that one stands."""

    name = "turbo"

    def __init__(self, schedule: Schedule, world: World, folder: Path, device: torch.device, workers: int = 0):
        super().__init__(schedule, world, folder, device, workers)
        if trained(folder, "decoder", self.module) is None:
            raise SystemExit("Train the stage decoder first.")
        # The embedder is shared by both decoders, and the heads have done their work.
        self.module.train().requires_grad_(False)
        self.module["transformer"].requires_grad_(True)

    def loss(self, batch, generator):
        """Mean squared error of the clean latents that each round estimates."""
        clean, codes = self._draw(batch, generator)
        n, device = len(clean), clean.device
        model, conditions = self.module["transformer"], self.module["embedder"](codes)
        times = torch.tensor(turbo_times(TURBO_ROUNDS)[:-1], device=device)
        index = torch.randint(TURBO_ROUNDS, (n,), generator=generator, device=device)

        def noisy(image: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            at = t.view(-1, 1, 1, 1, 1)
            return at * image + (1 - at) * torch.randn(image.shape, generator=generator, device=device)

        # Half of the examples stand where the sampler would: on what the model itself saw one round before.
        with torch.no_grad():
            before = times[(index - 1).clamp(min=0)]
            x = noisy(clean, before)
            seen = x + (1 - before.view(-1, 1, 1, 1, 1)) * velocity(model, x, before, conditions)[0]
            own = torch.rand(n, generator=generator, device=device) < 0.5
            source = torch.where(own.view(-1, 1, 1, 1, 1), seen, clean)
        t = times[index]
        x = noisy(source, t)
        v, _ = velocity(model, x, t, conditions)
        estimate = x + (1 - t.view(-1, 1, 1, 1, 1)) * v
        error = F.mse_loss(estimate, clean)
        each = (estimate - clean).square().mean((1, 2, 3, 4))
        begun = index == 0  # from nothing but noise and codes: the hardest
        return error, {"clean": error, "first": (each * begun).sum() / begun.sum().clamp(min=1)}


@torch.no_grad()
def sampled_error(stage: DecoderStage, generator: torch.Generator, steps: int = 50) -> float:
    """Mean squared error of sampled latents (normal sampler, no guidance) to the true ones, for a batch."""
    clean, codes = stage._draw({"grid": 0}, generator)
    conditions = stage.module["embedder"](codes)
    x = torch.randn(clean.shape, generator=generator, device=clean.device)
    times = normal_times(steps)
    for t, after in pairwise(times):
        v, _ = velocity(stage.module["transformer"], x, torch.full((len(x),), t, device=x.device), conditions)
        x = x + (after - t) * v
    return float(F.mse_loss(x, clean))
