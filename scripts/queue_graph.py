"""Queue an API graph on a ComfyUI server, watch it, and save what it makes.

    python scripts/queue_graph.py workflows/api/text-to-image.json --prompt "a red fox in the snow"
    python scripts/queue_graph.py workflows/api/edit.json --prompt "make it night" --image photo.png --out results
    python scripts/queue_graph.py workflows/api/miniature.json --set 2.prompt="a red circle on a white background"

Needs Python 3.10 and aiohttp, which ComfyUI itself brings. The work gets its id here, before it is sent: when a
connection breaks, the server is asked whether it has that id, and the graph is sent again only where it has not.
"""

import argparse
import asyncio
import hashlib
import json
import sys
import uuid
from pathlib import Path

import aiohttp

# Node class -> the input that --prompt sets.
PROMPTS = {"LLaDAUniSample": "prompt", "LLaDAUniImageQA": "question", "LLaDAUniInterleave": "instruction"}
LOST = (aiohttp.ClientConnectionError, aiohttp.ServerDisconnectedError, asyncio.TimeoutError)
TRIES = 5


class Failed(Exception):
    """The server refused or failed the work; the text says why."""


async def main(arguments: argparse.Namespace) -> int:
    """Queue, watch, save; returns the exit status."""
    prompt_id = arguments.id or str(uuid.uuid4())
    try:
        graph = read_graph(Path(arguments.graph))
        pictures = [read_picture(Path(file)) for file in arguments.image]
        folder = make_folder(Path(arguments.out))
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(address(arguments.server), timeout=timeout) as session:
            names = [await patiently(lambda given=given: upload(session, *given)) for given in pictures]
            fill_in(graph, arguments.prompt, names, arguments.set)
            print(f"id {prompt_id}")
            await queue_once(session, graph, prompt_id)
            history = await follow(session, prompt_id)
            for saved in await save(session, history, folder):
                print(saved)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def read_graph(file: Path) -> dict:
    """An API graph: node id -> {"class_type", "inputs"}."""
    try:
        graph = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Failed(f"{file}: {error.strerror}; expected a graph such as workflows/api/text-to-image.json") from error
    except ValueError as error:
        raise Failed(f"{file}: no JSON ({error}); expected a graph such as those of workflows/api/") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise Failed(f"{file}: a graph of the canvas; expected the API form: File -> Export (API), or workflows/api/")
    nodes = list(graph.values()) if isinstance(graph, dict) else [None]
    if not all(isinstance(node, dict) and {"class_type", "inputs"} <= node.keys() for node in nodes):
        raise Failed(f"{file}: no API graph; every node needs a class_type and inputs")
    return graph


def read_picture(file: Path) -> tuple[str, bytes]:
    """Name and contents of a picture to send."""
    try:
        return file.name, file.read_bytes()
    except OSError as error:
        raise Failed(f"--image {file}: {error.strerror}") from error


def make_folder(folder: Path) -> Path:
    """The folder for results; it is there before anything is queued."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(f"--out {folder}: {error.strerror}; expected a folder, or the name of a new one") from error
    return folder


def address(server: str) -> str:
    """The server's address with its scheme."""
    whole = server if "://" in server else f"http://{server}"
    if not whole.startswith(("http://", "https://")) or not whole.partition("://")[2].strip("/"):
        raise Failed(f"--server {server}: expected an address such as http://127.0.0.1:8188")
    return whole


def fill_in(graph: dict, prompt: str | None, images: list[str], settings: list[str]) -> None:
    """Put the caller's values into a graph: the prompt, the images in the order of the LoadImage nodes, the rest."""
    if prompt is not None:
        set_prompt(graph, prompt)
    loaders = [node for _, node in sorted(graph.items()) if node["class_type"] == "LoadImage"]
    if len(images) > len(loaders):
        raise Failed(f"--image: {len(images)} images for a graph with {len(loaders)} LoadImage nodes")
    for node, name in zip(loaders, images, strict=False):
        node["inputs"]["image"] = name
    for setting in settings:
        target, found, value = setting.partition("=")
        node, _, name = target.partition(".")
        if not found or node not in graph or name not in graph[node]["inputs"]:
            raise Failed(f"--set {setting}: expected NODE.INPUT=VALUE with a node and an input of the graph")
        try:
            graph[node]["inputs"][name] = json.loads(value)
        except ValueError:
            graph[node]["inputs"][name] = value


def set_prompt(graph: dict, prompt: str) -> None:
    """Put the prompt where there is one place for it. Raises Failed where there is none or a choice."""
    found = [
        (number, PROMPTS[node["class_type"]])
        for number, node in graph.items()
        if node["class_type"] in PROMPTS and not isinstance(node["inputs"].get(PROMPTS[node["class_type"]]), list)
    ]
    if not found:
        raise Failed("--prompt: this graph has no prompt to set")
    if len(found) > 1:
        places = " or ".join(f'--set {number}.{name}="..."' for number, name in found)
        raise Failed(f"--prompt: this graph has {len(found)} prompts; choose with {places}")
    ((number, name),) = found
    graph[number]["inputs"][name] = prompt


async def patiently(work):
    """What `work()` returns, tried again while the connection breaks."""
    for attempt in range(TRIES - 1):
        try:
            return await work()
        except LOST:
            await asyncio.sleep(2**attempt / 4)
    try:
        return await work()
    except LOST as lost:
        raise Failed(f"no connection to the server: {lost or type(lost).__name__}") from lost


async def upload(session: aiohttp.ClientSession, name: str, data: bytes) -> str:
    """Send an image; returns its name on the server. The name is of its contents: twice is as good as once."""
    form = aiohttp.FormData({"overwrite": "true", "subfolder": "queued"})
    form.add_field("image", data, filename=f"{hashlib.sha256(data).hexdigest()[:16]}{Path(name).suffix}")
    async with session.post("/upload/image", data=form) as answer:
        if answer.status != 200:
            raise Failed(f"{name}: the server refused the image ({answer.status})")
        stored = await answer.json()
    return f"{stored['subfolder']}/{stored['name']}"


async def queue_once(session: aiohttp.ClientSession, graph: dict, prompt_id: str) -> None:
    """Have the work queued, once, however often the connection breaks."""

    async def attempt() -> None:
        if await known(session, prompt_id):
            return
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": prompt_id}
        async with session.post("/prompt", json=body) as answer:
            told = await reason(answer)
        if answer.status != 200:
            raise Failed(describe(told, "the server refused the graph"))
        if told.get("node_errors"):
            # The server takes a graph without the outputs that it cannot run.
            await withdraw(session, prompt_id)
            raise Failed(describe(told, "the server would leave out a part of the graph, so it was withdrawn"))

    await patiently(attempt)


async def reason(answer: aiohttp.ClientResponse) -> dict:
    """What the server says of a graph, whatever form it says it in."""
    text = await answer.text()
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    return told if isinstance(told, dict) else {"error": {"message": f"status {answer.status}: {text[:200]}"}}


async def withdraw(session: aiohttp.ClientSession, prompt_id: str) -> None:
    """Take the work back: out of the queue, or stopped where it has begun."""
    async with session.post("/queue", json={"delete": [prompt_id]}):
        pass
    async with session.get("/queue") as answer:
        running = (await answer.json())["queue_running"]
    if any(item[1] == prompt_id for item in running):
        async with session.post("/interrupt", json={"prompt_id": prompt_id}):
            pass


async def known(session: aiohttp.ClientSession, prompt_id: str) -> bool:
    """Whether the server has the work: waiting, running or done."""
    if await ahead(session, prompt_id) is not None:
        return True
    # In this order: work leaves the queue for the history, never the other way.
    return await finished(session, prompt_id) is not None


async def ahead(session: aiohttp.ClientSession, prompt_id: str) -> int | None:
    """How many jobs run before this one, 0 where it is running; None where it is not in the queue."""
    async with session.get("/queue") as answer:
        queue = await answer.json()
    if any(item[1] == prompt_id for item in queue["queue_running"]):
        return 0
    # The server's heap is no order; its first entries are.
    waiting = sorted(queue["queue_pending"], key=lambda item: item[0])
    for place, item in enumerate(waiting):
        if item[1] == prompt_id:
            return len(queue["queue_running"]) + place
    return None


async def finished(session: aiohttp.ClientSession, prompt_id: str) -> dict | None:
    """The history of the work once it is done."""
    async with session.get(f"/history/{prompt_id}") as answer:
        return (await answer.json()).get(prompt_id)


async def follow(session: aiohttp.ClientSession, prompt_id: str) -> dict:
    """Show progress until the work is done; returns its history. Raises Failed where it failed."""

    said = 0

    async def watch() -> dict:
        nonlocal said
        async with session.ws_connect("/ws", params={"clientId": prompt_id}, heartbeat=20) as messages:
            while True:
                # The end may have come before the connection did.
                done = await finished(session, prompt_id)
                if done is not None:
                    return done
                jobs = await ahead(session, prompt_id)
                if jobs is None and await finished(session, prompt_id) is None:
                    raise Failed("the server no longer has this work; it may have been restarted or cleared")
                if jobs and jobs != said:
                    print(f"  waiting behind {jobs} other {'job' if jobs == 1 else 'jobs'}", file=sys.stderr)
                said = jobs or 0
                try:
                    show(await messages.receive(timeout=5))
                except asyncio.TimeoutError:
                    continue

    history = await patiently(watch)
    status = history["status"]
    if status["status_str"] != "success":
        errors = [data for kind, data in status["messages"] if kind in ("execution_error", "execution_interrupted")]
        text = errors[-1].get("exception_message", "interrupted") if errors else "no reason given"
        raise Failed(f"the work failed: {text.strip()}")
    return history


def show(message: aiohttp.WSMessage) -> None:
    """Print one progress message."""
    if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
        raise aiohttp.ServerDisconnectedError("the websocket closed")
    if message.type != aiohttp.WSMsgType.TEXT:
        return
    event = json.loads(message.data)
    if event["type"] == "progress":
        data = event["data"]
        print(f"  node {data['node']}: {data['value']} of {data['max']}", file=sys.stderr)


async def save(session: aiohttp.ClientSession, history: dict, folder: Path) -> list[Path]:
    """Write every saved image and every shown text into a folder; returns the files."""
    files = []
    for node, outputs in history["outputs"].items():
        for image in outputs.get("images", []):
            if image["type"] != "output":
                continue

            async def download(image=image) -> bytes:
                async with session.get("/view", params=image) as answer:
                    answer.raise_for_status()
                    return await answer.read()

            files.append(folder / Path(image["filename"]).name)
            files[-1].write_bytes(await patiently(download))
        if outputs.get("text"):
            files.append(folder / f"node-{node}.txt")
            files[-1].write_text("\n".join(map(str, outputs["text"])) + "\n", encoding="utf-8")
    return files


def describe(refusal: dict, otherwise: str) -> str:
    """What a refused graph is told, a line for each reason.

    Args:
        refusal: the server's answer.
        otherwise: the first line where the answer has none.
    """
    lines = [(refusal.get("error") or {}).get("message") or otherwise]
    for node, errors in (refusal.get("node_errors") or {}).items():
        for error in errors["errors"]:
            told, details = error.get("message", ""), error.get("details", "")
            if error.get("type") == "custom_validation_failed":
                # "INPUT - what the node says", once for each input that the node looks at.
                told = details.partition(" - ")[2] or f"{details}: {told}"
            elif details:
                told = f"{details}: {told}"
            lines.append(f"  node {node} ({errors['class_type']}): {told}")
    return "\n".join(dict.fromkeys(lines))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", help="an API graph, such as one of workflows/api/")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="default: %(default)s")
    parser.add_argument("--prompt", help="what to draw, change, ask or tell: the one prompt of the graph")
    parser.add_argument("--image", action="append", default=[], help="an image for a LoadImage node, in order")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="any other input")
    parser.add_argument("--out", default="results", help="folder for the results; default: %(default)s")
    parser.add_argument("--id", help="take up work that was queued before, by the id that was printed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(parse())))
