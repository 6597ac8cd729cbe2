"""A value where a link belongs, a link of another type, a name that no file can have: refused before anything runs."""

import os

import pytest
import torch

from dev.hosts.server import Rejected

# Node -> its sockets and what to connect, as the message says it; "?" marks those that may be left empty.
SOCKETS = {
    "LLaDAUniEncode": {"model": "Load LLaDA-Uni", "image": "Load Image"},
    "LLaDAUniSample": {
        "model": "Load LLaDA-Uni",
        "references?": "SigLIP-VQ Encode",
        "sampling?": "Sampling Options",
        "sprint?": "SPRINT Options",
        "tokens?": "SigLIP-VQ Encode",
        "mask?": "Load Image",
    },
    "LLaDAUniDecode": {"model": "Load LLaDA-Uni", "tokens": "Diffusion-LLM Sample"},
    "LLaDAUniImageQA": {
        "model": "Load LLaDA-Uni",
        "image?": "Load Image",
        "tokens?": "SigLIP-VQ Encode",
        "sampling?": "Sampling Options",
        "sprint?": "SPRINT Options",
    },
    "LLaDAUniInterleave": {
        "model": "Load LLaDA-Uni",
        "references?": "SigLIP-VQ Encode",
        "sampling?": "Sampling Options",
    },
    "LLaDAUniJoinTokens": {
        "tokens_1": "Load Image Tokens",
        "tokens_2": "Load Image Tokens",
        "tokens_3?": "Load Image Tokens",
        "tokens_4?": "Load Image Tokens",
    },
    "LLaDAUniSaveTokens": {"tokens": "Load Image Tokens"},
    "LLaDAUniVary": {
        "model": "Load LLaDA-Uni",
        "tokens": "Diffusion-LLM Sample",
        "references?": "SigLIP-VQ Encode",
        "sampling?": "Sampling Options",
        "sprint?": "SPRINT Options",
    },
    "LLaDAUniPadTokens": {"tokens": "SigLIP-VQ Encode"},
    "LLaDAUniCropTokens": {"tokens": "SigLIP-VQ Encode"},
    "LLaDAUniPasteTokens": {"tokens": "SigLIP-VQ Encode", "piece": "SigLIP-VQ Encode"},
    "LLaDAUniPreviewTokens": {"model": "Load LLaDA-Uni", "tokens": "SigLIP-VQ Encode"},
}
# The same of the nodes that only hosts with Z-Image offer.
NATIVE = {
    "LLaDAUniDecoderModel": {"model": "Load LLaDA-Uni"},
    "LLaDAUniConditioning": {"model": "Load LLaDA-Uni", "tokens": "Diffusion-LLM Sample"},
    "LLaDAUniDecoderGuidance": {"model": "Load Decoder"},
    "LLaDAUniDecoderSchedule": {"model": "Load Decoder"},
}
EVERY = [(node, name.rstrip("?"), name[-1] == "?", to) for node, of in SOCKETS.items() for name, to in of.items()]
VALUES = ["a text", 3, 0.5, True, None, {"a": 1}, [1, 2, 3], []]


@pytest.fixture(scope="module")
def right(in_process_host, graphs) -> dict:
    """What belongs into each socket."""
    graph = graphs.draw()
    done = in_process_host.run({name: graph[name] for name in ("load", "sample")})
    ((tokens,), _) = done["sample"][0]
    return {
        "LLADA_UNI": done["load"][0][0],
        "LLADA_TOKENS": tokens,
        "IMAGE": torch.zeros(1, 64, 64, 3),
        "MASK": torch.zeros(1, 64, 64),
    }


def test_the_table_has_every_socket(in_process_host):
    widgets = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    for node_id in in_process_host.node_ids:
        inputs = in_process_host.node_class(node_id).define_schema().inputs
        found = [f"{i.id}?" if i.optional else i.id for i in inputs if i.get_io_type() not in widgets]
        assert found == list(SOCKETS.get(node_id, {}))


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(("node", "name", "optional", "connect"), EVERY)
def test_a_value_in_place_of_a_link(node, name, optional, connect, value, in_process_host):
    answer = in_process_host.node_class(node).validate_inputs(input_types={}, **{name: value})
    if optional and value is None:
        assert answer is True  # what a client sends for "nothing connected"
        return
    assert f"{name}: found the value " in answer
    assert "expected a link to" in answer
    assert connect in answer


def test_links_and_empty_sockets_pass(in_process_host):
    for node, sockets in SOCKETS.items():
        kind = in_process_host.node_class(node)
        types = {i.id: i.get_io_type() for i in kind.define_schema().inputs}
        linked = {name.rstrip("?"): types[name.rstrip("?")] for name in sockets}
        assert kind.validate_inputs(input_types=linked, **dict.fromkeys(linked)) is True
        assert kind.validate_inputs(input_types={}) is True


@pytest.mark.parametrize(("node", "name", "optional", "connect"), EVERY)
def test_what_an_output_of_any_type_hands_on_is_looked_at(node, name, optional, connect, in_process_host, right):
    """Only the node itself can tell, and it does before it works: the widgets here are all impossible."""
    kind = in_process_host.node_class(node)
    inputs = {i.id: right.get(i.get_io_type()) for i in kind.define_schema().inputs}
    for value in ("a text", 3, [1], *(other for other in right.values() if type(other) is not type(inputs[name]))):
        with pytest.raises(ValueError, match=f"{name}: found .*{connect}"):
            kind.execute(**inputs | {name: value})


def test_numbers_are_in_range_before_anything_runs(in_process_host):
    decode = in_process_host.node_class("LLaDAUniDecode")
    for steps in (3_000_000, int(1e308), -1, 2.5, "8"):
        assert "steps: found" in decode.validate_inputs(turbo=True, steps=steps)
    assert "turbo: found 'maybe'" in decode.validate_inputs(turbo="maybe", steps=8)
    assert decode.validate_inputs(turbo=None, steps=1) is True  # a linked turbo is known later
    assert "steps: found 1001" in decode.validate_inputs(turbo=None, steps=1001)
    sample = in_process_host.node_class("LLaDAUniSample")
    assert "width: found 1000000000 pixels" in sample.validate_inputs(prompt="a", width=10**9, height=64)
    assert "height: found 1000000000 pixels" in sample.validate_inputs(prompt="a", width=None, height=10**9)
    assert "prompt: found 1000001 characters" in sample.validate_inputs(prompt="a" * 1_000_001)
    assert "prompt: found half a character" in sample.validate_inputs(prompt="a \ud800 b")


PREFIXES = {
    "": "without a letter",
    "..": "leaves the output folder",
    "../up": "leaves the output folder",
    "/etc/llada": "leaves the output folder",
    "a/../../b": "leaves the output folder",
    "...": "without a letter",
    "a/ /b": "without a letter",
    "a/..": "without a letter",
    "nul\0": "no file name has",
    "line\nbreak": "no file name has",
    "x" * 237: "refuses",
    "folder/" + "x" * 237: "refuses",
    "y" * 256 + "/x": "refuses",
    "/".join(["folder"] * 700): "refuses",
    "half \ud800": "refuses",
    "file/inside": "no folder that can be written to",
}


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: ascii(prefix[:20]))
def test_a_name_that_cannot_be_written_is_refused_before_there_are_tokens(prefix, in_process_host):
    output = in_process_host.base / "output"
    (output / "file").write_text("")
    before = sorted(os.walk(output.parent))
    answer = in_process_host.node_class("LLaDAUniSaveTokens").validate_inputs(filename_prefix=prefix)
    assert "filename_prefix: found" in answer
    assert PREFIXES[prefix] in answer
    assert sorted(os.walk(output.parent)) == before
    (output / "file").unlink()


@pytest.mark.parametrize(
    "prefix", ["llada", "tokens/llada", "a/b/../c", "%year%-%month%", "\u00e9t\u00e9/\u72d0", "x" * 220, ".x"]
)
def test_names_that_can_be_written(prefix, in_process_host, right):
    save = in_process_host.node_class("LLaDAUniSaveTokens")
    assert save.validate_inputs(filename_prefix=prefix) is True
    before = set(in_process_host.base.rglob("*.safetensors"))
    save.execute(right["LLADA_TOKENS"], prefix)
    assert len(set(in_process_host.base.rglob("*.safetensors")) - before) == 1


# On a real host


def refused(server, graph) -> str:
    with pytest.raises(Rejected) as caught:
        server.run(graph)
    return str(caught.value)


@pytest.mark.parametrize("value", ["a text", 3, 0.5, None, {"a": 1}, {"__value__": [1, 2, 3]}], ids=repr)
@pytest.mark.parametrize("name", ["model", "references", "sampling", "sprint"])
def test_the_host_answers_400_to_a_value_in_place_of_a_link(comfy_server, graphs, name, value):
    graph = graphs.draw(**{name: value} if name != "model" else {})
    graph["sample"]["inputs"][name] = value
    if value is None and name != "model":
        assert comfy_server.run(graph).status == "success"
        return
    assert f"{name}: found the value" in refused(comfy_server, graph)


@pytest.mark.parametrize(
    ("node", "name", "link"),
    [("sample", "references", "load"), ("decode", "tokens", "load"), ("decode", "model", "sample")],
)
def test_the_host_answers_400_to_a_link_of_another_type(comfy_server, graphs, node, name, link):
    """The pack compares types in the host's place where it asks for them."""
    graph = graphs.draw()
    graph[node]["inputs"][name] = [link, 0]
    assert f"{name}: found a link of type LLADA_" in refused(comfy_server, graph)


@pytest.mark.parametrize("node", NATIVE)
def test_so_it_does_for_the_nodes_of_hosts_with_z_image(comfy_server, graphs, node):
    info = comfy_server.get("/object_info").get(node)
    if info is None:
        pytest.skip("this host has no Z-Image")
    for name, connect in NATIVE[node].items():
        graph = graphs.draw()
        links = {"model": ["load" if NATIVE[node]["model"] == "Load LLaDA-Uni" else "open", 0], "tokens": ["sample", 0]}
        graph["open"] = graphs.node("LLaDAUniDecoderModel", model=["load", 0], decoder="turbo")
        widgets = {"decoder": "turbo"} if node == "LLaDAUniDecoderModel" else {"steps": 0, "denoise": 1.0}
        inputs = {key: links[key] for key in NATIVE[node]} | (widgets if "Conditioning" not in node else {})
        graph["node"] = graphs.node(node, **inputs | {name: 3})
        graph["show"] = graphs.node("PreviewAny", source=["node", 0])
        graph = {key: graph[key] for key in ("load", "sample", "open", "node", "show")}
        answer = refused(comfy_server, graph)
        assert f"{name}: found the value 3" in answer
        assert connect in answer


def test_a_widget_takes_links_of_its_own_type_alone(comfy_server, graphs):
    graph = graphs.draw()
    graph["number"] = graphs.node("PrimitiveInt", value=64)
    graph["text"] = graphs.node("PrimitiveString", value="64")
    graph["sample"]["inputs"]["width"] = ["text", 0]
    assert "width: found a link of type STRING" in refused(comfy_server, graph)
    graph["sample"]["inputs"]["width"] = ["number", 0]
    assert comfy_server.run(graph).status == "success"
    graph["number"]["inputs"]["value"] = 100  # known when it has run
    run = comfy_server.run(graph)
    assert run.status == "error"
    assert "width: found 100 pixels" in run.error["exception_message"]


def test_impossible_numbers_and_names_are_answered_with_400(comfy_server, graphs):
    for name, value in (("steps", 1e308), ("steps", 3_000_000), ("steps", float("nan")), ("steps", "many")):
        graph = graphs.draw()
        graph["decode"]["inputs"][name] = value
        assert name in refused(comfy_server, graph)
    graph = graphs.draw()
    graph["keep"] = graphs.node("LLaDAUniSaveTokens", tokens=["sample", 0], filename_prefix="nul\0")
    graph = {name: graph[name] for name in ("load", "sample", "keep")}
    assert "filename_prefix: found" in refused(comfy_server, graph)


def test_what_a_link_to_no_input_brings_is_refused_by_name(in_process_host):
    """A host hands it on, and runs what it comes from without a look at its inputs."""
    loader = in_process_host.node_class("LLaDAUniLoader")
    with pytest.raises(
        Exception, match="'references': found an input that this node has not; expected the inputs of Load"
    ):
        loader.execute(checkpoint="tiny", precision="auto", attention="auto", references=1)
    for node in in_process_host.node_ids:
        cls = in_process_host.node_class(node)
        needed = [spec.id for spec in cls.define_schema().inputs if not spec.optional]
        with pytest.raises(Exception, match=rf"({'|'.join(needed)}): found (nothing|None); expected"):
            cls.execute()
