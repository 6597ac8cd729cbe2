"""CUDA graphs where there is CUDA: the same tokens as kernel by kernel, memory given back, failures survived."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llada_core.backbone import attention_kernels
from llada_core.backbone.cuda_graphs import CUDAGraphRunner, GraphStore
from llada_core.backbone.experts import Experts, Router
from llada_core.options import Guidance, Sampling, Sprint
from llada_core.quantization import grouped
from llada_core.quantization.choices import quantizable
from llada_core.quantization.formats import Int4, Int8
from llada_core.quantization.grouped import can_group
from llada_core.quantization.modules import QuantizedLinear, apply_formats
from llada_core.sampling.batch import Sample
from llada_core.sampling.block_diffusion import GenerationConfig, Output, generate, prepare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROOT = Path(__file__).parents[2]
MASK, IMAGES, VOCABULARY = 95, 96, 160
COUNT = 150
SPRINT = Sprint(text_keep_ratio=0.4, image_keep_ratio=0.6, threshold=0.9)
BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.fixture
def backbone(oracle):
    """backbone(dtype): a small one on the device, its router in float32."""

    def build(dtype: torch.dtype):
        built = oracle.tiny_backbone(1).to("cuda", dtype)
        for part in built.modules():
            if isinstance(part, Router):
                part.float()
        return built

    return build


def run(
    backbone, lengths: list[int], sprint: Sprint | None = None, attend=attention_kernels.sdpa, graphs=True, capture=True
) -> tuple[Output, int]:
    """What a sample with branches of these lengths gives, and the most graphs there were."""
    branches = [[(7 * i + row) % MASK for i in range(length)] for row, length in enumerate(lengths)]
    config = GenerationConfig(6, IMAGES, VOCABULARY, frozenset(), Sampling(), Guidance(2.0, 0.5), sprint)
    dtype = backbone.lm_head.weight.dtype
    runner, batch = prepare(
        backbone,
        [Sample(branches, [MASK] * COUNT)],
        config,
        MASK,
        "cuda",
        dtype,
        attend,
        GraphStore() if graphs else None,
    )
    if not capture:
        rounds = runner.rounds
        runner.rounds = CUDAGraphRunner(backbone, rounds.cache, rounds.sizes, attend, rounds.then, 32, capture=False)
    most = 0

    def count(block, done):
        nonlocal most
        most = max(most, sum(fixed.graph is not None for fixed in runner.rounds._rounds.values()))

    try:
        (output,) = generate(runner, batch, config, count)
    finally:
        runner.close()
    return output, most


@BOTH
@pytest.mark.parametrize("lengths", [[64], [50, 90], [33]])
@pytest.mark.parametrize("sprint", [None, SPRINT], ids=["plain", "SPRINT"])
def test_graphs_fill_what_the_same_kernels_fill_one_by_one(dtype, lengths, sprint, backbone):
    built = backbone(dtype)
    found, count = run(built, lengths, sprint)
    assert count == 2
    assert run(built, lengths, sprint, capture=False) == (found, 0)
    if dtype == torch.float32:
        assert run(built, lengths, sprint, graphs=False) == (found, 0)


@BOTH
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_in_parts_equals_the_whole(dtype, rows):
    generator = torch.Generator("cuda").manual_seed(rows)
    shapes = [(rows, 8, 32, 64), *[(rows, 2, 3 * attention_kernels.PART, 64)] * 2]
    q, k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes)
    mask = torch.rand(rows, 1, 32, k.shape[2], generator=generator, device="cuda") < 0.5
    mask[..., attention_kernels.PART : 2 * attention_kernels.PART] = False  # one part holds nothing to see
    bias = attention_kernels.bias(mask, 32, 4, dtype)
    expected = attention_kernels.eager(q.float(), k.float(), v.float(), bias.float())
    found = attention_kernels.in_parts(q, k, v, bias)
    assert torch.allclose(found.float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("form", [Int8(), Int4()], ids=lambda form: form.name)
def test_graphs_of_quantized_layers(form, backbone):
    built = backbone(torch.bfloat16)
    dense = {name: weight.detach().clone() for name, weight in built.named_parameters()}
    layers = quantizable("backbone", built)
    apply_formats(built, lambda name, shape: form if f"{name}.weight" in layers else None)
    for name in layers:
        layer = built.get_submodule(name.removesuffix(".weight"))
        for suffix, tensor in form.quantize(dense[name]).items():
            getattr(layer, suffix).data = tensor
    found, count = run(built, [50, 90])
    assert count == 2
    assert found == run(built, [50, 90], capture=False)[0]


def test_graphs_under_the_allocator_that_comfyui_chooses():
    """What it allocates in a capture has no memory yet, and Triton takes its address for one on the CPU."""
    setting = "backend:cudaMallocAsync"
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "fill or quantized"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]


def test_each_type_takes_its_product(backbone):
    """So that the test above covers both: one kernel for all experts, and padding."""
    for dtype in (torch.bfloat16, torch.float32):
        bank = next(part for part in backbone(dtype).modules() if isinstance(part, Experts)).gate_up.weight
        grouping = torch.cuda.get_device_capability()[0] in (9, 10) and dtype == torch.bfloat16
        assert can_group(bank, dtype) == grouping


def test_sizes_that_would_be_read_back_are_not_captured(backbone, monkeypatch):
    monkeypatch.setattr(grouped, "FEW_TOKENS", 64)
    found, count = run(backbone(torch.float32), [50, 90])
    assert count == 1  # two rows of one block, not of two
    assert found == run(backbone(torch.float32), [50, 90], graphs=False)[0]


def test_memory_is_given_back(backbone):
    built = backbone(torch.bfloat16)
    run(built, [50, 90])  # libraries set themselves up
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(3):
        run(built, [50, 90])
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_what_waits_for_the_gpu_is_found_before_it_is_captured(backbone, caplog):
    built = backbone(torch.float32)

    def waiting(q, k, v, bias):
        float(q.flatten()[0])
        return attention_kernels.sdpa(q, k, v, bias)

    expected, _ = run(built, [50, 90])
    assert run(built, [50, 90], attend=waiting) == (expected, 0)
    assert len([record for record in caplog.records if "without CUDA graphs" in record.getMessage()]) == 1
    unharmed()


def test_kernels_are_tried_before_a_round_in_which_nothing_may_be_read_back(backbone, caplog):
    """A prompt of two blocks has its first run in fixed shapes: nothing ran before."""
    built = backbone(torch.bfloat16)
    apply_formats(built, lambda name, shape: Int8() if name.endswith("dense") else None)
    quantized = [layer for layer in built.modules() if isinstance(layer, QuantizedLinear)]
    for layer in quantized:
        layer.weight.zero_()
        layer.weight_scale.fill_(1)
    _, count = run(built, [33])
    assert count == 2
    assert quantized
    assert "fails here" not in caplog.text


def test_other_threads_may_wait_for_the_gpu_meanwhile(backbone):
    """A host has threads of its own; a warm-up and a capture must not make one of them fail."""
    built, going = backbone(torch.float32), threading.Event()
    stream = torch.cuda.Stream()

    def wait_again_and_again() -> int:
        count = 0
        with torch.cuda.stream(stream):
            while not going.is_set():
                count += int(torch.ones(8, device="cuda").sum())
        return count

    with ThreadPoolExecutor(1) as other:
        counted = other.submit(wait_again_and_again)
        try:
            for _ in range(3):
                assert run(built, [50, 90])[1] == 2
        finally:
            going.set()
        assert counted.result() > 0


def test_running_out_of_memory_in_a_capture_does_no_harm(backbone, caplog):
    built = backbone(torch.float32)

    def greedy(q, k, v, bias):
        if torch.cuda.is_current_stream_capturing():
            q.new_empty(2**50)
        return attention_kernels.sdpa(q, k, v, bias)

    expected, _ = run(built, [50, 90])
    assert run(built, [50, 90], attend=greedy) == (expected, 0)
    assert len([record for record in caplog.records if "OutOfMemoryError" in record.getMessage()]) == 1
    unharmed()


def unharmed() -> None:
    """The device, its generator and its allocator work, on the stream they worked on before."""
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(8, device="cuda").isfinite().all()
    torch.cuda.empty_cache()
    assert not torch.cuda.is_current_stream_capturing()
