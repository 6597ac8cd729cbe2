"""Every shipped workflow, both forms, against the schemas of today."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from dev.build.graph_checks import NOTES, api_complaints, api_of, graph_complaints
from dev.build.graph_forms import RESULTS
from dev.hosts.base_folder import GRAPHS

FROZEN = sorted((Path(__file__).parent / "frozen").glob("*/*.json"))
MINIATURE = "miniature"  # the workflow, and the checkpoint that it is for
EXPECTED = {
    MINIATURE,
    "text-to-image",
    "thinking-text-to-image",
    "edit",
    "edit-two-references",
    "image-qa",
    "sprint-side-by-side",
    "turbo-and-normal",
    "story",
    "edit-a-part",
    "outpaint",
    "four-variations",
    "decoder-with-ksampler",
    "edit-keeps-the-photo",
    "edit-in-a-mask",
    "larger",
    "with-lora",
}


def test_all_workflows_are_there_in_both_forms_with_a_thumbnail():
    for folder, ending in ((GRAPHS, "json"), (GRAPHS.parent, "json"), (GRAPHS.parent, "jpg")):
        assert {path.stem for path in folder.glob(f"*.{ending}")} == EXPECTED


@pytest.mark.parametrize("folder", ["example_workflows", "example", "examples", "workflow"])
def test_no_other_folder_hides_the_templates(folder):
    """ComfyUI serves templates from the first that exists of these and `workflows`: ours would be listed, and 404."""
    assert not (GRAPHS.parent.parent / folder).exists()


def test_an_api_graph_fits_the_schemas(api, schemas):
    assert api_complaints(api, schemas) == []


def test_a_canvas_graph_fits_the_schemas(graph, schemas):
    assert graph_complaints(graph, schemas) == []


def test_both_forms_say_the_same(graph, api, schemas):
    assert api_of(graph, schemas) == api


def test_only_core_nodes_and_ours_are_used(graph, api, schemas):
    assert {node["type"] for node in graph["nodes"]} <= set(schemas) | set(NOTES)
    assert any(data["class_type"] == "LLaDAUniLoader" for data in api.values())


def test_the_released_defaults_are_shipped(name, api):
    side = 256 if name == MINIATURE else 1024
    for data in api.values():
        inputs = data["inputs"]
        if data["class_type"] == "LLaDAUniLoader":
            assert inputs["checkpoint"] == (MINIATURE if name == MINIATURE else "LLaDA2.0-Uni")
        if data["class_type"] == "LLaDAUniSample":
            guidance = 4.0 if "references" in inputs else 2.0
            assert (inputs["width"], inputs["height"], inputs["steps"], inputs["guidance"]) == (side, side, 8, guidance)


def test_every_canvas_graph_explains_itself(graph):
    notes = [node for node in graph["nodes"] if node["type"] in NOTES]
    assert notes
    assert all(len(note["widgets_values"][0]) > 100 for note in notes)
    assert len(graph["groups"]) >= 3
    assert all(group["title"] for group in graph["groups"])


def test_app_mode_shows_what_to_say_the_seed_and_the_result(graph, schemas):
    form, nodes = graph["extra"]["linearData"], {node["id"]: node for node in graph["nodes"]}
    shown = [(nodes[node]["type"], name) for node, name in form["inputs"]]
    for kind, name in shown:
        assert schemas[kind].input(name).is_widget
        assert not schemas[kind].input(name).is_folded
    assert {name for _, name in shown} & {"prompt", "instruction", "question"}
    results = [node["id"] for node in graph["nodes"] if node["type"] in RESULTS]
    assert sorted(form["outputs"]) == sorted(results)
    assert [node["type"] for node in nodes.values()].count("LLaDAUniDecode") == shown.count(("LLaDAUniDecode", "seed"))
    assert form["outputs"]
    # An edit takes its size from the picture; the form does not ask for another.
    for node in graph["nodes"]:
        if node["type"] == "LLaDAUniSample":
            edits = any(entry["name"] == "references" and entry["link"] for entry in node["inputs"])
            assert ([node["id"], "width"] in form["inputs"]) != edits


def test_boxes_lie_apart_and_inside_a_group(graph):
    def frame(x, y, width, height):
        return x, y, x + width, y + height

    titled = [frame(n["pos"][0], n["pos"][1] - 30, n["size"][0], n["size"][1] + 30) for n in graph["nodes"]]
    groups = [frame(*group["bounding"]) for group in graph["groups"]]
    for a, b in [*combinations(titled, 2), *combinations(groups, 2)]:
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for box in titled:
        assert any(g[0] < box[0] and g[1] < box[1] and box[2] < g[2] and box[3] < g[3] for g in groups)


def test_titles_of_groups_fit_their_frames(graph):
    for group in graph["groups"]:
        assert len(group["title"]) * 11.5 <= group["bounding"][2], group["title"]


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_graphs_of_earlier_releases_still_fit(path, schemas):
    """These files are never changed: a rename or a narrower range breaks what people have saved."""
    assert api_complaints(json.loads(path.read_text()), schemas) == []


def test_there_are_frozen_graphs():
    assert {path.stem for path in FROZEN if path.parent.name == "2026-11"} == EXPECTED


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda g: g["2"].update(class_type="LLaDAUniPaint"), "no node LLaDAUniPaint"),
        (lambda g: g["2"]["inputs"].update(cfg=2.0), "has no input cfg"),
        (lambda g: g["2"]["inputs"].pop("prompt"), "prompt is required"),
        (lambda g: g["2"]["inputs"].update(steps=0), "not in 1 to 1024"),
        (lambda g: g["2"]["inputs"].update(width=1000), "not on a step of 32"),
        (lambda g: g["2"]["inputs"].update(thinking="yes"), "is no BOOLEAN"),
        (lambda g: g["2"]["inputs"].update(steps=True), "is no INT"),
        (lambda g: g["1"]["inputs"].update(precision="int4"), "is none of"),
        (lambda g: g["3"]["inputs"].update(tokens=["1", 0]), "takes LLADA_TOKENS, linked to LLADA_UNI"),
        (lambda g: g["3"]["inputs"].update(tokens=["2", 2]), "output 2 of 2"),
        (lambda g: g["3"]["inputs"].update(tokens=["9", 0]), "which is not there"),
        (lambda g: g["3"]["inputs"].update(tokens="x"), "where a link is due"),
    ],
)
def test_the_check_itself_finds_faults(change, complaint, schemas):
    graph = json.loads((GRAPHS / "text-to-image.json").read_text())
    change(graph)
    assert any(complaint in line for line in api_complaints(graph, schemas))


def test_a_template_opens_readable(graph):
    """The front end fits a graph into three quarters of what is to be seen, and blanks all text below six tenths."""
    frames = [group["bounding"] for group in graph["groups"]]
    width = max(x + w for x, _, w, _ in frames) - min(x for x, _, _, _ in frames)
    height = max(y + h for _, y, _, h in frames) - min(y for _, y, _, _ in frames)
    assert width <= 2020  # on a screen of 1600 x 1000
    assert height <= 1296  # ComfyUI 0.3.64 fits it into 741 of a screen of 1000, and blanks text below 0.571
    assert len(frames) <= 4


def test_links_have_the_colours_of_the_thumbnails():
    """web/link_colours.js and the drawn thumbnails name the same colour for each of our types."""
    from dev.build.pictures import TYPE_COLOURS

    script = (GRAPHS.parent.parent / "web" / "link_colours.js").read_text()
    told = dict(re.findall(r'(LLADA_\w+): "(#\w{6})"', script))
    assert told == {kind: colour for kind, colour in TYPE_COLOURS.items() if kind.startswith("LLADA_")}
    assert len(set(told.values())) == len(told)
