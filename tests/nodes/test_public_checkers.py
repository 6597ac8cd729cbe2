"""What the ecosystem's own checkers say of the pack: comfy-lint of its graphs, comfy-import-guard of its imports.

comfy-test wants a machine of its own to install ComfyUI on; what it checks without one is in tests/core/test_source.py
and, of the nodes' registration, here.
"""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dev.build.schemas import CORE_FILE, LOCAL_CHOICES, ROOT
from dev.hosts.base_folder import GRAPHS
from dev.hosts.server import knows_zimage, needs_zimage

# What the oldest host lacks and the pack uses where it is; the checker does not see how that is asked. The tests on a
# real 0.3.64 show that nothing is used there.
NEWER = {
    "comfy.model_patcher.CoreModelPatcher",  # getattr with another in its place
    "comfy.model_management.pin_memory",  # of DynamicVRAM, which dynamic_vram.pages_weights asks for
    "comfy.model_management.unpin_memory",
    "comfy.ops.cast_modules_with_vbar",
    "comfy.ops.resolve_cast_module_with_vbar",
    "comfy.ops.uncast_bias_weight",
    "comfy.utils.load_safetensors",
}

lint = pytest.importorskip("comfy_lint.linter")
pytest.importorskip("comfy_import_guard")


def object_info(host) -> dict:
    """What /object_info says of the pack's nodes, here, and of core nodes, as frozen."""
    from comfy_lint.schema import normalize

    ours = {}
    kinds = [host.node_class(node_id) for node_id in host.node_ids]
    package = kinds[0].__module__.rpartition(".")[0]
    # The nodes of the decoder as the host's own model, which are not offered here.
    for kind in [*kinds, *importlib.import_module(f"{package}.native_decoder").NODES]:
        schema = kind.GET_SCHEMA()
        outputs = [output.get_io_type() for output in schema.outputs]
        ours[schema.node_id] = {"input": json.loads(json.dumps(kind.INPUT_TYPES(), default=list)), "output": outputs}
    return normalize(json.loads(CORE_FILE.read_text()) | ours)


def found_by_lint(graph: dict, schema) -> list[str]:
    """comfy-lint's complaints, but for choices that depend on the files of a machine."""
    found = lint.lint_workflow(graph, schema)
    return [str(d.to_dict()) for d in found if (d.class_type, d.field) not in LOCAL_CHOICES]


def test_comfy_lint_of_the_shipped_graphs(in_process_host):
    schema = object_info(in_process_host)
    for path in sorted(GRAPHS.glob("*.json")):
        assert found_by_lint(json.loads(path.read_text()), schema) == [], path.name


def test_comfy_lint_finds_faults(in_process_host):
    schema = object_info(in_process_host)
    graph = json.loads((GRAPHS / "text-to-image.json").read_text())
    sample = next(node for node in graph.values() if node["class_type"] == "LLaDAUniSample")
    sample["inputs"]["cfg"] = 2.0
    del sample["inputs"]["prompt"]
    (loader,) = (node for node in graph.values() if node["class_type"] == "LLaDAUniLoader")
    loader["inputs"]["precision"] = "int3"
    found = " ".join(found_by_lint(graph, schema))
    assert all(rule in found for rule in ("extraneous-input", "missing-required", "invalid-enum"))


def test_comfy_lint_against_a_real_host(comfyui, comfy_server):
    from comfy_lint.schema import normalize

    schema = normalize(comfy_server.get("/object_info"))
    for path in sorted(GRAPHS.glob("*.json")):
        graph = json.loads(path.read_text())
        if knows_zimage(comfyui) or not needs_zimage(graph):
            assert found_by_lint(graph, schema) == [], path.name


@pytest.fixture(scope="module")
def guard(comfyui, tmp_path_factory) -> Callable[[Path], subprocess.CompletedProcess]:
    """guard(pack) -> comfy-import-guard's finished run over a pack, against the ComfyUI at hand and nothing else.

    It reads a host from a git repository, which it would clone; here one is made of the host's own sources.
    """
    if shutil.which("git") is None:
        pytest.skip("comfy-import-guard reads the host through git")
    base = tmp_path_factory.mktemp("guard")
    clone = base / "cache" / "ComfyUI"
    for path in comfyui.rglob("*.py"):
        name = path.relative_to(comfyui)
        if not {"custom_nodes", "tests", "venv", ".venv", "site-packages"} & set(name.parts):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, clone / name)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "host"]):
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
        subprocess.run([*git, *command], cwd=clone, check=True, capture_output=True)

    def run(pack: Path) -> subprocess.CompletedProcess:
        install = base / pack.name
        shutil.copytree(pack, install / "custom_nodes" / "pack", ignore=shutil.ignore_patterns("__pycache__"))
        options = ["--json", "--offline", "--cache-dir", str(base / "cache"), "check", "--comfy-dir", str(install)]
        options += ["--target", "HEAD", "--no-update", "--strict"]
        command = [sys.executable, "-m", "comfy_import_guard.cli", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def missing(done: subprocess.CompletedProcess) -> dict[str, str]:
    """Name -> file, of everything that comfy-import-guard says this host lacks or calls otherwise."""
    (pack,) = json.loads(done.stdout)["packs"]
    assert not pack["unparseable"], done.stderr
    return {found["dotted"]: found["file"] for found in pack["breaking"]}


def test_comfy_import_guard_finds_nothing_that_this_host_lacks(guard, comfyui, tmp_path):
    pack = tmp_path / "pack"
    for name in ("nodes", "llada_core"):
        shutil.copytree(ROOT / name, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "__init__.py", pack / "__init__.py")
    if "class ZImage" not in (comfyui / "comfy" / "supported_models.py").read_text(encoding="utf-8"):
        for path in (pack / "nodes" / "host" / "zimage").glob("[!_]*.py"):
            path.unlink()  # never imported on such a host
    found = missing(guard(pack))
    assert {name for name in found if name not in NEWER} == set(), found


def test_what_only_newer_hosts_have_is_still_used():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").rglob("*.py"))
    assert [name for name in NEWER if name.rpartition(".")[2] not in source] == []


def test_comfy_import_guard_finds_faults(guard, tmp_path):
    pack = tmp_path / "faulty"
    pack.mkdir()
    (pack / "__init__.py").write_text("from comfy.model_management import no_such_thing\n")
    assert missing(guard(pack)) == {"comfy.model_management.no_such_thing": "__init__.py"}


def test_every_node_registers_and_can_be_made(in_process_host):
    kinds = [in_process_host.node_class(node_id) for node_id in in_process_host.node_ids]
    schemas = [kind.GET_SCHEMA() for kind in kinds]
    assert all(isinstance(kind(), kind) for kind in kinds)
    assert [schema.node_id for schema in schemas] == in_process_host.node_ids
    for names in ([schema.node_id for schema in schemas], [schema.display_name for schema in schemas]):
        assert all(names)
        assert len(set(names)) == len(names)
    assert all(schema.description and schema.category == "LLaDA-Uni" for schema in schemas)


def test_every_default_is_one_that_the_host_accepts(in_process_host):
    for node_id in in_process_host.node_ids:
        inputs = in_process_host.node_class(node_id).INPUT_TYPES()
        for name, (kind, *rest) in {**inputs["required"], **inputs.get("optional", {})}.items():
            options = rest[0] if rest else {}
            default = options.get("default")
            if default is None:
                continue
            choices = kind if isinstance(kind, list) else options.get("options")
            assert choices is None or default in choices, (node_id, name)
            assert options.get("min", default) <= default <= options.get("max", default), (node_id, name)
