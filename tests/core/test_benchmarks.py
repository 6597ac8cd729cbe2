"""The benchmark programs run: small sizes, their checks included. The figures themselves are for people to read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """run(program, *options) -> the figures that it wrote."""

    def run(program: str, *options: str) -> dict:
        file = tmp_path / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{program}", *options, "--json", str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        figures = json.loads(file.read_text())["figures"]
        assert all(name in done.stdout for name in figures), "the table shows every figure"
        return figures

    return run


def test_backbone(run):
    figures = run("backbone", "--tokens", "40")
    assert figures["equal tokens"] == "40 of 40"
    # A prompt of 103 ends in block 3, so 40 tokens reach into block 4: 8 rounds at most in each.
    assert 2 <= figures["rounds"] <= 16
    sampled = run("backbone", "--tokens", "40", "--sample", "2")
    assert sampled["rounds"] == figures["rounds"], "what is recomputed does not change what is drawn"
    assert (sampled["equal tokens"], sampled["recomputing measured on"]) == ("not compared", "2 blocks")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("files", ["fp8", "4-bit"])
def test_loading(files, run):
    figures = run("loading", "--gigabytes", "0.1", "--files", files)
    assert figures["within the bound"] == "yes"
    assert figures["peak, MB"] >= figures["weights in memory, MB"], "the peak was measured while weights were loaded"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_in_fewer_bits_and_converting(run):
    dense = run("loading", "--gigabytes", "0.05")
    quantized = run("loading", "--gigabytes", "0.05", "--weights", "8-bit")
    assert quantized["weights in memory, MB"] < 0.7 * dense["weights in memory, MB"]
    converted = run("loading", "--gigabytes", "0.05", "--convert", "int8")
    assert converted["GB of the source a second"] > 0


def test_full_size_program_on_small_sizes(run):
    figures = run("fullsize", "--tiny", "--normal")
    assert figures["picture"] == "64 x 64"
    assert figures["drawing tokens, rounds"] >= 1
    assert figures["normal decoder, 50 steps, s"] > 0


def test_batches(run):
    figures = run("batches", "--tiny", "--pictures", "1", "3", "--questions", "2")
    assert figures["3 pictures, equal to alone"] == "yes"
    assert figures["3 pictures, times as long as one"] > 0
    assert figures["2 questions of other lengths, times as fast at once"] > 0
    seconds = ("prepared, s", "prefix and first round, s", "rounds after it, s", "the end, s")
    for name in ("2 questions of other lengths at once", "2 questions of other lengths one after the other"):
        assert sum(figures[f"{name}: {phase}"] for phase in seconds) == pytest.approx(figures[f"{name}, s"], rel=0.05)
        eager, *graphs = figures[f"{name}: rounds kernel by kernel, warm-ups, captures, replays"].split()
        assert 8 <= int(eager) <= 64
        assert graphs == ["0", "0", "0"]


def test_rounds(run, tmp_path):
    figures = run("rounds", "--tiny", "--weights", "as stored", "4-bit", "--kernels", str(tmp_path / "kernels.txt"))
    for weights in ("as stored", "4-bit"):
        assert figures[f"{weights}: 64 tokens, s"] > 0
        assert figures[f"{weights}: a graph of 32 positions x 2, ms"] > 0
        assert figures[f"{weights}: kernels"] > 0
    assert "4-bit: a layer, us" in (tmp_path / "kernels.txt").read_text()


def test_batches_of_quantized_weights(run):
    figures = run("batches", "--tiny", "--pictures", "1", "--questions", "1", "--weights", "4-bit")
    assert figures["a round of one, ms"] > 0


def test_decoder(run):
    figures = run("decoder", "--tiny", "--normal")
    assert figures["difference from the official, relative"] < 1e-5
    assert figures["times as fast as the official"] > 0
    for name in ("official", "ours"):
        parts = {key for key in figures if key.startswith(f"{name}: ")}
        assert {f"{name}: products, ms", f"{name}: attention, ms", f"{name}: activation, ms"} < parts
    for form, near in (("int8", 0.1), ("fp8_block", 0.3)):
        assert figures[f"{form}: activations"] == "dequantized weights"
        assert 0 < figures[f"{form}: velocity from the dense one, relative"] < near


def test_quantization_error(run):
    """More bits, a smaller error; and the search for clippings pays in every column."""
    figures = run("quantization_error", "--rows", "8")
    lines = {name: [float(value) for value in line.split()] for name, line in figures.items() if name}
    by_bits = sorted(lines.values())
    assert by_bits[-1][1] < by_bits[0][1]
    for name, line in lines.items():
        if "search True" in name:
            other = lines[name.replace("search True", "search False")]
            assert all(found < plain for found, plain in zip(line[1:], other[1:], strict=True))


def test_quantization_effect(run):
    """On the miniature's own predictions: 8 bits move them less than 4, whatever layers have them."""
    figures = run("quantization_effect", str(ROOT / "checkpoints" / "miniature"), "--pictures", "1")
    assert figures.pop("masked positions") == 64
    of_all = {name: float(line.split()[0]) for name, line in figures.items() if name.startswith("all that is")}
    assert len(of_all) == 5
    int8 = of_all.pop("all that is quantized, int8")
    assert 0 < int8 < of_all["all that is quantized, int4, group_size 64, symmetric True"]


def test_decoder_pictures(run):
    figures = run("decoder_pictures", str(ROOT / "checkpoints" / "miniature"), "--count", "1", "--normal", "0")
    assert figures["decoder-turbo, float32: right, %"] == 100
    near = {form: float(figures[f"decoder-turbo, {form}: distance"]) for form in ("bfloat16", "int8 weights")}
    assert 0 < near["bfloat16"] < near["int8 weights"] < 0.02


def test_offline_shows_where_workers_would_go():
    """The program itself starts Ray; tests/batch/test_on_ray.py does as much."""
    command = [sys.executable, "-m", "benchmarks.offline", "--placement"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "8 GPU: 8 workers, 1 GPU and 1 CPU each: GPU 0, GPU 1, GPU 2, GPU 3, GPU 4, GPU 5, GPU 6, GPU 7" in done.stdout
    )


def test_offline_counts_each_workers_speed_from_its_first_results_on():
    """Neither starting nor who begins first or ends last counts."""
    from benchmarks.offline import Run, of_killed, of_run, prompts

    one = Run(times={"a": [10.0, 10.1, 20.1, 30.1, 40.1]}, seconds=45.0)
    assert one.speed == pytest.approx(60 * 3 / 30)
    assert Run(times={"a": [10.0]}).speed == 0
    two = Run(times={"a": one.times["a"], "b": [25.0, 35.0, 45.0]}, seconds=60.0)
    assert two.speed == pytest.approx(6 + 60 * 2 / 20)
    assert (two.ready, two.results) == (25.0, 8)
    assert (two.steady(2), two.steady(3)) == (20.0, 0)
    figures = of_run(two, 2, {1: one, 2: two})
    assert figures["2 workers: of linear"] == pytest.approx(1)
    assert figures["2 workers: requests a minute, starting included"] == pytest.approx(8)
    stopped = Run(whole=False, times=two.times)
    assert "2 workers: requests a minute, starting included" not in of_run(stopped, 2, {2: stopped})
    killed = Run(times={"a": [10.0, 20.0, 30.0], "b": [11.0], "c": [27.0, 33.0]}, killed=15.0, seconds=66.0)
    assert of_killed(killed, 2, 8, two) == {
        "one of 2 workers killed: results": "6 of 8",
        "one of 2 workers killed: killed after, s": 15.0,
        "one of 2 workers killed: seconds of all": 66.0,
        "one of 2 workers killed: until its successor had a result, s": 12.0,
        "one of 2 workers killed: seconds more": 6.0,
        "one of 2 workers killed: its batch was run again": "no, it was between two",
    }
    assert len(set(prompts(100))) == 100


def test_masks_side_by_side_give_what_one_process_gives(run):
    miniature = str(ROOT / "checkpoints" / "miniature")
    alone = run("masks", miniature, "--count", "6", "--only", "edits")
    shared = run("masks", miniature, "--count", "6", "--only", "edits", "--processes", "2")
    assert alone["edit, all drawn: prompts"] == 6
    assert list(alone) == list(shared)
    for name in (name for name in alone if not name.endswith("seconds")):
        assert shared[name] == pytest.approx(alone[name])


def test_passes(run):
    figures = run("passes", "--count", "4")
    for name in {key.rpartition(": ")[0] for key in figures}:
        assert figures[f"{name}: alone, most"] <= figures[f"{name}: passes"]
    texts = "4 texts of 8 to 200 tokens, sure of some"
    assert figures[f"{texts}: passes"] < figures[f"{texts}: in step"]
