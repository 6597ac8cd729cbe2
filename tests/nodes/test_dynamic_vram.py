"""The parts under DynamicVRAM: a GPU of NVIDIA's and a ComfyUI with comfy-aimdo; skipped, by name, without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dev.hosts.server import find_python

NEEDED = "import torch, comfy_aimdo; raise SystemExit(not (torch.cuda.is_available() and torch.version.cuda))"


@pytest.fixture(scope="module")
def report(comfyui, golden_checkpoint) -> dict:
    """What dynamic_vram.py found."""
    if subprocess.run([find_python(comfyui), "-c", NEEDED], check=False, capture_output=True).returncode:
        pytest.skip("no GPU, or a ComfyUI without DynamicVRAM")
    script = Path(__file__).with_name("dynamic_vram.py")
    command = [find_python(comfyui), str(script), str(comfyui), str(golden_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr[-500:], file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_part_is_the_hosts_own_kind_of_model(report):
    assert report["dynamic"] == [True] * 5


def test_results_are_those_of_one_device(report):
    assert report["as on one device"] == report["again"] == report["after unloading"] == [True] * 3


def test_quantized_layers_give_the_results_of_one_device(report):
    assert report["4 bits as on one device"] == [True] * 3


def test_nothing_moves_where_everything_fits(report):
    assert report["brought again"] == 0
    assert all(report["resident"].values())
    assert not any(report["moves while placed twice"])


def test_rounds_are_graphs_where_every_weight_is_held(report):
    assert report["graphs"] > 0
    assert report["graphs in part"] == 0


def test_pins_are_given_back(report):
    assert report["held while it works"]
    assert report["held once another is placed"] == 0
    assert report["pinned after the nodes"] == report["pinned in part"] == 0
    assert report["in the host's queues after the nodes"] == 0
    assert report["pinned memory after the model is dropped"] == 0


def test_another_model_is_not_thrown_out(report):
    assert report["another model stays loaded"]


def test_results_in_part_are_the_same(report):
    assert report["in part"] == [True] * 3
    assert report["not resident in part"]
