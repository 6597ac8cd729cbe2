"""Memory management inside a real ComfyUI's modules: loading whole and in part, unloading, letting go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dev.hosts.server import find_python

HAS_GPU = "import torch; raise SystemExit(not torch.cuda.is_available())"


@pytest.fixture(scope="module", params=["--cpu", ""], ids=["stand-in card", "GPU"])
def report(request, comfyui, golden_checkpoint) -> dict:
    """What partial_load.py found, where a stand-in computes and where a GPU does, if there is one."""
    if not request.param and subprocess.run([find_python(comfyui), "-c", HAS_GPU], check=False).returncode:
        pytest.skip("no GPU here")
    launch = Path(__file__).parents[2] / "dev" / "hosts" / "launch.py"
    script = Path(__file__).with_name("partial_load.py")
    command = [
        find_python(comfyui),
        str(launch),
        str(script),
        str(comfyui),
        str(golden_checkpoint),
        *request.param.split(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr[-500:], file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_away_is_on_another_device(report):
    assert len(report["devices"]) == 2
    assert "cpu" in report["devices"]


def test_every_component_is_a_model_of_the_host(report):
    assert report["parts"] == ["backbone", "decoder", "decoder-turbo", "image_tokenizer", "sigvq", "vae"]
    assert report["loaded"] == 6


def test_a_batch_is_as_large_as_fits_beside_the_weights(report):
    assert report["fits beside the weights"] == [True, False]


def test_where_the_weights_do_not_fit_a_batch_may_have_half_of_the_card(report):
    assert report["fits where they do not"] == [True, False]


def test_what_is_kept_of_earlier_work_goes_before_any_weights(report):
    assert report["let go of"] == [[], ["graphs"]]


def test_unloading_releases_them(report):
    assert report["loaded after unloading"] == 0


def test_what_leaves_the_card_takes_its_copy_in_main_memory_again(report):
    assert report["moved to the card"]
    assert report["back in the same memory"]


def test_a_small_card_keeps_the_large_layers_of_every_component_away(report):
    assert all(count > 0 for count in report["away"].values()), report["away"]
    assert report["away that cannot be brought"] == 0


def test_the_engine_is_told_whether_weights_stay_on_the_device(report):
    assert report["there when whole"] == [True] * 6
    assert report["said to be there"] == report["only a table away"]
    assert set(report["only a table away"]) <= {"sigvq"}
    assert ["not all of the backbone stays on the device" in text for text in report["said in part"]] == [True]


def test_results_in_part_equal_results_whole(report):
    assert report["equal"] == [True, True, True, True]


def test_quantized_layers_in_part_are_the_same(report):
    assert report["quantized banks away"] > 0
    assert report["equal in 4 bits"] == [True, True, True, True]
    assert report["4 bits are not all"]


def test_of_an_embedding_that_is_away_only_the_rows_used_are_brought(report):
    if "lazy:0" not in report["devices"]:
        pytest.skip("a GPU does not count what arrives")
    assert report["embedding rows shipped"] == 3


def test_rounds_can_be_graphs_where_only_embeddings_are_away(report):
    assert report["resident but for embeddings"]
    assert not report["resident with patched embeddings"]


def test_a_dropped_model_leaves_nothing_behind(report):
    assert report["alive after the model is dropped"] == 0
