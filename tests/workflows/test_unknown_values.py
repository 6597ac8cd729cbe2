"""Values that a shared workflow may carry and this machine lacks: the message says so, and what to do."""

import importlib.util
import json

import pytest

from dev.hosts.base_folder import GRAPHS, for_tiny


@pytest.fixture
def shared(name) -> dict:
    """Each shipped graph as another machine made it: a checkpoint of a name that is not here."""
    graph = json.loads((GRAPHS / f"{name}.json").read_text())
    for data in graph.values():
        if data["class_type"] == "LLaDAUniLoader":
            data["inputs"]["checkpoint"] = "LLaDA2.0-Uni"
    return graph


def refusal(host, graph: dict) -> str:
    """The message that a run ends with."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 the runtime wraps whatever a node raises
        host.run(graph)
    return str(caught.value.__cause__ or caught.value)


def test_a_checkpoint_that_is_not_here(in_process_host, shared):
    text = refusal(in_process_host, shared)
    assert "checkpoint: found 'LLaDA2.0-Uni'" in text
    assert "tiny" in text  # what there is
    assert "llada_uni" in text  # where to put one


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here")
def test_flash_attention_that_is_not_installed(in_process_host):
    graph = for_tiny(json.loads((GRAPHS / "text-to-image.json").read_text()), side=64)
    graph["1"]["inputs"]["attention"] = "flash_attention_2"
    text = refusal(in_process_host, graph)
    assert "flash-attn" in text
    assert "choose sdpa" in text


@pytest.mark.parametrize(
    ("workflow", "kind", "name_of_input", "remedy"),
    [
        ("text-to-image", "LLaDAUniLoader", "precision", "bf16"),
        ("text-to-image", "LLaDAUniLoader", "attention", "sdpa"),
        ("edit", "LLaDAUniEncode", "purpose", "understand"),
        ("edit", "LLaDAUniEncode", "fit", "cover"),
        ("sprint-side-by-side", "LLaDAUniSprint", "confidence", "top_k_margin"),
    ],
)
def test_a_choice_of_another_version(in_process_host, workflow, kind, name_of_input, remedy):
    """ComfyUI 0.3.64 passes unknown choices on, so nodes say what there is."""
    graph = for_tiny(json.loads((GRAPHS / f"{workflow}.json").read_text()), side=64)
    for data in graph.values():
        if data["class_type"] == kind:
            data["inputs"][name_of_input] = "int4"
    text = refusal(in_process_host, graph)
    assert name_of_input in text
    assert "int4" in text
    assert remedy in text


def test_a_token_file_that_is_not_here(in_process_host):
    graph = {"1": {"class_type": "LLaDAUniLoadTokens", "inputs": {"file": "theirs.safetensors"}}}
    text = refusal(in_process_host, graph)
    assert "theirs.safetensors" in text
    assert "input folder" in text


def test_on_a_real_comfyui_the_run_is_refused_with_the_name(comfy_server):
    from dev.hosts.server import Rejected

    graph = json.loads((GRAPHS / "text-to-image.json").read_text())
    try:
        run = comfy_server.run(graph)
        status, text = run.status, run.error.get("exception_message", "")
    except Rejected as rejected:  # newer hosts: value_not_in_list
        status, text = "error", str(rejected)
    assert status == "error"
    assert "LLaDA2.0-Uni" in text
    assert "tiny" in text
