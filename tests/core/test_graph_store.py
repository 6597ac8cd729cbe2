"""Graphs that outlive a generation: found again by their shapes, gone when weights move, never a difference."""

from types import SimpleNamespace

import pytest
import torch

from llada_core.backbone import cuda_graphs
from llada_core.backbone.cuda_graphs import GraphStore
from llada_core.engine import LLaDAUni
from llada_core.options import Guidance, Sampling, Sprint
from llada_core.placement import OneDevice, Placement
from llada_core.sampling import block_diffusion
from llada_core.sampling.batch import Sample
from llada_core.sampling.block_diffusion import GenerationConfig, generate, prepare

MASK, IMAGES, VOCABULARY = 95, 96, 160
SLOWLY = Sampling(threshold=1.0)  # every block takes all its rounds


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[(7 * i + row) % MASK for i in range(length)] for row, length in enumerate(lengths)]


def drawing(**changes) -> GenerationConfig:
    return GenerationConfig(**{"steps": 4, "low": IMAGES, "high": VOCABULARY, "sampling": SLOWLY} | changes)


@pytest.fixture
def run(tiny, generate_one):
    """run(lengths, config, store, count): the output of one generation whose runner goes back to the store."""

    def run(lengths, config, store, count=64, **options):
        generated = generate_one(tiny, prompts_of(*lengths), count, config, store=store, **options)
        return generated.output

    return run


def test_what_comes_again_captures_nothing(events, run):
    store = GraphStore()
    first = run([50], drawing(), store)
    captured = events.count("capture")
    assert captured == 2
    events.clear()
    assert run([50], drawing(), store) == first
    assert set(events) == {"replay"}


@pytest.mark.parametrize(
    ("lengths", "config"),
    [
        ([40], drawing()),  # another prompt
        ([50], drawing(steps=3)),
        ([50], drawing(sampling=Sampling(steps=5, threshold=1.0, thinking_length=9))),
    ],
)
def test_what_a_round_does_not_depend_on_finds_the_same_graphs(lengths, config, events, run):
    store = GraphStore()
    run([50], drawing(), store)
    events.clear()
    run(lengths, config, store)
    assert set(events) == {"replay"}


@pytest.mark.parametrize(
    ("lengths", "config"),
    [
        ([50, 30], drawing(guidance=Guidance())),
        ([600], drawing()),  # another cache
        ([50], drawing(low=0, high=IMAGES)),
        ([50], drawing(sampling=Sampling(threshold=0.9))),
        ([50], drawing(sampling=Sampling(threshold=1.0, block_length=16))),
        ([50], drawing(sprint=Sprint())),
    ],
)
def test_what_a_round_depends_on_takes_graphs_of_its_own(lengths, config, events, run):
    store = GraphStore()
    run([50], drawing(), store)
    events.clear()
    run(lengths, config, store)
    assert "capture" in events
    assert "reset" not in events  # the others stay


def test_what_was_left_in_a_cache_changes_nothing(events, run, monkeypatch):
    """Generations of several lengths, tasks and prompts through one store equal those that start from nothing."""
    monkeypatch.setattr(cuda_graphs, "SHORTEST", 256)
    guided = drawing(guidance=Guidance(), sampling=Sampling(threshold=0.6))
    text = drawing(low=0, high=IMAGES, stops=frozenset(range(5)), sampling=Sampling(threshold=0.6))
    pruned = drawing(sprint=Sprint(text_keep_ratio=0.4), guidance=Guidance())
    drawn = drawing(sampling=Sampling(temperature=1.0))
    works = [
        ([300, 40], guided),
        ([20], text),
        ([90, 200], guided),
        ([200], text),
        ([60, 80], pruned),
        ([33, 9], pruned),
    ]
    works += [([70], drawn), ([20], text), ([300, 40], guided), ([10, 10], pruned), ([70], drawn)]
    store = GraphStore()
    found = [run(lengths, config, store, 90) for lengths, config in works]
    assert found == [run(lengths, config, GraphStore(), 90) for lengths, config in works]


def test_what_leaves_a_batch_leaves_its_graphs(tiny, events, monkeypatch):
    """A batch of which half is done goes on with graphs for fewer rows; the next batch finds those for all of them."""
    monkeypatch.setattr(block_diffusion, "WORTH_GRAPHS", 1)
    samples = [Sample(prompts_of(30), [MASK] * count) for count in (10, 100, 40, 90)]
    store, found = GraphStore(), []
    for _ in range(3):  # what a batch uses once is captured in the next
        events.clear()
        runner, batch = prepare(tiny, samples, drawing(), MASK, store=store)
        found.append(generate(runner, batch, drawing()))
        runner.finish()
    assert set(events) == {"replay"}
    assert found[0] == found[2] == [generate(*prepare(tiny, [one], drawing(), MASK), drawing())[0] for one in samples]
    events.clear()
    little = GraphStore(store.bytes // 20)
    for _ in range(2):
        runner, batch = prepare(tiny, samples, drawing(), MASK, store=little)
        assert generate(runner, batch, drawing()) == found[0]
        runner.finish()
    assert events.count("reset") > 2
    assert little.bytes <= store.bytes // 20


def test_graphs_for_fewer_rows_are_made_for_a_long_way_only(tiny, events, monkeypatch):
    """Else a batch goes on with those for all of its rows, unless there are some for fewer."""
    samples = [Sample(prompts_of(30), [MASK] * count) for count in (10, 100, 40, 90)]

    def rows(worth: int, store: GraphStore) -> list[int]:
        monkeypatch.setattr(block_diffusion, "WORTH_GRAPHS", worth)
        seen = []
        runner, batch = prepare(tiny, samples, drawing(), MASK, store=store)
        generate(runner, batch, drawing(), lambda *_: seen.append(len(runner.pads)))
        runner.finish()
        return sorted(set(seen), reverse=True)

    store = GraphStore()
    assert rows(20, store) == [4]
    assert rows(1, store) == [4, 2, 1]
    assert rows(20, store) == [4, 2, 1]


def test_graphs_for_all_of_a_batch_outlast_those_for_fewer(tiny, events, monkeypatch):
    monkeypatch.setattr(block_diffusion, "WORTH_GRAPHS", 1)
    samples = [Sample(prompts_of(30), [MASK] * count) for count in (10, 100, 40, 200, 20, 30, 15, 25)]

    def run(store: GraphStore) -> None:
        runner, batch = prepare(tiny, samples, drawing(), MASK, store=store)
        generate(runner, batch, drawing())
        runner.finish()

    store = GraphStore()
    run(store)
    little = GraphStore(store.bytes - 1)
    run(little)
    assert "reset" in events
    runner, _ = prepare(tiny, samples, drawing(), MASK, store=little)
    events.clear()
    assert runner.rounds.run(torch.zeros(8, 32, dtype=torch.int64), torch.zeros(8, 32), 32, None) is not None
    assert events == ["replay"]


def test_a_store_has_a_limit_and_drops_what_was_used_longest_ago(events, run):
    def size() -> int:
        alone = GraphStore()
        run([50], drawing(), alone)
        return alone.bytes

    store = GraphStore(2 * size())
    a, b, c = drawing(), drawing(low=0, high=IMAGES), drawing(sampling=Sampling(threshold=0.9))
    for config in (a, b, a, c):
        run([50], config, store)
    assert 0 < store.bytes <= 2 * size()
    events.clear()
    run([50], a, store)
    assert "capture" not in events
    run([50], b, store)
    assert "capture" in events


def test_a_large_card_keeps_a_share(monkeypatch):
    for size, kept in ((24 * 2**30, 2**30), (141 * 2**30, 141 * 2**25)):
        card = SimpleNamespace(total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert cuda_graphs.kept_bytes(torch.device("cuda")) == kept
    assert cuda_graphs.kept_bytes(torch.device("cpu")) == cuda_graphs.KEPT


def test_after_an_error_nothing_is_kept(events, tiny, generate_one):
    """What is in the cache then may be anything, numbers that are not finite among it."""

    def fail(*_):
        raise ZeroDivisionError

    store = GraphStore()
    with pytest.raises(ZeroDivisionError):
        generate_one(tiny, prompts_of(50), 64, drawing(), store=store, on_round=fail)
    assert store.bytes == 0


def test_weights_that_moved_take_their_graphs_along(events, tiny, oracle, run):
    store = GraphStore()
    store.follow(tiny, 0)
    run([50], drawing(), store)
    store.follow(tiny, 0)
    assert store.bytes
    store.follow(tiny, 1)
    assert (store.bytes, events[-1]) == (0, "reset")
    run([50], drawing(), store)
    store.follow(oracle.tiny_backbone(2), 1)
    assert store.bytes == 0


# In the engine


FEW = Sampling(steps=3)


def drawn_with(model: LLaDAUni) -> list[int]:
    return model.generate("a fox", 128, 96, sampling=FEW).tokens.grids[0].flatten().tolist()


def test_the_engine_keeps_graphs_until_its_weights_go(events, golden_checkpoint):
    manager = OneDevice()
    model = LLaDAUni(golden_checkpoint, manager)
    first = drawn_with(model)
    drawn_with(model)  # a shape is captured at its second use
    events.clear()
    assert drawn_with(model) == first
    assert set(events) == {"replay"}
    assert model._graphs.bytes
    manager.release("backbone")
    assert (model._graphs.bytes, events[-1]) == (0, "reset")
    assert drawn_with(model) == first
    assert "capture" in events[events.index("reset") :]


class Untold(OneDevice):
    """A manager that tells nobody when it moves weights."""

    def place(self, part, component, working_bytes):
        placement = super().place(part, component, working_bytes)
        return Placement(placement.module, placement.device, placement.dtype, resident=True)


def test_where_nobody_tells_of_moves_graphs_end_with_their_generation(events, golden_checkpoint):
    model = LLaDAUni(golden_checkpoint, Untold())
    for _ in range(2):
        events.clear()
        drawn_with(model)
        assert "capture" in events
        assert (model._graphs.bytes, events[-1]) == (0, "reset")


def test_the_factor_of_the_head_is_made_once(golden_checkpoint, monkeypatch):
    made = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x: made.append(x.shape) or cholesky(x))
    model = LLaDAUni(golden_checkpoint)
    for _ in range(3):
        drawn_with(model)
    assert len(made) == 1
