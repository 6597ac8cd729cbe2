"""A headless Chromium on a real ComfyUI. Skipped, by name, where either is missing.

Screenshots go to the folder named by LLADA_SCREENSHOTS, else to pytest's temporary one.
"""

import os
import shutil
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
READY = "window.app && window.app.graph && window.app.extensionManager"
LISTEN = """() => {
  window.seen = []; window.titles = new Set();
  const api = app.api ?? window.comfyAPI.api.api;
  const plain = d => d instanceof Blob ? d.size : d;
  for (const kind of ['executing', 'progress', 'executed', 'b_preview', 'execution_success', 'execution_error',
                      'execution_interrupted'])
    api.addEventListener(kind, e => window.seen.push([kind, plain(e.detail)]));
  new MutationObserver(() => window.titles.add(document.title)).observe(document.querySelector('title'),
    {childList: true, subtree: true, characterData: true});
}"""
ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Canvas:
    """The page of a ComfyUI, with what a person does on it.

    Args:
        page: Playwright's page, opened on the server.
        pack: the folder name of this pack on the server.
        shots: folder for screenshots.
    """

    def __init__(self, page, pack: str, shots: Path):
        self.page, self.pack, self.shots = page, pack, shots
        self.wait()

    def wait(self) -> None:
        """Until the page can be used."""
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.wait_for_timeout(3000)  # the first start opens the template browser late
        self.page.keyboard.press("Escape")
        self.page.evaluate(LISTEN)

    def shot(self, name: str) -> None:
        """Keep what is to be seen now."""
        self.page.screenshot(path=self.shots / f"{name}.png")

    def open_templates(self):
        """Show this pack's templates; returns the cards."""
        self.page.get_by_text("Templates", exact=True).first.click()
        ours = self.page.get_by_test_id("template-workflow-text-to-image")
        for _ in range(10):  # the list may be drawn anew while it loads, and forget the click
            self.page.get_by_text(self.pack, exact=True).last.click()
            self.page.wait_for_timeout(1500)
            if ours.count():
                break
        return self.page.locator("[data-testid^='template-workflow-']")

    def open_template(self, name: str) -> None:
        """Open one of this pack's templates as a person does."""
        self.open_templates()
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        opened = "app.graph._nodes.some(n => n.type === 'LLaDAUniLoader') && !document.querySelector('[role=dialog]')"
        self.page.wait_for_function(opened, timeout=20_000)
        self.page.wait_for_timeout(1500)

    def set(self, kind: str, **values) -> None:
        """Set widgets of every node of a class."""
        self.page.evaluate(
            """([kind, values]) => { for (const node of app.graph._nodes) if (node.type === kind)
                 for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name]; }""",
            [kind, values],
        )

    def press_run(self) -> None:
        """Click Run."""
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def run(self) -> list[tuple]:
        """Click Run and wait for its success; returns what the server said, as (kind, data)."""
        self.page.evaluate("window.seen = []")
        self.press_run()
        self.page.wait_for_function(f"window.seen.some(s => {list(ENDS)}.includes(s[0]))", timeout=300_000)
        self.page.wait_for_timeout(1500)
        seen = [tuple(entry) for entry in self.page.evaluate("window.seen")]
        assert "execution_success" in dict(seen), seen[-3:]
        return seen

    def select(self, kind: str) -> None:
        """Select a node of a class, in the middle of the screen: its tools would else lie under the bar at the top."""
        self.page.evaluate(
            """kind => { const node = app.graph._nodes.find(n => n.type === kind);
                 app.canvas.centerOnNode(node); app.canvas.selectNode(node); app.canvas.setDirty(true, true); }""",
            kind,
        )

    def classes(self, seen: list[tuple]) -> list[str]:
        """The classes of the nodes that ran, in order."""
        kinds = self.page.evaluate("Object.fromEntries(app.graph._nodes.map(n => [n.id, n.type]))")
        names = []
        for kind, data in seen:
            if kind == "executing" and data:
                names.append(kinds[str(data["node"] if isinstance(data, dict) else data)])
        return list(dict.fromkeys(names))


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program; skips where there is none."""
    named = os.environ.get("CHROMIUM_PATH")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium: install Debian's chromium, or set CHROMIUM_PATH")
    return found


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory) -> Path:
    """Where screenshots go."""
    named = os.environ.get("LLADA_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")  # no longer: Playwright keeps an event loop running in this thread
def browser(chromium, comfyui, tmp_path_factory):
    """A running headless browser with an empty profile."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=chromium,
            headless=True,
            args=FLAGS.split(),
            viewport={"width": 1700, "height": 950},
        )
        yield context
        context.close()


@pytest.fixture
def canvas(browser, comfy_server, screenshots):
    """A fresh page on the server."""
    from dev.hosts.server import PACK

    page = browser.new_page()
    page.goto(comfy_server.url)
    yield Canvas(page, PACK, screenshots)
    page.close()
