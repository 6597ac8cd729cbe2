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


@pytest.fixture(scope="module")
def pack(in_process_host):
    """part -> the module nodes/<part>, as the pack was loaded."""
    package = in_process_host.node_class("LLaDAUniLoader").__module__.rpartition(".")[0]
    return lambda part: importlib.import_module(f"{package}.{part}")


def test_nodes_are_found_by_other_words(in_process_host, pack):
    kinds = [in_process_host.node_class(node_id) for node_id in in_process_host.node_ids]
    schemas = [kind.define_schema() for kind in {*kinds, *pack("native_decoder").NODES}]  # offered by some hosts
    found = {schema.node_id: schema.search_aliases for schema in schemas}
    assert all(found.values())
    assert "text to image" in found["LLaDAUniSample"]
    assert "caption" in found["LLaDAUniImageQA"]


def test_an_older_host_is_not_asked_for_what_it_does_not_know(pack, monkeypatch):
    types = pack("types")

    @dataclasses.dataclass
    class OlderSchema:
        node_id: str

    assert types.found_as("draw") == {"search_aliases": ["draw"]}
    monkeypatch.setattr(types.io, "Schema", OlderSchema)
    assert types.found_as("draw") == {}
