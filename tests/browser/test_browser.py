"""What a person sees: templates, graphs, a run, and help."""

import json

import pytest

from dev.build.build_texts import LANGUAGES
from dev.build.schemas import CORE_FILE
from dev.hosts.base_folder import CHECKPOINT_NAME, GRAPHS
from dev.hosts.scenes import SAID
from dev.hosts.server import knows_zimage, needs_zimage

NAMES = sorted(path.stem for path in GRAPHS.glob("*.json"))
LANGUAGE = "locale => app.extensionManager.setting.set('Comfy.Locale', locale)"
SMALL = {"width": 64, "height": 64}


def test_the_template_browser_shows_our_templates_with_thumbnails(canvas):
    cards = canvas.open_templates()
    canvas.page.wait_for_timeout(2000)
    canvas.shot("templates")
    for _ in NAMES:  # older front ends list a dozen, and more as one scrolls
        if cards.count() < len(NAMES):
            cards.last.scroll_into_view_if_needed()
            canvas.page.mouse.wheel(0, 2000)
            canvas.page.wait_for_timeout(800)
    listed = [card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()]
    script = (GRAPHS.parents[1] / "web" / "templates.js").read_text(encoding="utf-8")
    assert sorted(listed) == NAMES
    assert listed == sorted(listed, key=lambda name: script.index(f'"{name}"'))
    for card in cards.all():
        card.scroll_into_view_if_needed()
        picture = card.locator("img").first
        picture.wait_for(timeout=10_000)
        handle = picture.element_handle()
        canvas.page.wait_for_function("img => img.complete && img.naturalWidth > 0", arg=handle, timeout=10_000)
        assert picture.evaluate("img => img.naturalWidth") == 400


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_whole(canvas, comfyui, name):
    if needs_zimage(json.loads((GRAPHS / f"{name}.json").read_text())) and not knows_zimage(comfyui):
        pytest.skip("this ComfyUI does not know Z-Image")
    canvas.open_template(name)
    canvas.shot(f"open-{name}")
    assert as_queued(canvas) == json.loads((GRAPHS / f"{name}.json").read_text())  # graph and API form agree
    canvas.set("LLaDAUniLoader", checkpoint=CHECKPOINT_NAME)
    nodes = canvas.page.evaluate(
        """() => app.graph._nodes.map(n => ({type: n.type, known: !!LiteGraph.registered_node_types[n.type],
             errors: !!n.has_errors, size: [...n.size], least: [...n.computeSize()]}))"""
    )
    shipped = json.loads((GRAPHS.parent / f"{name}.json").read_text())
    assert sorted(n["type"] for n in nodes) == sorted(n["type"] for n in shipped["nodes"])
    for node in nodes:
        assert node["known"], f"{node['type']} is missing"
        absent = node["type"] == "LoraLoaderModelOnly"  # the file that it names is of no machine, as the note says
        assert not node["errors"] or absent, f"{node['type']} has a red outline"
        assert node["size"][1] >= node["least"][1], f"{node['type']} is too small for its widgets"
    assert canvas.page.locator("[role=dialog]").count() == 0
    told = any(node["type"] == "LoraLoaderModelOnly" for node in nodes)  # that its file is missing
    assert canvas.page.get_by_test_id("error-overlay").count() == told


def test_each_of_our_links_has_a_colour_of_its_own_and_text_can_be_read(canvas):
    canvas.open_template("edit-two-references")
    shown = (
        "['LLADA_UNI', 'LLADA_TOKENS', 'LLADA_SAMPLING', 'LLADA_SPRINT'].map("
        "kind => app.canvas.default_connection_color_byType[kind])"
    )
    palette = "name => app.extensionManager.setting.set('Comfy.ColorPalette', name)"
    ours = ["#5b6fc9", "#e39b3b", "#4fa3a5", "#c46fa8"]
    assert canvas.page.evaluate(shown) == ours
    assert canvas.page.evaluate("app.canvas.ds.scale") > 0.6  # below, the front end blanks all text
    canvas.page.evaluate(palette, "light")
    canvas.page.wait_for_timeout(2000)
    canvas.shot("light")
    try:
        assert canvas.page.evaluate(shown) == ours
    finally:
        canvas.page.evaluate(palette, "dark")


@pytest.mark.parametrize(("value", "at"), [({"prompt": " "}, "prompt"), ({"width": 1000}, "width")])
def test_a_refused_input_is_said_once_at_that_input(canvas, value, at):
    canvas.open_template("text-to-image")
    canvas.set("LLaDAUniLoader", checkpoint=CHECKPOINT_NAME)
    canvas.set("LLaDAUniSample", **value)
    canvas.press_run()
    canvas.page.wait_for_function("Object.keys(app.lastNodeErrors ?? {}).length > 0", timeout=30_000)
    canvas.page.wait_for_timeout(1500)
    canvas.shot(f"refused-{at}")
    (refused,) = canvas.page.evaluate("Object.values(app.lastNodeErrors)")
    assert [error["extra_info"]["input_name"] for error in refused["errors"]] == [at]
    assert refused["errors"][0]["details"].startswith(f"{at} - {at}: found")


def as_queued(canvas) -> dict:
    """What the front end would post, less the widgets that newer ones add to core nodes."""
    queued = canvas.page.evaluate("async () => (await app.graphToPrompt()).output")
    core = json.loads(CORE_FILE.read_text())
    for data in queued.values():
        if data["class_type"] in core:
            known = {name for group in core[data["class_type"]]["input"].values() for name in group}
            data["inputs"] = {name: value for name, value in data["inputs"].items() if name in known}
    return queued


def test_the_miniature_runs_as_it_is_opened(canvas):
    """What a new user does first: open the template and press Run, with nothing downloaded and nothing changed."""
    canvas.open_template("miniature")
    seen = canvas.run()
    canvas.shot("miniature")
    shown = [data["output"] for kind, data in seen if kind == "executed" and data["output"]]
    assert sum(len(output.get("images", [])) for output in shown) == 2
    assert [text for output in shown for text in output.get("text", [])].count(SAID["miniature"])


def test_a_run_shows_progress_and_the_picture_and_a_new_decode_seed_runs_decode_only(canvas):
    canvas.open_template("text-to-image")
    canvas.set("LLaDAUniLoader", checkpoint=CHECKPOINT_NAME)
    canvas.set("LLaDAUniSample", prompt="a heron for the browser", **SMALL)
    canvas.set("LLaDAUniDecode", seed=1, control_after_generate="fixed")
    seen = canvas.run()
    canvas.shot("run-text-to-image")
    assert canvas.classes(seen)[-3:] == ["LLaDAUniSample", "LLaDAUniDecode", "SaveImage"]  # the loader may be cached
    assert len([data for kind, data in seen if kind == "progress"]) > 4
    assert [data for kind, data in seen if kind == "b_preview"], "no live preview"
    assert any("%" in title for title in canvas.page.evaluate("[...window.titles]"))
    first = pictures(canvas, "SaveImage")
    assert [size for _, size in first] == [[64, 64]]

    canvas.set("LLaDAUniDecode", seed=2)
    again = canvas.run()
    assert canvas.classes(again) == ["LLaDAUniDecode", "SaveImage"]
    assert pictures(canvas, "SaveImage")[0][0] != first[0][0]


def pictures(canvas, kind: str) -> list[list]:
    """File name and size of each picture that a node shows."""
    return canvas.page.evaluate(
        """async kind => {
             const node = app.graph._nodes.find(n => n.type === kind), api = app.api ?? window.comfyAPI.api.api;
             const shown = (app.nodeOutputs[node.id] ?? {images: []}).images;
             return Promise.all(shown.map(async image => {
               const picture = new Image();
               picture.src = api.apiURL('/view?' + new URLSearchParams(image));
               await picture.decode();
               return [image.filename, [picture.naturalWidth, picture.naturalHeight]];
             }));
           }""",
        kind,
    )


def test_an_answer_is_shown(canvas):
    canvas.open_template("image-qa")
    canvas.set("LLaDAUniLoader", checkpoint=CHECKPOINT_NAME)
    canvas.set("LLaDAUniImageQA", max_new_tokens=32)
    canvas.run()
    canvas.shot("run-image-qa")
    shown = canvas.page.evaluate("app.nodeOutputs[app.graph._nodes.find(n => n.type === 'PreviewAny').id].text")
    assert shown
    assert all(isinstance(text, str) for text in shown)


def test_a_checkpoint_that_is_missing_is_said_in_words(canvas):
    canvas.open_template("text-to-image")
    canvas.set("LLaDAUniSample", **SMALL)
    canvas.press_run()
    canvas.page.get_by_text("LLaDA2.0-Uni").or_(canvas.page.get_by_text("not in list")).first.wait_for(timeout=60_000)
    canvas.page.wait_for_timeout(2500)
    canvas.shot("missing-checkpoint")
    words = canvas.page.locator("body").inner_text()
    assert "checkpoint" in words


@pytest.mark.parametrize("kind", ["LLaDAUniSample", "LLaDAUniDecode"])
def test_the_help_panel_shows_our_page(canvas, kind):
    canvas.open_template("text-to-image")
    canvas.select(kind)
    canvas.page.get_by_test_id("info-button").click()
    canvas.page.get_by_text("Common mistakes").first.wait_for(timeout=15_000)
    picture = canvas.page.locator(f"img[src*='{kind}.png']").first
    picture.wait_for(timeout=10_000)
    canvas.page.wait_for_timeout(1000)
    canvas.shot(f"help-{kind}")
    assert picture.evaluate("img => img.naturalWidth") == 800


def test_nodes_notes_and_help_are_in_chinese_where_the_front_end_is(canvas):
    _, chinese = LANGUAGES
    graph = json.loads((GRAPHS.parent / "text-to-image.json").read_text())
    load = "graph => app.loadGraphData(graph, true, true, null)"
    canvas.page.evaluate(LANGUAGE, "zh")
    try:
        canvas.page.reload()
        canvas.wait()
        canvas.page.evaluate(load, graph)
        canvas.page.wait_for_timeout(2000)
        titles = canvas.page.evaluate("Object.fromEntries(app.graph._nodes.map(n => [n.type, n.title]))")
        names = json.loads((GRAPHS.parent.parent / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
        for kind in ("LLaDAUniLoader", "LLaDAUniSample", "LLaDAUniDecode"):
            assert titles[kind] == names[kind]["display_name"]
        shown = canvas.page.evaluate(SAVED)
        texts = json.loads((GRAPHS.parents[1] / "web" / "templates.zh.json").read_text(encoding="utf-8"))
        assert words(shown) == [texts.get(text, text) for text in words(graph)]
        assert words(shown) != words(graph)
        canvas.select("LLaDAUniSample")
        canvas.page.get_by_test_id("info-button").click()
        canvas.page.get_by_text(chinese.mistakes).first.wait_for(timeout=15_000)
        canvas.page.wait_for_timeout(1000)
        canvas.shot("chinese")
    finally:
        canvas.page.evaluate(LANGUAGE, "en")
    canvas.page.reload()
    canvas.wait()
    canvas.page.evaluate(load, shown)
    canvas.page.wait_for_timeout(2000)
    assert words(canvas.page.evaluate(SAVED)) == words(graph)  # and back, whoever saved it


SAVED = "() => JSON.parse(JSON.stringify(app.graph.serialize()))"


def words(graph: dict) -> list[str]:
    """The paragraphs of a graph's note, and the titles of note and groups."""
    (note,) = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    titles = [group["title"] for group in graph["groups"]]
    return [*note["widgets_values"][0].split("\n\n"), note["title"], *titles]


def test_a_note_that_was_written_anew_stays(canvas):
    graph = json.loads((GRAPHS.parent / "text-to-image.json").read_text())
    (note,) = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    mine = "Mine.\n\nAnd mine too."
    note["widgets_values"], note["title"] = [mine], "What this does"
    canvas.page.evaluate(LANGUAGE, "zh")
    try:
        canvas.page.reload()
        canvas.wait()
        canvas.page.evaluate("graph => app.loadGraphData(graph, true, true, null)", graph)
        canvas.page.wait_for_timeout(1500)
        assert words(canvas.page.evaluate(SAVED)) == words(graph)
    finally:
        canvas.page.evaluate(LANGUAGE, "en")


KNOWN_SETTING = """([id, value]) => {
  const setting = app.extensionManager.setting;
  if (setting.get(id) !== undefined) return setting.set(id, value);
}"""
APART = """() => {
  const {scale, offset} = app.canvas.ds, at = app.canvas.canvas.getBoundingClientRect(), found = [];
  const map = document.querySelector("[data-testid='minimap-container']")?.getBoundingClientRect();
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const frames = app.graph._nodes.map(node => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
    if (drawn) return [node.title, drawn.getBoundingClientRect()];
    const [x, y] = [(node.pos[0] + offset[0]) * scale + at.left, (node.pos[1] - 30 + offset[1]) * scale + at.top];
    return [node.title, {left: x, top: y, right: x + node.size[0] * scale, bottom: y + (node.size[1] + 30) * scale}];
  });
  frames.forEach(([title, frame], index) => {
    if (map && meet(frame, map)) found.push(`the map lies over ${title}`);
    if (frame.bottom > innerHeight || frame.top < 40) found.push(`${title} is not all to be seen`);
    for (const [other, its] of frames.slice(0, index)) if (meet(frame, its)) found.push(`${title} meets ${other}`);
  });
  return found;
}"""


@pytest.fixture(params=[False, True], ids=["classic", "nodes-2.0"])
def look(canvas, comfyui, request):
    """Which of the front end's looks is on, "classic" or "newer", on a screen of 1600 x 1000."""
    if request.param and not (comfyui / "app" / "subgraph_manager.py").exists():
        pytest.skip("the newer look of this front end was unfinished")
    canvas.page.set_viewport_size({"width": 1600, "height": 1000})
    canvas.page.evaluate(KNOWN_SETTING, ["Comfy.VueNodes.Enabled", request.param])
    canvas.page.evaluate(KNOWN_SETTING, ["Comfy.RightSidePanel.IsOpen", False])  # other tests open it
    canvas.page.wait_for_timeout(500)
    canvas.page.reload()
    canvas.wait()
    yield "newer" if request.param else "classic"
    canvas.page.evaluate(KNOWN_SETTING, ["Comfy.VueNodes.Enabled", False])


def load(canvas, name: str) -> None:
    """Put a shipped workflow on the canvas."""
    graph = json.loads((GRAPHS.parent / f"{name}.json").read_text())
    canvas.page.evaluate("graph => app.loadGraphData(graph, true, true, null)", graph)
    canvas.page.wait_for_timeout(1500)


def test_nothing_lies_over_a_node_in_either_look(canvas, comfyui, look):
    for name in NAMES:
        if needs_zimage(json.loads((GRAPHS / f"{name}.json").read_text())) and not knows_zimage(comfyui):
            continue
        load(canvas, name)
        canvas.shot(f"{look}-{name}")
        assert canvas.page.evaluate(APART) == [], name


def test_nothing_lies_over_a_node_after_a_run(canvas, look):
    """Pictures and lines that nodes show have their room in the template; the server sends no live previews."""
    load(canvas, "miniature")
    canvas.run()
    canvas.page.wait_for_timeout(1000)
    canvas.shot(f"after-{look}")
    assert canvas.page.evaluate(APART) == []
    assert canvas.page.evaluate("app.canvas.ds.scale") > 0.572  # below it the classic canvas leaves text out


def test_a_blueprint_is_one_node_that_draws(canvas, comfyui):
    if not (comfyui / "app" / "subgraph_manager.py").exists():
        pytest.skip("this ComfyUI has no subgraphs of packs")
    blueprint = json.loads((GRAPHS.parents[1] / "subgraphs" / "Draw (LLaDA-Uni).json").read_text())
    canvas.page.evaluate("graph => app.loadGraphData(graph, true, true, null)", blueprint)
    canvas.page.wait_for_timeout(1500)
    small = {"checkpoint": CHECKPOINT_NAME, "prompt": "a fox", "width": 64, "height": 64, "thinking": False}
    shown = canvas.page.evaluate(
        """values => {
          const [node] = app.graph._nodes;
          const names = node.widgets.map(w => w.name);
          for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
          const show = LiteGraph.createNode('PreviewImage');
          app.graph.add(show);
          node.connect(0, show, 0);
          return names;
        }""",
        small,
    )
    assert set(small) <= set(shown)
    canvas.shot("blueprint")
    seen = canvas.run()
    assert any(kind == "executed" and data["output"].get("images") for kind, data in seen)


def test_app_mode_shows_the_form(canvas):
    canvas.open_template("text-to-image")
    app_mode = "app.extensionManager.command.execute('Comfy.ToggleLinear')"
    if not canvas.page.evaluate("app.extensionManager.command.commands.some(c => c.id === 'Comfy.ToggleLinear')"):
        pytest.skip("this front end has no app mode")
    canvas.page.evaluate(app_mode)
    try:
        for name in ("prompt", "width", "height", "seed"):
            canvas.page.get_by_text(name, exact=True).first.wait_for(timeout=15_000)
        canvas.shot("app-mode")
    finally:
        canvas.page.evaluate(app_mode)
