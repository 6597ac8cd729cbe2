"""What a graph leaves behind: saved pictures and shown texts, whichever host ran it."""

from pathlib import Path

from .server import ComfyServer, Run

Shown = tuple[list[Path], list[str]]  # picture files and texts, in the order of the graph


def of_process(graph: dict, done: dict[str, list[tuple]]) -> Shown:
    """From what `InProcessHost.run` returns."""
    saves = [done[node] for node, data in graph.items() if data["class_type"] == "SaveImage"]
    pictures = [Path(file) for calls in saves for call in calls[:1] for file in call]
    return pictures, [call[0] for node, data in graph.items() if _shows_text(data) for call in done[node]]


def of_server(graph: dict, done: Run, server: ComfyServer) -> Shown:
    """From what `ComfyServer.run` returns. Raises RuntimeError with the node's message where the run failed."""
    if done.status != "success":
        raise RuntimeError(f"{done.error.get('node_type')}: {done.error.get('exception_message', done.status)}")
    pictures, texts = [], []
    for node, data in graph.items():
        shown = done.outputs.get(node, {})
        saved = [image for image in shown.get("images", []) if image["type"] == "output"]
        pictures += [server.base / "output" / image["subfolder"] / image["filename"] for image in saved]
        texts += shown.get("text", []) if _shows_text(data) else []
    return pictures, texts


def _shows_text(node: dict) -> bool:
    return node["class_type"] == "PreviewAny"
