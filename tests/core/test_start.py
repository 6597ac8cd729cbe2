"""Starting kernels of Triton: by tensors, or by addresses where a graph is captured that hides them from it."""

import pytest
import torch

from llada_core.quantization import start as module
from llada_core.quantization.start import start


class Kernel:
    """Notes how it is started, as triton.jit's would be."""

    arg_names = ("x_ptr", "out_ptr", "n", "BLOCK", "SPLIT")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *given, **constants: self.calls.append(("tensors", grid, given, constants))

    def warmup(self, *given, grid, **constants):
        self.calls.append(("compiled", grid, given, constants))
        return Compiled(self.calls)


class Compiled:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *given: self.calls.append(("addresses", grid, given))


@pytest.mark.parametrize("hidden", [False, True])
def test_addresses_and_all_constants_in_the_order_of_the_signature(hidden, monkeypatch):
    monkeypatch.setattr(module, "_hidden", lambda tensor: hidden)
    kernel, x, out = Kernel(), torch.ones(3), torch.ones(3)
    start(kernel, (5, 2), x, out, 3, SPLIT=4, BLOCK=16, num_warps=1)
    constants = {"SPLIT": 4, "BLOCK": 16, "num_warps": 1}
    if hidden:
        assert kernel.calls == [
            ("compiled", (5, 2), (x, out, 3), constants),
            ("addresses", (5, 2, 1), (x.data_ptr(), out.data_ptr(), 3, 16, 4)),
        ]
    else:
        assert kernel.calls == [("tensors", (5, 2), (x, out, 3), constants)]


def test_nothing_is_hidden_on_a_cpu():
    assert not module._hidden(torch.ones(1))
