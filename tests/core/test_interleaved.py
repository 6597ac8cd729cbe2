"""Stories, with a backbone that says what it is told to: order, headers, endings and guidance rows."""

import pytest
import torch

from llada_core import prompts
from llada_core.backbone.head import Head
from llada_core.errors import InputError
from llada_core.image_tokens import ImageTokens
from llada_core.options import Guidance, Sampling
from llada_core.placement import Placement
from llada_core.sampling.interleaved import generate_interleaved
from llada_core.sampling.pipeline import Pipeline

SAMPLING = Sampling(steps=2, thinking_steps=4, thinking_length=64)


class Logits(Head):
    """Takes logits for hidden states."""

    def forward(self, x, low=0, high=None):
        return x[..., low:high]

    def factor(self, device):
        return None


class Scripted(torch.nn.Module):
    """Predicts script[p] at position p, whatever it sees; remembers the prompts it was given."""

    def __init__(self, config, script: dict[int, int], default: int):
        super().__init__()
        self.config, self.script, self.default = config, script, default
        self.lm_head = Logits(config.hidden_size, config.vocab_size)
        self.seen: list[torch.Tensor] = []

    def forward(self, ids, positions, context, start, mask, attend):
        self.seen.append(ids.clone())
        wanted = [self.script.get(start + i, self.default) for i in range(ids.shape[1])]
        logits = torch.nn.functional.one_hot(torch.tensor(wanted), self.config.vocab_size).float() * 100
        return logits.expand(len(ids), -1, -1)


@pytest.fixture
def story(model):
    """story(parts, max_images, **options): tell a story whose model writes `parts`, texts and (h, w) by turns."""
    words = model.vocabulary

    def run(parts, max_images=4, guidance=None, references=None, sampling=SAMPLING, **config):
        script: list[int] = []
        for part in parts:
            if isinstance(part, str):
                script += words.encode(part)
            elif isinstance(part, tuple):
                script += words.header(*part)
                script += [words.image_offset + i % words.codebook_size for i in range(part[0] * part[1])]
                script += [words.image_end]  # appended by the engine, never predicted
            else:
                script.append(part)
        prompt = prompts.interleaved(words, "a story", references)
        settings = {**model.config.__dict__, **config}
        sized = type(model.config)(**settings)
        backbone = Scripted(sized, {len(prompt) + i: token for i, token in enumerate(script)}, words.end)
        placement = Placement(backbone, torch.device("cpu"), torch.float32)
        pipeline = Pipeline(words, sized, sampling, None, lambda _: placement, None)
        told = generate_interleaved(pipeline, "a story", references, max_images, guidance or Guidance(1.0), 0)
        return told, backbone

    return run


def test_text_and_images_alternate_until_the_end_token(story, model):
    told, _ = story(["Once.", (2, 3), "Then.", (3, 2), "Done.", model.vocabulary.end])
    assert told.text == "Once.\n\n[image 1]\n\nThen.\n\n[image 2]\n\nDone."
    assert told.complete
    assert told.ending == "the model ended the story"
    assert told.tokens.sizes == [(2, 3), (3, 2)]
    assert told.tokens.grids[0].flatten().tolist() == list(range(6))


def test_the_model_chooses_each_size(story, model):
    told, _ = story([(4, 4), (1, 7), model.vocabulary.end])
    assert told.tokens.sizes == [(4, 4), (1, 7)]
    assert told.text == "[image 1]\n\n[image 2]"


def test_it_stops_after_the_images_asked_for(story, model):
    told, _ = story(["One.", (2, 2), "Two.", (2, 2), "Three.", (2, 2), model.vocabulary.end], max_images=2)
    assert told.tokens.sizes == [(2, 2)] * 2
    assert told.complete
    assert "Three" not in told.text


def test_a_malformed_header_ends_it_with_what_is_finished(story, model):
    told, _ = story(["One.", (2, 2), "Two.", model.vocabulary.boi])
    assert told.tokens.sizes == [(2, 2)]
    assert told.text == "One.\n\n[image 1]\n\nTwo."
    assert not told.complete
    assert "without a valid size" in told.ending


def test_a_story_without_images_has_its_text(story, model):
    told, _ = story(["Only words.", model.vocabulary.end])
    assert told.tokens is None
    assert told.text == "Only words."
    assert told.complete


def test_an_image_beyond_the_context_ends_it(story, model):
    told, _ = story(["One.", (2, 2), "Two.", (30, 30)], max_position_embeddings=200)
    assert told.tokens.sizes == [(2, 2)]
    assert "30 x 30" in told.ending
    assert not told.complete


def test_a_text_without_end_stops_at_its_limit(story):
    told, _ = story(["x" * 500])
    assert told.tokens is None
    assert "limit of 64 tokens" in told.ending


def test_images_are_guided_by_two_rows_and_later_ones_by_three_when_edit_guidance_is_asked(story, model):
    words = model.vocabulary
    parts = ["One.", (2, 2), "Two.", (2, 2), words.end]
    _, backbone = story(parts, guidance=Guidance(2.0))
    assert sorted({len(ids) for ids in backbone.seen}) == [1, 2]  # texts alone, images with one unconditional row
    _, backbone = story(parts, guidance=Guidance(2.0, image=1.5))
    assert [len(ids) for ids in backbone.seen if len(ids) == 3]
    before_third_row = [len(ids) for ids in backbone.seen]
    assert before_third_row.index(2) < before_third_row.index(3)  # the first image has two rows all the same


def test_branches_of_a_later_image_are_as_written(model):
    words = model.vocabulary
    opening = prompts.interleaved(words, "a story", None)
    picture = [*words.header(1, 2), words.image_offset, words.image_offset + 1, words.image_end]
    text = words.encode("Then.")
    header = words.header(2, 2)
    history = opening + words.encode("One.") + picture + text + header
    nothing = words.encode("<uncondition>")
    blank = (
        prompts.open_turn(words, "You are a interleaved generation assistant.") + nothing + prompts.close_turn(words)
    )
    rows = prompts.interleaved_image(words, history, edit=True)
    assert rows.conditional == history
    assert rows.without_text == opening + words.encode("One.") + picture + nothing + header
    assert rows.without_image == blank + text + header
    plain = prompts.interleaved_image(words, history, edit=False)
    assert (plain.without_text, plain.without_image) == (blank + header, None)


def test_references_stand_before_the_instruction(story, model):
    references = ImageTokens((torch.tensor([[1, 2]]),), model.codebook_size)
    told, backbone = story(["One.", (1, 1), model.vocabulary.end], references=references)
    assert told.tokens.sizes == [(1, 1)]
    first = backbone.seen[0][0].tolist()
    assert model.vocabulary.image_offset + 2 in first


def test_bad_input_is_refused_before_any_work(model):
    with pytest.raises(InputError, match="instruction: found nothing"):
        model.interleave("  ")
    with pytest.raises(InputError, match="max_images: found 0"):
        model.interleave("a story", 0)
