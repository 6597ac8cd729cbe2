"""Every prompt form, as free functions over a vocabulary (docs/model.md, Tokens and prompts)."""

from collections.abc import Sequence
from dataclasses import dataclass

from .image_tokens import ImageTokens
from .vocabulary import Vocabulary

UNDERSTAND = "You are a multimodal understanding assistant."
TEXT_TO_IMAGE = "You are a text-to-image generation assistant."
THINKING = "You are a text-to-image generation assistant with a thinking process."
EDIT = "You are an image editing assistant."
INTERLEAVED = "You are a interleaved generation assistant."  # so spelled in training
UNCONDITION = "<uncondition>"  # ordinary text, not a special token


@dataclass(frozen=True)
class Prompts:
    """The prompts of one generation, token ids each.

    Attributes:
        conditional: what the user asked.
        without_text: the same without the instruction; None where the task has no guidance.
        without_image: the same without the reference images; None but for editing.
    """

    conditional: list[int]
    without_text: list[int] | None = None
    without_image: list[int] | None = None


def open_turn(vocabulary: Vocabulary, system: str) -> list[int]:
    """What opens every prompt: the system text, then the human's turn."""
    turn = [vocabulary.role, *vocabulary.encode("SYSTEM"), vocabulary.role_end, *vocabulary.encode(f" {system} ")]
    return [*turn, vocabulary.role, *vocabulary.encode("HUMAN"), vocabulary.role_end]


def close_turn(vocabulary: Vocabulary) -> list[int]:
    """What ends the human's turn."""
    return [vocabulary.role, *vocabulary.encode("ASSISTANT"), vocabulary.role_end]


def understand(vocabulary: Vocabulary, question: str, images: ImageTokens | None) -> Prompts:
    """Question about zero, one or several images."""
    return Prompts(
        [
            *open_turn(vocabulary, UNDERSTAND),
            *vocabulary.images(images),
            *vocabulary.encode(question),
            *close_turn(vocabulary),
        ]
    )


def text_to_image(vocabulary: Vocabulary, prompt: str, height: int, width: int) -> Prompts:
    """Draw height x width tokens from a prompt."""
    return Prompts(
        _instruct(vocabulary, TEXT_TO_IMAGE, vocabulary.encode(prompt), height, width),
        _instruct(vocabulary, TEXT_TO_IMAGE, vocabulary.encode(UNCONDITION), height, width),
    )


def thinking(vocabulary: Vocabulary, prompt: str) -> Prompts:
    """Phase 1 of thinking: the plan."""
    return Prompts([*open_turn(vocabulary, THINKING), *vocabulary.encode(prompt), *close_turn(vocabulary)])


def after_thinking(
    vocabulary: Vocabulary, prompt: str, plan: Sequence[int], height: int, width: int
) -> tuple[Prompts, str]:
    """Phase 2 of thinking: rows that draw height x width tokens after `plan` (phase 1's output), and its text."""
    plan = list(plan)
    if vocabulary.image in plan:
        plan = plan[: len(plan) - 1 - plan[::-1].index(vocabulary.image)]
    rows = Prompts(
        [*thinking(vocabulary, prompt).conditional, *plan, *vocabulary.header(height, width)],
        _instruct(vocabulary, THINKING, vocabulary.encode(UNCONDITION), height, width),
    )
    return rows, vocabulary.decode(plan).strip()


def edit(
    vocabulary: Vocabulary, instruction: str, references: ImageTokens, size: tuple[int, int] | None = None
) -> Prompts:
    """Edit references; the output grid is that of the first, or `size` in tokens."""
    height, width = size or references.sizes[0]
    images, text = vocabulary.images(references), vocabulary.encode(instruction)
    return Prompts(
        _instruct(vocabulary, EDIT, images + text, height, width),
        _instruct(vocabulary, EDIT, images + vocabulary.encode(UNCONDITION), height, width),
        _instruct(vocabulary, EDIT, [vocabulary.image, *text], height, width),
    )


def interleaved(vocabulary: Vocabulary, instruction: str, references: ImageTokens | None) -> list[int]:
    """The conditional prompt of a story; text and images follow it."""
    return [
        *open_turn(vocabulary, INTERLEAVED),
        *vocabulary.images(references),
        *vocabulary.encode(instruction),
        *close_turn(vocabulary),
    ]


def interleaved_image(vocabulary: Vocabulary, history: list[int], edit: bool) -> Prompts:
    """Prompts that draw the image whose header ends `history` (docs/model.md, Interleaved generation).

    Args:
        history: the prompt and all that was written, up to and with the header.
        edit: guide the image as an edit of the one before it, which there must be.
    """
    nothing = vocabulary.encode(UNCONDITION)
    header = history[-4:]
    blank = [*open_turn(vocabulary, INTERLEAVED), *nothing, *close_turn(vocabulary)]
    if not edit:
        return Prompts(history, blank + header)
    after = len(history) - history[::-1].index(vocabulary.image_end)
    return Prompts(history, history[:after] + nothing + header, blank + history[after:])


def _instruct(vocabulary: Vocabulary, system: str, content: list[int], height: int, width: int) -> list[int]:
    return [*open_turn(vocabulary, system), *content, *close_turn(vocabulary), *vocabulary.header(height, width)]
