"""Shipped graphs made hostile: inputs dropped, swapped, of other types, huge, tiny, linked to wrong sockets."""

import copy
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

from dev.hosts.base_folder import GRAPHS, for_tiny
from dev.hosts.server import needs_zimage

SIDE = 64  # pixels of pictures each way: 2 x 2 tokens
FEW = {
    "LLaDAUniDecode": {"steps": 3},
    "LLaDAUniImageQA": {"steps": 8, "max_new_tokens": 40},
    "LLaDAUniSampling": {"thinking_steps": 4, "thinking_length": 40},
    "LLaDAUniDecoderSchedule": {"steps": 3},
    "KSampler": {"steps": 3},
}
MARKER = "hostile-marker"  # in every path that a graph tries to reach; nothing of that name may appear
ANYTHING = "HostileAnything"  # a node of these tests whose output fits every socket

NUMBERS = [
    *(-1, 0, 1, 2, 3, 7, 31, 33, 100, 1000, 1001, 1025, 8224, 10**6, 3_000_000, 10**9, 2**31, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**308, -(2**63)),
    *(0.0, -0.0, 0.5, 0.999999, 1.0, 1.5, -0.1, 7.9, 1e-300, 1e308, -1e308, math.nan, math.inf, -math.inf),
]
TEXTS = [
    *(
        "",
        " ",
        "\n\t",
        "a",
        "8",
        "0.5",
        "true",
        "maybe",
        "None",
        "nan",
        "auto",
        "edit",
        "tiny",
        "\0",
        "nul\0l",
        "\ud800",
    ),
    *(
        "\u202e\u0631\u0645\u0632",
        "\U0001f600" * 50,
        "a\u0300" * 300,
        "<|mask|><boi><|/image|>",
        "%width%%year%",
        "x" * 300,
    ),
    *("x" * 100_000, "word " * 3000, "...", "..", ".", "/", "a/" * 600 + "b", f"../{MARKER}", f"../../../{MARKER}"),
    *(f"/tmp/{MARKER}", f"a/../../{MARKER}", "/etc/passwd", "../../../../etc/passwd", "..\\..\\" + MARKER, "CON"),
    *("tokens/llada", "file:///etc/passwd", "{}", "[]", "example.png", "gone.safetensors [output]", "tiny/../tiny"),
]
OTHERS = [
    None,
    True,
    False,
    {},
    {"a": 1},
    [],
    [1, 2, 3],
    ["1"],
    {"__value__": [1, 2]},
    {"__value__": "x"},
    [[]],
    {"": {}},
]
KINDS = [
    *("text", "number", "nothing", "list", "nan", "tensor", "huge tensor", "empty tensor", "dictionary", "object"),
    *("mask", "nan mask", "flag mask", "mask of 4", "huge mask", "empty mask", "sparse", "meta", "complex", "half"),
    *("one pixel", "no pixel", "five", "bytes", "huge batch", "wide", "nan image", "alpha", "long list"),
]

EDITED = ("tokens", "references", "piece", "tokens_1", "tokens_2")
EDITS = [
    ("LLaDAUniPadTokens", {"tokens": "tokens", "left": 32, "top": 0, "right": 0, "bottom": 64}),
    ("LLaDAUniCropTokens", {"tokens": "tokens", "left": 0, "top": 0, "width": 32, "height": 32}),
    ("LLaDAUniPasteTokens", {"tokens": "tokens", "piece": "tokens", "left": 0, "top": 0}),
    (
        "LLaDAUniVary",
        {
            **{"model": 0, "tokens": "tokens", "prompt": "a fox", "strength": 0.3, "count": 2, "choose": "by seed"},
            **{"steps": 2, "guidance": 2.0, "seed": 0},
        },
    ),
]
RETYPED = [kind for kind, _ in EDITS] + ["LLaDAUniJoinTokens", "LLaDAUniSaveTokens", "LLaDAUniPreviewTokens"]


def shipped(zimage: bool = False) -> dict[str, dict]:
    """Every shipped API graph by name, made small for the tiny checkpoint: a few rounds of each kind.

    Args:
        zimage: those too whose nodes only a host with Z-Image offers.
    """
    graphs = {path.stem: for_tiny(json.loads(path.read_text()), SIDE) for path in sorted(GRAPHS.glob("*.json"))}
    graphs = {name: graph for name, graph in graphs.items() if zimage or not needs_zimage(graph)}
    for graph in graphs.values():
        for data in graph.values():
            few = FEW.get(data["class_type"], {})
            data["inputs"] |= {name: value for name, value in few.items() if name in data["inputs"]}
    return graphs


def hostile(random: Random, graphs: dict[str, dict]) -> tuple[dict, str]:
    """A shipped graph with one to three things wrong, and what they are.

    Left out are two faults that are the host's own and end its worker: a link to a node that does not exist, and a link
    to a slot that does not exist on an input that no schema knows.
    """
    name = random.choice(sorted(graphs))
    graph, done = copy.deepcopy(graphs[name]), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        done.append(random.choice(MUTATIONS)(random, graph))
    return graph, f"{name}: {'; '.join(done)}"


def _of_ours(random: Random, graph: dict) -> tuple[str, dict]:
    """A node of this pack: its id and inputs."""
    ids = [node for node, data in graph.items() if data["class_type"].startswith("LLaDAUni")]
    node = random.choice(sorted(ids))
    return node, graph[node]["inputs"]


def _value(random: Random) -> Any:
    return random.choice(random.choice((NUMBERS, TEXTS, OTHERS)))


def _drop(random: Random, graph: dict) -> str:
    node, inputs = _of_ours(random, graph)
    if not inputs:
        return "nothing to drop"
    name = random.choice(sorted(inputs))
    del inputs[name]
    return f"{node}.{name} dropped"


def _replace(random: Random, graph: dict) -> str:
    node, inputs = _of_ours(random, graph)
    if not inputs:
        return "nothing to replace"
    name = random.choice(sorted(inputs))
    inputs[name] = _value(random)
    return f"{node}.{name} = {inputs[name]!r:.60}"


def _swap(random: Random, graph: dict) -> str:
    (one, first), (other, second) = _of_ours(random, graph), _of_ours(random, graph)
    if not first or not second:
        return "nothing to swap"
    a, b = random.choice(sorted(first)), random.choice(sorted(second))
    first[a], second[b] = second[b], first[a]
    return f"{one}.{a} and {other}.{b} swapped"


def _add(random: Random, graph: dict) -> str:
    node, inputs = _of_ours(random, graph)
    optional = [
        "references",
        "sampling",
        "sprint",
        "image",
        "tokens",
        "one_by_one",
        "pixels",
        "tokens_3",
        "self",
        "cls",
    ]
    name = random.choice([*optional, "input_types", "kwargs", "\u00e9", "", "a.b", "__class__"])
    value = _value(random)
    inputs[name] = value if not isinstance(value, list) else tuple(value) and None
    return f"{node}.{name} added: {inputs[name]!r:.60}"


def _link(random: Random, graph: dict) -> str:
    node, inputs = _of_ours(random, graph)
    if not inputs:
        return "nothing to link"
    name, slot = random.choice(sorted(inputs)), random.choice((0, 0, 0, 1, 2, 99, -1, 0.5, "0", None))
    inputs[name] = [random.choice(sorted(graph)), slot]
    return f"{node}.{name} linked to {inputs[name]}"


def _anything(random: Random, graph: dict) -> str:
    node, inputs = _of_ours(random, graph)
    if not inputs:
        return "nothing to link"
    name, kind = random.choice(sorted(inputs)), random.choice(KINDS)
    graph["anything"] = {"class_type": ANYTHING, "inputs": {"kind": kind}}
    inputs[name] = ["anything", 0]
    return f"{node}.{name} is handed {kind}"


def _retype(random: Random, graph: dict) -> str:
    node, _ = _of_ours(random, graph)
    known = sorted({data["class_type"] for data in graph.values()})
    graph[node]["class_type"] = random.choice([*known, *RETYPED, "LLaDAUniPaint", ""])
    return f"{node} is {graph[node]['class_type']!r}"


def _edit_tokens(random: Random, graph: dict) -> str:
    """What takes tokens takes them from a node that edits them, whose own inputs are whatever they are."""
    takers = [(node, name) for node, data in sorted(graph.items()) for name in EDITED if _linked(data, name)]
    if not takers:
        return "nothing to edit"
    node, name = random.choice(takers)
    source = graph[node]["inputs"][name]
    kind, inputs = random.choice(EDITS)
    loader = sorted(at for at, data in graph.items() if data["class_type"] == "LLaDAUniLoader")
    given = {key: source if value == "tokens" else value for key, value in inputs.items()}
    given |= {"model": [loader[0], 0]} if loader and "model" in given else {}
    if random.random() < 0.7:
        changed = random.choice(sorted(given))
        given[changed] = _value(random)
        kind_of_change = f" with {changed} = {given[changed]!r:.60}"
    else:
        kind_of_change = ""
    made = f"edited {len(graph)}"
    graph[made] = {"class_type": kind, "inputs": given}
    graph[node]["inputs"][name] = [made, 0]
    return f"{node}.{name} through {kind}{kind_of_change}"


def _linked(data: dict, name: str) -> bool:
    return data["class_type"].startswith("LLaDAUni") and isinstance(data["inputs"].get(name), list)


def _join_again(random: Random, graph: dict) -> str:
    """Tokens joined with themselves again and again: four times as many after each node."""
    takers = [(node, name) for node, data in sorted(graph.items()) for name in EDITED if _linked(data, name)]
    if not takers:
        return "nothing to join"
    node, name = random.choice(takers)
    source, count = graph[node]["inputs"][name], random.choice((1, 2, 12, 40))
    for index in range(count):
        links = {f"tokens_{at}": source for at in range(1, 5)}
        graph[f"join {index}"] = {"class_type": "LLaDAUniJoinTokens", "inputs": links}
        source = [f"join {index}", 0]
    graph[node]["inputs"][name] = source
    return f"{node}.{name} joined {count} times"


def _save_tokens(random: Random, graph: dict) -> str:
    sources = [node for node, data in graph.items() if data["class_type"] in ("LLaDAUniSample", "LLaDAUniEncode")]
    prefix = random.choice(TEXTS)
    if not sources:
        return "nothing to save"
    inputs = {"tokens": [random.choice(sorted(sources)), 0], "filename_prefix": prefix}
    graph["keep"] = {"class_type": "LLaDAUniSaveTokens", "inputs": inputs}
    return f"tokens saved as {prefix!r:.60}"


def _load_tokens(random: Random, graph: dict) -> str:
    node, inputs = _of_ours(random, graph)
    places = [name for name in ("tokens", "references", "image") if name in inputs] or ["references"]
    graph["file"] = {"class_type": "LLaDAUniLoadTokens", "inputs": {"file": _value(random)}}
    inputs[random.choice(places)] = ["file", 0]
    return f"{node} takes the token file {graph['file']['inputs']['file']!r:.60}"


MUTATIONS: list[Callable[[Random, dict], str]] = [
    *(_drop, _replace, _replace, _replace, _replace, _swap, _add, _link, _link),
    *(_anything, _anything, _anything, _retype, _save_tokens, _load_tokens, _edit_tokens, _edit_tokens, _join_again),
]
