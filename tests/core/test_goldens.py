"""The goldens: what the reference implementations returned, through our backbone, sampler, prompts and whole engine."""

import numpy as np
import pytest
import torch
from PIL import Image

from llada_core import prompts
from llada_core.backbone import attention_kernels
from llada_core.backbone.cache import PrefixCache
from llada_core.backbone.model import block_causal_mask
from llada_core.image_tokens import ImageTokens
from llada_core.options import Decoding, Guidance, Sampling
from llada_core.sampling.block_diffusion import GenerationConfig

GENERATED = [
    "text_steps32",
    "text_steps8_thr05",
    "t2i_nocfg",
    "t2i_cfg2",
    "t2i_cfg4_norescale_thr03",
    "edit_cfg_text",
    "edit_cfg_both",
    "blocks16",
]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_every_generation_of_the_goldens_is_tested(golden):
    assert [case["name"] for case in golden["generate"]] == GENERATED


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_backbone_logits(kind, golden_backbone, golden_tensors):
    ids = golden_tensors["backbone.input_ids"]
    n = ids.shape[1]
    cache = PrefixCache(golden_backbone.config, 1, n, "cpu", torch.float32)
    mask = block_causal_mask(0, n, 32, torch.tensor([0]))
    hidden = golden_backbone(ids, torch.arange(n)[None], cache, 0, mask, attention_kernels.choose(kind))
    assert relative_error(golden_backbone.lm_head(hidden), golden_tensors["backbone.logits"]) < 1e-3


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "fixed shapes"])
@pytest.mark.usefixtures("fixed_shapes")
def test_block_diffusion_ids_and_rounds(name, graphs, golden, golden_backbone, vocabulary, generate_one):
    case = next(case for case in golden["generate"] if case["name"] == name)
    text_scale, image_scale = [*case.get("scales", [1.0]), 0.0][:2]
    guidance = Guidance(text_scale, image_scale, case.get("rescale", 0.0))
    sampling = Sampling(block_length=case.get("B", 32), threshold=case.get("thr", 0.95))
    stops = frozenset([case["stop"]] if "stop" in case else [])
    low, high = case.get("lo", 0), case.get("hi", vocabulary.vocab_size)
    config = GenerationConfig(case["steps"], low, high, stops, sampling, guidance)
    prompts = [case["cond"], *case.get("branches", [])]
    mask = vocabulary.mask
    output = generate_one(golden_backbone, prompts, case["gen_len"], config, mask=mask, graphs=graphs).output
    ids = output.ids[:-1] if output.stopped else output.ids  # the reference leaves the stop out
    assert ids == case["output"]
    # Where the last block is longer than what was asked for, the reference goes on until all of it is filled.
    whole = (max(map(len, prompts)) + case["gen_len"]) % sampling.block_length == 0
    assert output.rounds == case["forwards"] if whole else output.rounds <= case["forwards"]


# Prompts


def image_tokens(images: list[dict], vocabulary) -> ImageTokens:
    grids = (torch.tensor(image["ids"]).view(image["h"], image["w"]) - vocabulary.image_offset for image in images)
    return ImageTokens(tuple(grids), vocabulary.codebook_size)


def test_text_to_image_prompt(golden, vocabulary):
    case = golden["prompts"]["t2i"]
    rows = prompts.text_to_image(vocabulary, case["prompt"], case["h"], case["w"])
    assert (rows.conditional, rows.without_text, rows.without_image) == (case["cond"], case["uncond"], None)


@pytest.mark.parametrize("key", ["understand", "understand_two"])
def test_understanding_prompt(key, golden, vocabulary):
    case = golden["prompts"][key]
    rows = prompts.understand(vocabulary, case["question"], image_tokens(case["images"], vocabulary))
    assert (rows.conditional, rows.without_text) == (case["cond"], None)


def test_edit_prompts(golden, vocabulary):
    case = golden["prompts"]["edit"]
    rows = prompts.edit(vocabulary, case["instruction"], image_tokens(case["images"], vocabulary))
    assert rows.conditional == case["cond"]
    assert rows.without_text == case["uncond"]
    assert rows.without_image == case["no_image"]


def test_thinking_prompts(golden, vocabulary):
    case = golden["prompts"]["thinking"]
    assert prompts.thinking(vocabulary, case["prompt"]).conditional == case["cond"]
    rows, _ = prompts.after_thinking(vocabulary, case["prompt"], [], case["h"], case["w"])
    assert rows.without_text == case["uncond_phase2"]


# The whole engine, opened from the checkpoint


@pytest.mark.parametrize("how", ["understand", "edit"])
def test_engine_encodes(how, golden, golden_images, model):
    for case in (case for case in golden["image_tokens"] if case["how"] == how):
        pixels = np.array(Image.open(golden_images / case["file"]).convert("RGB"))
        image = torch.from_numpy(pixels).float()[None] / 255
        (grid,) = model.encode(image, purpose=how, fit="crop").grids
        assert list(grid.shape) == [case["h"], case["w"]]
        assert grid.flatten().tolist() == case["token_ids"]


def test_engine_decodes_from_seeds(golden, golden_tensors, model):
    for case in golden["decode_seeded"]:
        grid = torch.tensor(case["token_ids"]).view(case["h"], case["w"])
        decoding = Decoding(turbo=case["decoder"] == "decoder-turbo", steps=case["steps"], seed=case["seed"])
        (image,) = model.decode(ImageTokens((grid,), model.codebook_size), decoding)
        expected = golden_tensors[case["key"] + ".image"][0].permute(1, 2, 0)
        assert relative_error(image, expected) < 1e-3
