"""scripts/queue_graph.py against servers that break connections, and against a real ComfyUI."""

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from dev.hosts.base_folder import GRAPHS, for_tiny

SCRIPT = Path(__file__).parents[2] / "scripts" / "queue_graph.py"
GRAPH = {"1": {"class_type": "LLaDAUniSample", "inputs": {"prompt": ""}}}


class BreakingServer:
    """Takes work as ComfyUI does, and drops the connection at chosen POSTs, before or after it took the work."""

    def __init__(self, drops: list[str], moves_late: bool = False, node_errors: dict | None = None, others: int = 0):
        self.drops = drops
        self.node_errors = node_errors or {}
        self.others = others  # jobs of other people before ours
        self.withdrawn: list[str] = []
        self.queued: list[dict] = []
        self.looks = 2 if moves_late else 0  # answers of the history after which the work has left the queue for it

    async def prompt(self, request: web.Request) -> web.Response:
        drop = self.drops.pop(0) if self.drops else ""
        if drop != "before":
            self.queued.append(await request.json())
        if drop:
            request.transport.close()
        answer = {"prompt_id": self.queued[-1]["prompt_id"], "node_errors": self.node_errors} if self.queued else {}
        return web.json_response(answer)

    async def queue(self, request: web.Request) -> web.Response:
        ours = [[9, work["prompt_id"]] for work in self.queued] if self.looks else []
        if not self.others:
            return web.json_response({"queue_running": ours, "queue_pending": []})
        waiting = [*ours, *([number, f"theirs-{number}"] for number in range(1, self.others))]
        return web.json_response({"queue_running": [[0, "theirs-0"]], "queue_pending": waiting})

    async def withdraw(self, request: web.Request) -> web.Response:
        self.withdrawn += (await request.json())["delete"]
        return web.Response()

    async def history(self, request: web.Request) -> web.Response:
        done = {"status": {"status_str": "success", "messages": []}, "outputs": {"1": {"text": ["done"]}}}
        ids = [] if self.looks else [work["prompt_id"] for work in self.queued]
        if self.queued and self.looks:
            self.looks -= 1
        return web.json_response({request.match_info["id"]: done} if request.match_info["id"] in ids else {})

    async def ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for _ in socket:
            pass
        return socket

    @contextlib.asynccontextmanager
    async def running_at(self):
        """The server's address."""
        app = web.Application()
        app.router.add_post("/prompt", self.prompt)
        app.router.add_get("/queue", self.queue)
        app.router.add_post("/queue", self.withdraw)
        app.router.add_get("/history/{id}", self.history)
        app.router.add_get("/ws", self.ws)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        finally:
            await runner.cleanup()


async def queue(*arguments: str) -> tuple[int, str]:
    """Run the example; its exit status and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode, said.decode()


@pytest.mark.parametrize("drops", [[], ["before"], ["after"], ["before", "before", "after"]], ids="-".join)
def test_work_is_queued_once_however_the_connection_breaks(tmp_path, drops):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    server = BreakingServer(drops)

    async def scenario():
        async with server.running_at() as url:
            return await queue(
                str(tmp_path / "graph.json"), "--server", url, "--prompt", "a fox", "--out", str(tmp_path / "results")
            )

    status, said = asyncio.run(scenario())
    assert status == 0, said
    assert len(server.queued) == 1
    assert server.queued[0]["prompt"]["1"]["inputs"]["prompt"] == "a fox"
    assert (tmp_path / "results" / "node-1.txt").read_text() == "done\n"


def test_work_that_ends_between_two_looks_is_not_taken_for_lost(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    server = BreakingServer([], moves_late=True)

    async def scenario():
        async with server.running_at() as url:
            return await queue(str(tmp_path / "graph.json"), "--server", url, "--out", str(tmp_path / "results"))

    status, said = asyncio.run(scenario())
    assert status == 0, said
    assert len(server.queued) == 1


def run_on(server: BreakingServer, tmp_path: Path, *arguments: str, graph: object = GRAPH) -> tuple[int, str]:
    """Queue a graph on the server; status and what was said."""
    (tmp_path / "graph.json").write_text(json.dumps(graph))

    async def scenario():
        async with server.running_at() as url:
            here = ["--server", url.removeprefix("http://"), "--out", str(tmp_path / "out")]  # no scheme is needed
            return await queue(str(tmp_path / "graph.json"), *here, *arguments)

    return asyncio.run(scenario())


def test_a_graph_of_which_the_server_would_leave_out_a_part_fails_and_is_withdrawn(tmp_path):
    small = {"type": "value_smaller_than_min", "message": "Value 0 smaller than min of 1", "details": "steps"}
    server = BreakingServer([], node_errors={"6": {"class_type": "LLaDAUniSample", "errors": [small]}})
    status, said = run_on(server, tmp_path)
    assert status == 1
    assert "node 6 (LLaDAUniSample): steps: Value 0 smaller than min of 1" in said
    assert server.withdrawn == [server.queued[0]["prompt_id"]]


def test_waiting_behind_others_is_said(tmp_path):
    status, said = run_on(BreakingServer([], moves_late=True, others=3), tmp_path)
    assert status == 0, said
    assert "waiting behind 3 other jobs" in said


TWO = GRAPH | {"7": {"class_type": "LLaDAUniImageQA", "inputs": {"question": "Why?"}}}
CANVAS = {"nodes": [], "links": [], "version": 0.4}


@pytest.mark.parametrize(
    ("arguments", "graph", "expected"),
    [
        (["--prompt", "a fox"], TWO, 'choose with --set 1.prompt="..." or --set 7.question="..."'),
        (["--prompt", "a fox"], {"1": {"class_type": "SaveImage", "inputs": {}}}, "this graph has no prompt to set"),
        ([], CANVAS, "a graph of the canvas; expected the API form"),
        ([], [1, 2], "no API graph"),
        (["--image", "nowhere.png"], GRAPH, "--image nowhere.png: No such file or directory"),
        (["--out", __file__], GRAPH, f"--out {__file__}: File exists; expected a folder"),
        (["--server", "ftp://here"], GRAPH, "expected an address such as http://127.0.0.1:8188"),
    ],
)
def test_what_cannot_be_queued_is_one_line_that_says_why(arguments, graph, expected, tmp_path):
    server = BreakingServer([])
    status, said = run_on(server, tmp_path, *arguments, graph=graph)
    assert status == 1
    assert expected in said
    assert len([line for line in said.strip().splitlines() if not line.startswith("id ")]) == 1
    assert server.queued == []


def test_one_prompt_among_linked_ones_is_the_prompt(tmp_path):
    linked = {"class_type": "LLaDAUniSample", "inputs": {"prompt": ["1", 1]}}
    server = BreakingServer([])
    status, said = run_on(server, tmp_path, "--prompt", "a fox", graph=GRAPH | {"2": linked})
    assert status == 0, said
    assert server.queued[0]["prompt"]["1"]["inputs"]["prompt"] == "a fox"
    assert server.queued[0]["prompt"]["2"]["inputs"]["prompt"] == ["1", 1]


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    status, said = asyncio.run(queue(str(tmp_path / "none.json")))
    assert status == 1
    assert "none.json: No such file or directory" in said
    assert len(said.strip().splitlines()) == 1


def test_a_server_that_never_answers_is_an_error_that_says_so(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    status, said = asyncio.run(queue(str(tmp_path / "graph.json"), "--server", "http://127.0.0.1:9"))
    assert status == 1
    assert "no connection to the server" in said


def test_values_for_inputs_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    status, said = asyncio.run(queue(str(tmp_path / "graph.json"), "--set", "9.seed=1"))
    assert status == 1
    assert "--set 9.seed=1" in said


def test_a_real_server_edits_a_picture(comfy_server, tmp_path):
    graph = for_tiny(json.loads((GRAPHS / "edit.json").read_text()), side=64)
    (tmp_path / "edit.json").write_text(json.dumps(graph))
    picture = comfy_server.base / "input" / "example.png"
    arguments = ["--server", comfy_server.url, "--prompt", "make it blue", "--image", str(picture)]
    status, said = asyncio.run(queue(str(tmp_path / "edit.json"), *arguments, "--out", str(tmp_path / "results")))
    assert status == 0, said
    assert "of" in said  # progress
    assert list((tmp_path / "results").glob("*.png"))


def test_a_refused_graph_is_told_why(comfy_server, tmp_path):
    graph = for_tiny(json.loads((GRAPHS / "text-to-image.json").read_text()), side=64)
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    status, said = asyncio.run(queue(str(tmp_path / "graph.json"), "--server", comfy_server.url, "--prompt", " "))
    assert status == 1
    assert said.count("prompt: found nothing") == 1


def test_a_part_that_a_real_server_leaves_out_is_a_failure(comfy_server, tmp_path):
    graph = for_tiny(json.loads((GRAPHS / "sprint-side-by-side.json").read_text()), side=64)
    samples = [number for number, node in graph.items() if node["class_type"] == "LLaDAUniSample"]
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    status, said = asyncio.run(
        queue(str(tmp_path / "graph.json"), "--server", comfy_server.url, "--set", f"{samples[1]}.steps=0")
    )
    assert status == 1
    assert "Value 0 smaller than min of 1" in said
