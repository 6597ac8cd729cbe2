"""Help pages and node texts: complete, in both languages, and in agreement with the schemas."""

import re

import pytest
from PIL import Image

REMEDY = "run `python -m dev.build.build_texts`"
CHINESE_SIGN = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def texts(schemas):
    """The program that derives texts from schemas."""
    from dev.build import build_texts

    return build_texts


def leaves(tree: dict, path: tuple = ()) -> dict[tuple, str]:
    """Every text of a nested dict, by its path."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def test_the_english_locale_is_the_schemas_own_texts(texts, our_schemas):
    path, text = texts.locale_file(our_schemas)
    assert path.read_text(encoding="utf-8") == text, REMEDY
    assert all(leaves(texts.node_texts("en")).values())


def test_the_chinese_locale_is_complete(texts, our_schemas):
    chinese, english = leaves(texts.node_texts("zh")), leaves(texts.english(our_schemas))
    assert set(chinese) == set(english)
    assert all(text.strip() for text in chinese.values())
    for path, text in chinese.items():
        if path[-1] in ("tooltip", "description"):
            assert CHINESE_SIGN.search(text), path


def test_choices_keep_their_values_in_chinese(texts, our_schemas):
    """Choices are not translated by the front end, so a tooltip names them as they are shown."""
    chinese = texts.node_texts("zh")
    for node, schema in our_schemas.items():
        for spec in schema.inputs:
            named = [c for c in spec.options.get("options", []) if re.search(rf"\b{c}\b", spec.tooltip)]
            told = chinese[node]["inputs"][spec.name]["tooltip"]
            assert all(choice in told for choice in named), (node, spec.name)


def test_every_page_lists_the_inputs_and_outputs_as_they_are(texts, our_schemas):
    for path, text in texts.pages(our_schemas).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: {REMEDY}"


def test_there_are_pages_for_our_nodes_and_no_others(texts, our_schemas):
    expected = {words.page(node) for words in texts.LANGUAGES for node in our_schemas}
    assert set(texts.PAGES.rglob("*.md")) == expected
    assert {path.stem for path in texts.PAGES.rglob("*.png")} == set(our_schemas)


def test_every_page_says_what_its_node_is_shows_it_and_warns(texts, our_schemas):
    for words in texts.LANGUAGES:
        names = texts.node_texts(words.language)
        for node in our_schemas:
            page = words.page(node).read_text(encoding="utf-8")
            title, introduction, rest = page.split("\n\n", 2)
            assert title == f"# {names[node]['display_name']}"
            assert len(introduction) > 15
            assert f"]({node}.png)" in rest  # relative to web/docs, as the front end resolves it
            assert Image.open(texts.PAGES / f"{node}.png").size == (800, 360)
            assert len(re.findall(r"^- \*\*", page.split(f"## {words.mistakes}\n")[1], flags=re.M)) >= 2
            assert bool(CHINESE_SIGN.search(page)) == (words.language == "zh")


def test_ranges_and_defaults_are_told(texts, our_schemas):
    sample, encode = our_schemas["LLaDAUniSample"], our_schemas["LLaDAUniEncode"]

    def told(schema, name, words):
        return texts.facts(schema.id, schema.input(name), words)

    english, chinese = texts.LANGUAGES
    assert told(sample, "width", english) == "INT, 32 to 8192, in steps of 32, default 1024"
    assert told(sample, "guidance", english) == "FLOAT, 0 to 100, default 2"
    assert told(sample, "seed", english) == "INT, 0 to 2^64 - 1, default 0"
    assert told(sample, "thinking", english) == "on / off, default off"
    assert told(sample, "references", english) == "socket LLADA_TOKENS, optional"
    assert told(encode, "purpose", english) == "edit / understand, default edit"
    assert told(encode, "pixels", chinese) == "INT\uff0c0 \u5230 16777216\uff0c\u9ed8\u8ba4 0\uff0c\u53ef\u9009"


def test_a_page_without_a_section_is_refused(texts):
    with pytest.raises(ValueError, match="## Inputs"):
        texts.with_lists("# A node\n", {"Inputs": "- none"})


def test_a_real_comfyui_serves_both_languages_and_the_pages(comfy_server, texts, our_schemas):
    from dev.hosts.server import PACK

    served = comfy_server.get("/i18n")
    for language in ("en", "zh"):
        for node, told in texts.node_texts(language).items():
            assert served[language]["nodeDefs"][node] == told
    for node in our_schemas:
        for file in (f"{node}.md", f"{node}/zh.md", f"{node}.png"):
            kept = (texts.PAGES / file).read_bytes()
            assert comfy_server.read(f"/extensions/{PACK}/docs/{file}") == kept
