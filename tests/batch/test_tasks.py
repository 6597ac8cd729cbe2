"""A batch through the engine: what each request would get by itself, and an error that is its own."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llada_core import Decoding, ImageTokens, InputError, LLaDAUni, OneDevice
from llada_core.batch.requests import parse
from llada_core.batch.rows import Work, pack, pack_result, unpack, unpack_result
from llada_core.batch.tasks import parts_for, run
from llada_core.batch.worker import TRIES, Settings, Worker
from llada_core.checkpoint.reading import map_file

TEXTS = ("a large blue circle on a white background", "a small green square on a black background")


def work(kind: str, name: str, sources=(), **fields) -> Work:
    size = {"height": 256, "width": 256} if kind in ("draw", "think") else {}
    named = {"images": ["photo.png"] * len(sources)} if kind in ("edit", "ask") and sources else {}
    return Work(parse({"id": name, "kind": kind, **size, **named, **fields}, None), tuple(sources))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.fixture(scope="module")
def drawn(model):
    """TEXTS, each drawn by itself."""
    return [model.generate(text, 256, 256, seed=i) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def shown(model, drawn) -> bytes:
    """The first of them as a PNG file."""
    file = io.BytesIO()
    picture = model.decode(drawn[0].tokens)[0]
    Image.fromarray((picture * 255).round().to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def test_drawn_together_is_drawn_alone(model, drawn):
    results = run(model, [work("draw", f"d{i}", prompt=text, seed=i) for i, text in enumerate(TEXTS)], "here:1")
    for i, result in enumerate(results):
        assert (result.id, result.error, result.worker, result.thinking) == (f"d{i}", "", "here:1", None)
        assert torch.equal(result.tokens.grids[0], drawn[i].tokens.grids[0])
        assert result.usage.tokens == 64
        alone = model.decode(drawn[i].tokens, Decoding(seed=i))[0]
        assert np.array_equal(pixels(result.picture), (alone * 255).round().to(torch.uint8).numpy())


def test_a_batch_is_one_call(model, drawn, monkeypatch):
    calls, generate, answer = [], LLaDAUni.generate, LLaDAUni.answer

    def generating(self, texts, *given, **named):
        calls.append(texts)
        return generate(self, texts, *given, **named)

    def answering(self, texts, *given, **named):
        calls.append(texts)
        return answer(self, texts, *given, **named)

    monkeypatch.setattr(LLaDAUni, "generate", generating)
    monkeypatch.setattr(LLaDAUni, "answer", answering)
    run(model, [work("draw", f"d{i}", prompt=text, seed=i, decoding=None) for i, text in enumerate(TEXTS)])
    asked = ["What colour is the circle?", "Describe the picture."]
    found = run(model, [work("ask", f"a{i}", [drawn[0].tokens], question=text) for i, text in enumerate(asked)])
    assert calls == [list(TEXTS), asked]
    alone = [model.answer(text, drawn[0].tokens).text for text in asked]
    assert [result.answer for result in found] == alone


def test_every_kind(model, drawn, shown):
    thought, edited, asked, decoded = (
        run(model, [one])[0]
        for one in (
            work("think", "t", prompt=TEXTS[0], decoding=None),
            work("edit", "e", [shown], prompt="make the circle red", decoding=None),
            work("ask", "a", [drawn[0].tokens], question="Describe the picture."),
            work("decode", "x", [drawn[1].tokens], tokens="t.safetensors", seed=3),
        )
    )
    assert "circle" in thought.thinking
    assert (thought.picture, thought.tokens.sizes) == (b"", [(8, 8)])
    reference = model.encode(torch.from_numpy(pixels(shown).astype(np.float32) / 255)[None])
    assert torch.equal(
        edited.tokens.grids[0], model.generate("make the circle red", references=reference).tokens.grids[0]
    )
    assert "blue circle" in asked.answer
    assert (asked.tokens, asked.picture) == (None, b"")
    alone = model.decode(drawn[1].tokens, Decoding(seed=3))[0]
    assert np.array_equal(pixels(decoded.picture), (alone * 255).round().to(torch.uint8).numpy())
    assert (decoded.tokens, decoded.usage) == (None, None)


def test_references_and_pictures_together(model, drawn, shown):
    asked = [
        work("ask", f"a{i}", [source], question="Describe it.") for i, source in enumerate((shown, drawn[1].tokens))
    ]
    edits = [
        work("edit", f"e{i}", [shown, drawn[0].tokens], prompt=f"make the circle {colour}", decoding=None)
        for i, colour in enumerate(("red", "green"))
    ]
    for works in (asked, edits):
        together, alone = run(model, works), [run(model, [one])[0] for one in works]
        for one, other in zip(together, alone, strict=True):
            assert (one.id, one.error, one.answer) == (other.id, "", other.answer)
            assert one.tokens is other.tokens is None or torch.equal(one.tokens.grids[0], other.tokens.grids[0])
    assert run(model, asked)[0].answer != run(model, asked)[1].answer


def test_an_error_is_that_requests_alone(model, drawn, caplog):
    other = ImageTokens((torch.zeros(2, 2, dtype=torch.int64),), 7)
    works = [
        work("ask", name, [tokens], question="What is it?") for name, tokens in (("a", drawn[0].tokens), ("b", other))
    ]
    good, bad = run(model, works)
    assert (good.id, good.error) == ("a", "")
    assert (bad.id, bad.answer) == ("b", None)
    assert "codebook" in bad.error
    (torn,) = run(model, [work("edit", "torn", [b"\x89PNG"], prompt="x")])
    assert "a picture" in torn.error


def test_pictures_are_read_upright_and_with_their_transparency(model):
    picture = Image.new("RGBA", (64, 96), (255, 0, 0, 0))
    flat = Image.new("RGB", (64, 96), (255, 255, 255))
    turned = Image.new("RGB", (96, 64), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.zeros((64, 96), np.uint16))
    files = []
    for image, options in ((picture, {}), (flat, {}), (turned, {"exif": exif}), (deep, {})):
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        files.append(file.getvalue())
    answers = [run(model, [work("ask", "a", [file], question="Describe the picture.")])[0] for file in files]
    assert answers[0].answer == answers[1].answer == answers[2].answer is not None
    assert "8 bits" in answers[3].error


def test_rows_keep_everything(files, drawn):
    raw = [
        {"id": "a", "kind": "edit", "prompt": "x", "images": ["photo.png", "one.safetensors"], "seed": 3},
        {"id": "b", "kind": "edit", "prompt": "y", "images": "wide.png", "guidance": {"image": 1.5}},
    ]
    asked = [parse(one, files) for one in raw]
    for send in (False, True):
        row, gone = pack("7", asked, send)
        assert (row["key"], gone) == ("7", [])
        json.dumps(row["works"])
        first, second = unpack(row)
        assert first.request == parse(raw[0], None)
        photo, tokens = first.sources
        assert photo == ((files / "photo.png").read_bytes() if send else files / "photo.png")
        assert torch.equal(tokens.grids[0], torch.arange(4).view(2, 2))
        assert second.request.guidance.image == 1.5
    (files / "wide.png").unlink()
    row, (gone,) = pack("7", asked, True)
    assert (gone.id, "wide.png" in gone.error) == ("b", True)
    assert [one.request.id for one in unpack(row)] == ["a"]


def test_results_travel_as_rows(model, drawn):
    (result,) = run(model, [work("think", "t", prompt=TEXTS[0])], "here:1")
    back = unpack_result(pack_result(result))
    assert torch.equal(back.tokens.grids[0], result.tokens.grids[0])
    assert (back.picture, back.thinking, back.usage, back.worker) == (
        result.picture,
        result.thinking,
        result.usage,
        "here:1",
    )


def test_a_worker_takes_a_batch_a_few_times_and_says_why_it_cannot_start(miniature, tmp_path, files):
    row, _ = pack("0", [parse({"id": "a", "kind": "ask", "question": "What is a circle?"}, files)], False)
    begun = iter([1, TRIES, TRIES + 1])
    worker = Worker(Settings(str(miniature), "cpu", parts=("backbone",)), lambda key: next(begun))
    first, second, third = worker(row), worker(row), worker(row)
    assert unpack_result(first[0]).answer == unpack_result(second[0]).answer
    assert third == [], "what has ended its worker too often is not run again"
    (said,) = Worker(Settings(str(tmp_path), "cpu"), lambda key: 1)(row)
    assert tmp_path.name in said["fault"]
    assert "config.json" in said["fault"]


def test_parts_that_requests_need(files):
    assert parts_for([parse({"id": "a", "kind": "ask", "question": "x"}, files)]) == ("backbone",)
    asked = [
        parse({"id": "a", "kind": "decode", "tokens": "one.safetensors", "decoding": {"turbo": False}}, files),
        parse({"id": "b", "kind": "edit", "prompt": "x", "images": "photo.png", "decoding": None}, files),
    ]
    assert set(parts_for(asked)) == {"sigvq", "decoder", "vae", "backbone", "image_tokenizer"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_workers_of_a_machine_have_the_files_pages_in_common(miniature, model, drawn):
    """What a file has as it is used is a slice of a map of it; tokens are the same."""
    mapped = LLaDAUni(miniature, OneDevice("cpu", mapped=True))
    assert torch.equal(mapped.generate(TEXTS[0], 256, 256).tokens.grids[0], drawn[0].tokens.grids[0])
    maps = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if line.endswith("model.safetensors")
    ]
    backbone = mapped.manager.place("backbone", mapped.components["backbone"], lambda dtype: 0).module
    shared = [p for p in backbone.parameters() if any(start <= p.data_ptr() < end for start, end in maps)]
    total = sum(p.nbytes for p in backbone.parameters())
    experts = sum(p.nbytes for name, p in backbone.named_parameters() if p.ndim == 3)
    assert sum(p.nbytes for p in shared) == total - experts, "all but the banks, which files have an expert at a time"


def test_a_file_that_cannot_be_mapped_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        map_file(tmp_path / "model.safetensors")
