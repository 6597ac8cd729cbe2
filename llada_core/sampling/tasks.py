"""The tasks of the backbone, for several at once: draw, edit, redraw a part, think, vary, answer (docs/model.md, Tokens
and prompts and Masked drawing)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import prompts
from ..checks import check_size
from ..errors import InputError
from ..image_tokens import ImageTokens
from ..options import EDIT_GUIDANCE, TEXT_STEPS, Guidance
from ..prompts import Prompts
from ..token_edits import cells_to_vary, one_grid, touched_cells
from ..vocabulary import Vocabulary
from .pipeline import Drawn, Image, Pipeline, Text, Usage, Written

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """A drawn image: its tokens, the plan where thinking was on ("" else), and what it took."""

    tokens: ImageTokens
    thinking: str
    usage: Usage


@dataclass(frozen=True)
class Answer:
    """A text about images, and what it took."""

    text: str
    usage: Usage


@dataclass(frozen=True)
class Request:
    """One image that is asked for.

    Attributes:
        prompt, seed: of it.
        size: (height, width) in tokens.
        references: images to edit; None draws.
        start: codes [height, width] to start from, and cells: bool [height, width], those to draw anew. None draws all.
    """

    prompt: str
    seed: int
    size: tuple[int, int]
    references: ImageTokens | None = None
    start: torch.Tensor | None = None
    cells: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        prompt: str,
        seed: int,
        height: int,
        width: int,
        references: ImageTokens | None,
        tokens: ImageTokens | None,
        mask: torch.Tensor | None,
    ) -> "Request":
        """From inputs as `LLaDAUni.generate` takes them. Raises InputError where they do not go together."""
        if mask is None:
            if tokens is not None:
                raise InputError("mask", "nothing, with tokens to start from", "a mask", "Mark what is to be drawn.")
            return cls(prompt, seed, references.sizes[0] if references else check_size(height, width), references)
        if tokens is None and references is None:
            remedy = "Connect tokens to start from, or references."
            raise InputError("tokens", "nothing, with a mask", "an image that the mask is of", remedy)
        start = one_grid(tokens) if tokens is not None else references.grids[0]  # type: ignore[union-attr]
        size = (start.shape[0], start.shape[1])
        return cls(prompt, seed, size, references, start, touched_cells(mask, *size))

    def prompts(self, vocabulary: Vocabulary) -> Prompts:
        """The branches of its prompt."""
        if self.references is None:
            return prompts.text_to_image(vocabulary, self.prompt, *self.size)
        return prompts.edit(vocabulary, self.prompt, self.references, self.size)

    def given(self, vocabulary: Vocabulary) -> list[int] | None:
        """The ids of the image, masks where it is to be drawn; None where all of it is."""
        if self.start is None or self.cells is None:
            return None
        return (self.start + vocabulary.image_offset).masked_fill(self.cells, vocabulary.mask).flatten().tolist()


def generate(
    pipeline: Pipeline, asked: Sequence[Request], guidance: Guidance | None, thinking: bool = False
) -> list[Generation]:
    """Images of prompts, edits of references, or parts of them.

    Args:
        asked: all with references, or none.
        guidance: of all; None is the default of the task.
        thinking: plan each in words first. A picture goes on from what is cached of its plan.

    Raises:
        InputError: thinking with references; references for some only.
    """
    editing = [one for one in asked if one.references is not None]
    if editing and thinking:
        remedy = "Turn thinking off, or disconnect the references."
        raise InputError("thinking", "on, with references", "off when editing", remedy)
    if editing and len(editing) < len(asked):
        remedy = "Draw in one call and edit in another."
        raise InputError("references", "None among others", "references for each, or for none", remedy)
    scales = for_editing(guidance) if editing else guidance or Guidance()
    if thinking:
        return _draw_after_plans(pipeline, asked, scales)
    return [Generation(drawn.tokens, "", drawn.usage) for drawn in _draw(pipeline, asked, scales)]


def _draw(pipeline: Pipeline, asked: Sequence[Request], guidance: Guidance) -> list[Drawn]:
    words = pipeline.vocabulary
    images = [Image(one.prompts(words), *one.size, one.seed, one.given(words)) for one in asked]
    return pipeline.draw(images, guidance)


def _draw_after_plans(pipeline: Pipeline, asked: Sequence[Request], guidance: Guidance) -> list[Generation]:
    words, plans = pipeline.vocabulary, think(pipeline, asked)
    images, traces = [], []
    for one, plan in zip(asked, plans, strict=True):
        branches, trace = prompts.after_thinking(words, one.prompt, plan.ids, *one.size)
        images.append(Image(branches, *one.size, one.seed, one.given(words), plan.prefix))
        traces.append(trace)
    found = zip(pipeline.draw(images, guidance), traces, plans, strict=True)
    return [Generation(drawn.tokens, trace, plan.usage + drawn.usage) for drawn, trace, plan in found]


def think(pipeline: Pipeline, asked: Sequence[Request]) -> list[Written]:
    """Phase 1 of thinking: the ids of each plan, up to and with the image header where one was written.

    A plan leaves room in the context for its image and the image's header.
    """
    vocabulary, sampling = pipeline.vocabulary, pipeline.sampling
    texts = []
    for one in asked:
        height, width = one.size
        thinking = prompts.thinking(vocabulary, one.prompt).conditional
        image = len(vocabulary.header(height, width)) + height * width
        pipeline.check_room([thinking], image + 1, f"a plan and an image of {height} x {width} tokens")
        most = min(sampling.thinking_length, pipeline.room(thinking) - image)
        if most < sampling.thinking_length:
            asked_for = sampling.thinking_length
            log.info("thinking: at most %d new tokens instead of %d, to leave room for the image", most, asked_for)
        texts.append(Text(thinking, most, one.seed))
    stops = frozenset((vocabulary.boi, vocabulary.end))
    plans = pipeline.write(texts, sampling.thinking_steps, stops, "thinking", keep_prefix=True)
    return [replace(plan, ids=plan.ids[:-1]) if plan.ids[-1] == vocabulary.end else plan for plan in plans]


def vary(
    pipeline: Pipeline, one: Request, strength: float, count: int, least_certain: bool, guidance: Guidance | None
) -> list[Generation]:
    """Variations of an image: a share of its cells is drawn anew.

    Args:
        one: with `start`; variation i takes its seed + i.
        strength: 0...1, the share.
        count: of variations.
        least_certain: the cells that the model is least sure of, instead of cells by seed.
        guidance: None is the default of drawing, or of editing.
    """
    words = pipeline.vocabulary
    prompt = one.prompts(words)  # first, since it refuses sizes whose cells take long to choose
    scales = guidance or (for_editing(None) if one.references is not None else Guidance())
    certainty, looked = None, Usage(0, 0, 0.0)
    if least_certain:
        whole = replace(one, cells=torch.zeros(one.size, dtype=torch.bool))
        image = Image(prompt, *one.size, one.seed, whole.given(words))
        certainty, usage = pipeline.certainty(image, scales)
        looked = replace(usage, seconds=usage.seconds / count)  # once for all of them
    seeds = [one.seed + index for index in range(count)]
    each = [replace(one, seed=seed, cells=cells_to_vary(*one.size, strength, seed, certainty)) for seed in seeds]
    return [Generation(drawn.tokens, "", looked + drawn.usage) for drawn in _draw(pipeline, each, scales)]


def answer(pipeline: Pipeline, asked: Sequence[dict[str, Any]], most: int) -> list[Answer]:
    """The texts that follow questions, of at most `most` tokens; question, images and seed of each."""
    vocabulary = pipeline.vocabulary
    stops, steps = frozenset((vocabulary.end,)), pipeline.sampling.steps or TEXT_STEPS
    questions = [prompts.understand(vocabulary, one["question"], one["images"]) for one in asked]
    texts = [Text(one.conditional, most, given["seed"]) for one, given in zip(questions, asked, strict=True)]
    found = pipeline.write(texts, steps, stops, "answer")
    return [Answer(vocabulary.decode(text.ids).strip(), text.usage) for text in found]


def for_editing(guidance: Guidance | None) -> Guidance:
    """The given guidance, or the defaults of editing: text 4, image 0 (docs/model.md, Block diffusion)."""
    return guidance if guidance is not None else replace(Guidance(), text=EDIT_GUIDANCE)
