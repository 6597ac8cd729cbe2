"""The README's programs run as they are written."""

import json
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from dev.hosts.base_folder import ROOT


def programs() -> list[str]:
    """The README's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def run(program: str) -> str:
    """What a program says, run in the pack's folder."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_engine_runs_from_python_on_the_miniature():
    (program,) = (text for text in programs() if "LLaDAUni(" in text)
    usage, answer = run(program).splitlines()
    assert usage.startswith("64 tokens in ")
    assert "green circle" in answer
    assert "red square" in answer


@pytest.mark.parametrize("status", [200, 400])
def test_the_request_is_sent_and_a_refusal_is_told(status):
    (program,) = (text for text in programs() if "urllib.request.Request" in text)
    taken = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"the reason" if status == 400 else b"queued")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = run(program.replace("127.0.0.1:8188", f"127.0.0.1:{server.server_port}"))
    finally:
        server.shutdown()
    assert said.strip() == ("the reason" if status == 400 else "queued")
    prompts = [node["inputs"].get("prompt") for node in taken[0]["prompt"].values()]
    assert "a small green circle to the left of a large red square on a white background" in prompts
