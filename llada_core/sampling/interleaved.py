"""Stories: text and images in turn (docs/model.md, Interleaved generation)."""

from dataclasses import dataclass

from .. import prompts
from ..backbone.cache import Prefix
from ..image_tokens import ImageTokens, join
from ..options import Guidance
from .pipeline import Image, Pipeline, Text, Usage


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
    pipeline: Pipeline, instruction: str, references: ImageTokens | None, max_images: int, guidance: Guidance, seed: int
) -> Story:
    """Write text until the model announces an image, draw it, and go on.

    The story ends at the end token, after max_images, where the context or the text's length limit ends, or at a
    header that announces no image. Image guidance above 0 draws every image but the first as an edit of the one
    before it. Each turn goes on from what is cached of those before it.
    """
    vocabulary = pipeline.vocabulary
    history = prompts.interleaved(vocabulary, instruction, references)
    pipeline.check_room([history], 1, "a text")
    stops = frozenset((vocabulary.end, vocabulary.boi))
    parts: list[str] = []
    drawn: list[ImageTokens] = []
    usage = Usage(0, 0, 0.0)
    prefix: Prefix | None = None

    def ended(ending: str, complete: bool = False) -> Story:
        text = "\n\n".join(part for part in parts if part)
        return Story(join(drawn) if drawn else None, text, ending, complete, usage)

    while True:
        text = Text(history, pipeline.sampling.thinking_length, seed + 2 * len(drawn), prefix)
        (written,) = pipeline.write([text], pipeline.sampling.thinking_steps, stops, "story", keep_prefix=True)
        ids, prefix = written.ids, written.prefix
        usage += written.usage
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
        image = Image(branches, height, width, seed + 2 * len(drawn) + 1, prefix=prefix)
        (picture,) = pipeline.draw([image], guidance, keep_prefix=True)
        prefix = picture.prefix
        usage += picture.usage
        drawn.append(picture.tokens)
        parts.append(f"[image {len(drawn)}]")
        body = (picture.tokens.grids[0].flatten() + vocabulary.image_offset).tolist()
        history = [*history, *body, vocabulary.image_end]
        if len(drawn) == max_images:
            return ended(f"it has its {max_images} images", complete=True)
        if pipeline.room(history) < 1:
            return ended("the context is full")
