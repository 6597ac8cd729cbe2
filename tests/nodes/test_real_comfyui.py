"""The pack in a real ComfyUI server, driven as users drive it. Skipped, by name, where there is none."""

import io
import threading

import pytest
from PIL import Image

from dev.hosts.base_folder import GRAPHS
from dev.hosts.server import PACK, Rejected, knows_zimage, needs_zimage

PREVIEW_IMAGE = 1  # the host's number of a binary message that holds a picture


def test_the_pack_imports_without_a_warning(comfy_server):
    lines = comfy_server.log.partition("Starting server")[0].splitlines()
    assert any(PACK in line and "seconds" in line for line in lines)
    assert not [line for line in lines if PACK in line and "seconds" not in line]


def test_object_info_shows_every_node_with_its_inputs(comfy_server, in_process_host):
    shown = comfy_server.get("/object_info")
    for node_id in in_process_host.node_ids:
        schema = in_process_host.node_class(node_id).define_schema()
        inputs = shown[node_id]["input"]
        named = [*inputs.get("required", {}), *inputs.get("optional", {})]
        assert sorted(named) == sorted(i.id for i in schema.inputs), node_id
        assert shown[node_id]["output_name"] == [o.display_name for o in schema.outputs]
        assert shown[node_id]["category"] == "LLaDA-Uni"


def test_checkpoints_are_found_at_any_depth_and_nothing_else_is(comfy_server):
    options = comfy_server.get("/object_info/LLaDAUniLoader")["LLaDAUniLoader"]["input"]["required"]["checkpoint"]
    assert options[1]["options"] == ["tiny", "miniature"]


def test_templates_are_listed(comfy_server):
    listed = comfy_server.get("/workflow_templates")[PACK]
    assert sorted(listed) == sorted(path.stem for path in GRAPHS.glob("*.json"))
    for name in listed:
        assert comfy_server.read(f"/api/workflow_templates/{PACK}/{name}.json")
        assert Image.open(io.BytesIO(comfy_server.read(f"/api/workflow_templates/{PACK}/{name}.jpg"))).size[0] >= 200


@pytest.mark.parametrize("path", sorted(GRAPHS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_graph_completes(comfyui, comfy_server, shipped_graph, path):
    graph = shipped_graph(path)
    if needs_zimage(graph) and not knows_zimage(comfyui):
        pytest.skip("this ComfyUI does not know Z-Image")
    run = comfy_server.run(graph)
    assert run.status == "success", run.error
    # Random weights tell no story with pictures: the text says so, and what needs pictures does not run.
    told = any("The story ends here" in text for shown in run.outputs.values() for text in shown.get("text", []))
    assert told == (path.stem == "story")
    for node, data in graph.items():
        if data["class_type"] == "SaveImage" and not told:
            for image in run.outputs[node]["images"]:
                query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
                picture = Image.open(io.BytesIO(comfy_server.read(f"/view?{query}")))
                assert min(picture.size) >= 32
        if data["class_type"] == "PreviewAny":
            assert run.outputs[node]["text"]


def test_progress_arrives_for_every_long_stage(comfy_server, graphs):
    run = comfy_server.run(graphs.draw(prompt="an owl for progress"))
    for node in ("sample", "decode"):
        bars = [data for data in run.of("progress") if data["node"] == node]
        assert bars, node
        assert all(0 <= bar["value"] <= bar["max"] for bar in bars)
        assert bars[-1]["value"] == bars[-1]["max"]
    texts = b"\n".join(run.of("binary"))
    assert b"Backbone round" in texts
    assert b"Decoder round" in texts


def test_previews_of_tokens_and_latents_arrive_as_pictures(comfy_server, graphs):
    arrived = []

    def on_message(kind, data):
        if kind == "executing" and data["node"]:
            arrived.append((data["node"], []))
        if kind == "binary" and int.from_bytes(data[:4], "big") == PREVIEW_IMAGE:
            arrived[-1][1].append(Image.open(io.BytesIO(data[8:])).size)

    assert comfy_server.run(graphs.draw(side=96, prompt="a lynx to watch"), on_message).status == "success"
    sizes = dict(arrived)
    assert sizes["sample"], "no token grid was shown"
    assert sizes["decode"], "no latents were shown"
    assert {*sizes["sample"], *sizes["decode"]} == {(96, 96)}  # the picture's own, which the front end names


def test_only_what_changed_runs_again(comfy_server, graphs):
    graph = graphs.draw(prompt="a hare for the cache")
    assert comfy_server.run(graph).status == "success"
    assert comfy_server.run(graph).executed == []
    graph["decode"]["inputs"]["seed"] += 1
    assert sorted(comfy_server.run(graph).executed) == ["decode", "save"]
    graph["sample"]["inputs"]["prompt"] = "a hound for the cache"
    assert sorted(comfy_server.run(graph).executed) == ["decode", "sample", "save"]


def test_interrupt_stops_a_run_and_the_next_one_works(comfy_server, graphs):
    stopped_at = []

    def on_message(kind, data):
        if kind == "progress":
            if not stopped_at:
                threading.Thread(target=comfy_server.post, args=("/interrupt",)).start()
            stopped_at.append(data["value"])

    run = comfy_server.run(graphs.think_long(), on_message)
    assert run.status == "interrupted"
    assert run.of("execution_interrupted")[0]["node_id"] == "sample"
    assert stopped_at[-1] < 1000  # of 8,000 rounds; a request takes many of these tiny ones to arrive
    assert comfy_server.run(graphs.draw(prompt="a fox after the interruption")).status == "success"


def test_free_releases_the_components(comfy_server, graphs):
    graph = graphs.draw(prompt="a crane before free")
    assert comfy_server.run(graph).status == "success"
    comfy_server.post("/free", {"unload_models": True, "free_memory": True})
    marker = len(comfy_server.log)
    run = comfy_server.run(graph)
    assert run.status == "success"
    assert "load" in run.executed  # its checkpoint was dropped with the host's cache
    assert "reading backbone" in comfy_server.log[marker:]  # and so were its weights
    assert [data for data in run.of("progress") if data["max"] == 100 and data["node"] == "sample"]  # read with a bar


def test_an_empty_prompt_and_odd_sizes_are_refused_at_once(comfy_server, graphs):
    graph = graphs.draw(prompt="  ")
    with pytest.raises(Rejected, match="prompt: found nothing"):
        comfy_server.run(graph)
    graph = graphs.draw()
    graph["sample"]["inputs"]["width"] = 100
    with pytest.raises(Rejected, match="multiple of 32"):
        comfy_server.run(graph)


def test_a_checkpoint_that_is_not_there_says_what_is(comfy_server, graphs):
    graph = graphs.draw()
    graph["load"]["inputs"]["checkpoint"] = "LLaDA2.0-Uni-elsewhere"
    refusal = _refusal(comfy_server, graph)
    assert "LLaDA2.0-Uni-elsewhere" in refusal
    assert "tiny" in refusal  # what there is


def test_flash_attention_without_its_package_says_so(comfy_server, graphs):
    graph = graphs.draw()
    graph["load"]["inputs"]["attention"] = "flash_attention_2"
    run = comfy_server.run(graph)
    assert run.status == "error"
    assert "flash-attn" in run.error["exception_message"]
    assert "choose sdpa" in run.error["exception_message"]


def _refusal(server, graph: dict) -> str:
    """How the host refuses a graph: newer ones check lists before a run, 0.3.64 leaves that to the node."""
    try:
        run = server.run(graph)
    except Rejected as rejected:
        return str(rejected)
    return f"{run.status}: {run.error.get('exception_message')}"
