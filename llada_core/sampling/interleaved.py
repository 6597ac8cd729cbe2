"""Stories: text and images in turn (docs/model.md, Interleaved generation)."""

from dataclasses import dataclass, replace

from .. import prompts
from ..image_tokens import ImageTokens, join
from ..options import Guidance
from .pipeline import Pipeline, Usage


@dataclass(frozen=True)
class Story:
    """What was told.

    Attributes:
        tokens: the images in order; None where the story ended before the first was finished.
        text: all text, with [image 1], [image 2], ... on lines of their own where the images are.
        ending: why it ended, for a person.
        complete: whether it ended as meant: by the model, or with the last image asked for.
        usage: what it took.
    """

    tokens: ImageTokens | None
    text: str
    ending: str
    complete: bool
    usage: Usage


def generate_interleaved(
    pipeline: Pipeline, instruction: str, references: ImageTokens | None, max_images: int, guidance: Guidance
) -> Story:
    """Write text until the model announces an image, draw it, and go on.

    The story ends at the end token, after max_images, where the context or the text's length limit ends, or at a
    header that announces no image. Image guidance above 0 draws every image but the first as an edit of the one
    before it.
    """
    vocabulary = pipeline.vocabulary
    history = prompts.interleaved(vocabulary, instruction, references)
    pipeline.check_room([history], 1, "a text")
    stops = frozenset((vocabulary.end, vocabulary.boi))
    parts: list[str] = []
    drawn: list[ImageTokens] = []
    usage = Usage(0, 0, 0.0)

    def ended(ending: str, complete: bool = False) -> Story:
        text = "\n\n".join(part for part in parts if part)
        return Story(join(drawn) if drawn else None, text, ending, complete, usage)

    while True:
        turn = replace(pipeline, seed=pipeline.seed + 2 * len(drawn))
        ids, used = turn.write(
            history, pipeline.sampling.thinking_length, pipeline.sampling.thinking_steps, stops, "story"
        )
        usage += used
        history = history + ids
        size = vocabulary.read_header(history)
        parts.append(vocabulary.decode(ids).strip())
        if ids[-1] == vocabulary.end:
            return ended("the model ended the story", complete=True)
        if ids[-1] != vocabulary.boi:
            return ended(f"a text reached its limit of {len(ids)} tokens without an image")
        if size is None:
            return ended("the model announced an image without a valid size")
        height, width = size
        if height * width + 1 > pipeline.room(history):
            return ended(f"an image of {height} x {width} tokens does not fit the rest of the context")
        branches = prompts.interleaved_image(vocabulary, history, edit=bool(drawn) and guidance.image > 0)
        image, used = replace(pipeline, seed=pipeline.seed + 2 * len(drawn) + 1).draw(branches, height, width, guidance)
        usage += used
        drawn.append(image)
        parts.append(f"[image {len(drawn)}]")
        history = history + (image.grids[0].flatten() + vocabulary.image_offset).tolist() + [vocabulary.image_end]
        if len(drawn) == max_images:
            return ended(f"it has its {max_images} images", complete=True)
        if pipeline.room(history) < 1:
            return ended("the context is full")
