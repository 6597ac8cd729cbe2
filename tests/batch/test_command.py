"""The command line: without Ray, and what it says before any starts."""

import re
import subprocess
import sys
from pathlib import Path

from llada_core.batch.command import main
from llada_core.batch.requests import read_requests

ROOT = Path(__file__).parents[2]
DRAW = {"id": "a", "kind": "draw", "prompt": "a red circle"}


def test_without_ray_one_line_says_what_to_install(write, tmp_path):
    program = "import sys; sys.modules['ray'] = None; from llada_core.batch.command import main; sys.exit(main())"
    command = [sys.executable, "-c", program, str(write(DRAW)), str(tmp_path / "out"), "--checkpoint", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install -r requirements-ray.txt" in line
    assert not (tmp_path / "out").exists()


def test_nothing_else_imports_ray():
    program = "import sys, llada_core.batch.command, llada_core.batch.worker; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_check_says_what_is_wrong_and_writes_nothing(write, tmp_path, capsys):
    path = write(DRAW, {**DRAW, "id": "b", "height": 100})
    assert main([str(path), str(tmp_path / "out"), "--check"]) == 3
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("line 2: height")
    assert said[1] == "1 requests can be run, 1 are wrong"
    assert not (tmp_path / "out").exists()
    assert main([str(write(DRAW)), str(tmp_path / "out"), "--check"]) == 0
    assert main([str(tmp_path / "nothing.jsonl"), str(tmp_path / "out"), "--check"]) == 1


def test_the_pages_example_is_right(tmp_path):
    """docs/batch.md: its requests can be read; test_on_ray.py runs such a command."""
    page = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    (tmp_path / "requests.jsonl").write_text(re.search(r"<<'END'\n(.*?)END\n", page, re.DOTALL)[1], encoding="utf-8")
    requests, wrong = read_requests(tmp_path / "requests.jsonl")
    assert ([request.kind for request in requests], wrong) == (["draw", "think"], [])
