"""Stories: the turns between text and images, by a model that follows a script, and once by the golden one."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from llada_core.options import Guidance, Sampling
from llada_core.sampling.interleave import tell
from llada_core.sampling.tasks import Job, Usage
from llada_core.tokens import ImageTokens

GUIDED = Guidance(2.0, 1.5)


@dataclass(frozen=True)
class Scripted(Job):
    """A job that writes what the script says and notes what it was asked; images count up from their seed."""

    script: list = field(default_factory=list)
    calls: list = field(default_factory=list)

    def write(self, prompt, most, steps, stops, stage):
        ids = self.script.pop(0)
        self.calls.append(("write", list(prompt), self.seed, stage))
        return ids, Usage(len(ids), 1, 0.5)

    def draw(self, rows, height, width, guidance):
        self.calls.append(("draw", rows, self.seed, guidance))
        grid = (torch.arange(height * width) + self.seed).remainder(256).view(height, width)
        return ImageTokens((grid,), 256), Usage(height * width, 2, 1.0)


@pytest.fixture
def scripted(model):
    """scripted(*texts): a job for those texts."""

    def scripted(*texts, seed: int = 0, context: int = 8192) -> Scripted:
        config = replace(model.config, max_position_embeddings=context)
        return Scripted(model.vocabulary, config, Sampling(), None, seed, None, None, list(texts), [])

    return scripted


def test_text_and_images_take_turns_until_the_end_token(scripted, vocabulary):
    words = vocabulary
    one, two, last = (words.encode(text) for text in ("One.", "Two.", "The end."))
    job = scripted([*one, *words.header(2, 3)], [*two, *words.header(1, 2)], [*last, words.end], seed=10)
    story = tell(job, "Tell.", None, 8, Guidance(2.0))
    assert story.text == "One.\n\n[image 1]\n\nTwo.\n\n[image 2]\n\nThe end."
    assert story.tokens.sizes == [(2, 3), (1, 2)]
    assert story.ending == "the model ended the story"
    assert story.usage == Usage(len(one) + 4 + 6 + len(two) + 4 + 2 + len(last) + 1, 3 + 2 * 2, 3 * 0.5 + 2 * 1.0)
    # What the second text saw: the prompt, the first text, its header, the image and its end.
    body = [words.image_offset + code for code in story.tokens.grids[0].flatten().tolist()]
    prompt = words.interleaved("Tell.", None)
    second_prompt = job.calls[2][1]
    assert second_prompt == [*prompt, *one, *words.header(2, 3), *body, words.image_end]
    seeds = [call[2] for call in job.calls]
    assert len(set(seeds)) == len(seeds), "no turn repeats another's draws"
    assert seeds[0] == 10


@pytest.mark.parametrize(("guidance", "edits"), [(Guidance(2.0, 0.0), [False, False]), (GUIDED, [False, True])])
def test_only_later_images_are_guided_as_edits(guidance, edits, scripted, vocabulary):
    header = vocabulary.header(2, 2)
    job = scripted(header, header)
    tell(job, "Tell.", None, 2, guidance)
    rows = [call[1] for call in job.calls if call[0] == "draw"]
    assert [row.without_image is not None for row in rows] == edits


def test_a_story_ends_after_its_images_without_another_text(scripted, vocabulary):
    job = scripted(*[vocabulary.header(1, 1)] * 5)
    story = tell(job, "Tell.", None, 3, GUIDED)
    assert story.tokens.sizes == [(1, 1)] * 3
    assert story.ending == "it has its 3 images"
    assert len(job.script) == 2


def test_a_malformed_header_ends_the_story_with_what_there_is(scripted, vocabulary):
    words = vocabulary
    story = tell(scripted(words.header(1, 1), [*words.encode("Two."), words.boi]), "Tell.", None, 8, GUIDED)
    assert story.ending == "the model announced an image without a valid size"
    assert story.tokens.sizes == [(1, 1)]
    assert story.text == "[image 1]\n\nTwo."


def test_a_story_without_an_image_has_no_tokens(scripted, vocabulary):
    story = tell(scripted([*vocabulary.encode("No."), vocabulary.end]), "Tell.", None, 8, GUIDED)
    assert story.tokens is None
    assert story.text == "No."


def test_a_text_that_reaches_its_limit_says_so(scripted, vocabulary):
    story = tell(scripted(vocabulary.encode("and so on")), "Tell.", None, 8, GUIDED)
    assert "limit of 9 tokens without an image" in story.ending


def test_an_image_that_does_not_fit_the_context_ends_the_story(scripted, vocabulary):
    prompt = len(vocabulary.interleaved("Tell.", None))
    header = vocabulary.header(4, 4)
    story = tell(scripted(header, context=prompt + 4 + 16), "Tell.", None, 8, GUIDED)
    assert "an image of 4 x 4 tokens does not fit" in story.ending
    assert story.tokens is None
    story = tell(scripted(header, context=prompt + 4 + 17), "Tell.", None, 8, GUIDED)  # with its end token, it does
    assert story.ending == "the context is full"
    assert story.tokens.sizes == [(4, 4)]


def test_references_stand_before_the_instruction(scripted, vocabulary):
    references = ImageTokens((torch.zeros(2, 2, dtype=torch.int64),), 256)
    job = scripted([vocabulary.end])
    tell(job, "Tell.", references, 8, GUIDED)
    assert job.calls[0][1] == vocabulary.interleaved("Tell.", references)
    assert len(job.calls[0][1]) == len(vocabulary.interleaved("Tell.", None)) + 4 + 4 + 1


def test_the_golden_model_tells_something_and_the_same_again(model):
    sampling = Sampling(steps=2, thinking_steps=2, thinking_length=60, temperature=1.0)
    first, again = (model.interleave("Tell.", 2, sampling=sampling, seed=2**64 - 1) for _ in range(2))
    assert (first.text, first.ending) == (again.text, again.ending)
    assert first.usage.rounds > 0
