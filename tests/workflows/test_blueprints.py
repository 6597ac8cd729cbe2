"""Blueprints: as generated, whole, and known to a ComfyUI that has such."""

import json
from pathlib import Path

import pytest

from dev.build.graph_checks import api_complaints

SUBGRAPHS = Path(__file__).parents[2] / "subgraphs"
NAMES = ["Ask (LLaDA-Uni)", "Draw (LLaDA-Uni)", "Edit (LLaDA-Uni)"]


@pytest.fixture(params=NAMES)
def blueprint(request) -> dict:
    """Each blueprint in turn."""
    return json.loads((SUBGRAPHS / f"{request.param}.json").read_text())


def flattened(blueprint: dict, schemas: dict) -> dict:
    """The API form of a blueprint's chain, with a picture where it takes one and a preview where it gives something."""
    (subgraph,) = blueprint["definitions"]["subgraphs"]
    links = {link["id"]: link for link in subgraph["links"]}
    graph = {}
    for node in subgraph["nodes"]:
        values, inputs = iter(node["widgets_values"]), {}
        for spec in schemas[node["type"]].inputs:
            if spec.is_widget:
                inputs[spec.name] = next(values)
                if spec.options.get("control_after_generate"):
                    next(values)
        for entry in node["inputs"]:
            link = links.get(entry["link"])
            if link is None:
                continue
            assert (link["target_id"], link["type"]) == (node["id"], entry["type"])
            if link["origin_id"] != subgraph["inputNode"]["id"]:
                inputs[entry["name"]] = [str(link["origin_id"]), link["origin_slot"]]
            elif "widget" not in entry:
                graph["picture"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
                inputs[entry["name"]] = ["picture", 0]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    for output in subgraph["outputs"]:
        (number,) = output["linkIds"]
        source = [str(links[number]["origin_id"]), links[number]["origin_slot"]]
        kind, name = ("PreviewImage", "images") if output["type"] == "IMAGE" else ("PreviewAny", "source")
        graph[f"shown {output['name']}"] = {"class_type": kind, "inputs": {name: source}}
    return graph


def test_blueprints_are_as_generated(schemas):
    from dev.build import blueprints

    made = blueprints.files(schemas)
    assert sorted(path.stem for path in made) == sorted(path.stem for path in SUBGRAPHS.iterdir()) == NAMES
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m dev.build.build_workflows`"


def test_the_chain_fits_the_schemas(blueprint, schemas):
    assert api_complaints(flattened(blueprint, schemas), schemas) == []


def test_the_node_shows_what_its_subgraph_takes_and_gives(blueprint):
    (node,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"]
    for side in ("inputs", "outputs"):
        assert [(e["name"], e["type"]) for e in node[side]] == [(e["name"], e["type"]) for e in subgraph[side]]
    ids = [node["id"], *(inner["id"] for inner in subgraph["nodes"])]
    assert len(set(ids)) == len(ids), "the front end numbers them anew otherwise"
    ends = {entry["link"] for inner in subgraph["nodes"] for entry in inner["inputs"]} - {None}
    assert ends | {n for output in subgraph["outputs"] for n in output["linkIds"]} == {
        e["id"] for e in subgraph["links"]
    }
    assert subgraph["description"]
    assert "checkpoint" in [entry["name"] for entry in node["inputs"]]


def test_the_chain_runs(blueprint, schemas, in_process_host):
    from dev.hosts.base_folder import for_tiny

    graph = for_tiny(flattened(blueprint, schemas), side=64)
    done = in_process_host.run(graph)
    assert all(done[node] for node in graph if node.startswith("shown"))


def test_a_real_comfyui_lists_them(comfyui, comfy_server):
    if not (comfyui / "app" / "subgraph_manager.py").exists():
        pytest.skip("this ComfyUI has no subgraphs of packs")
    listed = comfy_server.get("/global_subgraphs")
    ours = {key: entry["name"] for key, entry in listed.items() if entry["name"] in NAMES}
    assert sorted(ours.values()) == NAMES
    for key, name in ours.items():
        assert comfy_server.get(f"/global_subgraphs/{key}")["data"] == (SUBGRAPHS / f"{name}.json").read_text()
