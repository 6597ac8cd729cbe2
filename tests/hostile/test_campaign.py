"""The campaign in a small, fixed size; `make campaign` runs it in full. Prints its table."""

import contextlib
import json
import math
import os
import shutil
import struct
import subprocess
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dev.hosts.server import ComfyServer, find_comfyui
from llada_core.engine import LLaDAUni
from llada_core.errors import InputError
from llada_core.image_tokens import load_tokens
from tests.hostile import child
from tests.hostile.campaign import table
from tests.hostile.damage import run_files
from tests.hostile.graphs import shipped
from tests.hostile.hosts import HEAP, Outcome, ProcessHost, ServerHost, controls, reseeded
from tests.hostile.parts import Report, _controls, _varied, run_graphs, run_interrupts, run_soak

SEED = 20
CORPUS = Path(__file__).with_name("corpus")
TOKEN_FILES = sorted((CORPUS / "tokens").glob("*"))
PARTS = sorted(path for path in CORPUS.iterdir() if path.is_dir() and path.name != "tokens")


@pytest.fixture(scope="module")
def host(tmp_path_factory, request):
    """A real ComfyUI where there is one, else the nodes in this process."""
    comfyui = find_comfyui()
    if comfyui is None:
        yield ProcessHost(request.getfixturevalue("in_process_host"))
        return
    base = ServerHost.prepare(tmp_path_factory.mktemp("hostile") / "host")
    with ComfyServer(comfyui, base, environment=HEAP) as server:
        yield ServerHost(server)


@pytest.mark.parametrize(("run", "count"), [(run_graphs, 40), (run_interrupts, 6), (run_soak, 30)])
def test_a_host_holds(run, count, host):
    report = run(host, SEED, count, print)
    print(table([report]))
    assert report.faults == []
    assert sum(report.counts.values()) >= count


def test_files_hold(tmp_path):
    report = run_files(tmp_path / "files", SEED, 40, print)
    print(table([report]))
    assert report.faults == []
    assert sum(report.counts.values()) == 40
    assert report.counts["clear error"] > 15


def test_what_the_child_calls_a_fault(tmp_path, monkeypatch):
    """Memory that is not there, an error that nobody made, and a message that fills more than a screen."""
    for error in (
        MemoryError(),
        RuntimeError("not enough memory"),
        AttributeError("x"),
        InputError("x" * 2000, "", "", ""),
    ):
        monkeypatch.setattr(child, "use", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert child.outcome(tmp_path, work=False)["kind"] == "FAULT"
    monkeypatch.setattr(child, "use", lambda *_: None)
    assert child.outcome(tmp_path, work=False)["kind"] == "opened"


def test_a_child_that_dies_is_a_fault(tmp_path, monkeypatch):
    """It is named with what it had been given, and the next child goes on behind it."""
    real, started = subprocess.run, []

    def run(arguments, **named):
        started.append(int(arguments[-2]))
        log = Path(arguments[3]) / "log.jsonl"
        log.write_text(json.dumps({"kind": "begun", "index": started[-1], "what": "a file"}) + "\n")
        return real(["sh", "-c", "kill -SEGV $$"], **named)

    monkeypatch.setattr("tests.hostile.damage.subprocess.run", run)
    report = run_files(tmp_path / "files", SEED, 3, print)
    assert started == [0, 1, 2]
    assert [f"file {i} (a file): ended the process, SIGSEGV []" for i in started] == report.faults


class StandIn:
    """A server that answers what a ComfyUI on a card does; the process is this one."""

    def __init__(self, **card):
        self._process, self.card, self.posted = type("Process", (), {"pid": os.getpid()}), card, []

    def get(self, path):
        assert path == "/system_stats"
        return {"devices": [self.card]}

    def post(self, path, data=None):
        self.posted.append(path)
        return {"held": 500}


def test_memory_of_a_card_is_counted_where_there_is_one(monkeypatch):
    monkeypatch.setattr("tests.hostile.hosts.time.sleep", lambda seconds: None)
    card = {"vram_total": 1000, "vram_free": 400, "torch_vram_total": 300, "torch_vram_free": 100}
    server = StandIn(type="cuda", **card)
    held = ServerHost(server).settled()
    assert (held["card"], held["allocator"]) == (600, 200)
    assert held["memory"] == 500
    assert held["pages"] > 10**7
    assert held["mapped files"] > 10**6
    assert server.posted == ["/history", "/free", "/hostile/held", "/hostile/held"]
    assert set(ServerHost(StandIn(type="cpu", **card)).memory()) == {"pages"}


@pytest.mark.parametrize("kind", ["memory", "mapped files", "card", "allocator", "pages"])
def test_growth_of_each_kind_of_memory_is_a_fault(kind, monkeypatch, tmp_path):
    class Host:
        base, zimage, size = tmp_path, False, 10**9

        def settled(self):
            Host.size += 2 * 10**8
            return {
                name: Host.size if name == kind else 10**9
                for name in ("memory", "mapped files", "card", "allocator", "pages")
            }

        def run(self, graph):
            return Outcome("right result")

        def answers(self):
            return True

    monkeypatch.setattr("tests.hostile.parts.controls", lambda host, until: {})
    report = run_graphs(Host(), SEED, 3, print)
    assert report.faults == [f"{kind} grew from 1.400 to 1.600 GB"]
    assert f"{kind} 1.400 GB before, 1.600 GB after" in report.notes


def test_of_a_card_the_servers_own_share_is_counted_where_the_driver_tells_it(monkeypatch, tmp_path):
    told = tmp_path / "nvidia-smi"
    told.write_text(f"#!/bin/sh\necho '{os.getpid()}, 300'\necho '{os.getpid() + 1}, 5000'\necho '[N/A], [N/A]'\n")
    told.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    card = {"vram_total": 1000, "vram_free": 400, "torch_vram_total": 300, "torch_vram_free": 100}
    assert ServerHost(StandIn(type="cuda", **card)).memory()["card"] == 300 * 2**20


class Varying:
    """A host whose `result` is another each time for one graph, and of which nothing grows."""

    zimage, vary = False, "edit"

    def __init__(self, base, on_card):
        self.base, self.on_card, self._shipped, self.runs = base, on_card, shipped(False), 0

    def result(self, graph):
        self.runs += 1
        return str(self.runs) if set(graph) == set(self._shipped[self.vary]) else "the same"

    def settled(self):
        return {"memory": 10**9}


@pytest.mark.parametrize("on_card", [False, True])
def test_what_differs_undisturbed_is_a_fault_or_on_a_card_left_out(on_card, tmp_path):
    host = Varying(tmp_path, on_card)
    digests = controls(host)
    assert digests["edit"] == ""
    assert digests["text-to-image"] == "the same"
    report = Report("graphs")
    assert _controls(host, report, math.inf) == digests
    said = [text for text in [*report.notes, *report.faults] if "undisturbed runs differ" in text and "edit" in text]
    assert len(said) == 1
    assert bool(report.faults) != on_card


def test_a_part_ends_when_its_time_is_up(tmp_path):
    report = run_graphs(Varying(tmp_path, on_card=True), SEED, 3, print, ends=0)
    assert "0 of 3, then the time was up" in report.notes
    assert "not compared, for want of time: " + ", ".join(shipped(False)) in report.notes
    assert not report.counts


@pytest.mark.parametrize("checkpoint", ["tiny", "miniature"])
def test_the_soak_varies_the_decoder_as_comfyuis_own_model(checkpoint):
    random = Random(3)
    lora, large = (_varied(random, shipped(True)[name], checkpoint, "a fox") for name in ("with-lora", "larger"))
    (strength,) = (d["inputs"]["strength_model"] for d in lora.values() if d["class_type"] == "LoraLoaderModelOnly")
    assert (strength > 0) == (checkpoint == "miniature")
    seeds = [d["inputs"]["seed"] for d in [*lora.values(), *large.values()] if d["class_type"] == "KSampler"]
    assert len(seeds) == len(set(seeds)) == 3
    assert {d["inputs"]["checkpoint"] for d in lora.values() if d["class_type"] == "LLaDAUniLoader"} == {checkpoint}


def test_a_slot_that_the_host_never_checked_is_its_own_fault():
    line = "self.output_link_callback(value.outputs[from_socket])"
    for text, kind in ((line, "error of a core node"), ("self.drawn[0.5]", "FAULT")):
        error = {"node_type": "LLaDAUniSample", "exception_type": "TypeError", "traceback": ["execute", text]}
        run = type("Run", (), {"status": "error", "error": error})
        server = type("Server", (), {"run": lambda self, *_, run=run, **__: run})()
        server._process = type("Process", (), {"pid": os.getpid()})
        assert ServerHost(server).run({}).kind == kind


def test_a_graph_that_runs_anew_gives_the_same():
    """Guidance differs, so that nothing is taken from what was drawn of late, and float32 does not see by how much."""
    graph = shipped(False)["text-to-image"]
    (sample,) = (node for node, data in graph.items() if data["class_type"] == "LLaDAUniSample")
    told = [reseeded(graph, seed)[sample]["inputs"]["guidance"] for seed in (0, 1, 2**20 - 1)]
    assert len({*told, graph[sample]["inputs"]["guidance"]}) == 4
    assert len(torch.tensor(told, dtype=torch.float32).unique()) == 1


# What was found once


@pytest.mark.parametrize("path", TOKEN_FILES, ids=lambda path: path.name)
def test_token_files_of_the_corpus(path):
    with pytest.raises(InputError, match=r"safetensors|tokens\[0\]"):
        load_tokens(path)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_checkpoint_files_of_the_corpus(path, checkpoint_copy):
    """Each folder holds files of a checkpoint that belong into the place of whole ones."""
    shutil.copytree(path, checkpoint_copy, dirs_exist_ok=True)
    with pytest.raises(InputError) as caught:
        LLaDAUni(checkpoint_copy)
    assert len(str(caught.value)) < 1200


# Whatever hypothesis thinks of

NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(2**60, 2**70))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=6,
)
ENTRY = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["I64", "I32", "F32", "F8_E4M3", "BOOL", "X", 3]),
            "shape": st.one_of(st.lists(st.sampled_from([0, 1, 2, 4, 2**31, 2**62, -1]), max_size=4), JSON),
            "data_offsets": st.one_of(st.tuples(*[st.sampled_from([0, 8, 32, 64, 2**40])] * 2), JSON),
        }
    ),
)
FILES = ["config.json", "decoder/config.json", "vae/config.json", "image_tokenizer/config.json"]


@settings(max_examples=60)
@given(
    metadata=st.one_of(JSON, st.just({"codebook_size": "256"}), st.fixed_dictionaries({"codebook_size": st.text()})),
    entries=st.dictionaries(st.sampled_from(["0", "1", "2", "10", "-1", ""]), ENTRY, max_size=3),
)
def test_any_header_of_a_token_file(metadata, entries, tmp_path_factory):
    path = tmp_path_factory.mktemp("header") / "t.safetensors"
    text = json.dumps({"__metadata__": metadata} | entries).encode("utf-8", "replace")
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with contextlib.suppress(InputError):
        assert load_tokens(path).grids


@settings(max_examples=60)
@given(name=st.sampled_from(FILES), data=st.data())
def test_any_value_in_a_configuration(name, data, golden_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configuration") / "checkpoint"
    shutil.copytree(golden_checkpoint, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    config = json.loads((golden_checkpoint / name).read_text())
    within = config["vision_config"] if name.startswith("image_tokenizer") and data.draw(st.booleans()) else config
    within[data.draw(st.sampled_from(sorted(within)))] = data.draw(JSON)
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(config))
    with contextlib.suppress(InputError):
        assert LLaDAUni(folder).components
