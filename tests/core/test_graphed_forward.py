"""Rounds in the fixed shapes of CUDA graphs against rounds in their exact ones, and when they become graphs."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llada_core.backbone import attention_kernels, cuda_graphs, experts, runner
from llada_core.backbone.cache import PrefixCache
from llada_core.backbone.cuda_graphs import CUDAGraphRunner, ReadingBackRaises, capturable_sizes
from llada_core.backbone.model import Backbone, block_causal_mask
from llada_core.options import Guidance, Sampling, Sprint
from llada_core.quantization import grouped
from llada_core.sampling.block_diffusion import GenerationConfig

MASK, IMAGES, VOCABULARY = 95, 96, 160
GUIDANCE = Guidance(2.0, 0.5, 0.7)
COUNT = 150  # positions to fill where a test does not vary it
PRUNING = Sprint(text_keep_ratio=0.4, image_keep_ratio=0.6, threshold=0.9)


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCABULARY - 1, (n,), generator=generator) for n in lengths]
    return [(row + (row >= MASK)).tolist() for row in rows]


def drawing(steps: int = 6, sampling: Sampling | None = None, sprint: Sprint | None = None) -> GenerationConfig:
    return GenerationConfig(steps, IMAGES, VOCABULARY, frozenset(), sampling or Sampling(), GUIDANCE, sprint)


EXACTLY = GenerationConfig(6, IMAGES, VOCABULARY, sampling=Sampling(threshold=1.0))  # every block takes all its rounds


# The fixed shapes


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 120) | st.integers(200, 260), min_size=1, max_size=3),
    block=st.integers(8, 40),
    count=st.integers(1, 120),
    steps=st.integers(1, 7),
    shortest=st.sampled_from([256, 2048]),
    sprint=st.none()
    | st.builds(
        Sprint,
        keep_ratio=st.sampled_from([0.2, 0.7]),
        text_keep_ratio=st.sampled_from([None, 0.3, 1.0]),
        image_keep_ratio=st.sampled_from([None, 0.5]),
        threshold=st.sampled_from([0.3, 0.9]),
        warmup=st.integers(0, 2),
    ),
    stops=st.sampled_from([frozenset(), frozenset(range(4))]),
    seed=st.integers(0, 10**6),
)
def test_fixed_shapes_fill_as_exact_ones(
    lengths, block, count, steps, shortest, sprint, stops, seed, tiny, fixed_shapes, generate_one, monkeypatch
):
    # Masks that see nothing but masks are all predicted alike: which is best is a matter of rounding.
    assume(not sprint or sprint.warmup or sprint.text_keep_ratio == 1.0)
    monkeypatch.setattr(cuda_graphs, "SHORTEST", shortest)
    config = drawing(steps, Sampling(block_length=block, threshold=0.6), sprint)
    config = replace(config, low=0, high=IMAGES, stops=stops) if stops else config
    prompts = prompts_of(lengths, seed)
    exact, fixed = (generate_one(tiny, prompts, count, config, graphs=graphs) for graphs in (False, True))
    assert fixed.output == exact.output
    exact, fixed = exact.runner, fixed.runner
    assert fixed.cached == exact.cached
    if sprint:
        final = slice(0, min(exact.cached))
        assert torch.allclose(fixed.cache.key_norms[:, final], exact.cache.key_norms[:, final], rtol=1e-4)
        assert torch.allclose(fixed.confidence, exact.confidence, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pads", [[0, 0], [0, 7], [40, 0], [0, 70]])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_hidden_states_and_cache_equal_those_of_exact_shapes(pads, kind, tiny):
    """Block after block, with padding that reaches into the block before, into the block itself, or fills both."""
    attend = attention_kernels.choose(kind)
    ids = torch.tensor(prompts_of([128, 128]))
    pads = torch.tensor(pads)
    positions = (torch.arange(128) - pads[:, None]).clamp_min(0)
    exact, written = (PrefixCache(tiny.config, 2, 256, "cpu", torch.float32, key_norms=True) for _ in range(2))
    fixed = CUDAGraphRunner(tiny, written, (32, 64), attend, block=32, capture=False)
    for begin, end in [(0, 32), (0, 64), (32, 96), (96, 128), (96, 128), (64, 128)]:
        mask = block_causal_mask(begin, end - begin, 32, pads)
        expected = tiny(ids[:, begin:end], positions[:, begin:end], exact, begin, mask, attend)
        found = fixed.run(ids[:, begin:end], positions[:, begin:end], begin, mask)
        real = torch.arange(begin, end) >= pads[:, None]
        assert torch.allclose(found[real], expected[real], atol=1e-4)
        assert found.isfinite().all()
    real = torch.arange(256) >= pads[:, None]
    assert torch.allclose(written.key_norms[real], exact.key_norms[real], rtol=1e-4)
    for kept, expected in zip(written.keys + written.values, exact.keys + exact.values, strict=True):
        assert torch.allclose(kept.transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=1e-4)


def test_every_task_of_the_engine_in_fixed_shapes(model, fixed_shapes, monkeypatch):
    """A picture after thinking, an edit with three rows, a pruned answer and a story."""
    image = torch.linspace(0, 1, 64 * 96 * 3).view(1, 64, 96, 3)
    references = model.encode(image, pixels=64 * 64)
    sampling = Sampling(thinking_length=80, thinking_steps=4)

    def work():
        drawn = model.generate("a fox", 128, 256, thinking=True, sampling=sampling)
        edited = model.generate("a fox", references=references, guidance=Guidance(4.0, 1.5))
        answer = model.answer("What?", references, max_new_tokens=70, sprint=PRUNING)
        story = model.interleave("a fox", 2, sampling=replace(sampling, steps=3))
        return drawn.tokens, drawn.thinking, edited.tokens, answer.text, story.text, story.tokens

    in_fixed_shapes = work()
    monkeypatch.setattr(runner, "capturable_sizes", lambda *_: ())
    for found, expected in zip(in_fixed_shapes, work(), strict=True):
        if hasattr(expected, "grids"):
            assert all(torch.equal(a, b) for a, b in zip(found.grids, expected.grids, strict=True))
        else:
            assert found == expected


def test_a_fixed_round_reads_nothing_back(oracle):
    """On the meta device there is nothing to read, so whatever would wait for the GPU is an error."""
    config = oracle.tiny_config()
    with torch.device("meta"):
        backbone = Backbone(config).requires_grad_(False)
        cache = PrefixCache(config, 2, 256, "meta", torch.float32, key_norms=True)
        fixed = cuda_graphs.GraphedForward(backbone, cache, 32, 256)
        fixed.compute()
    assert fixed.hidden.shape == (2, 32, 48)


def test_ids_are_looked_up_where_their_table_lies(oracle):
    """A table elsewhere keeps nothing else from being a graph: the round has the rows, and no address of the table."""
    backbone = oracle.tiny_backbone(1)
    others = [parameter for parameter in backbone.parameters() if parameter is not backbone.word_embeddings.weight]
    assert list(map(id, backbone.used_in_rounds())) == list(map(id, others))
    fixed = cuda_graphs.GraphedForward(backbone, PrefixCache(backbone.config, 1, 256, "cpu", torch.float32), 8, 256)
    fixed.load(torch.arange(8)[None], torch.arange(8)[None], 0, None)
    with torch.no_grad():
        backbone.word_embeddings.weight.fill_(float("nan"))
        fixed.compute()
    assert fixed.hidden.isfinite().all()


def test_only_rounds_of_the_two_sizes_are_fixed(tiny, fixed_shapes, generate_one, monkeypatch):
    ran = []
    run = CUDAGraphRunner.run
    monkeypatch.setattr(
        CUDAGraphRunner, "run", lambda self, ids, *rest: ran.append(ids.shape[1]) or run(self, ids, *rest)
    )
    generate_one(tiny, prompts_of([100]), 92, replace(EXACTLY, steps=2), graphs=True)
    assert ran == [32, 64, 32, 64, 32]  # the prompt's three blocks and the first to fill go together


def test_no_graphs_off_the_gpu(tiny):
    assert capturable_sizes(tiny, attention_kernels.sdpa, torch.device("cpu"), 1, (32, 64)) == []


# When they become graphs, and that those are let go


@pytest.fixture
def compare(tiny, generate_one):
    """compare(lengths): what is filled with graphs is what exact shapes fill."""

    def compare(lengths, backbone=tiny, **options):
        exact, found = (generate_one(backbone, prompts_of(lengths), COUNT, drawing(), graphs=g) for g in (False, True))
        assert found.output == exact.output

    return compare


def test_a_shape_is_captured_at_its_second_use(tiny, events, generate_one):
    generate_one(tiny, prompts_of([64]), 32, EXACTLY, graphs=True)
    # Its first round takes the prompt along; five rounds of a block alone follow.
    assert events == ["warm_up", "capture", "replay", "replay", "replay", "replay", "reset"]


def test_graphs_fill_as_exact_shapes(events, compare):
    compare([50, 90])
    assert events.count("capture") == events.count("reset") == 2


def test_a_longer_extent_takes_a_new_graph(events, compare, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "SHORTEST", 256)
    compare([150])
    assert events.count("capture") == events.count("reset") > 2


def test_graphs_are_let_go_when_the_work_is_interrupted(tiny, events, generate_one):
    class Interrupted(Exception):
        pass

    def stop(*_):
        if "replay" in events:
            raise Interrupted

    with pytest.raises(Interrupted):
        generate_one(tiny, prompts_of([64]), COUNT, drawing(), graphs=True, on_round=stop)
    assert events[-2:] == ["replay", "reset"]


@pytest.mark.parametrize("failing", ["_warm_up", "_capture"])
def test_a_capture_that_fails_is_logged_once_and_the_run_goes_on(failing, events, compare, monkeypatch, caplog):
    def fail(self, fixed):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(CUDAGraphRunner, failing, fail)
    compare([50, 90])
    assert [record.getMessage() for record in caplog.records] == [
        "rounds go on without CUDA graphs (OutOfMemoryError: no room)"
    ]


def test_after_a_failure_the_kernels_of_fixed_shapes_are_left_alone(events, compare, monkeypatch, caplog):
    """Where the kernel in parts is what fails, as on a card that has none, going on with it would fail again."""

    def missing(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(attention_kernels, "in_parts", missing)
    compare([50, 90])
    assert [record.getMessage() for record in caplog.records] == [
        "rounds go on without CUDA graphs (RuntimeError: no kernel image is available)"
    ]


def test_nothing_is_captured_on_a_full_card(events, compare, monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "_free_bytes", lambda device: cuda_graphs.SPARE - 1)
    compare([50, 90])
    assert "capture" not in events
    assert ["537 MB are free on the card" in record.getMessage() for record in caplog.records] == [True]


def test_what_torch_keeps_counts_as_free(monkeypatch):
    """Its cache is emptied first: on a card that has room graphs are not refused for memory that nobody uses."""
    free = [2**20]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2**34))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.__setitem__(0, 2**32))
    assert cuda_graphs._free_bytes(torch.device("cpu")) == 2**32


def test_memory_that_a_graph_takes_at_its_first_replay_may_be_missing_too(events, compare, monkeypatch, caplog):
    class Failing:
        def replay(self):
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(CUDAGraphRunner, "_capture", lambda self, fixed: Failing())
    compare([50, 90])
    assert len(caplog.records) == 1


def test_an_error_in_a_capture_keeps_no_tensor(tiny):
    kept = []

    def fail(q, k, v, bias):
        kept.extend(weakref.ref(tensor) for tensor in (q, k, v, bias))
        raise RuntimeError("no room")

    fixed = cuda_graphs.GraphedForward(tiny, PrefixCache(tiny.config, 1, 256, "cpu", torch.float32), 32, 256, fail)
    with pytest.raises(RuntimeError) as caught, cuda_graphs.freeing_what_fails():
        fixed.compute()
    assert len(kept) == 4
    assert all(ref() is None for ref in kept), caught


# Reading back


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.unique(x),
        lambda x: torch.equal(x, x + 1),
    ],
)
def test_reading_back_is_found_in_this_thread_alone(waits):
    x = torch.arange(6.0)
    with ReadingBackRaises():
        with pytest.raises(RuntimeError, match="reads back"):
            waits(x)
        with ThreadPoolExecutor(1) as other:
            other.submit(waits, x).result()
        x[torch.tensor([1, 2])] + x.sort().values[:2]  # and nothing else is
    waits(x)


@pytest.mark.parametrize("sprint", [None, PRUNING])
def test_rounds_pass_for_what_reads_nothing_back(sprint, tiny, fixed_shapes, monkeypatch):
    """The same check over the kernels of a round, whose product of experts is the batched one of a GPU."""
    monkeypatch.setattr(
        experts,
        "grouped_product",
        lambda form, stored, pairs, ends, most, shape: grouped._batched(form, stored, pairs, ends, most, shape),
    )
    cache = PrefixCache(tiny.config, 2, 256, "cpu", torch.float32, key_norms=sprint is not None)
    fixed = cuda_graphs.GraphedForward(tiny, cache, 32, 256)
    with ReadingBackRaises():
        fixed.compute()
    assert fixed.hidden.isfinite().all()
