"""Where workers go, without any device: the numbers that Ray is given, and that they fit."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_core import InputError
from llada_core.batch.devices import Machine, Place, plan


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_one_worker_on_each_gpu(gpus):
    planned = plan([Machine(16, gpus)])
    assert (planned.device, planned.workers, planned.gpus, planned.cpus) == ("cuda", gpus, 1.0, 1.0)
    assert planned.places == tuple(Place(0, gpu) for gpu in range(gpus))


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_two_workers_share_each_gpu(gpus):
    planned = plan([Machine(16, gpus)], workers=2 * gpus)
    assert planned.gpus == 0.5
    assert Counter(place.gpu for place in planned.places) == dict.fromkeys(range(gpus), 2)


def test_fewer_workers_than_gpus_take_one_each():
    assert plan([Machine(16, 8)], workers=3).places == (Place(0, 0), Place(0, 1), Place(0, 2))


def test_machines_of_different_sizes():
    planned = plan([Machine(4, 1), Machine(64, 8), Machine(32, 0)])
    assert planned.workers == 9
    assert Counter(place.machine for place in planned.places) == {0: 1, 1: 8}
    assert plan([Machine(1, 4)]).cpus == 0.25, "four workers where there is one processor"


def test_processors():
    assert plan([Machine(2)]).cpus == 2
    two = plan([Machine(2)], workers=2)
    assert (two.device, two.cpus, two.gpus, two.workers) == ("cpu", 1.0, 0.0, 2)
    assert plan([Machine(2)], workers=4).cpus == 0.5
    assert plan([Machine(7)], workers=2).cpus == 3, "above one, Ray takes whole processors"
    assert plan([Machine(16, 2)], workers=2, device="cpu").cpus == 8
    uneven = plan([Machine(2), Machine(8)], workers=5)
    assert uneven.cpus == 2
    assert Counter(place.machine for place in uneven.places) == {0: 1, 1: 4}
    assert plan([Machine(4), Machine(4)]).workers == 2


def test_refusals():
    with pytest.raises(InputError, match="GPU"):
        plan([Machine(8)], device="cuda")
    with pytest.raises(InputError, match="workers"):
        plan([Machine(8)], workers=0)
    with pytest.raises(InputError, match="device"):
        plan([Machine(8)], device="tpu")
    with pytest.raises(InputError, match="processor"):
        plan([])


MACHINES = st.lists(st.builds(Machine, st.integers(1, 128).map(float), st.integers(0, 8)), min_size=1, max_size=6)


@given(MACHINES, st.integers(1, 200), st.sampled_from(["auto", "cpu"]))
def test_every_plan_fits(machines, workers, device):
    planned = plan(machines, workers, device)
    assert planned.workers == workers
    for at, machine in enumerate(machines):
        here = [place for place in planned.places if place.machine == at]
        assert len(here) * planned.cpus <= machine.cpus + 1e-9
        for gpu, count in Counter(place.gpu for place in here).items():
            if planned.device == "cuda":
                assert gpu < machine.gpus
                assert count * planned.gpus <= 1
