"""The folder of results: nothing half, nothing double, nothing lost, whatever ends a run."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from llada_core import ImageTokens, InputError, load_tokens
from llada_core.batch.requests import Wrong, parse
from llada_core.batch.results import Output
from llada_core.batch.rows import Result
from llada_core.sampling.pipeline import Usage

TOKENS = ImageTokens((torch.arange(4).view(2, 2),), 16)
USAGE = Usage(4, 2, 0.5)


def request(name: str, prompt: str = "x"):
    return parse({"id": name, "kind": "draw", "prompt": prompt}, None)


def result(name: str, **values) -> Result:
    return Result(name, "draw", **({"tokens": TOKENS, "picture": b"PNG", "usage": USAGE} | values))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_result_is_a_line_and_its_files(tmp_path):
    with Output(tmp_path / "new" / "out") as output:
        assert output.begin([request("a")], []) == [request("a")]
        output.add(request("a"), result("a", thinking="a plan", seconds=1.5, worker="here:1"))
    (record,) = records(tmp_path / "new" / "out")
    assert record == {
        "id": "a",
        "kind": "draw",
        "outcome": "ok",
        "image": "images/a.png",
        "tokens": "tokens/a.safetensors",
        "thinking": "a plan",
        "usage": {"tokens": 4, "rounds": 2, "seconds": 0.5},
        "seconds": 1.5,
        "worker": "here:1",
        "request": request("a").digest,
    }
    folder = tmp_path / "new" / "out"
    assert (folder / record["image"]).read_bytes() == b"PNG"
    assert torch.equal(load_tokens(folder / record["tokens"]).grids[0], TOKENS.grids[0])


def test_what_has_its_result_is_not_done_again_and_what_failed_is(tmp_path):
    asked = [request(name) for name in "abc"]
    with Output(tmp_path / "out") as output:
        output.begin(asked, [Wrong(4, "wrong", "d", "ask"), Wrong(5, "no JSON")])
        output.add(asked[0], result("a"))
        output.add(asked[1], Result("b", "draw", error="too long"))
    assert [(r["id"], r["outcome"]) for r in records(tmp_path / "out")] == [
        ("d", "error"),
        (None, "error"),
        ("a", "ok"),
        ("b", "error"),
    ]
    with Output(tmp_path / "out") as output:
        assert [r.id for r in output.begin(asked, [])] == ["b", "c"]
        output.add(asked[1], result("b"))
    assert [(r["id"], r["outcome"]) for r in records(tmp_path / "out")] == [("a", "ok"), ("b", "ok")]


def test_half_a_line_of_a_killed_run_is_no_result(tmp_path):
    asked = [request(name) for name in "ab"]
    with Output(tmp_path / "out") as output:
        output.begin(asked, [])
        output.add(asked[0], result("a"))
        output.add(asked[1], result("b"))
    path = tmp_path / "out" / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with Output(tmp_path / "out") as output:
        assert [r.id for r in output.begin(asked, [])] == ["b"]
        output.add(asked[1], result("b"))
    assert [r["id"] for r in records(tmp_path / "out")] == ["a", "b"]


@pytest.mark.parametrize("fails", ["picture", "tokens", "line"])
def test_a_full_disk_leaves_nothing_half(tmp_path, monkeypatch, fails):
    """The disk fills up in the middle of a file; what is done stays, and the next run goes on."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_, **__):
        raise full

    asked = [request(name) for name in "ab"]
    with Output(tmp_path / "out") as output:
        output.begin(asked, [])
        output.add(asked[0], result("a"))
        with monkeypatch.context() as patched:
            if fails == "picture":
                write = Path.write_bytes
                patched.setattr(Path, "write_bytes", lambda path, data: (write(path, data[:1]), refuse()))
            elif fails == "tokens":
                patched.setattr("llada_core.image_tokens.save_file", refuse)
            else:
                patched.setattr(os, "fsync", lambda number: refuse() if number == output._lines.fileno() else None)
            with pytest.raises(InputError, match=r"b, not written.*Make room"):
                output.add(asked[1], result("b"))
    assert [r["id"] for r in records(tmp_path / "out")] == ["a"]
    assert not list((tmp_path / "out").rglob("*.partial"))
    if fails == "picture":
        assert not (tmp_path / "out" / "images" / "b.png").exists()
    with Output(tmp_path / "out") as output:
        assert [r.id for r in output.begin(asked, [])] == ["b"]


def test_results_of_other_requests_are_not_mixed_with_these(tmp_path):
    with Output(tmp_path / "out") as output:
        output.begin([request("a")], [])
        output.add(request("a"), result("a"))
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    with Output(tmp_path / "out") as output, pytest.raises(InputError, match="another request of the id 'a'"):
        output.begin([request("a", "another prompt")], [])
    with Output(tmp_path / "out") as output, pytest.raises(InputError, match="another request of the id 'a'"):
        output.begin([], [Wrong(1, "wrong now", "a", "draw")])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_folders_that_are_somebody_elses(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png"), Output(tmp_path / "photos"):
        pass
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text("not ours\n")
    with pytest.raises(InputError, match="line 1"), Output(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output"), Output(tmp_path / "file"):
        pass


def test_one_run_at_a_time(tmp_path):
    with Output(tmp_path / "out"), pytest.raises(InputError, match="another run"), Output(tmp_path / "out"):
        pass
    with Output(tmp_path / "out") as output:
        assert output.begin([], []) == []
