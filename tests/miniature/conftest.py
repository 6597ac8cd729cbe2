"""A run of the training that is as short as can be: two steps a stage."""

from pathlib import Path

import pytest
import torch

from dev.miniature.export import export
from dev.miniature.sizes import Schedule
from dev.miniature.stage import Budget, run
from dev.miniature.train import STAGES, make
from dev.miniature.worlds import WORLDS, World

CPU = torch.device("cpu")
SCHEDULES = {
    "vae": Schedule(2, 1, 2e-3, 0.1, 6),
    "vision": Schedule(2, 3, 1e-3, 0.1, 6),
    "decoder": Schedule(2, 1, 1e-3, 0.3, 6),
    "turbo": Schedule(2, 1, 3e-4, 0.1, 6),
    "backbone": Schedule(2, 2, 1.5e-3, 0.4, 0),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several add the gradients of an embedding up in an order of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=WORLDS)
def world(request) -> World:
    """Every world."""
    return WORLDS[request.param]()


@pytest.fixture(scope="session")
def short_run(world, tmp_path_factory) -> Path:
    """A folder with all five stages of a world, two steps each."""
    folder = tmp_path_factory.mktemp("run")
    for name in STAGES:
        run(make(name, world, folder, SCHEDULES[name], CPU), folder, Budget(2), CPU)
    return folder


@pytest.fixture(scope="session")
def short_checkpoint(world, short_run) -> Path:
    """That run as a checkpoint."""
    return export(world, short_run, short_run / "checkpoint")


@pytest.fixture
def stage(world, short_run):
    """name -> a stage that has not begun, on the pools of the short run."""
    return lambda name: make(name, world, short_run, SCHEDULES[name], CPU)


@pytest.fixture(scope="session")
def schedules() -> dict[str, Schedule]:
    """How long each stage of the short run trains."""
    return SCHEDULES
