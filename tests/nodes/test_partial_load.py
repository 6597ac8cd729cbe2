"""Memory management inside a real ComfyUI's modules: loading whole and in part, unloading, letting go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dev.hosts.server import find_python


@pytest.fixture(scope="module")
def report(comfyui, golden_checkpoint) -> dict:
    """What partial_load.py found."""
    launch = Path(__file__).parents[2] / "dev" / "hosts" / "launch.py"
    script = Path(__file__).with_name("partial_load.py")
    command = [find_python(comfyui), str(launch), str(script), str(comfyui), str(golden_checkpoint), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr[-500:], file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_component_is_a_model_of_the_host(report):
    assert report["parts"] == ["backbone", "decoder", "decoder-turbo", "image_tokenizer", "sigvq", "vae"]
    assert report["loaded"] == 6


def test_unloading_releases_them(report):
    assert report["loaded after unloading"] == 0


def test_a_small_card_keeps_the_large_layers_of_every_component_away(report):
    assert all(count > 0 for count in report["away"].values()), report["away"]
    assert report["away that cannot be brought"] == 0


def test_the_engine_is_told_whether_weights_stay_on_the_device(report):
    assert report["there when whole"] == [True] * 6
    assert report["there in part"] == [False] * 6
    assert ["not all of the backbone stays on the device" in text for text in report["said in part"]] == [True]


def test_results_in_part_equal_results_whole(report):
    assert report["equal"] == [True, True, True, True]


def test_a_dropped_model_leaves_nothing_behind(report):
    assert report["alive after the model is dropped"] == 0
