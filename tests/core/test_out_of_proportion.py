"""Small inputs that ask for much: what an input claims, or makes of little, stays in proportion, or is refused."""

import struct

import pytest
import torch

from llada_core.errors import InputError
from llada_core.image_tokens import MOST_GRIDS, ImageTokens, join, load_tokens, save_tokens
from llada_core.options import Decoding
from llada_core.progress import Interrupted
from llada_core.token_edits import paste, touched_cells
from llada_core.vision import preprocess
from llada_core.zimage import decoder_files, features_of

TOKENS = ImageTokens((torch.zeros(2, 2, dtype=torch.int64),), 256)
ONE = torch.ones(1)
KINDS = {
    "sparse": lambda shape: torch.ones(shape).to_sparse(),
    "meta": lambda shape: torch.ones(shape, device="meta"),
    "quantized": lambda shape: torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.quint8),
    "nested": lambda shape: torch.nested.nested_tensor([torch.ones(shape[1:])] * shape[0]),
    "complex": lambda shape: torch.ones(shape, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_kinds(kind, model):
    with pytest.raises(InputError, match=f"mask: found a {kind} tensor; expected one mask"):
        touched_cells(KINDS[kind]((1, 8, 8)), 2, 2)
    with pytest.raises(InputError, match=f"image: found a {kind} tensor; expected a batch"):
        model.encode(KINDS[kind]((1, 8, 8, 3)))


def test_tensors_that_claim_more_than_they_hold(model):
    with pytest.raises(
        InputError, match=r"mask: found shape \[10000, 10000\] out of 1 numbers; expected a tensor that"
    ):
        touched_cells(ONE.expand(10_000, 10_000), 2, 2)
    for shape in ((10**9, 8, 8, 3), (1, 10_000, 10_000, 3)):
        with pytest.raises(InputError, match=r"image: found shape .* out of 1 numbers; expected a tensor that holds"):
            model.encode(ONE.expand(shape), progress=lambda progress: pytest.fail("it began"))
    assert bool(touched_cells(ONE.expand(1, 512, 512), 2, 2).all())  # as a node makes one that is all ones


def test_a_batch_of_too_many_images(model):
    with pytest.raises(InputError, match=r"image: found 5000 images; expected at most 4096\. Take fewer"):
        model.encode(ONE.expand(5000, 8, 8, 3), pixels=1024)


def test_masks_of_any_type_and_of_bands():
    """Looked at in bands: NaN in the last row is found, and what a cell touches is what a maximum over it says."""
    mask = torch.zeros(1001, 777)
    mask[1000, 776] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        touched_cells(mask, 3, 3)
    drawn = (torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)) > 0.9999).float()
    expected = torch.nn.functional.adaptive_max_pool2d(drawn[None], (7, 7))[0] > 0
    assert 0 < int(expected.sum()) < 49
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.float64, torch.float8_e4m3fn):
        assert torch.equal(touched_cells(drawn.to(dtype), 7, 7), expected)


def test_images_are_resized_one_at_a_time(model, monkeypatch):
    """What is resized may be a thousand times as large; the second image waits until the first is encoded."""
    resized, resize = [], preprocess._resize
    monkeypatch.setattr(preprocess, "_resize", lambda *given: resized.append(given) or resize(*given))

    def stop(progress) -> bool:
        assert len(resized) == progress.done or progress.done < len(resized) == progress.done + 1
        return progress.done < 2

    with pytest.raises(Interrupted):
        model.encode(torch.rand(5, 8, 8, 3), pixels=1024, progress=stop)
    assert len(resized) == 2


def test_features_are_computed_a_few_images_at_a_time(model):
    made = []
    embedder = model._place("sigvq").module
    hook = embedder.register_forward_hook(lambda *_: made.append(1))
    try:
        with pytest.raises(Interrupted):
            model.decode(join([TOKENS] * 20), Decoding(steps=3), lambda progress: False)
    finally:
        hook.remove()
    assert len(made) == 8


def test_an_interrupt_waits_for_one_block_of_the_vision_tower(model):
    blocks, stopped = [], []
    tower = model._place("image_tokenizer").module.visual.blocks
    hooks = [block.register_forward_hook(lambda *_: blocks.append(1)) for block in tower]

    def stop(progress) -> bool:
        stopped.append(1)
        return len(stopped) < 2

    try:
        with pytest.raises(Interrupted):
            model.encode(torch.rand(1, 64, 64, 3), pixels=1024, progress=stop)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(tower) > len(blocks) == 1


def test_joining_what_was_joined_ends(tmp_path):
    """Twenty nodes that each join four times the one before: 4**20 images, without end."""
    tokens = TOKENS
    for _ in range(6):
        tokens = join([tokens] * 4)
    assert len(tokens.grids) == MOST_GRIDS
    with pytest.raises(InputError, match=r"tokens: found 16384 images; expected at most 4096\. Take fewer"):
        join([tokens] * 4)
    save_tokens(tokens, tmp_path / "t.safetensors")
    assert len(load_tokens(tmp_path / "t.safetensors").grids) == MOST_GRIDS
    large = ImageTokens((torch.zeros(1024, 1024, dtype=torch.int64),), 256)
    with pytest.raises(InputError, match=r"tokens: found 8388608 tokens in all; expected at most 4194304"):
        join([large] * 8)


def test_a_token_file_of_too_much_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    shape, size = [2**25, 1], 2**28
    header = (
        f'{{"__metadata__":{{"codebook_size":"256"}},"0":{{"dtype":"I64","shape":{shape},"data_offsets":[0,{size}]}}}}'
    )
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + size)  # a hole: it takes no room on the disk
    monkeypatch.setattr(torch.Tensor, "min", lambda *_: pytest.fail("it was read"))
    with pytest.raises(InputError, match=r"t\.safetensors: found 33554432 tokens in all; expected at most 4194304"):
        load_tokens(path)


def test_variations_of_an_image_too_large_to_ask_for(model, monkeypatch):
    """Of 64 variations the cells were chosen before the size was looked at: 20 s without a way to stop."""
    monkeypatch.setattr("llada_core.sampling.tasks.cells_to_vary", lambda *_: pytest.fail("cells were chosen"))
    large = ImageTokens((torch.zeros(1500, 1500, dtype=torch.int64),), 256)
    with pytest.raises(InputError, match="size: found 1500 x 1500 tokens; expected 1 to 128"):
        model.vary(large, "a fox", count=64)


def test_a_canvas_of_many_tokens():
    large = ImageTokens((torch.zeros(300, 20, dtype=torch.int64),), 256)
    with pytest.raises(InputError, match=r"tokens: found 640 x 9600 pixels; expected at most 8192 a side\. Crop"):
        paste(large, TOKENS, 0, 0)


def test_a_preview_of_many_tokens(model):
    large = ImageTokens((torch.zeros(256, 256, dtype=torch.int64),), 256)
    with pytest.raises(
        InputError, match=r"cell: found 64, which makes 268435456 pixels; expected at most 67108864\. Ch"
    ):
        model.preview(large, 64)
    assert model.preview(large, 8)[0].shape == (2048, 2048, 3)


def test_a_conditioning_of_many_images(model):
    many = ImageTokens(TOKENS.grids * 65, 256)
    with pytest.raises(InputError, match=r"tokens: found 65 images; expected at most 64 in a batch"):
        features_of(model, many)
    assert len(features_of(model, ImageTokens(TOKENS.grids * 64, 256))[0]) == 64


@pytest.mark.parametrize("decoder", ["fast", None, torch.ones(2, 2), [0] * 1000])
def test_another_decoder(decoder, model):
    with pytest.raises(InputError, match=r"decoder: found .*; expected one of turbo, normal"):
        decoder_files(model, decoder)
