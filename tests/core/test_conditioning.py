"""decoder/conditioning.py: codes -> features."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llada_core.decoder.conditioning import FILE, NAMES, SigVQEmbedder, open_embedder, upsample
from llada_core.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(golden_checkpoint) -> Path:
    return golden_checkpoint / "image_tokenizer"


@pytest.fixture
def tensors(folder) -> dict:
    return torch.load(folder / FILE, weights_only=True)


def test_features_are_those_of_the_upsampled_codes(folder, tensors):
    grid = torch.randint(0, 256, (5, 3), generator=torch.Generator().manual_seed(0))
    wide = grid.repeat_interleave(2, 0).repeat_interleave(2, 1)
    w = {ours: tensors[theirs] for theirs, ours in NAMES.items()}
    hidden = F.silu(F.linear(w["codes.weight"][wide.flatten()], w["inner.weight"], w["inner.bias"]))
    expected = F.linear(hidden, w["outer.weight"], w["outer.bias"])
    features = open_embedder(folder).load(torch.float32)(grid)
    assert features.shape == (4 * 15, 48)
    assert torch.allclose(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upsampling_is_nearest_neighbour(factor):
    grids = torch.arange(48.0).reshape(2, 3, 4, 2)
    expected = F.interpolate(grids.movedim(-1, 1), scale_factor=factor, mode="nearest").movedim(1, -1)
    assert torch.equal(upsample(grids, factor), expected)
    assert torch.equal(upsample(grids[1], factor), expected[1])


def test_sizes_come_from_the_file(tmp_path):
    source = SigVQEmbedder(7, 3, 5, 4)
    ours = source.state_dict()
    torch.save({theirs: ours[name] for theirs, name in NAMES.items()}, tmp_path / FILE)
    component = open_embedder(tmp_path)
    assert component.bytes(torch.float32) == 4 * (7 * 3 + 5 * 3 + 5 + 4 * 5 + 4)
    grid = torch.tensor([[6, 0]])
    loaded = component.load(torch.float32)
    assert torch.equal(loaded(grid), source(grid))
    torch.testing.assert_close(loaded(grid.expand(2, 1, 2)), source(grid).expand(2, 8, 4))


class Trap:
    """Unpickled by a careless loader, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_but_tensors_is_unpickled(tmp_path, tensors):
    mark = tmp_path / "opened"
    torch.save(tensors | {"extra": Trap(mark)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"sigvq_embedding\.pt.*tensors alone"):
        open_embedder(tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap itself must work"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"note": "text"},
        lambda t: list(t.values()),
        lambda t: {"state_dict": t},
        lambda t: {k: v for k, v in t.items() if k != "prior_token_embedding.weight"},
        lambda t: {k: v for k, v in t.items() if k != "prior_projector.net.2.bias"},
        lambda t: t | {"prior_token_embedding.weight": torch.zeros(256)},
        lambda t: t | {"prior_projector.net.0.proj.weight": torch.zeros(48, 47)},
        lambda t: t | {"prior_projector.net.2.weight": torch.zeros(48, 20)},
        lambda t: t | {"prior_projector.net.4.weight": torch.zeros(48, 48)},
    ],
)
def test_files_of_something_else_are_refused(tmp_path, tensors, change):
    torch.save(change(tensors), tmp_path / FILE)
    with pytest.raises(CheckpointError, match="image_tokenizer"):
        open_embedder(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"sigvq_embedding\.pt: found no such file"):
        open_embedder(tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder, tmp_path, kept):
    data = (folder / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[: kept if kept >= 1 else int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=r"sigvq_embedding\.pt"):
        open_embedder(tmp_path)
