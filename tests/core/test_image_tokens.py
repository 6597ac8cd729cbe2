"""ImageTokens and their files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llada_core.errors import InputError
from llada_core.image_tokens import ImageTokens, join, load_tokens, save_tokens


def tokens_of(*sizes: tuple[int, int], codebook: int = 256, seed: int = 0) -> ImageTokens:
    generator = torch.Generator().manual_seed(seed)
    return ImageTokens(tuple(torch.randint(0, codebook, size, generator=generator) for size in sizes), codebook)


def same(left: ImageTokens, right: ImageTokens) -> bool:
    grids = zip(left.grids, right.grids, strict=True)
    return left.codebook_size == right.codebook_size and all(torch.equal(a, b) for a, b in grids)


# Values


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ((), r"tokens: found no image; expected at least one token grid\. Encode or sample"),
        (
            (torch.zeros(0, 4, dtype=torch.int64),),
            r"tokens\[0\]: found torch.int64 of shape \[0, 4\]; expected a non-e",
        ),
        ((torch.zeros(2, 2),), r"tokens\[0\]: found torch.float32 of shape \[2, 2\]; expected .*int64"),
        ((torch.zeros(2, 2, dtype=torch.int32),), r"found torch.int32"),
        ((torch.zeros(4, dtype=torch.int64),), r"of shape \[4\]; expected .*\[h, w\]"),
        (
            (torch.tensor([[0]]), torch.tensor([[-1]])),
            r"tokens\[1\]: found codes from -1 to -1; expected codes from 0 to",
        ),
        ((torch.tensor([[0, 256]]),), r"found codes from 0 to 256; expected codes from 0 to 255\. .*codebook"),
    ],
)
def test_refused_grids(grids, message):
    with pytest.raises(InputError, match=message):
        ImageTokens(grids, 256)


def test_sizes_are_height_then_width():
    assert tokens_of((2, 3), (5, 1)).sizes == [(2, 3), (5, 1)]


def test_join_keeps_order():
    parts = [tokens_of((2, 3), (1, 1), seed=1), tokens_of((4, 2), seed=2)]
    assert same(join(parts), ImageTokens((*parts[0].grids, *parts[1].grids), 256))


def test_join_refuses_other_codebooks_and_nothing():
    with pytest.raises(InputError, match=r"codes of a codebook of 512; expected codes of this checkpoint's.* of 256"):
        join([tokens_of((1, 1)), tokens_of((1, 1), codebook=512)])
    with pytest.raises(InputError, match=r"found nothing; expected at least one set"):
        join([])


# Files


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_files_give_back_what_was_saved(tmp_path_factory, sizes):
    """Twelve images and more: tensor "10" must not come before tensor "2"."""
    path = tmp_path_factory.mktemp("tokens") / "t.safetensors"
    tokens = tokens_of(*sizes, codebook=16_384)
    save_tokens(tokens, path)
    assert same(load_tokens(path), tokens)


def test_grids_that_share_memory_or_are_views_are_saved(tmp_path):
    grid = torch.arange(12).view(3, 4)
    tokens = ImageTokens((grid, grid, grid.T, grid[:, 1:]), 256)
    save_tokens(tokens, tmp_path / "t.safetensors")
    assert same(load_tokens(tmp_path / "t.safetensors"), tokens)


GRID = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (
            {"0": GRID},
            None,
            r"t\.safetensors: found tensors \['0'\] and codebook_size ''; expected .*Save Image Tokens",
        ),
        ({"0": GRID}, {"codebook_size": "many"}, r"codebook_size 'many'"),
        ({"0": GRID}, {"codebook_size": "²"}, r"codebook_size '²'"),
        ({"0": GRID, "2": GRID}, {"codebook_size": "256"}, r"tensors \['0', '2'\]"),
        ({"weight": GRID}, {"codebook_size": "256"}, r"tensors \['weight'\]"),
        ({"0": GRID + 9}, {"codebook_size": "9"}, r"codes from 9 to 9; expected codes from 0 to 8"),
        ({"0": GRID.float()}, {"codebook_size": "256"}, r"torch.float32"),
    ],
)
def test_files_of_something_else(tensors, metadata, message, tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({name: grid.clone() for name, grid in tensors.items()}, path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        load_tokens(path)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_damaged_files(keep, tmp_path):
    path = tmp_path / "t.safetensors"
    save_tokens(tokens_of((4, 4)), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"t\.safetensors: found an unreadable file .*Save Image Tokens"):
        load_tokens(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.safetensors: found an unreadable file"):
        load_tokens(tmp_path / "gone.safetensors")
