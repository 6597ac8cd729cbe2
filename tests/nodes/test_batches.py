"""Several at once through the nodes: batch_size, lists of prompts, parts drawn anew, variations."""

import pytest
import torch


def grids_of(results: dict, node: str) -> list[list[torch.Tensor]]:
    """The grids of each item of a node's first output."""
    ((tokens, *_),) = results[node]
    return [list(one.grids) for one in (tokens if isinstance(tokens, list) else [tokens])]


@pytest.fixture
def drawing(graphs):
    """drawing(**inputs): a graph of a loader, options at temperature 1, and Sample."""

    def drawing(temperature: float = 1.0, **inputs) -> dict:
        graph = graphs.draw(side=64, sampling=["options", 0], **inputs)
        graph["options"] = graphs.think_long()["options"]
        graph["options"]["inputs"] |= {"temperature": temperature, "thinking_length": 40}
        return {name: graph[name] for name in ("load", "options", "sample")}

    return drawing


def test_a_batch_is_what_single_runs_with_the_next_seeds_are(in_process_host, drawing):
    (together,) = grids_of(in_process_host.run(drawing(batch_size=4, seed=2**64 - 2)), "sample")
    alone = [grids_of(in_process_host.run(drawing(seed=seed)), "sample")[0][0] for seed in (2**64 - 2, 2**64 - 1, 0, 1)]
    assert len(together) == 4
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together[0], together[1])


def test_at_temperature_0_one_is_drawn_for_all_and_the_node_says_so(in_process_host, drawing, caplog):
    with caplog.at_level("INFO"):
        (together,) = grids_of(in_process_host.run(drawing(0.0, batch_size=3)), "sample")
    (alone,) = grids_of(in_process_host.run(drawing(0.0)), "sample")
    assert len(together) == 3
    assert all(torch.equal(grid, alone[0]) for grid in together)
    assert "At temperature 0 all 3 are equal: drawn once." in caplog.text
    assert "sample: 4 tokens in" in caplog.text


def test_a_list_of_prompts_is_drawn_in_one_call_and_stays_a_list(in_process_host, drawing, graphs, monkeypatch):
    graph = drawing()
    prompts = ["a fox", "an owl in a tree", "a hen"]
    nodes = in_process_host.node_class("LLaDAUniSample")
    loaded = in_process_host.run({"load": graph["load"], "options": graph["options"]})
    model, options = loaded["load"][0][0], loaded["options"][0][0]
    calls = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, *given, **named: calls.append(given[0]) or generate(self, *given, **named)
    )
    widgets = {"width": [64], "height": [64, 96, 64], "steps": [8], "guidance": [2.0], "seed": [1], "thinking": [False]}
    tokens, plans = nodes.execute(model=[model], prompt=prompts, sampling=[options], **widgets).args
    assert calls == [prompts]
    assert plans == [""] * 3
    assert [one.sizes for one in tokens] == [[(2, 2)], [(3, 2)], [(2, 2)]]
    for prompt, height, found in zip(prompts, (64, 96, 64), tokens, strict=True):
        graph["sample"]["inputs"] |= {"prompt": prompt, "height": height}
        ((alone,),) = grids_of(in_process_host.run(graph), "sample")
        assert torch.equal(found.grids[0], alone)


def test_runs_whose_options_differ_are_calls_of_their_own(in_process_host, drawing, monkeypatch):
    loaded = in_process_host.run({name: drawing()[name] for name in ("load", "options")})
    model, options = loaded["load"][0][0], loaded["options"][0][0]
    calls = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, *given, **named: calls.append(given[0]) or generate(self, *given, **named)
    )
    widgets = {"width": [64], "height": [64], "steps": [8, 8, 4], "guidance": [2.0], "seed": [1], "thinking": [False]}
    nodes = in_process_host.node_class("LLaDAUniSample")
    tokens, _ = nodes.execute(model=[model], prompt=["a", "b", "c"], sampling=[options], **widgets).args
    assert calls == [["a", "b"], ["c"]]
    assert len(tokens) == 3


def test_at_temperature_0_another_seed_draws_nothing_again(in_process_host, drawing, monkeypatch, caplog):
    loaded = in_process_host.run({name: drawing()[name] for name in ("load", "options")})
    model, options = loaded["load"][0][0], loaded["options"][0][0]
    calls = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, *given, **named: calls.append(given[0]) or generate(self, *given, **named)
    )
    nodes = in_process_host.node_class("LLaDAUniSample")

    def draw(prompt="a fox", **changes):
        inputs = {"width": 64, "height": 64, "steps": 2, "guidance": 2.0, "seed": 1, "thinking": False} | changes
        before = len(calls)
        tokens, _ = nodes.execute(model=[model], prompt=[prompt], **{name: [of] for name, of in inputs.items()}).args
        return tokens[0], len(calls) > before

    first, drew = draw()
    assert drew
    with caplog.at_level("INFO"):
        again, drew = draw(seed=2)
    assert not drew
    assert torch.equal(again.grids[0], first.grids[0])
    assert "at temperature 0 the seed changes nothing" in caplog.text
    start, mask = first, torch.ones(1, 8, 8)
    for changes in (
        {"prompt": "an owl"},
        {"steps": 3},
        {"height": 96},
        {"batch_size": 2},
        {"tokens": start, "mask": mask},
    ):
        assert draw(**changes)[1]
        assert not draw(**changes, seed=3)[1]
    darker = mask.clone()
    darker[:, :4] = 0
    assert draw(tokens=start, mask=darker)[1]
    assert draw(sampling=options)[1]
    assert draw(sampling=options)[1], "chance has a part in it: the host decides"


def test_only_some_results_are_kept(in_process_host, drawing):
    recent = in_process_host.run({"load": drawing()["load"]})["load"][0][0].recent
    for at in range(100):
        recent.keep(("key", at), at + 1)
    assert recent.get(("key", 99)) == 100
    assert recent.get(("key", 0)) is None


def test_a_tensor_that_claims_more_than_it_holds_is_refused_by_name(in_process_host, graphs):
    """120 GB by its shape, four bytes in memory: neither the key of a result nor an error may write it out."""
    right = in_process_host.run({name: data for name, data in graphs.draw(side=64).items() if name == "load"})
    huge = torch.zeros(1).expand(1, 100_000, 100_000, 3)
    given = {"model": right["load"][0][0], "width": 64, "height": 64, "steps": 2, "guidance": 2.0, "seed": 0}
    given |= {"prompt": "an owl", "thinking": False}
    node = in_process_host.node_class("LLaDAUniSample")
    for changes, said in (
        ({"prompt": huge}, "prompt: found a value of type Tensor"),
        ({"seed": huge}, "seed: found a value of type Tensor"),
        ({"seed": [[1, 2]]}, r"seed: found \[1, 2\]"),
        ({"steps": [huge, huge]}, "steps: found a value of type Tensor"),
        ({"prompt": torch.ones(2, 2).to_sparse()}, "prompt: found a value of type Tensor"),
        ({"prompt": torch.ones(2, device="meta")}, "prompt: found a value of type Tensor"),
    ):
        with pytest.raises(Exception, match=said):
            node.execute(**{**given, **changes})


def test_answers_one_by_one_are_one_call(in_process_host, graphs, monkeypatch):
    graph = graphs.draw(side=64)
    graph["batch"] = graphs.node("ImageBatch", image1=["decode", 0], image2=["decode", 0])
    ask = {"question": "What?", "steps": 8, "max_new_tokens": 8, "seed": 0, "one_by_one": True}
    graph["each"] = graphs.node("LLaDAUniImageQA", model=["load", 0], image=["batch", 0], **ask)
    model = in_process_host.run({"load": graph["load"]})["load"][0][0]
    calls = []
    answer = type(model).answer
    monkeypatch.setattr(
        type(model), "answer", lambda self, *given, **named: calls.append(given) or answer(self, *given, **named)
    )
    answers = in_process_host.run(graph)["each"][0][0]
    assert len(calls) == 1
    assert len(answers) == 2


# Only here


def test_a_padded_picture_is_drawn_around_what_is_known(in_process_host, drawing, graphs):
    graph = drawing(mask=["pad", 1], tokens=["pad", 0])
    graph["first"] = graphs.draw(side=64)["sample"]
    sides = {"left": 32, "top": 0, "right": 32, "bottom": 32}
    graph["pad"] = graphs.node("LLaDAUniPadTokens", tokens=["first", 0], **sides)
    results = in_process_host.run(graph)
    ((known,),), ((drawn,),) = grids_of(results, "first"), grids_of(results, "sample")
    assert drawn.shape == (3, 4)
    assert torch.equal(drawn[:2, 1:3], known)


def test_crop_paste_and_preview(in_process_host, graphs):
    graph = graphs.draw(side=96)
    place = {"left": 32, "top": 64}
    graph["cut"] = graphs.node("LLaDAUniCropTokens", tokens=["sample", 0], left=0, top=0, width=64, height=32)
    graph["paste"] = graphs.node("LLaDAUniPasteTokens", tokens=["sample", 0], piece=["cut", 0], **place)
    graph["show"] = graphs.node("LLaDAUniPreviewTokens", model=["load", 0], tokens=["paste", 0], cell=4)
    results = in_process_host.run(graph)
    ((whole,),), ((pasted,),) = grids_of(results, "sample"), grids_of(results, "paste")
    assert torch.equal(pasted[2, 1:], whole[0, :2])
    assert torch.equal(pasted[:2], whole[:2])
    assert results["paste"][0][1].shape == (1, 96, 96)
    (picture,) = results["show"][0][0]
    assert picture.shape == (1, 12, 12, 3)


@pytest.mark.parametrize("choose", ["by seed", "least certain"])
def test_variations_are_as_many_as_asked_for(choose, in_process_host, graphs):
    graph = graphs.draw(side=96)
    options = {"prompt": "a fox", "strength": 0.3, "count": 3, "choose": choose, "steps": 4, "guidance": 2.0, "seed": 5}
    graph["vary"] = graphs.node("LLaDAUniVary", model=["load", 0], tokens=["sample", 0], **options)
    results = in_process_host.run(graph)
    ((before,),), (found,) = grids_of(results, "sample"), grids_of(results, "vary")
    assert len(found) == 3
    assert all(0 < int((one != before).sum()) <= 3 for one in found)


def test_another_choice_of_tokens_is_refused(in_process_host, graphs):
    """ComfyUI 0.3.64 looks at no list of choices, and any text but one would have meant "by seed"."""
    graph = graphs.draw(side=64)
    options = {"prompt": "a fox", "strength": 0.3, "count": 1, "choose": "at random", "steps": 4, "guidance": 2.0}
    graph["vary"] = graphs.node("LLaDAUniVary", model=["load", 0], tokens=["sample", 0], seed=5, **options)
    with pytest.raises(Exception, match="choose: found 'at random'; expected one of by seed, least certain"):
        in_process_host.run(graph)
