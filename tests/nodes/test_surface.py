"""What a node shows: few inputs at first, the others folded away; and the words that find it."""

import dataclasses
import importlib

import pytest

FOLDED = {
    "LLaDAUniLoader": "attention",
    "LLaDAUniEncode": "fit pixels",
    "LLaDAUniSample": "",
    "LLaDAUniSampling": "block_length top_k top_p guidance_rescale thinking_steps",
    "LLaDAUniSprint": "keep_ratio warmup alpha confidence",
    "LLaDAUniDecode": "steps",
    "LLaDAUniImageQA": "steps max_new_tokens",
    "LLaDAUniInterleave": "steps",
}


def inputs_of(host, node_id: str) -> dict[str, dict]:
    """Name -> options of every input, as the host sends them to the front end."""
    types = host.node_class(node_id).INPUT_TYPES()
    return {name: (rest or [{}])[0] for name, (_, *rest) in {**types["required"], **types.get("optional", {})}.items()}


@pytest.mark.parametrize("node_id", FOLDED)
def test_what_few_people_change_is_folded_away(in_process_host, node_id):
    inputs = inputs_of(in_process_host, node_id)
    assert [name for name, options in inputs.items() if options.get("advanced")] == FOLDED[node_id].split()


def test_what_is_folded_away_has_a_default_or_may_be_left_out(in_process_host):
    for node_id in in_process_host.node_ids:
        for name, options in inputs_of(in_process_host, node_id).items():
            assert not options.get("advanced") or options.get("default") is not None, (node_id, name)


def test_nodes_are_found_by_other_words(in_process_host):
    schemas = [in_process_host.node_class(node_id).GET_SCHEMA() for node_id in in_process_host.node_ids]
    found = {schema.node_id: schema.search_aliases for schema in schemas}
    assert all(found.values())
    assert "text to image" in found["LLaDAUniSample"]
    assert "caption" in found["LLaDAUniImageQA"]


def test_an_older_host_is_not_asked_for_what_it_does_not_know(in_process_host, monkeypatch):
    package = in_process_host.node_class("LLaDAUniLoader").__module__.rpartition(".")[0]
    types = importlib.import_module(f"{package}.types")

    @dataclasses.dataclass
    class OlderSchema:
        node_id: str

    assert types.found_as("draw") == {"search_aliases": ["draw"]}
    monkeypatch.setattr(types.io, "Schema", OlderSchema)
    assert types.found_as("draw") == {}
