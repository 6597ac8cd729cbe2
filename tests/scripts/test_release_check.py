"""make release-check: nothing is missing but what only the publisher knows, and what is missing is found."""

import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

pytest.importorskip("tomllib", reason="reads pyproject.toml with Python 3.11 or newer")

from dev import release_check as check

pytestmark = pytest.mark.skipif(not (check.ROOT / ".git").exists(), reason="not a git repository")


def git(folder: Path, *arguments: str) -> None:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


def test_only_the_publisher_is_missing():
    found = [line for line in check.complaints(check.ROOT) if "neither tracked nor ignored" not in line]
    assert all("PublisherId" in line or check.PLACEHOLDER in line for line in found), found


def test_users_get_the_product_and_not_the_workshop():
    published = check.published_files(check.ROOT)
    assert {name.split("/")[0] for name in published} & {"dev", "Makefile", ".ci"} == set()
    assert [name for name in published if name.startswith("tests/")] == ["tests/core/oracle.py"]
    wanted = "nodes/load.py llada_core/engine.py web/docs/LLaDAUniSample.md locales/zh/nodeDefs.json README.md"
    wanted += " workflows/text-to-image.json checkpoints/miniature/model.safetensors scripts/queue_graph.py"
    assert set(wanted.split()) <= set(published)


def test_the_icon_is_as_drawn():
    from dev.build.build_icon import OUT, icon

    difference = ImageChops.difference(Image.open(OUT).convert("RGB"), icon())
    assert max(ImageStat.Stat(difference).mean) < 2, "run `python -m dev.build.build_icon`"


def test_versions_are_compared():
    assert check.wrong_version("1.2.0", "# Changelog\n\n## 1.2.0\n\n## 1.1.0\n") == []
    assert check.wrong_version("1.2.0", "# Changelog\n\n## Unreleased\n\n## 1.2.0\n") == []
    assert "1.1.0" in check.wrong_version("1.2.0", "# Changelog\n\n## 1.1.0\n")[0]
    assert check.wrong_version("1.2.0", "# Changelog\n") == ["CHANGELOG.md: no version"]


@pytest.fixture
def pack(tmp_path) -> Path:
    """A small pack in a git repository of its own, ready to be published."""
    files = {
        "__init__.py": "from .engine import core\n",
        "engine/core.py": "import engine\n",
        "engine/__init__.py": "",
        "workshop/__init__.py": "",
        "workshop/tool.py": "",
        "requirements.txt": "einops\n",
        ".comfyignore": "/workshop/\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def test_files_that_are_ignored_or_untracked_are_not_published(pack):
    (pack / "new.py").write_text("")
    assert "engine/core.py" in check.published_files(pack)
    assert not {"workshop/tool.py", "new.py"} & set(check.published_files(pack))
    assert check.git_files(pack, "--others", "--exclude-standard") == ["new.py"]


@pytest.mark.parametrize("line", ["import workshop.tool", "from workshop import tool", "from workshop.tool import x"])
def test_an_import_of_what_is_not_published_is_found(pack, line):
    assert check.imports_of_what_stays(pack, check.published_files(pack)) == []
    (pack / "engine" / "core.py").write_text(f"{line}\n")
    (found,) = check.imports_of_what_stays(pack, check.published_files(pack))
    assert found.startswith("engine/core.py: imports workshop")


def test_a_published_program_that_cannot_run_is_found(pack):
    (pack / "benchmarks").mkdir()
    for name, text in (("__init__", ""), ("right", ""), ("wrong", "import no_such_module\n")):
        (pack / "benchmarks" / f"{name}.py").write_text(text)
    files = [f"benchmarks/{name}.py" for name in ("right", "wrong")]
    (found,) = check.wrong_programs(pack, files)
    assert found.startswith("benchmarks.wrong: cannot be run as published (ModuleNotFoundError")


def test_what_the_registry_needs_is_asked_for(pack):
    icon = f"https://example.org/{check.ICON}"
    comfy = {"PublisherId": "us", "Icon": icon, "requires-comfyui": ">=0.3.64"}
    project = {"version": "1.0.0", "urls": {"Repository": "https://example.org/us/pack"}}
    project["classifiers"] = ["Operating System :: OS Independent"]
    right = {"project": project, "tool": {"comfy": comfy}}
    assert check.wrong_in_pyproject(right, pack) == []
    for key in comfy:
        wrong = right | {"tool": {"comfy": {k: v for k, v in comfy.items() if k != key}}}
        assert any(key in line for line in check.wrong_in_pyproject(wrong, pack)), key
    for key, value in (("version", "1.0"), ("urls", {"Repository": "https://x.org/OWNER/pack"}), ("classifiers", [])):
        assert check.wrong_in_pyproject(right | {"project": project | {key: value}}, pack), key
    (pack / "requirements.txt").write_text("torch>=2\n")
    assert "torch" in check.wrong_in_pyproject(right, pack)[0]


def test_a_large_icon_is_found(pack):
    assert "no such file" in check.wrong_icon(pack)[0]
    (pack / "docs").mkdir()
    Image.new("RGB", (801, 10)).save(pack / check.ICON)
    assert "801x10" in check.wrong_icon(pack)[0]
