"""Tokens as a canvas: masks to cells, pad, crop, paste, and which cells a variation draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_core.errors import InputError
from llada_core.image_tokens import ImageTokens
from llada_core.token_edits import cells_to_vary, crop, mask_of_cells, pad, paste, touched_cells


def image(rows: int, columns: int, first: int = 0) -> ImageTokens:
    return ImageTokens((torch.arange(first, first + rows * columns).view(rows, columns),), 256)


# Masks


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), size=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_every_cell_with_a_marked_pixel_and_no_other(rows, columns, size, seed):
    """By brute force, for masks of the grid's proportions: pixel by pixel, cell by cell."""
    height, width = rows * size, columns * size
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(height, width, generator=generator) < 0.02).float()
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    for y, x in mask.nonzero().tolist():
        expected[y // size, x // size] = True
    assert torch.equal(touched_cells(mask, rows, columns), expected)
    assert torch.equal(touched_cells(mask[None], rows, columns), expected)


def test_the_faintest_touch_counts():
    mask = torch.zeros(64, 64)
    mask[10, 50] = 1e-3
    assert touched_cells(mask, 2, 2).tolist() == [[False, True], [False, False]]


def test_masks_smaller_than_the_grid_cover_all_the_cells_of_a_pixel():
    assert touched_cells(torch.tensor([[0.0, 1.0]]), 2, 4).tolist() == [[False, False, True, True]] * 2


def test_a_mask_of_other_proportions_is_read_as_a_picture_that_covers_the_grid():
    """100 x 60 pixels over a square grid: 20 pixels at either side hang over, as of the picture itself."""
    mask = torch.zeros(60, 100)
    mask[:, :20] = mask[:, 80:] = 1
    assert not touched_cells(mask, 3, 3).any()
    mask[:, 20] = 1
    assert touched_cells(mask, 3, 3).tolist() == [[True, False, False]] * 3


def test_an_empty_mask_marks_nothing_and_says_so(caplog):
    assert not touched_cells(torch.zeros(64, 64), 4, 4).any()
    assert "marks nothing" in caplog.text


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 8, 8), r"mask: found shape \[2, 8, 8\]; expected one mask"),
        (torch.zeros(8), r"mask: found shape \[8\]"),
        (torch.zeros(1, 1).expand(10**5, 10**5), r"mask: found shape \[100000, 100000\] out of 1 numbers"),
        (torch.zeros(0, 8), r"mask: found shape \[0, 8\]"),
        (torch.full((8, 8), float("nan")), "mask: found values that are not finite"),
        ([[1]], "mask: found .*; expected one mask"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(InputError, match=message):
        touched_cells(mask, 2, 2)


def test_cells_and_masks_of_the_decoded_picture_are_the_same():
    cells = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    assert mask_of_cells(cells).shape == (1, 96, 160)
    assert torch.equal(touched_cells(mask_of_cells(cells), 3, 5), cells)


# Pad, crop, paste


@given(sides=st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(any))
def test_what_is_known_stays_where_it_stood_and_the_rest_is_masked(sides):
    left, top, right, bottom = sides
    larger, mask = pad(image(3, 5), *(32 * side for side in sides))
    (grid,) = larger.grids
    assert grid.shape == (3 + top + bottom, 5 + left + right)
    known = (slice(top, top + 3), slice(left, left + 5))
    assert torch.equal(grid[known], image(3, 5).grids[0])
    unknown = touched_cells(mask, *grid.shape)
    assert not unknown[known].any()
    assert int(unknown.sum()) == unknown.numel() - 15


def test_cropping_undoes_padding():
    larger, _ = pad(image(3, 5), 32, 64, 0, 96)
    assert torch.equal(crop(larger, 32, 64, 160, 96).grids[0], image(3, 5).grids[0])


def test_every_image_is_cropped():
    both = ImageTokens((image(3, 5).grids[0], image(4, 4, 100).grids[0]), 256)
    assert [grid.tolist() for grid in crop(both, 32, 0, 64, 32).grids] == [[[1, 2]], [[101, 102]]]


def test_a_piece_lies_over_the_image_and_its_seam_is_marked():
    result, seam = paste(image(5, 6), image(3, 3, 200), 64, 32)
    (grid,) = result.grids
    assert torch.equal(grid[1:4, 2:5], image(3, 3, 200).grids[0])
    outside = torch.ones(5, 6, dtype=torch.bool)
    outside[1:4, 2:5] = False
    assert torch.equal(grid[outside], image(5, 6).grids[0][outside])
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[0:5, 1:6] = True
    expected[2, 3] = False  # the middle of the piece
    assert torch.equal(touched_cells(seam, 5, 6), expected)
    assert torch.equal(image(5, 6).grids[0], torch.arange(30).view(5, 6)), "the image below is not written to"


def test_a_seam_ends_at_the_edge_of_the_image():
    _, seam = paste(image(3, 3), image(2, 2, 100), 0, 0)
    assert touched_cells(seam, 3, 3).all()


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: pad(image(2, 2), 0, 0, 0, 0), "padding: found 0 pixels on every side"),
        (lambda: pad(image(2, 2), 31, 0, 0, 0), "left: found 31 pixels; expected a multiple of 32 from 0"),
        (lambda: pad(image(2, 2), 0, -32, 0, 0), "top: found -32 pixels"),
        (lambda: pad(image(2, 2), 0, 0, 8192, 0), "padding: found 8256 x 64 pixels; expected at most 8192"),
        (lambda: pad(ImageTokens((image(2, 2).grids[0],) * 2, 256), 32, 0, 0, 0), "tokens: found 2 images"),
        (lambda: crop(image(2, 2), 32, 0, 64, 32), "rectangle: found .* up to 96 x 32 pixels; expected .* 64 x 64"),
        (lambda: crop(image(2, 2), 0, 0, 0, 32), "width: found 0 pixels; expected a multiple of 32 from 32"),
        (lambda: crop(image(2, 2), 0, 0, True, 32), "width: found True pixels"),
        (lambda: paste(image(2, 2), image(2, 2), 32, 0), "rectangle: found .* Move the piece"),
        (lambda: paste(image(2, 2), ImageTokens((torch.zeros(1, 1).long(),), 512), 0, 0), "codebook of 512"),
        (lambda: cells_to_vary(2, 2, 1.5, 0), "strength: found 1.5"),
    ],
)
def test_what_cannot_be_done_is_refused(work, message):
    with pytest.raises(InputError, match=message):
        work()


# Variations


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), strength=st.floats(0, 1), seed=st.integers(0, 2**64))
def test_a_share_of_the_cells_by_seed(rows, columns, strength, seed):
    cells = cells_to_vary(rows, columns, strength, seed)
    assert int(cells.sum()) == max(round(strength * rows * columns), 1)
    assert torch.equal(cells, cells_to_vary(rows, columns, strength, seed))


def test_other_seeds_choose_other_cells_and_the_global_generator_stays():
    before = torch.get_rng_state()
    assert not torch.equal(cells_to_vary(8, 8, 0.3, 1), cells_to_vary(8, 8, 0.3, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_least_certain_cells_come_first():
    certainty = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    cells = cells_to_vary(4, 5, 0.25, 0, certainty)
    assert int(cells.sum()) == 5
    assert certainty[cells].max() < certainty[~cells].min()
