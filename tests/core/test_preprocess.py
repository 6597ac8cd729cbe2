"""vision/preprocess.py: sizes against the reference's, then what holds for every image, then what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llada_core.errors import CheckpointError, InputError
from llada_core.vision.preprocess import (
    ALIGN,
    MAX_EDIT_RATIO,
    Normalisation,
    PixelBudgets,
    cover,
    edit_size,
    edit_sizes,
    prepare,
    to_picture,
    to_pixels,
    understand_size,
    understand_target,
)

BUDGETS = PixelBudgets()


@st.composite
def sizes(draw, longest=5000):
    height = draw(st.integers(1, longest))
    width = draw(st.integers(max(1, -(-height // 200)), min(longest, height * 200)))
    return height, width


def filled(height: int, width: int, value: float = 0.5, channels: int = 3) -> torch.Tensor:
    return torch.full((height, width, channels), value)


# Against the reference


def swapped(pair):
    return None if pair is None else (pair[1], pair[0])


def test_sizes_are_those_of_the_reference(golden):
    assert golden["resize"]
    for case in golden["resize"]:
        size = swapped(case["size"])
        single = BUDGETS.understand_min, BUDGETS.understand_max
        several = BUDGETS.understand_min, BUDGETS.several_max
        assert understand_target(size, *single) == swapped(case["understand_target"]), size
        assert understand_target(size, *several) == swapped(case["multi_target"]), size
        if case["understand_final"]:
            assert understand_size(size, *single) == swapped(case["understand_final"]), size
        if case["edit"]:
            assert edit_size(size, BUDGETS.edit) == swapped(case["edit"]), size


def test_edit_candidates_are_those_of_the_reference(golden):
    assert edit_sizes(BUDGETS.edit) == [swapped(pair) for pair in golden["edit_crop_sizes"]]


def test_prepare_reaches_the_sizes_of_the_reference(golden):
    for case in golden["resize"]:
        height, width = swapped(case["size"])
        if height * width > 10**6 or not case["understand_final"]:
            continue
        image = filled(height, width)
        assert prepare(image, "understand").shape[1:] == swapped(case["understand_final"])
        for fit in ("cover", "crop"):
            assert prepare(image, "edit", fit).shape[1:] == swapped(case["edit"])


# Sizes, for every image


@given(sizes())
def test_understand_target_is_aligned_and_within_budget(size):
    height, width = understand_target(size, BUDGETS.understand_min, BUDGETS.understand_max)
    assert height % ALIGN == width % ALIGN == 0
    assert height * width >= BUDGETS.understand_min
    assert height * width <= BUDGETS.understand_max or min(height, width) == ALIGN


@given(sizes())
def test_understand_size_is_aligned_and_covers_the_target(size):
    limits = BUDGETS.understand_min, BUDGETS.several_max
    target, final = understand_target(size, *limits), understand_size(size, *limits)
    assert all(side % ALIGN == 0 and side >= wanted for side, wanted in zip(final, target, strict=True))
    assert min(side - wanted for side, wanted in zip(final, target, strict=True)) < ALIGN


@given(sizes(), sizes())
def test_cover_covers_and_touches_one_side(size, target):
    covered = cover(size, target)
    assert all(side >= wanted for side, wanted in zip(covered, target, strict=True))
    assert covered[0] == target[0] or covered[1] == target[1]


@given(st.integers(ALIGN**2, 4096**2))
def test_edit_candidates_keep_budget_and_ratio(maximum):
    candidates = edit_sizes(maximum)
    assert candidates
    assert len(set(candidates)) == len(candidates)
    for height, width in candidates:
        assert height % ALIGN == width % ALIGN == 0
        assert height * width <= maximum
        assert max(height, width) <= MAX_EDIT_RATIO * min(height, width)


@given(sizes())
def test_edit_size_is_the_candidate_of_nearest_proportions(size):
    def lost(candidate):
        return abs(math.log(candidate[0] / candidate[1]) - math.log(size[0] / size[1]))

    candidates = edit_sizes(BUDGETS.edit)
    chosen = edit_size(size, BUDGETS.edit)
    assert chosen in candidates
    assert lost(chosen) <= min(map(lost, candidates)) + 1e-9


# Pixels


def test_every_8_bit_value_survives():
    ramp = torch.arange(256).reshape(16, 16, 1).expand(-1, -1, 3)
    assert torch.equal(to_pixels(to_picture(ramp / 255)), ramp.permute(2, 0, 1).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types_give_the_same_pixels(dtype):
    ramp = torch.arange(256).reshape(16, 16, 1).expand(-1, -1, 3) / 255
    assert torch.equal(to_pixels(to_picture(ramp.to(dtype))), to_pixels(to_picture(ramp)))


def test_transparency_is_composited_over_white():
    image = torch.zeros(1, 3, 4)
    image[0, :, 3] = torch.tensor([0.0, 0.5, 1.0])  # black: clear, half, solid
    red, green, blue = to_pixels(to_picture(image))[:, 0]
    assert red.tolist() == green.tolist() == blue.tolist()
    assert red[0] == 255
    assert red[1] == pytest.approx(127, abs=1)
    assert red[2] == 0


def test_the_callers_image_is_left_alone():
    image = torch.rand(40, 50, 3)
    before = image.clone()
    prepare(image, "understand")
    assert torch.equal(image, before)


def test_cover_keeps_the_whole_scene_and_crop_the_middle():
    image = torch.rand(1024, 1024, 3)
    image[:100, :100] = 0.0
    image[-100:, -100:] = 1.0
    covered = prepare(image, "edit", "cover")
    assert covered.shape == (3, 512, 512)
    assert covered[:, :40, :40].max() == 0
    assert covered[:, -40:, -40:].min() == 255
    assert torch.equal(prepare(image, "edit", "crop"), to_pixels(to_picture(image[256:768, 256:768])))


def test_cover_cuts_as_much_on_either_side():
    image = torch.zeros(320, 1800, 3)  # wider than 4:1, so that the ends have to go
    image[:, :900] = 1.0
    covered = prepare(image, "edit")
    half = covered.shape[2] // 2
    assert covered.shape == (3, 256, 1024)
    assert covered[:, :, : half - 4].min() == 255
    assert covered[:, :, half + 4 :].max() == 0


def test_crop_fills_up_small_images_with_black_below_and_right():
    cropped = prepare(filled(100, 100, 1.0), "edit", "crop")
    assert cropped.shape == (3, 512, 512)
    assert cropped[:, :100, :100].min() == 255
    assert cropped.sum() == 3 * 100 * 100 * 255


def test_understanding_resizes_with_bicubic_on_8_bits():
    image = torch.rand(100, 150, 3)
    picture = Image.fromarray((image.numpy() * 255).round().astype(np.uint8))
    # 96x160 is the target; covering it takes 107x160, of which 96 rows remain.
    expected = picture.resize((160, 107), Image.Resampling.BICUBIC).crop((0, 5, 160, 101))
    budgets = PixelBudgets(understand_min=ALIGN**2)
    assert torch.equal(prepare(image, "understand", budgets=budgets), to_pixels(expected))


def test_one_of_several_gets_the_smaller_budget():
    image = filled(1000, 1000)
    assert prepare(image, "understand").shape == (3, 800, 800)
    assert prepare(image, "understand", several=True).shape == (3, 448, 448)


@pytest.mark.parametrize("purpose", ["edit", "understand"])
@pytest.mark.parametrize(("pixels", "side"), [(ALIGN**2, 32), (256**2, 256), (1024**2, 1024)])
def test_pixels_takes_the_budgets_place(purpose, pixels, side):
    assert prepare(filled(1500, 1500), purpose, pixels=pixels).shape == (3, side, side)


def test_pixels_below_the_least_budget_wins_over_it():
    assert prepare(filled(40, 40), "understand").shape == (3, 128, 128)
    assert prepare(filled(40, 40), "understand", pixels=ALIGN**2).shape == (3, 32, 32)


def test_the_checkpoints_budgets_are_used():
    budgets = PixelBudgets.from_config({"pixel_budgets": {"edit": 128**2, "understand_max": 320**2}})
    assert budgets == PixelBudgets(edit=128**2, understand_max=320**2)
    assert prepare(filled(900, 900), "edit", budgets=budgets).shape == (3, 128, 128)
    assert prepare(filled(900, 900), "understand", budgets=budgets).shape == (3, 320, 320)


def test_normalisation_of_the_golden_checkpoint(golden_checkpoint):
    config = json.loads((golden_checkpoint / "image_tokenizer" / "preprocessor_config.json").read_text())
    assert PixelBudgets.from_config(config) == PixelBudgets()
    values = Normalisation.from_config(config)(torch.tensor([0.0, 51.0, 255.0]).expand(3, 1, 3))
    assert values.dtype == torch.float32
    assert torch.allclose(values[2, 0], torch.tensor([-1.0, -0.6, 1.0]), atol=1e-6)


def test_normalisation_is_per_channel_and_follows_the_switches():
    config = {"rescale_factor": 0.5, "image_mean": [1, 2, 3], "image_std": [1, 2, 4]}
    pixels = torch.full((3, 1, 1), 10.0)
    assert Normalisation.from_config(config)(pixels).flatten().tolist() == [4.0, 1.5, 0.5]
    assert Normalisation.from_config(config | {"do_rescale": False})(pixels).flatten().tolist() == [9.0, 4.0, 1.75]
    assert Normalisation.from_config(config | {"do_normalize": False})(pixels).flatten().tolist() == [5.0, 5.0, 5.0]
    assert Normalisation.from_config({}) == Normalisation()


# What is refused


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (filled(32, 32, channels=1), "1 channel"),
        (filled(32, 32, channels=2), "2 channel"),
        (filled(32, 32, channels=5), "5 channel"),
        (filled(0, 32), "32x0 pixels"),
        (filled(32, 0), "0x32 pixels"),
        (filled(1, 201), "201x1 pixels"),
        (filled(32, 32, float("nan")), "values from nan"),
        (filled(32, 32, float("inf")), "to inf"),
        (filled(32, 32, -float("inf")), "from -inf"),
        (filled(32, 32, 2.1), "to 2.1"),
        (filled(32, 32, -1.1), "from -1.1"),
        (filled(32, 32, 255.0), "to 255"),
        (filled(32, 32)[None], r"\[1, 32, 32, 3\]"),
        (filled(32, 32)[:, :, 0], r"\[32, 32\]"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), "torch.uint8"),
        ("photo.png", "'photo.png'"),
    ],
)
def test_images_that_are_refused(image, found):
    with pytest.raises(InputError, match=rf"image: found .*{found}"):
        prepare(image)


def test_one_bad_pixel_is_enough():
    image = filled(64, 64)
    image[63, 63, 2] = float("nan")
    with pytest.raises(InputError, match="nan"):
        prepare(image)


@pytest.mark.parametrize(("value", "pixel"), [(-0.4, 0), (1.4, 255)])
def test_overshoot_of_sharp_resizing_is_clamped(value, pixel):
    assert to_pixels(to_picture(filled(2, 2, value))).unique().tolist() == [pixel]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"purpose": "draw"}, "purpose"),
        ({"fit": "stretch"}, "fit"),
        ({"pixels": ALIGN**2 - 1}, "pixels"),
        ({"pixels": -1}, "pixels"),
        ({"pixels": 4096**2 + 1}, "pixels"),
    ],
)
def test_arguments_that_are_refused(arguments, name):
    with pytest.raises(InputError) as error:
        prepare(filled(64, 64), **arguments)
    assert error.value.name == name


@pytest.mark.parametrize(
    "budgets",
    [
        {"edit": 512},
        {"edit": 4096**2 + 1},
        {"edit": "512"},
        {"edit": 262144.0},
        {"edit": True},
        {"edti": 512**2},
        {"understand_min": 500**2},
        {"understand_min": 900**2},
        [512**2],
        None,
    ],
)
def test_budgets_that_are_refused(budgets):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json.*pixel_budgets"):
        PixelBudgets.from_config({"pixel_budgets": budgets})


@pytest.mark.parametrize(
    "config",
    [
        {"rescale_factor": "fast"},
        {"rescale_factor": float("nan")},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": 0.5},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_std": [0.5, 0.5, float("inf")]},
        {"image_std": [0.5, 0.5, None]},
    ],
)
def test_normalisations_that_are_refused(config):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        Normalisation.from_config(config)
