"""llada_core.doctor: what it says of whole, damaged and foreign folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dev.hosts.base_folder import CHECKPOINT, ROOT
from llada_core.doctor import files, runs, tensors
from llada_core.doctor.__main__ import examine, main
from llada_core.doctor.findings import LINE, MOST_LINES, Findings
from llada_core.doctor.picture import drawn_picture, likeness, looks_like_words, merged_order
from llada_core.doctor.tensors import Range

MINIATURE = ROOT / "checkpoints" / "miniature"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the goldens' checkpoint, to damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "somebodys-model"))


def told(folder: Path, quick: bool = True) -> tuple[dict[str, list[str]], str, list[str]]:
    """Level -> its lines without advice; the report; everything that was printed."""
    printed: list[str] = []
    findings = Findings(printed.append)
    report = examine(folder, CPU, quick, findings)
    levels = {"ok": [], "look": [], "wrong": []}
    for finding in findings.found:
        levels[finding.level].append(f"{finding.about}: {finding.found}")
    return levels, report, printed


def shard_with(folder: Path, key: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][key]


def change(path: Path, key: str, how) -> None:
    stored = load_file(path)
    stored[key] = how(stored[key])
    save_file(stored, path, metadata={"format": "pt"})


def test_the_miniature_is_well_in_all_that_is_run():
    levels, report, printed = told(MINIATURE, quick=False)
    assert levels["wrong"] == []
    assert [line.partition(":")[0] for line in levels["look"]] == ["sizes"]
    (answer,) = (line for line in levels["ok"] if line.startswith("answer"))
    assert "circle" in answer
    for part in ("decoder-turbo", "decoder"):
        assert any(line.startswith(f"{part}: raster patches: colour off 0.0") for line in levels["ok"])
    (routing,) = (line for line in levels["ok"] if line.startswith("routing"))
    assert "of 8 experts" in routing
    assert any(line.startswith("drawing: rescale 0:") and "rescale 0.7:" in line for line in levels["ok"])
    assert all(line.startswith(("ok", "look", "wrong", "       ")) for line in printed)
    assert len(report.splitlines()) <= MOST_LINES
    assert max(map(len, report.splitlines())) <= LINE


def test_random_weights_are_told_from_trained_ones(monkeypatch):
    monkeypatch.setattr(runs, "PIXELS", 64 * 64)
    levels, _, _ = told(Path(CHECKPOINT), quick=False)
    assert any(line.startswith("answer") for line in levels["wrong"])
    assert any(line.startswith("decoder") for line in levels["look"])


def test_the_report_names_neither_folders_nor_people(folder, monkeypatch):
    monkeypatch.setenv("USER", "annabel")
    monkeypatch.setenv("LOGNAME", "annabel")
    (folder / "vae" / "config.json").unlink()
    (folder / "config.json").unlink()
    _, report, printed = told(folder)
    assert any("somebodys-model" in line for line in printed)  # on the screen it may
    assert "somebodys-model" not in report
    assert str(folder.parent) not in report
    assert "annabel" not in report


def test_a_nan_is_found_and_nothing_is_run(folder):
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    change(shard_with(folder, key), key, lambda t: t.index_fill(0, torch.tensor([5]), float("nan")))
    levels, _, printed = told(folder, quick=False)
    assert levels["wrong"] == [f"backbone: NaN or infinity in {key}"]
    assert any("Nothing was run" in line for line in printed)
    assert not any(line.startswith("drawing") for line in levels["ok"])


def test_values_beyond_float16_are_worth_a_look(folder):
    path = folder / "decoder" / "decoder_model.safetensors"
    change(path, "x_pad_token", lambda t: torch.full_like(t, 1e24))
    levels, _, _ = told(folder)
    assert levels["wrong"] == []
    assert "decoder: values beyond float16 in x_pad_token" in levels["look"]


def test_a_layer_unlike_its_neighbours_is_worth_a_look(tmp_path):
    folder = Path(shutil.copytree(MINIATURE, tmp_path / "copy"))
    (path,) = folder.glob("model*.safetensors")
    key = "model.layers.2.attention.dense.weight"
    change(path, key, lambda t: t * 40)
    levels, _, _ = told(folder)
    assert f"backbone: out of line: {key}" in levels["look"]


def test_zeros_are_worth_a_look(folder):
    key = "model.layers.0.mlp.up_proj.weight"
    change(shard_with(folder, key), key, torch.zeros_like)
    assert f"backbone: nothing but zeros in {key}" in told(folder)[0]["look"]


def truncate(folder: Path) -> None:
    path = next(folder.glob("model-00001*"))
    path.write_bytes(path.read_bytes()[:-1000])


def another_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))


def another_codebook(folder: Path) -> None:
    path = folder / "image_tokenizer" / "sigvq_embedding.pt"
    stored = torch.load(path, weights_only=True)
    stored["prior_token_embedding.weight"] = stored["prior_token_embedding.weight"][:-8].clone()
    torch.save(stored, path)


def no_mask_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|mask|>", "<|mosk|>"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "backbone files: an unreadable file of"),
        (another_architecture, "config.json: hidden_act = 'gelu'"),
        (another_codebook, "sigvq: 248 codes, and config.json has 256"),
        (no_mask_token, "tokenizer: no token <|mask|>"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "folder: no tokenizer.json in"),
        (lambda folder: (folder / "decoder" / "config.json").write_text("{"), "decoder: unreadable JSON"),
    ],
)
def test_a_damaged_folder_is_wrong_and_the_other_parts_are_still_looked_at(damage, expected, folder):
    damage(folder)
    levels, _, _ = told(folder)
    assert [line for line in levels["wrong"] if line.startswith(expected)], levels["wrong"]
    assert levels["ok"] or "tokenizer.json in" in expected


def test_a_folder_of_another_model_is_told_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 4096}')
    (tmp_path / "tokenizer.json").write_text("{}")
    levels, _, _ = told(tmp_path)
    assert any(line.startswith("config.json: no field") for line in levels["wrong"])
    assert main([str(tmp_path), "--quick"]) == 1


def test_parts_that_are_missing_are_named_with_what_they_are_for(folder):
    shutil.rmtree(folder / "decoder")
    levels, _, printed = told(folder)
    assert levels["wrong"] == []
    assert any(line.startswith("decoder: not there (decoder/config.json") for line in levels["look"])
    assert any("It is needed for the normal decoder" in line for line in printed)


def test_a_tokenizer_of_another_release_is_wrong_where_the_sizes_are_the_releases(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(files, "RELEASED_SIZES", {name: config[name] for name in files.RELEASED_SIZES})
    levels, _, _ = told(folder)
    assert any(line.startswith("special tokens: <|endoftext|> is ") for line in levels["wrong"])
    assert any(line.startswith("sizes: those of the released") for line in levels["ok"])


def test_a_range_takes_in_every_piece():
    seen = Range()
    seen.look(torch.zeros(100))
    seen.look(torch.tensor([1.0, -7.0]))
    assert (seen.largest, seen.finite) == (7.0, True)
    seen.look(torch.tensor([float("inf"), 9.0, float("nan")]))
    assert (seen.largest, seen.finite) == (9.0, False)
    whole = torch.cat((torch.zeros(100), torch.tensor([1.0, -7.0, 9.0])))
    assert seen.spread == pytest.approx(float(whole.std(correction=0)), rel=1e-6)


def test_large_tensors_are_read_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", 4096)
    key = "lm_head.weight"
    change(shard_with(folder, key), key, lambda t: t.index_fill(0, torch.tensor([len(t) - 1]), float("nan")))
    assert told(folder)[0]["wrong"] == [f"backbone: NaN or infinity in {key}"]


def test_eight_bit_tensors_can_be_looked_at():
    seen = Range()
    seen.look(torch.tensor([1.5, -3.0]).to(torch.float8_e4m3fn))
    assert (seen.largest, seen.finite) == (3.0, True)
    seen.look(torch.tensor([5, -100], dtype=torch.int8))
    assert seen.largest == 100.0


def test_likeness_tells_colour_and_layout():
    picture = drawn_picture(128)[0]
    assert likeness(picture, drawn_picture(256)[0]) < (0.01, 1.01)
    colour, layout = likeness(picture, picture.flip(1))
    assert layout < 0.5
    assert likeness(picture, 1 - picture)[1] < -0.9
    assert likeness(picture, torch.full_like(picture, 0.5))[1] == 0.0
    assert colour < 0.2


def test_merged_order_takes_two_by_two():
    assert merged_order(2, 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red fox in the snow.", True),
        ("\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8", True),
        ("", False),
        ("xx\ufffd\ufffd", False),
        ("the the the the the the the the", False),
        ("@@##$$%%", False),
        ("x?xxxxxxxxxxxxx", False),
        ("Yes.", True),
        ("qwertyuiopasdfghjklzxcvbnmqwertyuiopasdfgh", False),
    ],
)
def test_words_are_told_from_noise(text, words):
    assert looks_like_words(text) == words
