"""Stage "vision": SigLIP-VQ learns to name what it sees, patch by patch, through a quantizer.

Nothing here reconstructs pixels. Each patch's code must tell which colour, shape and size it belongs to and where in
it the object lies. It is asked for nothing else, so that a code says nothing else.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from llada_core.vision.siglip_vq import SiglipVQ

from .sizes import CODES, PREPROCESSOR, SEED, VISION, VQ, Schedule
from .stage import Stage
from .world import COLOURS, GRIDS, RADII, SHAPES, TOKEN, Scene, centre_of, mask_of, sample_scene, view

KINDS = tuple((shape, size) for shape in SHAPES for size in RADII)  # 0 is "no object" in targets
_CELLS = 4  # each way, in which a patch's coverage is told
_NAMES = tuple(COLOURS)
_FREE = 300  # steps without quantizing: the features move_uncast_parameters before the codebook is laid over them
_REVIVE_EVERY = 50
_DEAD = 0.05  # uses a step, on the running mean, below which a code is moved
_SAME = 0.945  # cosine above which two codes say the same
_SERVED = 0.93  # cosine to the nearest code below which a latent is badly served


def build() -> SiglipVQ:
    """The vision tower and the quantizer with random weights."""
    torch.manual_seed(SEED)
    visual = GlmImageVisionModel(GlmImageVisionConfig(**VISION, attn_implementation="sdpa"))
    return SiglipVQ(visual, GlmImageVQVAE(GlmImageVQVAEConfig(**VQ))).requires_grad_(True)


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, height, width, 3] -> patches [n, h·w, 3, 16, 16] as the engine's preprocessing leaves them."""
    scaled = (pixels.float() * PREPROCESSOR["rescale_factor"] - 0.5) / 0.5
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


def targets(scene: Scene) -> dict[str, np.ndarray]:
    """What is to be told of each patch: colour, kind and quarter int64 [h·w], cover float32 [h·w, 16]."""
    rows, columns = scene.grid
    colour = np.full((rows, columns), _NAMES.index(scene.background))
    kind = np.zeros((rows, columns), dtype=np.int64)
    quarter = np.zeros((rows, columns), dtype=np.int64)
    cover = np.zeros((rows, columns, _CELLS, _CELLS), dtype=np.float32)
    for thing in scene.things:
        x, y = (at // TOKEN for at in centre_of(thing.place, scene.grid))
        here = np.s_[y - 1 : y + 1, x - 1 : x + 1]
        colour[here] = _NAMES.index(thing.colour)
        kind[here] = 1 + KINDS.index((thing.shape, thing.size))
        quarter[here] = [[0, 1], [2, 3]]
        mask, cell = mask_of(thing.shape, thing.size), TOKEN // _CELLS
        cover[here] = mask.reshape(2, _CELLS, cell, 2, _CELLS, cell).mean((2, 5)).transpose(0, 2, 1, 3)
    flat = {"colour": colour.ravel(), "kind": kind.ravel(), "quarter": quarter.ravel()}
    return {**flat, "cover": cover.reshape(rows * columns, -1)}


class VisionTrainer(nn.Module):
    """SigLIP-VQ, the heads that question it (not kept afterwards), and how often each code is used."""

    def __init__(self):
        super().__init__()
        self.model = build()
        width = VQ["embed_dim"]
        self.patch = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 8 + 1 + len(KINDS) + _CELLS**2))
        self.register_buffer("uses", torch.ones(CODES))
        self.register_buffer("quantizing", torch.zeros((), dtype=torch.bool))


class VisionStage(Stage):
    """First free features, then a codebook laid over them, then both together; dead codes are moved."""

    name = "vision"

    def __init__(self, schedule: Schedule, free: int = _FREE):
        self.schedule, self.free = schedule, free
        self.module = VisionTrainer()
        self._last: torch.Tensor | None = None

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """pixels uint8 [n, 16 h, 16 w, 3] and `targets`."""
        rng = random.Random(SEED * 104_729 + step)
        grid = GRIDS[step % 3 == 2]
        scenes = [sample_scene(rng) for _ in range(self.schedule.batch)]
        scenes = [Scene(scene.things, scene.background, grid) for scene in scenes]
        wanted = [targets(scene) for scene in scenes]
        batch = {key: torch.from_numpy(np.stack([one[key] for one in wanted])) for key in wanted[0]}
        return batch | {
            "pixels": torch.from_numpy(np.stack([np.asarray(view(scene)) for scene in scenes])),
            "step": step,
        }

    def loss(self, batch, generator):
        """Naming losses, plus the quantizer's own once it is in use."""
        m = self.module
        latents = free = latents_of(m.model, batch["pixels"])
        self._last = latents.detach().flatten(0, 1)
        if batch["step"] == self.free:
            self._lay_codebook(generator)
        extra = latents.new_zeros(())
        if batch["step"] >= self.free:
            with torch.autocast(latents.device.type, enabled=False):
                quantized, extra, codes = m.model.vqmodel.quantize(latents.transpose(1, 2)[..., None])
            latents = quantized[..., 0].transpose(1, 2)
            with torch.no_grad():
                m.uses.lerp_(torch.bincount(codes, minlength=CODES).float(), 0.02)
        told = m.patch(latents * 4)
        colour, kind, cover = told.split((8, 1 + len(KINDS), _CELLS**2), -1)
        inked = batch["kind"] > 0
        # Most patches are background: they weigh as much as objects, all together.
        weight = inked / inked.sum() + 0.5 * ~inked / (~inked).sum()

        def named(logits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return (F.cross_entropy(logits.transpose(1, 2).float(), right, reduction="none") * weight).sum()

        covering = F.binary_cross_entropy_with_logits(cover.float(), batch["cover"], reduction="none").mean(-1)
        loss = named(colour, batch["colour"]) + named(kind, batch["kind"]) + 4 * (covering * weight).sum()
        apart = 1 - (free * self._middles(free.detach(), batch)).sum(-1)
        loss = loss + (apart * weight * torch.where(inked, 1.0, 3.0)).sum()
        with torch.no_grad():
            right = (colour.argmax(-1) == batch["colour"]) & (kind.argmax(-1) == batch["kind"])
            right = right & ((cover > 0) == (batch["cover"] > 0.5)).float().mean(-1).gt(0.9)
            shown = {
                "objects": (right & inked).sum() / inked.sum(),
                "background": (right & ~inked).sum() / (~inked).sum(),
                "codes": (m.uses > _DEAD).sum(),
            }
        return loss + extra, shown

    @staticmethod
    def _middles(latents: torch.Tensor, batch: dict) -> torch.Tensor:
        """For each patch, the mean direction [n, h·w, d] of all that look like it.

        Drawn to it, equal patches get equal codes wherever they lie and whatever else is in the picture; otherwise
        the backbone would have to guess which of many codes for the same yellow comes next.
        """
        kinds, quarters = 1 + len(KINDS), batch["quarter"]
        looks = ((batch["colour"] * kinds + batch["kind"]) * 4 + quarters).flatten()
        sums = latents.new_zeros(8 * kinds * 4, latents.shape[-1]).index_add_(0, looks, latents.flatten(0, 1))
        return F.normalize(sums, dim=-1)[looks].view_as(latents)

    @torch.no_grad()
    def _lay_codebook(self, generator: torch.Generator) -> None:
        """Codes where latents are, each as far from all before it as can be."""
        seen = self._last
        far = torch.full((len(seen),), float("inf"), device=seen.device)
        at = torch.randint(len(seen), (1,), generator=generator, device=seen.device)
        for code in range(CODES):
            self.module.model.vqmodel.quantize.embedding.weight[code] = seen[at][0]
            far = torch.minimum(far, 1 - seen @ seen[at][0])
            at = far.argmax(keepdim=True)
        self.module.uses.fill_(1.0)

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
