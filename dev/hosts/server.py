"""A real ComfyUI as users drive it: a server in a process of its own, HTTP and a websocket."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import websocket

from .base_folder import ROOT, make_base

ZIMAGE_NODES = ("LLaDAUniDecoderModel", "LLaDAUniConditioning", "LLaDAUniDecoderGuidance", "LLaDAUniDecoderSchedule")
PACK = "llada-uni"  # the folder name under custom_nodes
START_SECONDS = 180


def find_comfyui() -> Path | None:
    """The ComfyUI to test against: COMFYUI_PATH, or two levels up when the pack sits in its custom_nodes."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not (Path(named) / "main.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH: found {named!r} without a main.py; expected a ComfyUI folder.")
        return Path(named).resolve()
    above = ROOT.parent.parent
    return above if ROOT.parent.name == "custom_nodes" and (above / "main.py").is_file() else None


def find_python(comfyui: Path) -> str:
    """The Python that runs it: COMFYUI_PYTHON, a virtual environment inside its folder, or this one."""
    named = os.environ.get("COMFYUI_PYTHON")
    inside = [comfyui / name / "bin" / "python" for name in ("venv", ".venv")]
    return named or next((str(path) for path in inside if path.is_file()), sys.executable)


def knows_zimage(comfyui: Path) -> bool:
    """Whether a ComfyUI has the model that Load Decoder and the nodes around it need."""
    return "class ZImage(" in (comfyui / "comfy" / "supported_models.py").read_text(encoding="utf-8")


def needs_zimage(graph: dict) -> bool:
    """Whether an API graph has nodes that only such a ComfyUI offers."""
    return any(node["class_type"] in ZIMAGE_NODES for node in graph.values())


@dataclass
class Run:
    """One finished prompt.

    Attributes:
        prompt_id: the host's id of it.
        status: "success", "error" or "interrupted".
        outputs: node id -> what the node showed ({"images": [...]}, {"text": [...]}).
        messages: all websocket messages in order; binary ones as ("binary", bytes).
        error: the data of an execution_error message, {} else.
    """

    prompt_id: str
    status: str = ""
    outputs: dict = field(default_factory=dict)
    messages: list[tuple[str, Any]] = field(default_factory=list)
    error: dict = field(default_factory=dict)

    def of(self, kind: str) -> list[Any]:
        """The data of all messages of a kind."""
        return [data for name, data in self.messages if name == kind]

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that ran, in order."""
        return [data["node"] for data in self.of("executing") if data["node"] is not None]


class Rejected(Exception):
    """POST /prompt answered 400; `answer` is its JSON."""

    def __init__(self, answer: dict):
        super().__init__(json.dumps(answer)[:2000])
        self.answer = answer


class ComfyServer:
    """A running ComfyUI with only this pack.

    Args:
        comfyui: its folder.
        base: folder for models, input, output and the log; see `make_base`.
        arguments: more command line arguments, after those of COMFYUI_OPTIONS ("--cpu" where that is not set).
        environment: what its environment has beside this process's.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        arguments: tuple[str, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        self.base = make_base(base)
        link = self.base / "custom_nodes" / PACK
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = self.base / "server.log"
        command = [find_python(comfyui), str(Path(__file__).with_name("launch.py")), str(comfyui / "main.py")]
        command += shlex.split(os.environ.get("COMFYUI_OPTIONS", "--cpu"))
        command += ["--port", str(self.port), "--base-directory", str(self.base), "--disable-auto-launch"]
        with self.log_file.open("wb") as log:
            whole = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
            self._process = subprocess.Popen(
                [*command, *arguments], cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=whole
            )
        self._wait()

    def __enter__(self) -> "ComfyServer":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """All it has logged."""
        return self.log_file.read_text(errors="replace")

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        for _ in range(START_SECONDS * 2):
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at its start:\n{self.log[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not answer in {START_SECONDS} s:\n{self.log[-3000:]}")

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        """The bytes at a path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def post(self, path: str, data: dict | None = None) -> Any:
        """POST JSON. Raises Rejected on 400."""
        body = json.dumps(data or {}).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise Rejected(json.loads(error.read())) from error
        return json.loads(text) if text else None

    def run(
        self, graph: dict, on_message: Callable[[str, Any], None] = lambda kind, data: None, timeout: float = 300
    ) -> Run:
        """Queue an API graph and wait for its end.

        Args:
            graph: node id -> {"class_type", "inputs"}.
            on_message: called with every message as it comes.
            timeout: seconds without any message.
        """
        client = uuid.uuid4().hex
        socket_ = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=timeout)
        try:
            run = Run(self.post("/prompt", {"prompt": graph, "client_id": client})["prompt_id"])
            while not run.status:
                self._take(socket_.recv(), run, on_message)
        finally:
            socket_.close()
        run.outputs = self._history(run.prompt_id).get("outputs", {})
        return run

    def _take(self, message: str | bytes, run: Run, on_message: Callable[[str, Any], None]) -> None:
        if isinstance(message, bytes):
            kind, data = "binary", message
        else:
            parsed = json.loads(message)
            kind, data = parsed["type"], parsed["data"]
        run.messages.append((kind, data))
        on_message(kind, data)
        if kind == "execution_error":
            run.status, run.error = "error", data
        elif kind == "execution_interrupted":
            run.status = "interrupted"
        elif kind == "execution_success":
            run.status = "success"

    def _history(self, prompt_id: str) -> dict:
        for _ in range(100):  # written a moment after the last message
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.05)
        raise RuntimeError(f"no history for prompt {prompt_id}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
