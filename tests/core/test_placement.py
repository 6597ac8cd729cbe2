"""Where components sit: the plain manager, and a host with room for a single part at a time."""

import pytest
import torch

from llada_core.engine import LLaDAUni, OneDevice, Placement
from llada_core.options import Decoding, Guidance


class RoomForOne:
    """Sends every other part away when it gives a placement, as a host on a small card; what is away cannot run."""

    def __init__(self):
        self.here: tuple[str, Placement] | None = None
        self.order: list[str] = []

    def place(self, part, component, working_bytes):
        assert working_bytes(torch.float32) >= 0
        if self.here is None or self.here[0] != part:
            if self.here is not None:
                self.here[1].module.to("meta")
            self.here = (part, Placement(component.load(torch.float32), torch.device("cpu"), torch.float32))
            self.order.append(part)
        return self.here[1]


@pytest.fixture
def image():
    return torch.linspace(0, 1, 2 * 64 * 96 * 3).view(2, 64, 96, 3)


def test_every_task_works_where_only_one_part_fits_at_a_time(golden_checkpoint, model, image):
    manager = RoomForOne()
    small = LLaDAUni(golden_checkpoint, manager)

    def work(model):
        references = model.encode(image, pixels=64 * 64)
        drawn = model.generate("a fox", references=references, guidance=Guidance(4.0, 1.0))
        pictures = model.decode(references, Decoding(steps=2))
        return references.grids, drawn.tokens.grids, model.answer("What?", references, max_new_tokens=8).text, pictures

    references, drawn, answer, pictures = work(small)
    expected = work(model)
    assert all(torch.equal(a, b) for a, b in zip((*references, *drawn), (*expected[0], *expected[1]), strict=True))
    assert answer == expected[2]
    assert all(torch.equal(a, b) for a, b in zip(pictures, expected[3], strict=True))
    # A batch brings each part once: all features, then all latents, then all pixels.
    assert manager.order == ["image_tokenizer", "backbone", "sigvq", "decoder-turbo", "vae", "backbone"]


def test_one_device_loads_a_part_once_and_lets_go_of_it_when_told(golden_checkpoint):
    manager = OneDevice(dtype=torch.bfloat16)
    model = LLaDAUni(golden_checkpoint, manager)
    first = manager.place("vae", model.components["vae"], lambda dtype: 0)
    assert first.dtype == next(first.module.parameters()).dtype == torch.bfloat16
    assert manager.place("vae", model.components["vae"], lambda dtype: 0) is first
    manager.release("vae")
    assert manager.place("vae", model.components["vae"], lambda dtype: 0) is not first


def test_the_vae_is_never_loaded_in_float16(golden_checkpoint):
    manager = OneDevice(dtype=torch.float16)
    model = LLaDAUni(golden_checkpoint, manager)
    assert manager.place("vae", model.components["vae"], lambda dtype: 0).dtype == torch.float32
    assert manager.place("sigvq", model.components["sigvq"], lambda dtype: 0).dtype == torch.float16
