"""Block diffusion the slow way, to hold the engine against: nothing is cached, every round recomputes everything.

It follows docs/model.md line by line, one position at a time where speed allows, and shares only weights and option
dataclasses with the engine. The benchmarks time the engine against it. Nothing else may use it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from llada_core.backbone.cache import PrefixCache
from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.model import Backbone
from llada_core.options import Guidance, Sampling, Sprint
from llada_core.sampling.block_diffusion import GenerationConfig

# (ids [rows, n], positions [rows, n], visible bool [rows, n, n]) -> hidden [rows, n, hidden], key norms [rows, n].
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator, std: float = 0.02) -> nn.Module:
    """Fill every parameter in place: matrices with noise, norms with ones, other vectors (biases) with zeros."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, std, generator=generator)
        else:
            parameter.fill_(float("norm" in name and not name.endswith("bias")))
    return module.eval().requires_grad_(False)


def tiny_config(**changes) -> BackboneConfig:
    """96 text and 64 image ids; 95 is the mask. Every size differs from the others where it can."""
    fields = {
        "vocab_size": 160,
        "image_token_offset": 96,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "rope_theta": 100.0,
        "max_position_embeddings": 4096,
    }
    return BackboneConfig(**fields | changes)


def tiny_backbone(seed: int, **changes) -> Backbone:
    """A random backbone whose predictions are neither flat nor all alike, so that thresholds and ranks matter."""
    generator = torch.Generator().manual_seed(seed)
    backbone = randomise(Backbone(tiny_config(**changes)), generator, 0.25)
    for name, parameter in backbone.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.05 if "bias" in name else 0.2))
    backbone.lm_head.weight.mul_(1.4)
    return backbone


def recomputing(backbone: Backbone) -> Forward:
    """The engine's own network over a fresh cache each time: what the benchmarks time."""

    def forward(ids, positions, visible):
        rows, n = ids.shape
        weight = backbone.lm_head.weight
        cache = PrefixCache(backbone.config, rows, n, weight.device, weight.dtype, key_norms=True)
        return backbone(ids, positions, cache, 0, visible[:, None]), cache.key_norms

    return forward


def written_out(backbone: Backbone) -> Forward:
    """The network from its weights alone: heads repeated, RoPE by complex numbers, every expert on every token."""
    c = backbone.config

    def norm(x, module):
        return x * (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * module.weight

    def rotate(x, positions):
        size = c.rotary_dim
        speed = c.rope_theta ** (-torch.arange(0, size, 2) / size)
        turn = torch.polar(torch.ones(()), positions[:, None, :, None] * speed)
        pairs = torch.complex(x[..., : size // 2], x[..., size // 2 : size]) * turn
        return torch.cat((pairs.real, pairs.imag, x[..., size:]), -1)

    def attention(x, module, positions, visible):
        sizes = [heads * c.head_dim for heads in (c.num_attention_heads, *[c.num_key_value_heads] * 2)]
        parts = F.linear(x, module.query_key_value.weight).split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for part in parts)
        q, k = rotate(norm(q, module.query_layernorm), positions), rotate(norm(k, module.key_layernorm), positions)
        norms = k.norm(dim=-1).mean(1)
        k, v = (part.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 1) for part in (k, v))
        seen = (q @ k.mT / c.head_dim**0.5).masked_fill(~visible[:, None], float("-inf"))
        return F.linear((seen.softmax(-1) @ v).transpose(1, 2).flatten(2), module.dense.weight), norms

    def gated(x, gate, up, down):
        return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT

    def mlp(x, module):
        if not hasattr(module, "experts"):
            return gated(x, *(getattr(module, f"{name}_proj").weight for name in ("gate", "up", "down")))
        shared = module.shared_experts
        flat = x.flatten(0, 1)
        gate, up = module.experts.gate_up.weight.chunk(2, 1)
        every = gated(flat[None], gate, up, module.experts.down.weight)  # [experts, tokens, hidden]
        routed = torch.einsum("eth,te->th", every, expert_weights(flat, module.gate, c)).view_as(x)
        return routed + gated(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)

    def forward(ids, positions, visible):
        x = backbone.word_embeddings.weight[ids]
        total = 0
        for layer in backbone.layers:
            out, norms = attention(norm(x, layer.input_layernorm), layer.attention, positions, visible)
            x = x + out
            x = x + mlp(norm(x, layer.post_attention_layernorm), layer.mlp)
            total = total + norms / len(backbone.layers)
        return norm(x, backbone.norm), total

    return forward


def expert_weights(x: torch.Tensor, gate: nn.Module, c: BackboneConfig) -> torch.Tensor:
    """Weight of every expert for every token [tokens, experts], zero where not chosen: by thresholds, not by index."""
    scores = (x @ gate.weight.T).sigmoid()
    biased = (scores + gate.expert_bias).unflatten(-1, (c.n_group, -1))
    pairs = biased.sort(-1).values[..., -2:].sum(-1)
    least_group = pairs.sort(-1).values[..., -c.topk_group, None]
    inside = biased.masked_fill((pairs < least_group)[..., None], float("-inf")).flatten(-2)
    least = inside.sort(-1).values[..., -c.num_experts_per_tok, None]
    weights = scores * (inside >= least)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor


@dataclass
class Outcome:
    """What a generation gave.

    Attributes:
        ids: up to and with the stop.
        rounds: of each block, until nothing that was asked for was masked any more.
        kept: under SPRINT the last block's kept prefix [rows, n].
    """

    ids: list[int]
    rounds: list[int]
    kept: torch.Tensor | None = None


class Oracle:
    """Generates from prompts, from scratch.

    Args:
        forward: how the network is computed.
        backbone: for its head and its configuration.
        mask_id: id of the mask token.
        look_ahead: compute also the masked blocks to come, which nobody may see. A timing leaves them out.
    """

    def __init__(self, forward: Forward, backbone: Backbone, mask_id: int, look_ahead: bool = True):
        self.forward, self.backbone, self.mask_id, self.look_ahead = forward, backbone, mask_id, look_ahead

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        new: list[int],
        config: GenerationConfig,
        seed: int = 0,
        only_blocks: Callable[[int], bool] = lambda index: True,
        prune: bool = True,
    ) -> Outcome:
        """What `generate` must return for a sample of these branches and new ids.

        Blocks that `only_blocks` leaves out keep their masks. `prune` False runs SPRINT's schedule on a full prefix.
        """
        sampling, guidance, sprint = config.sampling, config.guidance, config.sprint
        block, length = sampling.block_length, max(map(len, prompts))
        end = length + len(new)
        width = end + -end % block
        device = self.backbone.lm_head.weight.device
        ids = torch.full((len(prompts), width), self.mask_id)
        for row, prompt in zip(ids, prompts, strict=True):
            row[length - len(prompt) : end] = torch.tensor([*prompt, *new])
        ids = ids.to(device)
        pads = torch.tensor([length - len(prompt) for prompt in prompts], device=device)
        at = torch.arange(width, device=device)
        positions = (at - pads[:, None]).clamp_min(0)
        real = at >= pads[:, None]
        visible = (at[:, None] // block >= at // block) & (real[:, None] | torch.eye(width, device=device).bool())
        draws = torch.Generator().manual_seed(seed)
        outcome = Outcome([], [])
        for index, start in enumerate(range(length // block * block, end, block)):
            stop = start + block
            n = width if self.look_ahead else stop
            rounds = needed = 0
            if sprint and prune and start:
                outcome.kept = self._kept(ids[:, :n], positions[:, :n], visible[:, :n, :n], real, start, sprint)
            while only_blocks(index) and rounds < config.steps:
                masked = [p for p in range(block) if start + p >= length and ids[0, start + p] == self.mask_id]
                if not masked:
                    break
                seen = visible[:, :n, :n].clone()
                if outcome.kept is not None and rounds >= sprint.warmup:
                    seen[:, start:stop, :start] &= outcome.kept[:, None]
                hidden, _ = self.forward(ids[:, :n], positions[:, :n], seen)
                logits = guide(self.backbone.lm_head(hidden[:, start:stop]).float(), guidance)
                probabilities = spread(logits[:, config.low : config.high], sampling)
                tokens = choose(probabilities, sampling, draws)
                confidence = confidences(probabilities, tokens, sprint.confidence if sprint else "low_confidence")
                if sprint:
                    threshold, least = sprint.threshold, -(-len(masked) // (config.steps - rounds))
                else:
                    threshold = sampling.threshold
                    least = block // config.steps + (rounds < block % config.steps)
                for p in accepted(confidence, masked, threshold, least):
                    ids[:, start + p] = tokens[p] + config.low
                rounds += 1
                # Masks behind the end are filled too, as by the reference; the engine need not go on for them.
                needed = rounds if any(start + p < end for p in masked) else needed
            outcome.rounds.append(needed)
        outcome.ids = answer(ids[0, length:end].tolist(), config.stops, self.mask_id)
        return outcome

    def _kept(self, ids, positions, visible, real, start: int, sprint: Sprint) -> torch.Tensor:
        """Which prefix positions stay visible, bool [rows, start], scored on a full pass."""
        score = self.scores(ids, positions, visible, real[:, :start], sprint.alpha)
        kept = torch.zeros(len(ids), start, dtype=torch.bool, device=ids.device)
        for row in range(len(ids)):
            for ratio, images in ((sprint.text_keep_ratio, False), (sprint.image_keep_ratio, True)):
                ratio = sprint.keep_ratio if ratio is None else ratio
                group = [
                    i
                    for i in range(start)
                    if real[row, i] and (int(ids[row, i]) >= self.backbone.config.image_token_offset) == images
                ]
                best = sorted(group, key=lambda i, row=row: -score[row, i].item())
                kept[row, best[: int(ratio * len(group) + 1e-9)]] = True
        return kept

    def scores(self, ids, positions, visible, real, alpha: float) -> torch.Tensor:
        """docs/model.md, SPRINT's s_i over the first real.shape[1] positions, straight from a full pass."""
        start = real.shape[1]
        hidden, norms = self.forward(ids, positions, visible)
        top = self.backbone.lm_head(hidden[:, :start]).float().softmax(-1).amax(-1)
        norms = norms[:, :start]
        mean = torch.stack([norms[row, real[row]].mean() for row in range(len(ids))])[:, None]
        return alpha * norms / mean + (1 - alpha) * top


def guide(logits: torch.Tensor, guidance: Guidance | None) -> torch.Tensor:
    """docs/model.md, Guidance on logits [rows, n, vocabulary]."""
    if len(logits) == 1:
        return logits[0]
    c, u = logits[:2]
    g = u + guidance.text * (c - u)
    if len(logits) == 3:
        g = g + guidance.image * (u - logits[2])
    phi = guidance.rescale
    return phi * g * c.std(-1, keepdim=True) / g.std(-1, keepdim=True) + (1 - phi) * g if phi else g


def spread(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [n, candidates] that tokens are drawn from: tempered, then cut by top-k and top-p."""
    if sampling.temperature == 0:
        return logits.softmax(-1)
    probabilities = (logits / sampling.temperature).softmax(-1)
    for row in probabilities:
        order = row.argsort(descending=True).tolist()
        row[order[sampling.top_k or len(order) :]] = 0
        row /= row.sum()
        mass, kept = 0.0, 0
        while kept < len(order) and mass < sampling.top_p:
            mass += row[order[kept]].item()
            kept += 1
        row[order[kept:]] = 0
        row /= row.sum()
    return probabilities


def choose(probabilities: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The best candidate, or a draw with one uniform number a position."""
    if sampling.temperature == 0:
        return probabilities.argmax(-1)
    uniform = torch.rand(len(probabilities), generator=generator).to(probabilities.device)
    return (probabilities.double().cumsum(-1) <= uniform[:, None]).sum(-1)


def confidences(probabilities: torch.Tensor, tokens: torch.Tensor, kind: str) -> list[float]:
    """docs/model.md, SPRINT's three kinds."""
    if kind == "low_confidence":
        return probabilities.gather(-1, tokens[:, None])[:, 0].tolist()
    if kind == "top_k_margin":
        ordered = probabilities.sort(-1, descending=True).values
        return (ordered[:, 0] - ordered[:, 1]).tolist()
    return [sum(p * torch.tensor(p).log().item() for p in row if p > 0) for row in probabilities.tolist()]


def accepted(confidence: list[float], masked: list[int], threshold: float, least: int) -> list[int]:
    """All masked positions above the threshold if they are at least `least`, else the `least` most confident."""
    above = [p for p in masked if confidence[p] > threshold]
    return above if len(above) >= least else sorted(masked, key=lambda p: -confidence[p])[:least]


def answer(ids: list[int], stops: frozenset[int], mask_id: int) -> list[int]:
    """ids up to and with the first stop that no mask stands before."""
    for i, token in enumerate(ids):
        if token in stops:
            return ids[: i + 1]
        if token == mask_id:
            break
    return ids
