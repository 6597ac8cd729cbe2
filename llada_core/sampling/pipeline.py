"""The tasks of the backbone: draw, edit, think before drawing, answer (docs/model.md, Tokens and prompts)."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import prompts
from ..backbone.attention_kernels import PART, Attend, sdpa
from ..backbone.config import BackboneConfig
from ..backbone.runner import PREFILL, SCORED
from ..errors import InputError
from ..image_tokens import ImageTokens
from ..options import EDIT_GUIDANCE, IMAGE_STEPS, TEXT_STEPS, Guidance, Sampling, Sprint
from ..placement import Placement
from ..progress import Progress, ProgressCallback, TokenPreview, report
from ..prompts import Prompts
from ..quantization.grouped import WORKING_BYTES
from ..vocabulary import Vocabulary
from .batch import Sample, Track
from .block_diffusion import GenerationConfig, Output, generate, prepare
from .guidance import guided_branches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """What a generation took: new tokens, backbone rounds, seconds."""

    tokens: int
    rounds: int
    seconds: float

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.tokens + other.tokens, self.rounds + other.rounds, self.seconds + other.seconds)

    def __str__(self) -> str:
        speed = self.tokens / max(self.seconds, 1e-9)
        return f"{self.tokens} tokens in {self.rounds} rounds, {self.seconds:.1f} s, {speed:.1f} tokens/s"


@dataclass(frozen=True)
class Pipeline:
    """Everything the tasks share: vocabulary, sizes, options, how to get the backbone, whom to tell.

    Attributes:
        place: how much working memory it takes (a function of configuration and dtype) -> the backbone, ready to run.
        seed: of the draws at temperature > 0.
        attend: the backbone's attention kernel.
    """

    vocabulary: Vocabulary
    config: BackboneConfig
    sampling: Sampling
    sprint: Sprint | None
    seed: int
    place: Callable[[Callable[[BackboneConfig, torch.dtype], int]], Placement]
    progress: ProgressCallback | None
    attend: Attend = sdpa

    def draw(self, prompts: Prompts, height: int, width: int, guidance: Guidance) -> tuple[ImageTokens, Usage]:
        """The image of height x width tokens that follows the prompts' headers."""
        count, low = height * width, self.vocabulary.image_offset
        branches = guided_branches(prompts, guidance)
        self.check_room(branches, count, f"an image of {height} x {width} tokens")
        config = self._config(self.sampling.steps or IMAGE_STEPS, low, self.vocabulary.vocab_size, guidance=guidance)

        def preview(track: Track) -> TokenPreview:
            ids = torch.tensor(track.ids[track.begin : track.end])
            return TokenPreview((ids - low).clamp_min(-1).view(height, width))

        output, usage = self._run(branches, count, config, "backbone", preview)
        grid = torch.tensor(output.ids).view(height, width) - low
        return ImageTokens((grid,), self.vocabulary.codebook_size), usage

    def think(self, prompt: str, height: int, width: int) -> tuple[list[int], Usage]:
        """Phase 1 of thinking: the ids of the plan, up to and with the image header where one was written.

        The plan leaves room in the context for an image of height x width tokens and its header.
        """
        stops = frozenset((self.vocabulary.boi, self.vocabulary.end))
        thinking = prompts.thinking(self.vocabulary, prompt).conditional
        image = len(self.vocabulary.header(height, width)) + height * width
        self.check_room([thinking], image + 1, f"a plan and an image of {height} x {width} tokens")
        most = min(self.sampling.thinking_length, self.room(thinking) - image)
        if most < self.sampling.thinking_length:
            asked = self.sampling.thinking_length
            log.info("thinking: at most %d new tokens instead of %d, to leave room for the image", most, asked)
        ids, usage = self.write(thinking, most, self.sampling.thinking_steps, stops, "thinking")
        return (ids[:-1] if ids[-1] == self.vocabulary.end else ids), usage

    def answer(self, question: Prompts, max_new_tokens: int) -> tuple[str, Usage]:
        """The text that follows a question."""
        stops = frozenset((self.vocabulary.end,))
        ids, usage = self.write(
            question.conditional, max_new_tokens, self.sampling.steps or TEXT_STEPS, stops, "answer"
        )
        return self.vocabulary.decode(ids).strip(), usage

    def room(self, prompt: list[int]) -> int:
        """Tokens that still fit the context after a prompt."""
        return self.config.max_position_embeddings - len(prompt)

    def check_room(self, prompts: list[list[int]], count: int, what: str) -> None:
        """Raise InputError where prompt and `count` new tokens do not fit the context."""
        longest, room = max(map(len, prompts)), self.config.max_position_embeddings
        if longest + count > room:
            found = f"{longest} prompt tokens and {what}, {longest + count} in all"
            remedy = "Choose a smaller size, fewer or smaller reference images, or a shorter prompt."
            raise InputError("length", found, f"at most {room} tokens, the model's context", remedy)

    def write(
        self, prompt: list[int], most: int, steps: int, stops: frozenset[int], stage: str
    ) -> tuple[list[int], Usage]:
        """The ids of a text of at most `most` tokens after `prompt`, up to and with a stop."""
        self.check_room([prompt], 1, "a text")
        room = self.room(prompt)
        if most > room:
            log.info("%s: at most %d new tokens instead of %d, the rest of the context", stage, room, most)
        config = self._config(steps, 0, self.vocabulary.image_offset, stops)
        output, usage = self._run(
            [prompt], min(most, room), config, stage, lambda track: self.vocabulary.decode(track.new)
        )
        return output.ids, usage

    def _config(self, steps: int, low: int, high: int, stops=frozenset(), guidance=None) -> GenerationConfig:
        return GenerationConfig(steps, low, high, stops, self.sampling, guidance, self.sprint)

    def _run(
        self,
        branches: list[list[int]],
        count: int,
        config: GenerationConfig,
        stage: str,
        preview: Callable[[Track], Any],
    ) -> tuple[Output, Usage]:
        """Generate `count` ids; reports go out under the name of the stage."""
        length, block = max(map(len, branches)) + count, self.sampling.block_length
        scored = self.sprint is not None
        placement = self.place(lambda c, dtype: working_bytes(c, len(branches), length, dtype, block, scored))
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed % 2**64)  # stories count up from it
        sample = Sample(branches, [self.vocabulary.mask] * count, generator)
        module, device, dtype, resident = placement.module, placement.device, placement.dtype, placement.resident
        runner, batch = prepare(module, [sample], config, self.vocabulary.mask, device, dtype, self.attend, resident)
        (track,) = batch.tracks
        total = len(batch.starts) * config.steps

        def show() -> Any:
            return preview(track)

        def on_round(index: int, done: int) -> None:
            report(self.progress, Progress(index * config.steps + done, total, stage, show))

        report(self.progress, Progress(0, total, stage))
        try:
            (output,) = generate(runner, batch, config, on_round)
        finally:
            runner.close()
        report(self.progress, Progress(total, total, stage, show))
        return output, Usage(len(output.ids), output.rounds, time.perf_counter() - began)


def working_bytes(
    config: BackboneConfig, rows: int, length: int, dtype: torch.dtype, block_length: int = 32, sprint: bool = False
) -> int:
    """Memory that a generation needs besides the weights: the cache, a prompt chunk's activations, the logits.

    Args:
        config: sizes.
        rows: branches, of all samples.
        length: prompt and new tokens of the longest row.
        dtype: of the activations.
        block_length: positions whose logits are guided and softmaxed together.
        sprint: the prefix is gathered into a copy, and finished positions are scored by their logits.
    """
    cached = length + -length % PART
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * cached * dtype.itemsize
    run = min(length, PREFILL)
    expert_row = 2 * config.hidden_size + 3 * config.moe_intermediate_size
    experts = config.num_experts_per_tok * expert_row
    dense = 6 * config.hidden_size + 3 * config.intermediate_size
    group = config.num_attention_heads // config.num_key_value_heads
    mask = run * length * (1 + group * (1 + dtype.itemsize))  # once more for each query of a key, and as numbers
    logits = (2 * rows + 3) * block_length  # as computed and in float32; three more of the guided ones
    if sprint:
        cache, logits = 2 * cache, max(logits, 3 * rows * SCORED)
    layer = max(rows * (run * dtype.itemsize * (2 * experts + dense) + mask), WORKING_BYTES)
    return rows * cache + layer + 4 * logits * config.vocab_size


def for_editing(guidance: Guidance | None) -> Guidance:
    """The given guidance, or the defaults of editing: text 4, image 0 (docs/model.md, Block diffusion)."""
    return guidance if guidance is not None else replace(Guidance(), text=EDIT_GUIDANCE)
