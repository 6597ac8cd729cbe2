"""The documents are true of the repository: headings that code cites, links, files, modules and make targets exist."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "docs" / "model.md"
SKIPPED = {".git", ".venv", ".carry", ".hypothesis", "output"}

CITATION = re.compile(r"docs/model\.md(?:,\s+(?P<headings>[^)]{0,200}))?")
BETWEEN = re.compile(r"(?:,\s+and|,|\s+and)\s+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*\.(?:py|md|json|toml|txt|png|svg|jpg|yaml)")
FOLDER = re.compile(r"[\w.-]+(?:/[\w.-]+)*/")
MODULE = re.compile(r"python3? -m ([\w.]+)")
TARGET = re.compile(r"`?make ([a-z][a-z-]*)`|^make ([a-z][a-z-]*)$", re.MULTILINE)
ELSEWHERE = ("models/", "ComfyUI/", "custom_nodes/", "sglang_omni/", "/")  # of a host, or of somebody else
NOT_KEPT = {"extra_model_paths.yaml", "output/"}  # of a host, or written by a program
CHECKPOINT = ROOT / "tests" / "goldens" / "alpha" / "checkpoint"
BASES = (ROOT, ROOT / "llada_core", ROOT / "dev", ROOT / "tests" / "core", CHECKPOINT, CHECKPOINT / "image_tokenizer")


def files(suffix: str) -> list[Path]:
    """The repository's own files of a kind."""
    tops = [path for path in ROOT.iterdir() if path.name not in SKIPPED]
    found = (path for top in tops for path in ([top] if top.is_file() else top.rglob(f"*{suffix}")))
    return sorted(path for path in found if path.suffix == suffix and "goldens" not in path.parts)


DOCUMENTS = [path for path in files(".md") if "web" not in path.relative_to(ROOT).parts]


def headings(text: str) -> list[str]:
    """The headings of a page, without those that only look like one in a fenced block."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE)


def wrong_citations(text: str, known: Iterable[str]) -> list[str]:
    """Citations of docs/model.md whose first words are no heading of it, and any that is left of the old document."""
    ordered = sorted(known, key=len, reverse=True)  # "Tokens and prompts" before "Tokens"
    found = []
    for match in CITATION.finditer(text):
        rest = re.sub(r"\s+", " ", match["headings"] or "")
        first = True
        while rest:
            heading = next((h for h in ordered if re.match(rf"{re.escape(h)}(?!\w)", rest)), None)
            if heading is None:
                if first:
                    found.append(match[0].strip())
                break
            between = BETWEEN.match(rest, len(heading))
            # What follows a comma may go on with the sentence; what follows "and" after headings is one more.
            rest, first = (rest[between.end() :], "and" in between[0]) if between else ("", False)
    return found + re.findall(r"contract sections?[ \d]*", text, flags=re.IGNORECASE)


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def wrong_links(page: Path, text: str) -> list[str]:
    """Relative links whose file or heading is not there."""
    found = []
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, wanted = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (wanted and wanted not in map(anchor, headings(target.read_text(encoding="utf-8")))):
            found.append(link)
    return found


def wrong_paths(text: str, bases: Iterable[Path] = BASES) -> list[str]:
    """Files and folders named in `code` that are nowhere."""
    found = []
    for code in CODE.findall(text):
        for word in code.split():
            if not (FILE.fullmatch(word) or FOLDER.fullmatch(word)) or word.startswith(ELSEWHERE) or word in NOT_KEPT:
                continue
            if not any(next(base.glob(word.rstrip("/")), None) for base in bases):
                found.append(word)
    return found


def wrong_modules(text: str) -> list[str]:
    """`python -m` of modules that are nowhere."""
    ours = [name for name in MODULE.findall(text) if (ROOT / name.split(".")[0]).is_dir()]
    paths = {name: ROOT.joinpath(*name.split(".")) for name in ours}
    return [name for name, path in paths.items() if not path.with_suffix(".py").is_file() and not path.is_dir()]


def wrong_map(text: str) -> list[str]:
    """Entries of a page's first fenced block, a tree by indentation, that are nowhere."""
    block = re.search(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[1]
    found, above = [], {}
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        above = {depth: path for depth, path in above.items() if depth < indent}
        base = above[max(above)] if above else ROOT
        for name in re.match(r"(?:\S+(?:  (?=\S+/))?)+", line.strip())[0].split():
            if not (base / name).exists():
                found.append(f"{base.relative_to(ROOT) / name}")
            above[indent] = base / name
    return found


def test_citations_name_headings_that_exist():
    known = headings(MODEL.read_text(encoding="utf-8"))
    found = {path: wrong_citations(path.read_text(encoding="utf-8"), known) for path in files(".py")}
    wrong = {path.relative_to(ROOT).as_posix(): cited for path, cited in found.items() if cited}
    assert not wrong or set(wrong) == {"tests/core/test_docs.py"}, wrong  # this file has wrong ones to try itself on


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_documents_name_exists(path):
    text = path.read_text(encoding="utf-8")
    assert not wrong_links(path, text)
    assert not wrong_paths(text, (path.parent, *BASES))
    assert not wrong_modules(text)
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert not [name for pair in TARGET.findall(text) for name in pair if name and name not in targets]
    assert not re.findall(r"contract section", text, flags=re.IGNORECASE)


def test_the_map_of_contributing_is_the_tree():
    assert not wrong_map((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_the_model_page_has_the_headings_that_code_cites():
    expected = "Parts, Files, Backbone, Tokens and prompts, Image preprocessing, Block diffusion, Guidance"
    expected += ", Interleaved generation, SPRINT, Decoding"
    assert set(expected.split(", ")) < set(headings(MODEL.read_text(encoding="utf-8")))


def test_mistakes_are_found():
    known = ["Guidance", "Tokens and prompts", "Decoding"]
    right = (
        "docs/model.md, Guidance.",
        "(docs/model.md, Tokens and\n    prompts and Decoding)",
        "(docs/model.md, Guidance, Decoding, and Tokens and prompts)",
        "docs/model.md",
        "docs/model.md, Decoding, says so.",
    )
    assert [wrong_citations(text, known) for text in right] == [[]] * len(right)
    for text in ("docs/model.md, Guide", "(docs/model.md, Guidance and Nothing)", "see contract section 3"):
        assert wrong_citations(text, known), text
    page = ROOT / "README.md"
    assert wrong_links(page, "[a](CONTRIBUTING.md) [b](nowhere.md)") == ["nowhere.md"]
    assert wrong_links(page, "[a](docs/model.md#guidance) [b](docs/model.md#none)") == ["docs/model.md#none"]
    assert wrong_paths("`README.md` `nowhere/x.py` `nowhere/` `models/llada_uni/`") == ["nowhere/x.py", "nowhere/"]
    assert wrong_modules("python -m benchmarks.quality\npython -m benchmarks.nothing") == ["benchmarks.nothing"]
    tree = "```\nllada_core/\n  engine.py   x\n  nothing.py\ndocs/  nowhere/   y\n```\n"
    assert wrong_map(tree) == ["llada_core/nothing.py", "nowhere"]
