"""LLaDAUni as its users call it: every task, repeatable, whatever the options, and with no effect outside itself."""

import pytest
import torch

from llada_core import prompts
from llada_core.engine import LLaDAUni
from llada_core.errors import InputError
from llada_core.image_tokens import ImageTokens
from llada_core.options import Decoding, Guidance, Sampling, Sprint
from llada_core.placement import OneDevice
from llada_core.sampling import tasks
from llada_core.sampling.pipeline import Image

REFERENCES = ImageTokens((torch.arange(12).view(3, 4), torch.arange(4).view(2, 2)), 256)
FEW = Sampling(steps=3, thinking_steps=3, thinking_length=40)
DRAWS = Sampling(steps=3, temperature=1.5, top_k=50, top_p=0.95)

CALLS = {
    "draw": lambda m, **o: m.generate("a red fox", 96, 160, **o),
    "edit": lambda m, **o: m.generate("make it blue", references=REFERENCES, **o),
    "answer": lambda m, **o: m.answer("What is it?", REFERENCES, max_new_tokens=50, **o),
    "answer without images": lambda m, **o: m.answer("Why?", max_new_tokens=50, **o),
}


def result_of(result) -> object:
    tokens = getattr(result, "tokens", None)
    return [grid.tolist() for grid in tokens.grids] if tokens else result.text


@pytest.mark.parametrize("sprint", [None, Sprint(text_keep_ratio=0.5, image_keep_ratio=0.5)], ids=["plain", "sprint"])
@pytest.mark.parametrize("sampling", [FEW, DRAWS], ids=["best", "drawn"])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_twice_gives_the_same(name, sampling, sprint, model):
    """And leaves the program's own random numbers where they were, and does not depend on them."""
    call = CALLS[name]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = result_of(call(model, sampling=sampling, sprint=sprint, seed=7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert result_of(call(model, sampling=sampling, sprint=sprint, seed=7)) == first


@pytest.mark.parametrize("name", CALLS)
def test_seeds_matter_only_to_draws(name, model):
    call = CALLS[name]
    assert result_of(call(model, sampling=FEW, seed=1)) == result_of(call(model, sampling=FEW, seed=2))
    assert result_of(call(model, sampling=DRAWS, seed=1)) != result_of(call(model, sampling=DRAWS, seed=2))


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_a_host_may_hand_over(seed, model):
    model.generate("fox", 64, 64, sampling=DRAWS, seed=seed)
    (image,) = model.decode(ImageTokens((REFERENCES.grids[1],), 256), Decoding(steps=1, seed=seed))
    assert bool(image.isfinite().all())


def test_seed_of_the_second_image_may_wrap(model):
    """A batch that begins at the last seed goes on at 0."""
    pair = ImageTokens((REFERENCES.grids[1],) * 2, 256)
    _, second = model.decode(pair, Decoding(steps=2, seed=2**64 - 1))
    (first,) = model.decode(ImageTokens(pair.grids[:1], 256), Decoding(steps=2, seed=0))
    assert torch.equal(second, first)


def test_drawing_has_the_grid_asked_for_and_counts_its_work(model):
    drawn = model.generate("a red fox", 96, 160, sampling=FEW)
    assert drawn.tokens.sizes == [(3, 5)]
    assert drawn.thinking == ""
    assert drawn.usage.tokens == 15
    assert 1 <= drawn.usage.rounds <= 6
    assert drawn.usage.seconds > 0


def test_editing_has_the_grid_of_the_first_reference_and_ignores_the_size(model):
    edits = [model.generate("blue", size, size, references=REFERENCES, sampling=FEW) for size in (64, 77)]
    assert [edit.tokens.sizes for edit in edits] == [[(3, 4)], [(3, 4)]]
    assert result_of(edits[0]) == result_of(edits[1])


def test_editing_uses_its_own_guidance_by_default(model):
    explicit = model.generate("blue", references=REFERENCES, sampling=FEW, guidance=Guidance(4.0, 0.0, 0.7))
    assert result_of(model.generate("blue", references=REFERENCES, sampling=FEW)) == result_of(explicit)
    assert result_of(explicit) != result_of(
        model.generate("blue", references=REFERENCES, sampling=FEW, guidance=Guidance(2.0, 0.0, 0.7))
    )


def test_default_steps_of_each_task(model):
    """8 rounds for images, 32 for text: at a threshold that nothing reaches, the totals say so."""
    totals: dict[str, int] = {}

    def note(progress):
        totals[progress.stage] = progress.total

    picky = Sampling(threshold=1.0)
    model.generate("fox", 64, 64, sampling=picky, progress=note)
    model.answer("Why?", max_new_tokens=1, sampling=picky, progress=note)
    assert totals == {"backbone": 8, "answer": 32}


def test_thinking_draws_after_its_plan(model):
    drawn = model.generate("a red fox", 64, 96, thinking=True, sampling=FEW)
    pipeline = model._pipeline(FEW, None, None)
    (plan,) = tasks.think(pipeline, [tasks.Request("a red fox", 0, (2, 3))])
    branches, trace = prompts.after_thinking(model.vocabulary, "a red fox", plan.ids, 2, 3)
    (expected,) = pipeline.draw([Image(branches, 2, 3, seed=0)], Guidance())
    assert result_of(drawn) == [expected.tokens.grids[0].tolist()]
    assert drawn.thinking == trace
    assert drawn.usage.tokens == len(plan.ids) + 6
    assert drawn.usage.rounds == plan.usage.rounds + expected.usage.rounds


def test_a_plan_leaves_room_for_its_image(checkpoint_copy, edit_json):
    """However long the plan may be, the image that follows it still fits the context."""
    model = LLaDAUni(checkpoint_copy)
    longest = len(prompts.thinking(model.vocabulary, "fox").conditional)
    context = longest + 4 + 64 + 20
    edit_json(checkpoint_copy / "config.json", lambda config: config | {"max_position_embeddings": context})
    drawn = LLaDAUni(checkpoint_copy).generate("fox", 256, 256, thinking=True, sampling=Sampling(1, thinking_steps=1))
    assert drawn.tokens.sizes == [(8, 8)]


def test_an_answer_is_cut_to_the_context(checkpoint_copy, edit_json, caplog):
    model = LLaDAUni(checkpoint_copy)
    context = len(prompts.understand(model.vocabulary, "Why?", None).conditional) + 5
    edit_json(checkpoint_copy / "config.json", lambda config: config | {"max_position_embeddings": context})
    with caplog.at_level("INFO"):
        answer = LLaDAUni(checkpoint_copy).answer("Why?", sampling=FEW)
    assert answer.usage.tokens <= 5
    assert "at most 5 new tokens instead of 2048, the rest of the context" in caplog.text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_kinds_draw_the_same(attention, golden_checkpoint, model):
    drawn = LLaDAUni(golden_checkpoint, attention=attention).generate("fox", 96, 96, sampling=FEW)
    assert result_of(drawn) == result_of(model.generate("fox", 96, 96, sampling=FEW))


def test_several_images_are_encoded_in_order_with_the_smaller_budget(model):
    images = torch.rand(2, 640, 640, 3, generator=torch.Generator().manual_seed(0))
    together = model.encode(images, "understand")
    assert together.sizes == [(28, 28)] * 2  # 448 pixels a side
    assert model.encode(images[:1], "understand").sizes == [(40, 40)]
    swapped = model.encode(images.flip(0), "understand")
    assert [grid.tolist() for grid in swapped.grids] == [grid.tolist() for grid in reversed(together.grids)]


def test_each_image_of_a_batch_decodes_with_its_own_seed(model):
    grid = REFERENCES.grids[1]
    together = model.decode(ImageTokens((grid, grid), 256), Decoding(steps=2, seed=5))
    for i, image in enumerate(together):
        (alone,) = model.decode(ImageTokens((grid,), 256), Decoding(steps=2, seed=5 + i))
        assert torch.equal(image, alone)
    assert not torch.equal(together[0], together[1])
    assert together[0].shape == (64, 64, 3)
    assert 0 <= together[0].min() <= together[0].max() <= 1


def test_images_decode_with_seeds_of_their_own(model):
    first, second = REFERENCES.grids
    together = model.decode(ImageTokens((first, second), 256), Decoding(steps=2, seed=1), seed=[9, 4])
    for grid, seed, image in zip((first, second), (9, 4), together, strict=True):
        (alone,) = model.decode(ImageTokens((grid,), 256), Decoding(steps=2, seed=seed))
        assert torch.equal(image, alone)
    with pytest.raises(InputError, match="seed: found 1 beside 2 images; expected one of each image"):
        model.decode(REFERENCES, Decoding(steps=2), seed=[9])
    with pytest.raises(InputError, match="seed: found -1"):
        model.decode(REFERENCES, Decoding(steps=2), seed=[9, -1])


# ComponentManager


def test_a_part_loads_when_first_needed_and_again_after_its_release(golden_checkpoint):
    manager = OneDevice()
    model = LLaDAUni(golden_checkpoint, manager)
    assert not manager._placements
    first = result_of(model.generate("fox", 64, 64, sampling=FEW))
    assert set(manager._placements) == {"backbone"}
    manager.release("backbone")
    assert not manager._placements
    assert result_of(model.generate("fox", 64, 64, sampling=FEW)) == first


def test_precision_of_every_part(golden_checkpoint):
    """float16 is asked of all parts; the VAE, which overflows in it, the router and pad tokens keep float32."""
    manager = OneDevice(dtype=torch.float16)
    model = LLaDAUni(golden_checkpoint, manager)
    found = {part: model._place(part) for part in model.components}
    dtypes = {part: {p.dtype for p in placement.module.parameters()} for part, placement in found.items()}
    assert dtypes.pop("vae") == {torch.float32}
    assert dtypes.pop("backbone") == {torch.float16, torch.float32}
    for decoder in ("decoder", "decoder-turbo"):
        kept = [name for name, p in found[decoder].module.named_parameters() if p.dtype != torch.float16]
        assert kept == ["x_pad_token", "cap_pad_token"]
        assert dtypes.pop(decoder) == {torch.float16, torch.float32}
    assert all(kinds == {torch.float16} for kinds in dtypes.values())
    assert found["vae"].dtype == torch.float32


def test_bfloat16_runs_every_task(golden_checkpoint):
    model = LLaDAUni(golden_checkpoint, OneDevice(dtype=torch.bfloat16))
    tokens = model.encode(torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)), "understand")
    model.answer("What?", tokens, max_new_tokens=10, sampling=FEW)
    drawn = model.generate("fox", 64, 64, sampling=FEW, sprint=Sprint(image_keep_ratio=0.5))
    (image,) = model.decode(drawn.tokens, Decoding(steps=2))
    assert image.dtype == torch.float32
    assert bool(image.isfinite().all())
