"""The attention that a ComfyUI was started with serves the decoder too."""

import json
import subprocess
from pathlib import Path

import pytest

from dev.hosts.server import find_python


@pytest.fixture(scope="module")
def report(comfyui) -> dict:
    """What hosts_attention.py found."""
    launch = Path(__file__).parents[2] / "dev" / "hosts" / "launch.py"
    script = Path(__file__).with_name("hosts_attention.py")
    command = [find_python(comfyui), str(launch), str(script), str(comfyui), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_torchs_attention_stays_where_the_host_has_nothing_else(report):
    assert report["torch's is left alone"]
    assert report["a CPU keeps torch's"]


def test_every_other_attention_is_used_and_gives_the_same(report):
    assert set(report["calls"].values()) == {4}  # a block of each refiner and two layers
    assert all(distance < 1e-5 for distance in report["distance"].values()), report["distance"]
