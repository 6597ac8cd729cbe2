"""What a real ComfyUI keeps of the model between prompts. Skipped, by name, where there is none."""

import pytest

from dev.hosts.server import ComfyServer


@pytest.fixture(scope="module")
def server_under_pressure(comfyui, tmp_path_factory):
    """A server that believes its memory is never enough for what it caches: the default cache at its worst."""
    if "--cache-ram" not in (comfyui / "comfy" / "cli_args.py").read_text():
        pytest.skip("this ComfyUI has no cache that looks at memory")
    with ComfyServer(comfyui, tmp_path_factory.mktemp("pressure"), ("--cache-ram", "1000")) as server:
        yield server


def test_weights_are_read_once_however_little_memory_the_host_believes_to_have(server_under_pressure, graphs):
    for seed in range(3):
        run = server_under_pressure.run(graphs.draw(seed=seed, prompt="an owl under pressure"))
        assert run.status == "success", run.error
    assert server_under_pressure.log.count("reading backbone") == 1


def test_a_change_of_another_widget_reads_nothing_again(comfy_server, graphs):
    graph = graphs.draw(prompt="a heron for the widgets")
    assert comfy_server.run(graph).status == "success"
    graph["again"] = graph["load"] | {"inputs": graph["load"]["inputs"]}
    graph["decode"]["inputs"] |= {"model": ["again", 0], "seed": 77}
    marker = len(comfy_server.log)
    assert comfy_server.run(graph).status == "success"
    assert "reading" not in comfy_server.log[marker:]
