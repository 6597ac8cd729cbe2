"""The templates in Chinese: every text of a graph, and the order of the list, as web/templates.js takes them."""

import json
import re

import pytest

from dev.build.build_texts import LANGUAGES
from dev.build.graph_checks import NOTES
from dev.hosts.base_folder import GRAPHS, ROOT

CHINESE = json.loads((ROOT / "web" / "templates.zh.json").read_text(encoding="utf-8"))
SIGN = re.compile("[\u4e00-\u9fff]")
PROMPT = re.compile(r"\*[^*].*\*")  # a paragraph that is a prompt for the miniature, which knows English alone


def texts(graph: dict) -> set[str]:
    """What is to be translated in a graph: paragraphs of notes, titles of nodes and groups."""
    found = {node["title"] for node in graph["nodes"] if "title" in node}
    found |= {group["title"] for group in graph["groups"]}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            found |= set(node["widgets_values"][0].split("\n\n"))
    return {text for text in found if not PROMPT.fullmatch(text)}


def test_every_text_of_a_template_is_there_in_chinese(graph):
    missing = texts(graph) - CHINESE.keys()
    assert not missing, "translate these in web/templates.zh.json"


def test_there_are_no_others():
    graphs = [json.loads(path.read_text(encoding="utf-8")) for path in GRAPHS.parent.glob("*.json")]
    assert CHINESE.keys() == set().union(*map(texts, graphs))


def test_they_are_chinese_and_can_be_turned_back():
    assert all(SIGN.search(text) or text.lower() in ("turbo", "normal") for text in CHINESE.values())
    assert len(set(CHINESE.values())) == len(CHINESE)


@pytest.mark.usefixtures("schemas")
def test_a_note_names_inputs_as_they_are_shown(graph):
    """Words in bold that are an input of a node of ours carry its name in the language of the note."""
    from dev.build.build_texts import node_texts

    _, chinese = LANGUAGES
    shown = node_texts(chinese.language)
    for node in graph["nodes"]:
        for name, told in shown.get(node["type"], {}).get("inputs", {}).items():
            for english in texts(graph):
                if f"**{name}**" in english:
                    assert f"**{told['name']}**" in CHINESE[english], (node["type"], name)


def test_the_list_has_every_template_and_begins_with_the_one_that_needs_no_download():
    script = (ROOT / "web" / "templates.js").read_text(encoding="utf-8")
    order = re.findall(r'"([\w-]+)"', re.search(r"ORDER = \[(.*?)\]", script, re.DOTALL).group(1))
    assert sorted(order) == sorted(path.stem for path in GRAPHS.glob("*.json"))
    assert order[0] == "miniature"
