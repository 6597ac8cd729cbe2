"""The decoder as one of the host's own models, in a real ComfyUI's modules; skipped, by name, where it is too old."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dev.hosts.server import ZIMAGE_NODES, find_python, knows_zimage

EXACT = 1e-5  # relative, float32; 1e-4 is asked for


def run(script: str, comfyui: Path, checkpoint: Path, work: Path) -> dict:
    """What one of the scripts beside this file found."""
    launch = Path(__file__).parents[2] / "dev" / "hosts" / "launch.py"
    path = Path(__file__).with_name(script)
    command = [find_python(comfyui), str(launch), str(path), str(comfyui), str(checkpoint), str(work), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr[-500:], file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def host(comfyui) -> Path:
    """A ComfyUI that knows Z-Image."""
    if not knows_zimage(comfyui):
        pytest.skip("this ComfyUI does not know Z-Image")
    return comfyui


@pytest.fixture(scope="module")
def report(host, golden_checkpoint, tmp_path_factory) -> dict:
    return run("zimage_in_host.py", host, golden_checkpoint, tmp_path_factory.mktemp("zimage"))


@pytest.fixture(scope="module")
def patched(host, golden_checkpoint, tmp_path_factory) -> dict:
    return run("zimage_patches_in_host.py", host, golden_checkpoint, tmp_path_factory.mktemp("patches"))


def test_an_evaluation_is_minus_the_engines(report):
    """At sigma = 1 - t, with both decoders, on grids whose positions are and are not multiples of 32."""
    assert report["evaluation"] < EXACT


@pytest.mark.parametrize("kind", ["turbo", "normal"])
@pytest.mark.parametrize(
    "way", ["KSampler, {}", "SamplerCustom, {}, own steps", "SamplerCustom, {}, 5 steps", "first of a batch, {}"]
)
def test_the_hosts_samplers_draw_what_decode_draws(report, kind, way):
    assert report[way.format(kind)] < EXACT
    assert report[f"another seed, {kind}"] > 0.1


def test_the_levels_are_decodes(report):
    turbo, normal = ([1 - i / 8 for i in range(9)], [i / 49 for i in range(50)])
    normal = [1 - t / (t + 6 - 6 * t) for t in normal]
    for kind, expected in (("turbo", turbo), ("normal", normal)):
        assert report[f"levels, {kind}"] == pytest.approx(expected, abs=2e-7)
        assert report[f"simple, {kind}"] == pytest.approx(expected, abs=1e-6)  # the host's own, of the table
    assert report["half of the way is the last half"]
    assert report["no denoising has no levels"] == 0


def test_the_rest_of_a_batch_has_noise_of_the_hosts(report):
    """The host draws a batch from one generator, where Decode takes seed + i."""
    assert report["second of a batch, turbo"] > 0.1
    assert report["the sampler as it was"]


def test_guidance_never_lengthens_a_pictures_velocity(report):
    for guided, conditional in report["norms"]:
        assert guided == pytest.approx(conditional, rel=1e-5)
    assert report["cfg 1"] == 0
    assert report["the model itself stays unguided"]


def test_the_vae_is_the_hosts_class_with_the_checkpoints_factors(report):
    assert report["VAE"] == ["VAE", 16, 8]
    assert max(report[name] for name in ("VAE Encode", "latents inside", "latents outside")) < EXACT


def test_a_vae_of_the_released_sizes_is_the_hosts_own_model(report):
    assert report["released VAE is"] == "comfy"
    assert max(report["released VAE"]) < EXACT


def test_the_released_sizes_are_those_that_the_hosts_own_loading_finds(report):
    assert report["detected"] == {"released": True, "theta": False, "layers": False}


def test_the_host_is_told_of_the_memory_that_the_conditioning_takes(report):
    assert report["memory, of what is needed"] == pytest.approx(1)
    assert report["shapes before sampling"] == {"c_crossattn": [1, 80, 48]}


def test_nothing_is_read_twice_and_nothing_stays(report):
    assert report["shared"] == [True, True, True]
    assert report["read once more by the host"] == 0
    assert report["alive when nobody holds them"] == [False, False]


def test_decoders_in_the_hosts_own_form_open(report):
    assert report["host's names"] == 0
    assert report["int8 in the host's names"] == 0


def test_eight_bits_are_the_same_whoever_quantizes(report):
    """The loader's choice, this pack's conversion, and files in the host's form hold the same numbers."""
    assert report["8-bit in the loader, against int8"] == 0
    assert report["converted, against int8"] == 0
    assert report["8-bit, against Decode in 8-bit"] < 0.02


def test_quantized_decoders_stay_near(report):
    """The host computes int8 layers in int8, rounding what goes in as well."""
    assert 0 < report["int8, against its dense weights"] < 0.02
    assert 0 < report["int8, against the whole"] < 0.02
    assert 0 < report["blocks of FP8, against the whole"] < 0.05


def test_what_cannot_be_opened_is_named(report):
    assert "found layers quantized as int3" in report["refused, int3"]
    assert "Update ComfyUI" in report["refused, int3"]
    assert "fp16 for decoder, whose pad tokens reach 1e+24" in report["refused, fp16"]
    assert "Choose bf16" in report["refused, fp16"]


@pytest.mark.parametrize("kind", ["turbo", "normal"])
def test_in_bfloat16_they_are_as_near_as_rounding_leaves_them(report, kind):
    dtype, apart, rounding = report[f"bfloat16, {kind}"]
    assert dtype == "torch.bfloat16"
    assert apart < 3 * rounding < 0.06


@pytest.mark.parametrize(
    "form",
    [
        "transformer., diffusers' names",
        "diffusion_model., diffusers' names",
        "diffusion_model., Z-Image's names",
        "no prefix, diffusers' names",
        "lora_unet_, Z-Image's names",
        "lycoris_, diffusers' names",
    ],
)
def test_a_lora_is_the_dense_sum(patched, form):
    assert patched["what the update changes"] > 0.05
    assert patched[f"LoRA, {form}"] < EXACT
    assert patched["afterwards, without"] == 0


def test_a_controlnet_controls(patched):
    assert patched["ControlNet, strength 0"] == 0
    assert patched["ControlNet, that adds nothing"] == 0
    assert patched["ControlNet, strength 1"] > 0.1
    assert patched["ControlNet, another picture"] > 0.1


def test_the_nodes_are_offered_where_they_work_and_the_log_says_once_where_not(comfyui, comfy_server):
    offered = comfy_server.get("/object_info")
    if knows_zimage(comfyui):
        assert set(ZIMAGE_NODES) <= set(offered)
        assert "are not offered" not in comfy_server.log
    else:
        assert not set(ZIMAGE_NODES) & set(offered)
        assert comfy_server.log.count("does not know Z-Image, which 0.3.75 and newer do") == 1


def test_the_benchmark_runs(host, tmp_path):
    """Its small sizes; the figures of the released width are for people to read."""
    file = tmp_path / "figures.json"
    options = [str(host), "--tiny", "--cpu", "--json", str(file)]
    command = [find_python(host), "-m", "benchmarks.native_decoder", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(json.loads(file.read_text())["figures"]["largest relative difference"]) < 1e-4
