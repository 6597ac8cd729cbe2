"""Numbers that are not finite are noticed a round later, and the error says whose fault they are."""

import pytest
import torch
from torch import nn

from llada_core.errors import CheckpointError, InputError
from llada_core.nonfinite import FiniteWatch, nonfinite_error
from llada_core.quantization.formats import FP8Block, Int8
from llada_core.quantization.modules import QuantizedLinear

BAD = [float("nan"), float("inf"), float("-inf")]
DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


class Found(Exception):
    """What the watch is told to raise."""


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


@pytest.mark.parametrize("bad", BAD)
def test_it_is_known_a_round_later(device, bad):
    watch = FiniteWatch(Found)
    x = torch.ones(3, 5, device=device)
    watch.note(x)
    x[1, 2] = bad
    watch.note(x)
    with pytest.raises(Found):
        watch.note(torch.ones_like(x))


def test_the_last_round_is_asked_for(device):
    watch = FiniteWatch(Found)
    watch.note(torch.ones(3, device=device))
    watch.note(torch.full((3,), float("nan"), device=device))
    with pytest.raises(Found):
        watch.check()
    watch.check()  # said once


def test_nothing_wrong_is_said_of_nothing_wrong(device):
    watch = FiniteWatch(Found)
    watch.check()
    for _ in range(3):
        watch.note(torch.full((3,), torch.finfo(torch.float32).max, device=device))
    watch.check()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_named(bad, dtype):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    module[1].bias.data[1] = bad
    error = nonfinite_error("decoder", module, dtype, "latents")
    assert isinstance(error, CheckpointError)
    assert "decoder: 1.bias: found 1 numbers that are NaN or infinite" in str(error)
    assert "download" in str(error)


def test_a_weight_that_float16_cannot_hold_is_no_damage():
    module = nn.Linear(3, 4)
    module.weight.data[0, 0] = 1e6
    error = nonfinite_error("decoder", module.half(), torch.float16, "latents")
    assert not isinstance(error, CheckpointError)
    assert "precision: found decoder: weight beyond the range of torch.float16" in str(error)
    assert "choose bf16" in str(error)
    module.weight.data[1, 1] = float("nan")
    assert isinstance(nonfinite_error("decoder", module, torch.float16, "latents"), CheckpointError)


@pytest.mark.parametrize(("dtype", "remedy"), [(torch.float16, "choose bf16"), (torch.bfloat16, "download")])
def test_finite_weights_blame_the_range(dtype, remedy):
    error = nonfinite_error("decoder", nn.Linear(3, 4).to(dtype), dtype, "latents")
    assert isinstance(error, InputError)
    assert not isinstance(error, CheckpointError)
    assert f"precision: found latents beyond the range of {dtype}, from finite weights" in str(error)
    assert remedy in str(error)


@pytest.mark.parametrize("form", [Int8(), FP8Block()])
def test_scales_of_quantized_weights_are_looked_at(form):
    layer = QuantizedLinear(4, 3, form)
    for suffix, tensor in form.quantize(torch.randn(3, 4)).items():
        getattr(layer, suffix).data.copy_(tensor)
    assert not isinstance(nonfinite_error("decoder", layer, torch.bfloat16, "latents"), CheckpointError)
    list(layer.parameters())[1].data[0] = float("nan")
    assert "decoder: weight_scale" in str(nonfinite_error("decoder", layer, torch.bfloat16, "latents"))


def test_a_damaged_weight_of_8_bits_is_found():
    layer = QuantizedLinear(4, 3, FP8Block())
    layer.weight_scale_inv.data.fill_(1)
    layer.weight.data.copy_(torch.zeros(3, 4))
    layer.weight.data.view(torch.uint8)[0, 0] = 0x7F  # NaN
    assert "decoder: weight:" in str(nonfinite_error("decoder", layer, torch.bfloat16, "latents"))
