"""Lines of a file of requests: what is wrong with one is said of that one, and the rest can be run."""

import json
from pathlib import Path

import pytest

from llada_core import Decoding, Guidance, InputError, Sampling, Sprint
from llada_core.batch.requests import FIELDS, batches, parse, read_requests

DRAW = {"id": "a", "kind": "draw", "prompt": "a red circle"}
ASK = {"id": "a", "kind": "ask", "question": "What is it?"}
EDIT = {"id": "a", "kind": "edit", "prompt": "make it blue", "images": "photo.png"}
DECODE = {"id": "a", "kind": "decode", "tokens": "one.safetensors"}


def test_what_a_request_leaves_out_is_the_engines_default(files):
    request = parse(DRAW, files)
    assert (request.text, request.size, request.seed) == ("a red circle", (1024, 1024), 0)
    assert (request.sampling, request.guidance, request.sprint) == (None, None, None)
    assert request.decoding == Decoding()


def test_every_field_arrives(files):
    options = {"sampling": {"steps": 4, "temperature": 0.5}, "guidance": {"rescale": 0.5}, "sprint": {"warmup": 2}}
    drawn = parse(DRAW | options | {"height": 64, "width": 96, "seed": 7, "decoding": {"turbo": False}}, files)
    assert drawn.size == (64, 96)
    assert drawn.sampling == Sampling(steps=4, temperature=0.5)
    assert (drawn.guidance, drawn.sprint) == (Guidance(rescale=0.5), Sprint(warmup=2))
    assert drawn.decoding == Decoding(turbo=False, seed=7), "the request's seed is the decoder's too"
    assert parse(DRAW | {"decoding": None}, files).decoding is None
    assert parse(DRAW | {"seed": 7, "decoding": {"seed": 3}}, files).decoding == Decoding(seed=3)
    assert parse(EDIT | {"guidance": {"image": 1}}, files).guidance == Guidance(text=4.0, image=1)
    asked = parse(ASK | {"images": ["photo.png", "two.safetensors"], "max_new_tokens": 9}, files)
    assert [path.name for path in asked.images] == ["photo.png", "two.safetensors"]
    assert asked.max_new_tokens == 9
    assert parse(DECODE | {"seed": 5}, files).decoding == Decoding(seed=5)


WRONG = [
    ({**DRAW, "kind": "paint"}, "kind"),
    ({**DRAW, "kind": ["draw"]}, "kind"),
    ({"id": "a", "prompt": "x"}, "kind"),
    ({**DRAW, "id": 7}, "id"),
    ({**DRAW, "id": "../a"}, "id"),
    ({**DRAW, "id": "a."}, "id"),
    ({**DRAW, "id": "a" * 101}, "id"),
    ({"kind": "draw", "prompt": "x"}, "id"),
    ({**DRAW, "hieght": 512}, "hieght"),
    ({**DRAW, "images": "photo.png"}, "images"),
    ({"id": "a", "kind": "draw"}, "prompt"),
    ({**DRAW, "prompt": " "}, "prompt"),
    ({**DRAW, "prompt": 3}, "prompt"),
    ({**DRAW, "height": 100}, "height"),
    ({**DRAW, "width": "512"}, "width"),
    ({**DRAW, "seed": -1}, "seed"),
    ({**DRAW, "seed": True}, "seed"),
    ({**DRAW, "seed": None}, "seed"),
    ({**DRAW, "sampling": 3}, "sampling"),
    ({**DRAW, "sampling": {"step": 3}}, "step"),
    ({**DRAW, "sampling": {"steps": 0}}, "steps"),
    ({**DRAW, "sampling": {"temperature": float("nan")}}, "temperature"),
    ({**DRAW, "guidance": {"text": "2"}}, "guidance"),
    ({**DRAW, "decoding": {"turbo": "no"}}, "turbo"),
    ({**DECODE, "decoding": None}, "decoding"),
    ({"id": "a", "kind": "edit", "prompt": "x"}, "images"),
    ({**EDIT, "images": []}, "images"),
    ({**EDIT, "images": ["photo.png", 3]}, "images"),
    ({**EDIT, "images": "gone.png"}, "gone.png"),
    ({**EDIT, "images": "../outside.png"}, "outside.png"),
    ({**EDIT, "images": "/etc/hostname"}, "/etc/hostname"),
    ({**EDIT, "images": "link.png"}, "link.png"),
    ({**EDIT, "images": "a\0b"}, "file"),
    ({**EDIT, "images": "torn.png"}, "torn.png"),
    ({**DECODE, "tokens": "photo.png"}, "tokens"),
    ({**DECODE, "tokens": "two.safetensors"}, "tokens"),
    ({**DECODE, "tokens": ["one.safetensors", "one.safetensors"]}, "tokens"),
    ({**ASK, "max_new_tokens": 2.0}, "max_new_tokens"),
    ("[1, 2]", "line"),
    ("{", "line"),
    ('{"id": "a", "id": "b"}', "twice"),
    ("[" * 100_000, "line"),
]


@pytest.mark.parametrize(("line", "named"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_request_is_named_and_the_others_are_read(files, write, line, named):
    outside = files.parent / "outside.png"
    outside.write_bytes((files / "photo.png").read_bytes())
    (files / "link.png").symlink_to(outside)
    (files / "torn.png").write_bytes((files / "photo.png").read_bytes()[:20])
    requests, wrong = read_requests(write({**DRAW, "id": "first"}, line, "", {**ASK, "id": "last"}))
    assert [request.id for request in requests] == ["first", "last"]
    (only,) = wrong
    assert only.line == 2
    assert named in only.error


def test_an_id_that_is_there_already_is_the_later_requests_error(write):
    requests, wrong = read_requests(
        write(DRAW, {**DRAW, "id": "A"}, {**DRAW, "id": "b", "seed": -1}, {**ASK, "id": "b"})
    )
    assert [request.id for request in requests] == ["a"]
    assert [(line.line, line.id) for line in wrong] == [(2, None), (3, "b"), (4, None)]


def test_a_file_that_is_no_text_is_refused(files):
    with pytest.raises(InputError, match="requests"):
        read_requests(files / "photo.png")
    with pytest.raises(InputError, match="requests"):
        read_requests(files / "nothing.jsonl")


def test_batches_are_of_one_kind_and_shape(files):
    small = {"height": 64, "width": 64}
    asked = [
        *({**DRAW, "id": f"d{i}", "seed": i, "prompt": f"{i}", **small} for i in range(5)),
        {**DRAW, "id": "large", "height": 96, "width": 64},
        {**DRAW, "id": "think", "kind": "think", **small},
        {**DRAW, "id": "tokens", "decoding": None, **small},
        {**DRAW, "id": "steps", "sampling": {"steps": 3}, **small},
        *({**EDIT, "id": f"e{i}"} for i in range(2)),
        {**EDIT, "id": "wide", "images": "wide.png"},
        {**EDIT, "id": "both", "images": ["photo.png", "one.safetensors"]},
    ]
    found = batches([parse(one, files) for one in asked], 3, 1)
    together = [[request.id for request in batch] for batch in found]
    assert together[:2] == [["d0", "d1", "d2"], ["d3", "d4"]]
    assert sorted(map(len, together)) == [1] * 6 + [2, 2, 3]
    assert ["e0", "e1"] in together
    shared = batches([parse(one, files) for one in asked[:5]], 8, 2)
    assert [len(batch) for batch in shared] == [3, 2], "a few requests do not all wait for one worker"


def test_a_digest_is_of_what_is_asked():
    first, same, other = (
        parse(json.loads(text), None)
        for text in (
            '{"id": "a", "kind": "draw", "prompt": "x", "seed": 1}',
            '{"seed": 1, "prompt": "x", "kind": "draw", "id": "a"}',
            '{"id": "a", "kind": "draw", "prompt": "x", "seed": 2}',
        )
    )
    assert first.digest == same.digest != other.digest


def test_the_page_names_every_field():
    page = (Path(__file__).parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
    for kind, names in FIELDS.items():
        assert f"`{kind}`" in page
        assert all(f"`{name}`" in page for name in names)
