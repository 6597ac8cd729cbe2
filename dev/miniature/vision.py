"""Stage "vision": SigLIP-VQ learns to name what it sees, patch by patch, through a quantizer.

Nothing here reconstructs pixels. Each patch's code must tell which colour, shape and size it belongs to and where in
it the object lies. It is asked for nothing else, so that a code says nothing else.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from llada_core.vision.siglip_vq import SiglipVQ

from .pictures import picture_pool
from .sizes import SEED, Schedule, Sizes
from .stage import Stage
from .worlds import World

_CELLS = 4  # each way, in which a patch's coverage is told
_REVIVE_EVERY = 50
_DEAD = 0.05  # uses a step, on the running mean, below which a code is moved
_SAME = 0.945  # cosine above which two codes say the same
_SHARPNESS = 20.0  # of the softmax over looks, by cosine
_SERVED = 0.93  # cosine to the nearest code below which a latent is badly served


def build(sizes: Sizes) -> SiglipVQ:
    """The vision tower and the quantizer with random weights."""
    torch.manual_seed(SEED)
    visual = GlmImageVisionModel(GlmImageVisionConfig(**sizes.vision, attn_implementation="sdpa"))
    return SiglipVQ(visual, GlmImageVQVAE(GlmImageVQVAEConfig(**sizes.vq))).requires_grad_(True)


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, height, width, 3] -> patches [n, h·w, 3, 16, 16] as the engine's preprocessing leaves them."""
    scaled = (pixels.float() / 255 - 0.5) / 0.5
    return rearrange(scaled, "n (h p) (w q) c -> n (h w) c p q", p=16, q=16)


def latents_of(model: SiglipVQ, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 16 h, 16 w, 3] -> unit latents [n, h·w, embed_dim]: the engine's `encode` for pictures of one size."""
    n, h, w = pixels.shape[0], pixels.shape[1] // 16, pixels.shape[2] // 16
    visual, patches = model.visual, to_model(pixels)
    hidden = visual.patch_embed.proj(patches.flatten(0, 1)).flatten(1).view(n, h * w, -1)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rows, columns = rows.flatten().to(hidden.device), columns.flatten().to(hidden.device)
    shape = torch.tensor([[1, h, w]], device=hidden.device)
    zeros = hidden.new_zeros(h * w, hidden.shape[-1])
    hidden = hidden + visual.embeddings(zeros, [h * w], shape, rows, columns)
    for block in visual.blocks:
        # The library cuts a packed sequence picture by picture; pictures of one size go through as a batch.
        q, k, v = block.attn.qkv(block.norm1(hidden)).view(n, h * w, 3, block.attn.num_heads, -1).unbind(2)
        attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        hidden = hidden + block.attn.proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    conv = model.vqmodel.quant_conv
    return F.normalize(F.linear(hidden, conv.weight.flatten(1), conv.bias).float(), dim=-1)


@torch.no_grad()
def codes_of(model: SiglipVQ, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 16 h, 16 w, 3] -> codes int64 [n, h, w]."""
    latents = latents_of(model, pixels)
    codebook = F.normalize(model.vqmodel.quantize.embedding.weight.float(), dim=-1)
    return (latents @ codebook.T).argmax(-1).view(len(pixels), pixels.shape[1] // 16, -1)


class VisionTrainer(nn.Module):
    """SigLIP-VQ, the heads that question it (not kept afterwards), how often each code is used, and what looks are."""

    def __init__(self, world: World):
        super().__init__()
        self.model = build(world.sizes)
        width, codes = world.sizes.vq["embed_dim"], world.sizes.codes
        self.split = [world.tints, world.kinds, _CELLS**2]
        self.patch = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, sum(self.split)))
        self.register_buffer("uses", torch.ones(codes))
        self.register_buffer("looks", torch.zeros(world.tints * world.kinds * world.quarters, width))


class VisionStage(Stage):
    """First free features, then a codebook laid over them, then both together; dead codes are moved."""

    name = "vision"
    busy = False

    def __init__(self, schedule: Schedule, world: World, folder: Path, device: torch.device, workers: int = 0):
        self.schedule, self.world, self.free = schedule, world, world.sizes.free
        self.module = VisionTrainer(world)
        self.pool = picture_pool(world, folder, schedule.pool, workers, full=False, device=device)
        self._last: torch.Tensor | None = None

    def batch(self, step: int) -> dict:
        """Which grid the step is about; the rest is drawn where the pool lies."""
        return {"grid": self.world.turn(step), "step": step}

    def draw(self, grid: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """pixels uint8 [n, 16 h, 16 w, 3] and `World.targets`."""
        pool = {name: values for name, values in self.pool[grid].items() if name != "focus"}
        device = pool["seen"].device
        chosen = torch.randint(len(pool["seen"]), (self.schedule.batch,), generator=generator, device=device)
        drawn = {name: values[chosen] for name, values in pool.items()}
        wanted = {name: drawn[name].long() for name in ("colour", "kind", "quarter")}
        return {"pixels": drawn["seen"], "cover": drawn["cover"].float(), **wanted}

    def loss(self, batch, generator):
        """Naming losses, plus the quantizer's own once it is in use."""
        m, step = self.module, batch["step"]
        batch = self.draw(batch["grid"], generator)
        latents = free = latents_of(m.model, batch["pixels"])
        self._last = latents.detach().flatten(0, 1)
        kinds = self.world.kinds
        looks = ((batch["colour"] * kinds + batch["kind"]) * self.world.quarters + batch["quarter"]).flatten()
        self._learn_looks(looks)
        if step == self.free:
            self._lay_codebook(generator)
        extra = latents.new_zeros(())
        if step >= self.free:
            with torch.autocast(latents.device.type, enabled=False):
                quantized, extra, codes = m.model.vqmodel.quantize(latents.transpose(1, 2)[..., None])
            latents = quantized[..., 0].transpose(1, 2)
            with torch.no_grad():
                m.uses.lerp_(torch.bincount(codes, minlength=len(m.uses)).float(), 0.02)
        told = m.patch(latents * 4)
        colour, kind, cover = told.split(m.split, -1)
        inked = batch["kind"] >= self.world.grounds
        # Most patches are background: they weigh as much as objects, all together.
        weight = inked / inked.sum() + 0.5 * ~inked / (~inked).sum()

        def named(logits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return (F.cross_entropy(logits.transpose(1, 2).float(), right, reduction="none") * weight).sum()

        covering = F.binary_cross_entropy_with_logits(cover.float(), batch["cover"], reduction="none").mean(-1)
        loss = named(colour, batch["colour"]) + named(kind, batch["kind"]) + 4 * (covering * weight).sum()
        # Drawn to the mean of all that look like it, equal patches get equal codes wherever they lie and whatever else
        # is in the picture; otherwise the backbone would have to guess which of many codes for the same yellow is next.
        middles = F.normalize(m.looks, dim=-1)[looks].view_as(free)
        apart = 1 - (free * middles).sum(-1)
        loss = loss + (apart * weight * torch.where(inked, 1.0, 3.0)).sum()
        told_apart, found = self._told_apart(free.flatten(0, 1), looks, inked.flatten(), generator)
        loss = loss + told_apart
        with torch.no_grad():
            right = (colour.argmax(-1) == batch["colour"]) & (kind.argmax(-1) == batch["kind"])
            right = right & ((cover > 0) == (batch["cover"] > 0.5)).float().mean(-1).gt(0.9)
            shown = {
                "objects": (right & inked).sum() / inked.sum(),
                "background": (right & ~inked).sum() / (~inked).sum(),
                "nearest": found,
                "codes": (m.uses > _DEAD).sum(),
            }
        return loss + extra, shown

    def _told_apart(
        self, free: torch.Tensor, looks: torch.Tensor, inked: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How well features are nearest to the mean of their own look, of all looks; and the share of those that are.

        A code is found by nearness, so it is nearness that has to tell looks apart, by a margin.
        """
        known = self.module.looks
        chance = torch.rand(inked.shape, generator=generator, device=inked.device)
        chosen = inked | (chance < inked.float().mean())  # of the ground about as many
        near = _SHARPNESS * free[chosen] @ F.normalize(known, dim=-1).T
        near = near.masked_fill(known.abs().sum(-1) == 0, -_SHARPNESS)
        right = looks[chosen]
        shown = inked[chosen]
        with torch.no_grad():
            found = ((near.argmax(-1) == right) & shown).sum() / shown.sum()
        return F.cross_entropy(near, right), found

    @torch.no_grad()
    def _learn_looks(self, looks: torch.Tensor) -> None:
        """Follow the mean direction of each look, rare ones as fast as frequent ones."""
        known, seen = self.module.looks, self._last
        sums = torch.zeros_like(known).index_add_(0, looks, seen)
        here = torch.zeros(len(known), device=seen.device).index_add_(0, looks, torch.ones_like(seen[:, 0])) > 0
        fresh = known.abs().sum(-1) == 0
        rate = torch.where(fresh, 1.0, 0.1)[:, None]
        known[here] = known.lerp(F.normalize(sums, dim=-1), rate)[here]

    @torch.no_grad()
    def _lay_codebook(self, generator: torch.Generator) -> None:
        """A code for each look; the rest where latents are, each as far from all before it as can be."""
        m, seen = self.module, self._last
        weight, known = m.model.vqmodel.quantize.embedding.weight, m.looks[m.looks.abs().sum(-1) > 0]
        known = F.normalize(known[: len(weight)], dim=-1)
        weight[: len(known)] = known
        far = 1 - torch.cat([(part @ known.T).amax(-1) for part in seen.split(8192)])
        for code in range(len(known), len(weight)):
            at = far.argmax(keepdim=True)
            weight[code] = seen[at][0]
            far = torch.minimum(far, 1 - seen @ seen[at][0])
        m.uses.fill_(1.0)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move codes that are hardly used, or say the same as another, to latents that are badly served.

        Where none are, such codes are parked opposite all latents: two codes for one thing are worse than none, for
        the backbone would have to guess which of the two comes next.
        """
        if step < self.free + _REVIVE_EVERY or step % _REVIVE_EVERY:
            return
        m = self.module
        weight = m.model.vqmodel.quantize.embedding.weight
        codes = F.normalize(weight, dim=-1)
        order = m.uses.argsort(descending=True, stable=True)
        alike = (codes @ codes.T)[order][:, order].triu(1) > _SAME  # a code, and those used less that lie on it
        doubles = torch.zeros_like(m.uses, dtype=torch.bool)
        doubles[order[alike.any(0)]] = True
        spare = ((m.uses < _DEAD) | doubles).nonzero()[:, 0]
        served = (self._last @ codes.T).amax(-1)
        worst = served.argsort()[: len(self._last) // 8]
        worst = worst[served[worst] < _SERVED]
        chosen = torch.randperm(len(worst), generator=torch.Generator().manual_seed(step))[: len(spare) // 2]
        moved = spare[: len(chosen)]
        weight[spare] = -F.normalize(self._last.mean(0), dim=-1)
        weight[moved] = self._last[worst[chosen.to(worst.device)]]
        m.uses[spare] = 0.0
        m.uses[moved] = 1.0
