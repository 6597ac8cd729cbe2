"""Weights from files into modules: every published form of the keys, FP8, and checkpoints with some parts only."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llada_core.backbone.keys import open_backbone, place
from llada_core.checkpoint import loading, reading, weights
from llada_core.checkpoint.layout import Layout
from llada_core.engine import LLaDAUni
from llada_core.errors import CheckpointError
from llada_core.image_tokens import ImageTokens
from llada_core.options import Decoding, Sampling

GRID = ImageTokens((torch.arange(4).view(2, 2),), 256)


def load_backbone(folder, config, dtype=torch.float32):
    return open_backbone(Layout.open(folder).backbone_files(), config).load(dtype)


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# Forms of the keys


def sibling(tensors: dict) -> dict:
    """LLaDA-Image's names."""
    names = {key: "model.language_model." + key.removeprefix("model.") for key in tensors}
    names["lm_head.weight"] = "model.lm_head.weight"
    return {names[key]: value for key, value in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, stacked: tensors,  # per expert, in one file without an index
        lambda tensors, stacked: stacked(tensors),
        lambda tensors, stacked: stacked(tensors, ".weight"),
        lambda tensors, stacked: sibling(tensors),
        lambda tensors, stacked: sibling(stacked(tensors)),
    ],
    ids=["single file", "stacked", "stacked with .weight", "sibling", "sibling stacked"],
)
def test_every_form_gives_the_same_module(change, stacked, checkpoint_copy, rewrite, golden_backbone):
    rewrite(checkpoint_copy, lambda tensors: change(tensors, stacked))
    assert_same(load_backbone(checkpoint_copy, golden_backbone.config), golden_backbone)


@pytest.mark.parametrize("per_expert", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_pieces_give_the_same_module(
    dtype, per_expert, stacked, checkpoint_copy, rewrite, golden_backbone, monkeypatch
):
    """Large tensors are read some rows at a time, and a few are waited for; here each row, and each piece."""
    whole = load_backbone(checkpoint_copy, golden_backbone.config, dtype)
    monkeypatch.setattr(loading, "CHUNK", 1)
    monkeypatch.setattr(reading, "AHEAD", 1)
    if not per_expert:
        rewrite(checkpoint_copy, stacked)
    assert_same(load_backbone(checkpoint_copy, golden_backbone.config, dtype), whole)


def test_gate_comes_before_up_in_their_bank(golden_checkpoint, golden_backbone):
    tensors = {}
    for path in golden_checkpoint.glob("model-*.safetensors"):
        tensors |= load_file(path)
    bank = golden_backbone.layers[1].mlp.experts.gate_up.weight
    for expert in range(golden_backbone.config.num_experts):
        stem = f"model.layers.1.mlp.experts.{expert}."
        gate, up = tensors[stem + "gate_proj.weight"], tensors[stem + "up_proj.weight"]
        assert torch.equal(bank[expert], torch.cat((gate, up)))


def test_shared_experts_and_dense_layers_are_not_taken_for_a_bank(golden_backbone):
    for key in ("layers.0.mlp.up_proj.weight", "layers.1.mlp.shared_experts.up_proj.weight"):
        assert place("model." + key, golden_backbone.config) == weights.Slot(key)


def test_a_component_loads_in_the_dtype_asked_for_but_the_router(golden_checkpoint, golden_backbone):
    component = open_backbone(Layout.open(golden_checkpoint).backbone_files(), golden_backbone.config)
    assert component.dtype == torch.float32
    module = component.load(torch.bfloat16)
    float32 = {name for name, tensor in module.state_dict().items() if tensor.dtype == torch.float32}
    assert float32 == {f"layers.{n}.mlp.gate.{leaf}" for n in (1, 2) for leaf in ("weight", "expert_bias")}
    assert component.bytes(torch.bfloat16) == sum(t.nbytes for t in module.state_dict().values())
    assert all(tensor.is_meta for tensor in component.module.state_dict().values()), "it can be loaded again"


# Checkpoints with some parts only


def test_decoder_under_the_name_that_mirrors_use(checkpoint_copy, golden, golden_tensors):
    for part in ("decoder", "decoder-turbo"):
        (checkpoint_copy / part / "decoder_model.safetensors").rename(checkpoint_copy / part / "model.safetensors")
    model = LLaDAUni(checkpoint_copy)
    case = golden["decode_seeded"][0]
    tokens = ImageTokens((torch.tensor(case["token_ids"]).view(case["h"], case["w"]),), 256)
    (image,) = model.decode(tokens, Decoding(steps=case["steps"], seed=case["seed"]))
    expected = golden_tensors[case["key"] + ".image"][0].permute(1, 2, 0)
    assert (image - expected).norm() < 1e-3 * expected.norm()


@pytest.fixture
def understanding_only(checkpoint_copy):
    """The backbone, the tokenizer and the vision tower: all that questions need."""
    for part in ("decoder", "decoder-turbo", "vae"):
        shutil.rmtree(checkpoint_copy / part)
    (checkpoint_copy / "image_tokenizer" / "sigvq_embedding.pt").unlink()
    return checkpoint_copy


def test_understanding_only_checkpoint_answers(understanding_only, model):
    small, image = LLaDAUni(understanding_only), torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    tokens = small.encode(image, "understand")
    assert torch.equal(tokens.grids[0], model.encode(image, "understand").grids[0])
    asked = {"max_new_tokens": 20, "sampling": Sampling(steps=2)}
    assert small.answer("What?", tokens, **asked).text == model.answer("What?", tokens, **asked).text


@pytest.mark.parametrize("turbo", [True, False])
def test_decoding_without_a_decoder_names_the_missing_files(turbo, understanding_only):
    model = LLaDAUni(understanding_only)
    with pytest.raises(CheckpointError, match=r"no image_tokenizer/sigvq_embedding\.pt.*hf download"):
        model.decode(GRID, Decoding(turbo=turbo))


def test_one_missing_decoder_leaves_the_other(checkpoint_copy):
    (checkpoint_copy / "decoder" / "decoder_model.safetensors").unlink()
    model = LLaDAUni(checkpoint_copy)
    with pytest.raises(CheckpointError, match=r"no decoder/decoder_model\.safetensors; expected the files of its dec"):
        model.decode(GRID, Decoding(turbo=False, steps=2))
    assert model.decode(GRID, Decoding(steps=1))[0].shape == (64, 64, 3)


def test_encoding_without_a_vision_tower_names_its_files(checkpoint_copy):
    (checkpoint_copy / "image_tokenizer" / "image_tokenizer.safetensors").unlink()
    model = LLaDAUni(checkpoint_copy)
    with pytest.raises(CheckpointError, match=r"no image_tokenizer/image_tokenizer\.safetensors"):
        model.encode(torch.zeros(1, 64, 64, 3))


def test_reading_is_reported_and_can_be_stopped(model):
    component = model.components["backbone"]
    seen = []
    component.load(torch.float32, lambda done, total: seen.append((done, total)))
    total = sum(p.numel() for p in component.module.state_dict().values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        component.load(torch.float32, stop)
    assert all(p.is_meta for p in component.module.parameters())


def test_the_pickled_file_is_not_kept_open(checkpoint_copy):
    path = checkpoint_copy / "image_tokenizer" / "sigvq_embedding.pt"
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not list what a process has mapped")
    model = LLaDAUni(checkpoint_copy)
    assert path.name not in maps.read_text()
    loaded = model.components["sigvq"].load(torch.float32)
    assert model.palette() is not None
    assert path.name not in maps.read_text()
    assert loaded.codes.weight.abs().sum() > 0  # a copy: it lives on


def test_a_pickled_file_that_changed_under_an_open_model_is_refused(checkpoint_copy):
    path = checkpoint_copy / "image_tokenizer" / "sigvq_embedding.pt"
    component = LLaDAUni(checkpoint_copy).components["sigvq"]
    torch.save({name: t[:1].clone() for name, t in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(CheckpointError, match="another file"):
        component.load(torch.float32)


# Straight from the files


def test_what_lies_whole_in_a_file_can_stay_a_slice_of_its_map(checkpoint_copy, rewrite, golden_backbone):
    """A host keeps maps of its own. Banks of one expert a key, and what is wanted in another type, are read."""
    component = open_backbone(Layout.open(checkpoint_copy).backbone_files(), golden_backbone.config)
    maps = {path: load_file(path) for path in checkpoint_copy.glob("model-*.safetensors")}
    module = component.load(torch.float32, mapped=maps.__getitem__)
    assert_same(module, golden_backbone)
    ours = {tensor.data_ptr() for tensors in maps.values() for tensor in tensors.values()}
    mapped = {name for name, tensor in module.state_dict().items() if tensor.data_ptr() in ours}
    assert mapped == {name for name in module.state_dict() if ".experts." not in name}
    rounded = component.load(torch.bfloat16, mapped=maps.__getitem__)
    mapped = {name for name, tensor in rounded.state_dict().items() if tensor.data_ptr() in ours}
    assert mapped == {name for name in rounded.state_dict() if component.keep_float32(name)}
    assert_same(rounded, component.load(torch.bfloat16))


def test_a_map_of_another_file_is_refused(checkpoint_copy, golden_backbone):
    component = open_backbone(Layout.open(checkpoint_copy).backbone_files(), golden_backbone.config)
    with pytest.raises(CheckpointError, match=r"found another .*expected the file that was opened"):
        component.load(torch.float32, mapped=lambda path: {})


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(checkpoint_copy, golden_backbone):
    component = open_backbone(Layout.open(checkpoint_copy).backbone_files(), golden_backbone.config)
    path = checkpoint_copy / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: found a file that ends 10 bytes too early"):
        component.load(torch.float32)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        component.load(torch.float32)


def test_weights_are_read_in_the_order_of_the_files(golden_checkpoint, golden_backbone):
    """A disk reads ahead; and no thread is left when reading was stopped."""
    source = Layout.open(golden_checkpoint).backbone_files()
    component = open_backbone(source, golden_backbone.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in component.module.state_dict().items()}
    found = [
        source.entries[piece.key]
        for piece in loading.pieces(
            source, component.slots, shapes, component.forms(torch.bfloat16), torch.device("cpu")
        )
    ]
    assert len(found) == len(component.slots)
    assert found == sorted(found, key=lambda entry: (entry.file, entry.offset))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read weights")]
