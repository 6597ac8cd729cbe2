"""Real Ray: two workers on the processor with the miniature, one of which is killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llada_core import load_tokens

pytest.importorskip("ray", reason="Ray is not installed: requirements-ray.txt")

ROOT = Path(__file__).parents[2]
TEXTS = ("a large blue circle on a white background", "a small green square on a black background")
KINDS = [
    *({"id": f"d{i}", "kind": "draw", "prompt": TEXTS[i % 2], "height": 256, "width": 256} for i in range(12)),
    {"id": "t", "kind": "think", "prompt": TEXTS[0], "height": 256, "width": 256, "decoding": None},
    {"id": "a", "kind": "ask", "question": "Describe the picture.", "images": "photo.png"},
    {"id": "wrong", "kind": "draw", "prompt": "x", "hieght": 3},
    {"id": "too-large", "kind": "draw", "prompt": "x", "height": 8192, "width": 8192},
    {"id": "d0", "kind": "draw", "prompt": "an id that is there already"},
]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def kill_a_worker(program: subprocess.Popen) -> None:
    """Kill a process that holds the checkpoint, in the middle: it is stopped first, until it has been given a batch."""
    found = [
        p for p in psutil.Process(program.pid).children(recursive=True) if "MapWorker" in " ".join(p.cmdline()[:1])
    ]
    found[0].send_signal(signal.SIGSTOP)
    time.sleep(1)
    found[0].send_signal(signal.SIGKILL)


def test_a_worker_is_killed_and_nothing_is_lost_or_double(write, files, miniature, model):
    out = files / "out"
    command = [sys.executable, "-m", "llada_core.batch", str(write(*KINDS)), str(out), "--checkpoint", str(miniature)]
    command += ["--workers", "2", "--batch-size", "3", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 240
        while not any(line["outcome"] == "ok" for line in lines(out / "results.jsonl")):
            assert program.poll() is None, program.communicate()
            assert time.monotonic() < end, "no result in four minutes"
            time.sleep(0.1)
        kill_a_worker(program)
        said, errors = program.communicate(timeout=240)
    finally:
        program.kill()
    assert program.returncode == 3, errors
    assert "will be retried" in errors or "the batch was run again" in errors, "the worker had been given a batch"

    records = lines(out / "results.jsonl")
    assert sorted(str(record["id"]) for record in records) == sorted([*(str(r["id"]) for r in KINDS[:-1]), "None"])
    outcomes = {record["id"]: record for record in records}
    assert {name for name, record in outcomes.items() if record["outcome"] == "error"} == {"wrong", "too-large", None}
    assert "hieght" in outcomes["wrong"]["error"]
    for i in range(12):
        alone = model.generate(TEXTS[i % 2], 256, 256).tokens
        assert torch.equal(load_tokens(out / outcomes[f"d{i}"]["tokens"]).grids[0], alone.grids[0])
        assert (out / outcomes[f"d{i}"]["image"]).stat().st_size > 1000
    assert outcomes["t"]["thinking"]
    assert outcomes["a"]["answer"]
    assert not list(out.rglob("*.partial"))
    assert "draw          12       3       0" in said

    path = files / "requests.jsonl"
    done = [json.dumps(request) for request in KINDS if outcomes[request["id"]]["outcome"] == "ok"][:-1]
    path.write_text("\n".join(done), encoding="utf-8")
    before = {
        name: (out / record["tokens"]).stat().st_mtime_ns for name, record in outcomes.items() if "tokens" in record
    }
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "0 requests in" in again.stdout
    records = lines(out / "results.jsonl")
    assert len(records) == 14, "errors of lines that are no longer there have gone"
    assert before == {r["id"]: (out / r["tokens"]).stat().st_mtime_ns for r in records if "tokens" in r}
