"""Lists into the engine: each of several is what it is alone; parts of pictures drawn anew; variations."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llada_core.engine import LLaDAUni
from llada_core.errors import InputError
from llada_core.image_tokens import ImageTokens
from llada_core.options import Guidance, Sampling, Sprint
from llada_core.placement import OneDevice
from llada_core.progress import Progress, TokenPreview, side_by_side

FEW = Sampling(steps=3, thinking_steps=3, thinking_length=40)
DRAWS = Sampling(steps=3, thinking_steps=3, thinking_length=40, temperature=1.0)
SPRINT = Sprint(text_keep_ratio=0.5, image_keep_ratio=0.5)


def grid(rows: int, columns: int, first: int = 0) -> ImageTokens:
    return ImageTokens((torch.arange(first, first + rows * columns).view(rows, columns) % 256,), 256)


REFERENCES = [grid(3, 4), ImageTokens((*grid(2, 2).grids, *grid(4, 3, 50).grids), 256), grid(5, 3, 90)]
PROMPTS = ["a red fox", "a very much longer prompt about a heron that stands in the water", "blue"]
QUESTIONS = ["What is it?", "Why?", "How many of them are there, and where do they stand?"]

CALLS = {
    "draw": lambda m, at, **o: m.generate(at(PROMPTS), at([96, 64, 160]), at([160, 96, 64]), seed=at([7, 8, 9]), **o),
    "draw, one prompt": lambda m, at, **o: m.generate("a fox", 96, 96, seed=at([7, 8, 9]), **o),
    "think": lambda m, at, **o: m.generate(at(PROMPTS), 64, 96, thinking=True, seed=at([7, 8, 9]), **o),
    "edit": lambda m, at, **o: m.generate(at(PROMPTS), references=at(REFERENCES), seed=at([7, 8, 9]), **o),
    "edit with three branches": lambda m, at, **o: m.generate(
        at(PROMPTS), references=at(REFERENCES), guidance=Guidance(4.0, 1.5), seed=at([7, 8, 9]), **o
    ),
    "answer": lambda m, at, **o: m.answer(at(QUESTIONS), at(REFERENCES), max_new_tokens=50, seed=at([7, 8, 9]), **o),
}


def result_of(one) -> tuple:
    tokens = getattr(one, "tokens", None)
    ids = [of.tolist() for of in tokens.grids] if tokens else one.text
    return ids, getattr(one, "thinking", ""), one.usage.tokens, one.usage.rounds


@pytest.mark.parametrize("sprint", [None, SPRINT], ids=["plain", "SPRINT"])
@pytest.mark.parametrize("sampling", [FEW, DRAWS], ids=["best", "drawn"])
@pytest.mark.parametrize("name", CALLS)
def test_each_of_several_is_what_it_is_alone(name, sampling, sprint, model):
    call, options = CALLS[name], {"sampling": sampling, "sprint": sprint}
    together = call(model, lambda values: values, **options)
    assert isinstance(together, list)
    alone = [call(model, lambda values, at=at: values[at], **options) for at in range(3)]
    assert [result_of(one) for one in together] == [result_of(one) for one in alone]


@pytest.fixture(scope="session")
def model_on_gpu(golden_checkpoint, tmp_path_factory) -> LLaDAUni:
    """The golden checkpoint's language model in float32 on a GPU: rounds are CUDA graphs, and kernels are others."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return LLaDAUni(
        language_model(golden_checkpoint, tmp_path_factory.mktemp("alone")), OneDevice("cuda", torch.float32)
    )


def language_model(checkpoint: Path, folder: Path) -> Path:
    """The files at a checkpoint's top, by themselves."""
    for path in checkpoint.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def test_the_calls_need_nothing_but_the_language_model(golden_checkpoint, tmp_path):
    """So that they run on a GPU's machine that has neither diffusers nor transformers."""
    alone = LLaDAUni(language_model(golden_checkpoint, tmp_path))
    assert set(alone.components) == {"backbone"}
    for call in CALLS.values():
        assert len(call(alone, lambda values: values, sampling=FEW)) == 3


@pytest.mark.parametrize("sprint", [None, SPRINT], ids=["plain", "SPRINT"])
@pytest.mark.parametrize("sampling", [FEW, DRAWS], ids=["best", "drawn"])
@pytest.mark.parametrize("name", CALLS)
def test_each_of_several_is_what_it_is_alone_on_a_gpu(name, sampling, sprint, model_on_gpu):
    test_each_of_several_is_what_it_is_alone(name, sampling, sprint, model_on_gpu)


def test_a_list_of_one_is_a_list(model):
    (one,) = model.generate(["a fox"], 64, 64, sampling=FEW)
    assert result_of(one) == result_of(model.generate("a fox", 64, 64, sampling=FEW))
    (answer,) = model.answer("Why?", seed=[3], max_new_tokens=10, sampling=FEW)
    assert answer.text == model.answer("Why?", seed=3, max_new_tokens=10, sampling=FEW).text


def test_seconds_of_a_batch_are_shared(model):
    drawn = model.generate(["a fox"] * 4, 64, 64, sampling=FEW)
    assert len({one.usage.seconds for one in drawn}) == 1
    assert drawn[0].usage.seconds > 0


def test_images_encode_as_alone(model):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(count, 64, size, 3, generator=generator) for count, size in ((1, 96), (2, 64), (1, 64))]
    together = model.encode(images, "understand")
    for found, image in zip(together, images, strict=True):
        expected = model.encode(image, "understand")
        assert [of.tolist() for of in found.grids] == [of.tolist() for of in expected.grids]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(["a", "b"], seed=[1, 2, 3]), "seed: found 3 beside 2 of prompt; expected as many"),
        (lambda m: m.generate([]), r"prompt: found \[\]; expected at least one"),
        (lambda m: m.generate(["a", " "]), "prompt: found nothing"),
        (lambda m: m.generate(["a", "b"], references=[REFERENCES[0], None]), "references: found None among others"),
        (lambda m: m.generate("a", [64, 65], 64), "height: found 65 pixels"),
        (lambda m: m.answer(["a", ""]), "question: found nothing"),
        (lambda m: m.answer("a", [REFERENCES[0], 3]), "images: found 3"),
        (lambda m: m.generate("a", tokens=REFERENCES[0]), "mask: found nothing, with tokens to start from"),
        (lambda m: m.generate("a", mask=torch.ones(8, 8)), "tokens: found nothing, with a mask"),
        (
            lambda m: m.generate(
                "a", mask=torch.ones(8, 8), tokens=grid(2, 2).__class__((torch.zeros(1, 1).long(),), 9)
            ),
            "codebook of 9",
        ),
        (lambda m: m.vary(REFERENCES[1], "a"), "tokens: found 2 images; expected one"),
        (lambda m: m.vary(REFERENCES[0], " "), "prompt: found nothing"),
        (lambda m: m.vary(REFERENCES[0], "a", count=0), "count: found 0"),
    ],
)
def test_refused_before_any_work(call, message, golden_checkpoint):
    class Nothing(OneDevice):
        def place(self, part, component, working_bytes):
            pytest.fail("a part was loaded before the input was checked")

    with pytest.raises(InputError, match=message):
        call(LLaDAUni(golden_checkpoint, Nothing()))


# Memory


class Small(OneDevice):
    """Has room for so many bytes, and notes what it is asked for."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.asked = room, []

    def could_fit(self, part, component, working_bytes):
        return working_bytes(torch.float32) <= self.room

    def place(self, part, component, working_bytes):
        self.asked.append(working_bytes(torch.float32))
        return super().place(part, component, working_bytes)


def test_what_does_not_fit_goes_in_parts_and_the_log_says_so(golden_checkpoint, model, caplog):
    unbounded = Small(2**60)
    LLaDAUni(golden_checkpoint, unbounded).generate("a fox", 64, 64, seed=[1, 2], sampling=DRAWS)
    manager = Small(unbounded.asked[0])
    with caplog.at_level("INFO"):
        drawn = LLaDAUni(golden_checkpoint, manager).generate("a fox", 64, 64, seed=list(range(5)), sampling=DRAWS)
    assert "backbone: 5 at once do not fit the device's memory; 2 + 2 + 1 one after the other" in caplog.text
    assert len(manager.asked) == 3
    assert max(manager.asked) <= manager.room
    alone = [model.generate("a fox", 64, 64, seed=seed, sampling=DRAWS) for seed in range(5)]
    assert [result_of(one) for one in drawn] == [result_of(one) for one in alone]


def test_one_is_tried_whether_it_fits_or_not(golden_checkpoint):
    drawn = LLaDAUni(golden_checkpoint, Small(1)).generate(["a", "b"], 64, 64, sampling=FEW)
    assert len(drawn) == 2


# Progress


def test_reports_of_parts_rise_to_one_total(golden_checkpoint):
    reports: list[Progress] = []
    engine = LLaDAUni(golden_checkpoint, Small(1))
    engine.generate(["a", "b", "c"], 64, 64, sampling=FEW, progress=lambda report: reports.append(report))
    assert [report.done for report in reports] == sorted(report.done for report in reports)
    assert reports[-1].done == reports[-1].total
    assert len({report.total for report in reports}) == 1


def test_previews_show_all_pictures_of_a_batch(model):
    previews: list[TokenPreview] = []
    drawn = model.generate(
        ["a", "b", "c"], [64, 96, 64], [64, 64, 96], sampling=FEW, progress=lambda p: previews.append(p.preview)
    )
    shown = previews[-1]().codes
    assert torch.equal(shown, side_by_side([one.tokens.grids[0] for one in drawn]))


def test_grids_side_by_side():
    shown = side_by_side([grid(2, 3).grids[0], grid(1, 2, 10).grids[0], grid(2, 1, 20).grids[0]])
    assert shown.tolist() == [
        [0, 1, 2, 10, 11, -1],
        [3, 4, 5, -1, -1, -1],
        [20, -1, -1, -1, -1, -1],
        [21, -1, -1, -1, -1, -1],
    ]


# Only here


MASK = torch.zeros(96, 128)  # of the first reference, 3 x 4 tokens
MASK[40:60, 100:] = 1  # touches one cell
TOUCHED = torch.zeros(3, 4, dtype=torch.bool)
TOUCHED[1, 3] = True


@pytest.mark.parametrize("sprint", [None, SPRINT], ids=["plain", "SPRINT"])
@pytest.mark.parametrize("options", [{"references": REFERENCES[0]}, {"tokens": REFERENCES[0]}], ids=["edit", "text"])
def test_only_masked_cells_are_drawn(options, sprint, model):
    drawn = model.generate("blue", mask=MASK, sampling=FEW, sprint=sprint, **options)
    (before,), (after,) = REFERENCES[0].grids, drawn.tokens.grids
    assert torch.equal(after[~TOUCHED], before[~TOUCHED])
    assert drawn.usage.tokens == 1
    assert 1 <= drawn.usage.rounds <= FEW.steps  # masks behind the end of the last block are filled along the way


def test_tokens_to_start_from_give_the_size_and_references_stay_references(model):
    start = grid(4, 2, 100)
    drawn = model.generate(
        "blue", references=REFERENCES[0], tokens=start, mask=torch.tensor([[1.0], [0.0]]), sampling=FEW
    )
    (after,) = drawn.tokens.grids
    assert after.shape == (4, 2)
    assert torch.equal(after[2:], start.grids[0][2:])


def test_everything_masked_is_a_plain_drawing(model):
    drawn = model.generate("a fox", tokens=grid(3, 2), mask=torch.ones(4, 4), sampling=FEW)
    assert result_of(drawn) == result_of(model.generate("a fox", 96, 64, sampling=FEW))


def test_nothing_masked_is_the_image_itself(model):
    drawn = model.generate("a fox", tokens=grid(3, 2), mask=torch.zeros(4, 4), sampling=FEW)
    assert torch.equal(drawn.tokens.grids[0], grid(3, 2).grids[0])
    assert (drawn.usage.tokens, drawn.usage.rounds) == (0, 0)


def test_a_mask_with_thinking(model):
    drawn = model.generate("a fox", tokens=grid(3, 4), mask=MASK, thinking=True, sampling=FEW)
    assert torch.equal(drawn.tokens.grids[0][~TOUCHED], grid(3, 4).grids[0][~TOUCHED])


def test_masks_of_several(model):
    masks = [MASK, torch.ones(96, 128), MASK.flip(1)]
    together = model.generate("blue", references=REFERENCES[0], mask=masks, sampling=FEW)
    alone = [model.generate("blue", references=REFERENCES[0], mask=mask, sampling=FEW) for mask in masks]
    assert [result_of(one) for one in together] == [result_of(one) for one in alone]


# Variations


@pytest.mark.parametrize("least_certain", [False, True])
@pytest.mark.parametrize("references", [None, REFERENCES[1]], ids=["drawn", "edited"])
def test_variations_draw_a_share_and_keep_the_rest(least_certain, references, model):
    start = grid(6, 8)
    options = {"references": references, "least_certain": least_certain, "sampling": replace(DRAWS, top_k=50)}
    found = model.vary(start, "a fox", 0.25, 3, seed=5, **options)
    (before,) = start.grids
    changed = [one.tokens.grids[0] != before for one in found]
    assert all(1 <= int(where.sum()) <= 12 for where in changed)
    assert all(one.usage.tokens == 12 for one in found)
    assert not torch.equal(found[0].tokens.grids[0], found[1].tokens.grids[0])
    again = model.vary(start, "a fox", 0.25, 1, seed=6, **options)
    assert result_of(again[0]) == result_of(found[1]), "variation i has the seed + i"
    if least_certain:
        assert not ((changed[0] | changed[1] | changed[2]).sum() > 12), "all draw the same cells"


def test_looking_for_the_least_certain_is_counted(model):
    """One cell, one round; and before it a round for each of the blocks that 48 tokens lie in, two or three."""
    (plain,) = model.vary(grid(6, 8), "a fox", 0.0, sampling=Sampling(steps=1))
    (looked,) = model.vary(grid(6, 8), "a fox", 0.0, sampling=Sampling(steps=1), least_certain=True)
    assert plain.usage.rounds == 1
    assert looked.usage.rounds in (3, 4)


def test_certainty_is_the_probability_of_a_token_where_it_alone_of_its_half_could_be_seen(tiny, oracle):
    """Against the oracle's network: the whole sequence, each block half masked, everything before it as it is."""
    from llada_core.sampling.batch import Sample
    from llada_core.sampling.block_diffusion import GenerationConfig, prepare
    from llada_core.sampling.certainty import certainty

    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 95, (n,), generator=generator).tolist() for n in (40, 21)]
    new = torch.randint(96, 160, (70,), generator=generator).tolist()
    config = GenerationConfig(1, 96, 160, guidance=Guidance(2.0, 0.0, 0.7))
    found = certainty(*prepare(tiny, [Sample(prompts, new)] * 2, config, 95), config)

    forward = oracle.written_out(tiny)
    ids = torch.tensor([prompts[0] + new, [95] * 19 + prompts[1] + new])
    pads = torch.tensor([0, 19])
    at = torch.arange(110)
    visible = (at[:, None] // 32 >= at // 32) & ((at >= pads[:, None])[:, None] | torch.eye(110).bool())
    expected = torch.zeros(70)
    for start in (32, 64, 96):
        for parity in (0, 1):
            hidden_positions = [p for p in range(max(start, 40), min(start + 32, 110)) if p % 2 == parity]
            masked = ids.clone()
            masked[:, hidden_positions] = 95
            # Positions behind the end are masks of the block, and are seen.
            end = start + 32
            padded = torch.cat((masked[:, :110], torch.full((2, max(end - 110, 0)), 95)), 1)[:, :end]
            positions = (torch.arange(end) - pads[:, None]).clamp_min(0)
            spot = torch.arange(end)
            seen = (spot[:, None] // 32 >= spot // 32) & ((spot >= pads[:, None])[:, None] | torch.eye(end).bool())
            hidden, _ = forward(padded, positions, seen)
            logits = oracle.guide(tiny.lm_head(hidden), config.guidance)[:, 96:160].softmax(-1)
            for p in hidden_positions:
                expected[p - 40] = logits[p, int(ids[0, p]) - 96]
    assert visible.shape == (2, 110, 110)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


# Preview


def test_a_preview_is_a_square_of_its_colour_for_each_token(model):
    small, large = model.preview(ImageTokens((*grid(2, 3).grids, *grid(4, 1, 9).grids), 256), 8)
    assert (small.shape, large.shape) == ((16, 24, 3), (32, 8, 3))
    palette = model.palette().float() / 255
    assert torch.equal(small[3, 17], palette[2])
    assert torch.equal(large[31, 0], palette[12])
    assert 0 <= small.min() <= small.max() <= 1
