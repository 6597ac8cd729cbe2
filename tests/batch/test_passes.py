"""What becomes of requests whose workers end, with a stand-in for Ray's part: test_on_ray.py has the real one."""

import json
from typing import ClassVar

import pytest

from llada_core.batch.devices import Machine, plan
from llada_core.batch.requests import parse
from llada_core.batch.rows import Result, pack_fault, pack_result
from llada_core.batch.worker import Settings

cluster = pytest.importorskip("llada_core.batch.cluster", reason="Ray is not installed: requirements-ray.txt")

ASKED = [parse({"id": f"r{i}", "kind": "draw", "prompt": "poison" if i == 4 else "x"}, None) for i in range(9)]
BATCHES = [ASKED[:3], ASKED[3:6], ASKED[6:]]
PLAN, SETTINGS = plan([Machine(2)], 2), Settings("folder", "cpu")


class StandIn:
    """A pass whose workers are ended by poison; the first results of all come twice, as after a lost object."""

    seen: ClassVar[list] = []
    closed: ClassVar[list] = []

    def __init__(self, rows, plan, settings):
        self.batches = [[work["request"] for work in json.loads(row["works"])] for row in rows]
        self.seen.append([[one["id"] for one in batch] for batch in self.batches])
        whole = [batch for batch in self.batches if all(one["prompt"] != "poison" for one in batch)]
        self.left = [*whole[:1], *whole]

    def take(self):
        if not self.left:
            return None
        return [pack_result(Result(one["id"], "draw", seconds=1.0)) for one in self.left.pop(0)]

    def again(self):
        return 1

    def close(self):
        self.closed.append(len(self.left))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cluster, "Pass", StandIn)
    StandIn.seen.clear()
    StandIn.closed.clear()
    return StandIn.seen


def test_a_request_that_ends_its_workers_takes_nobody_with_it(stand_in, caplog):
    results = list(cluster.run_batches(BATCHES, PLAN, SETTINGS, None))
    assert sorted(result.id for result in results) == [f"r{i}" for i in range(9)]
    assert [result.id for result in results if result.error] == ["r4"]
    assert "ended each time" in results[-1].error
    assert stand_in == [[["r0", "r1", "r2"], ["r3", "r4", "r5"], ["r6", "r7", "r8"]], [["r3"], ["r4"], ["r5"]]]
    assert "run again: 1 times" in caplog.text


def test_who_stops_taking_results_ends_the_pass(stand_in):
    results = cluster.run_batches(BATCHES, PLAN, SETTINGS, None)
    next(results)
    assert StandIn.closed == []
    results.close()
    assert StandIn.closed == [2], "with two of its batches not taken"


@pytest.mark.parametrize("how", ["fault", "Ray", "connection"])
def test_workers_that_cannot_start_stop_the_run(stand_in, monkeypatch, how):
    class Ends(StandIn):
        def take(self):
            if how == "fault":
                return [pack_fault("no such checkpoint")]
            raise cluster.ray.exceptions.RayError("why") if how == "Ray" else ConnectionError("why")

    monkeypatch.setattr(cluster, "Pass", Ends)
    with pytest.raises(cluster.Stopped, match="no such checkpoint" if how == "fault" else "Ray: why"):
        list(cluster.run_batches(BATCHES, PLAN, SETTINGS, None))


def test_a_file_that_has_gone_is_its_requests_error(stand_in, files):
    asked = [parse({"id": name, "kind": "ask", "question": "x", "images": "one.safetensors"}, files) for name in "ab"]
    (files / "one.safetensors").unlink()
    results = list(cluster.run_batches([asked, ASKED[:1]], PLAN, SETTINGS, None))
    assert [(result.id, bool(result.error)) for result in results] == [("a", True), ("b", True), ("r0", False)]
