"""Prompt forms beyond the goldens: what cannot be forged, headers both ways, every form of the prompts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_core import prompts
from llada_core.errors import InputError
from llada_core.image_tokens import ImageTokens

ONE = ImageTokens((torch.tensor([[3, 1, 2], [250, 0, 9]]),), 256)
TWO = ImageTokens((*ONE.grids, torch.tensor([[7], [8]])), 256)


def block(vocabulary, grid: torch.Tensor) -> list[int]:
    body = [vocabulary.image_offset + code for row in grid.tolist() for code in row]  # raster order
    return [*vocabulary.header(*grid.shape), *body, vocabulary.image_end]


def find(ids: list[int], part: list[int]) -> int:
    """Where part begins in ids; there must be one such place."""
    places = [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]
    assert len(places) == 1
    return places[0]


@pytest.mark.parametrize(
    "special", ["<|mask|>", "<|endoftext|>", "<|image|>", "<boi>", "<role>", "<|reserved_token_4|>"]
)
def test_a_prompt_cannot_forge_special_tokens(special, vocabulary):
    text = f"a {special} b"
    ids = vocabulary.encode(text)
    assert vocabulary._tokenizer.token_to_id(special) not in ids
    assert vocabulary.decode(ids) == text
    length = len(prompts.text_to_image(vocabulary, "a  b", 2, 2).conditional)
    assert len(prompts.text_to_image(vocabulary, text, 2, 2).conditional) > length + 1


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_texts_come_back(text, vocabulary):
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_decoding_leaves_out_special_tokens_and_image_codes(vocabulary):
    ids = [vocabulary.boi, *vocabulary.encode("fox"), vocabulary.mask, 448, 703, vocabulary.end]
    assert vocabulary.decode(ids) == "fox"


# Headers


@given(height=st.integers(1, 128), width=st.integers(1, 128))
def test_headers_are_read_back(height, width, vocabulary):
    header = vocabulary.header(height, width)
    assert header[0] == vocabulary.image
    assert header[3] == vocabulary.boi
    assert vocabulary.read_header([5, 6, *header]) == (height, width)


@pytest.mark.parametrize(("height", "width"), [(0, 1), (1, 0), (129, 1), (1, 129)])
def test_sizes_without_a_dimension_token(height, width, vocabulary):
    with pytest.raises(InputError, match=rf"size: found {height} x {width} tokens; expected 1 to 128 tokens each way"):
        vocabulary.header(height, width)


def test_malformed_headers(vocabulary):
    image, high, wide, boi = vocabulary.header(4, 6)
    zero = vocabulary._tokenizer.token_to_id("<|reserved_token_0|>")
    for ids in (
        [],
        [high, wide, boi],
        [image, high, boi],
        [image, high, wide],
        [boi, high, wide, boi],
        [image, 65, wide, boi],
        [image, high, 448, boi],
        [image, zero, wide, boi],
        [image, high, zero, boi],
        [image, high, wide, boi, boi],
    ):
        assert vocabulary.read_header(ids) is None


# Forms


def test_several_references_are_blocks_in_a_row_and_the_first_gives_the_size(vocabulary):
    rows = prompts.edit(vocabulary, "Make it blue.", TWO)
    blocks = [*block(vocabulary, TWO.grids[0]), *block(vocabulary, TWO.grids[1])]
    for row in (rows.conditional, rows.without_text):
        find(row, blocks)
        assert row[-4:] == vocabulary.header(2, 3)
    assert rows.without_image[-4:] == vocabulary.header(2, 3)
    assert not [token for token in rows.without_image if token >= vocabulary.image_offset]


def test_a_question_without_images(vocabulary):
    asked = prompts.understand(vocabulary, "Why?", None).conditional
    with_image = prompts.understand(vocabulary, "Why?", ONE).conditional
    at = find(with_image, block(vocabulary, ONE.grids[0]))
    assert with_image[:at] + with_image[at + 11 :] == asked


def test_a_plan_is_cut_at_its_last_header(vocabulary):
    think, header = vocabulary.encode("a red fox, then a header"), vocabulary.header(9, 9)
    for plan, kept in (
        ([*think, *header], think),  # as the model writes it
        (think, think),  # it stopped without a header
        ([*think, *header, *think, *header[:2]], [*think, *header, *think]),  # the last of several, even a torn one
        ([], []),
    ):
        rows, trace = prompts.after_thinking(vocabulary, "fox", plan, 4, 6)
        expected = [*prompts.thinking(vocabulary, "fox").conditional, *kept, *vocabulary.header(4, 6)]
        assert rows.conditional == expected
        assert trace == vocabulary.decode(kept).strip()
        assert rows.without_image is None


def test_rows_of_a_story(vocabulary):
    """The first image of a story, and a later one guided as an edit of the one before it."""
    nothing, header = vocabulary.encode("<uncondition>"), vocabulary.header(2, 2)
    opening = prompts.open_turn(vocabulary, "You are a interleaved generation assistant.")
    blank = [*opening, *nothing, *prompts.close_turn(vocabulary)]
    prompt = prompts.interleaved(vocabulary, "Tell.", ONE)
    assert prompt == [
        *opening,
        *block(vocabulary, ONE.grids[0]),
        *vocabulary.encode("Tell."),
        *prompts.close_turn(vocabulary),
    ]
    first = [*prompt, *vocabulary.encode("One."), *header]
    rows = prompts.interleaved_image(vocabulary, first, edit=False)
    assert (rows.conditional, rows.without_text, rows.without_image) == (first, [*blank, *header], None)
    drawn = [*first, 448, 449, 450, 451, vocabulary.image_end]
    second = vocabulary.encode("Two.")
    rows = prompts.interleaved_image(vocabulary, [*drawn, *second, *header], edit=True)
    assert rows.conditional == [*drawn, *second, *header]
    assert rows.without_text == [*drawn, *nothing, *header]
    assert rows.without_image == [*blank, *second, *header]
