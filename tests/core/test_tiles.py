"""Which tiles the product kernels take: of every format, for every number of pairs, and within the device's memory."""

import pytest
import torch

from llada_core.quantization.formats import Dense, FP8Block, Int4, Int8, describe
from llada_core.quantization.tiles import FEW_PAIRS, MANY_PAIRS, choose_tile, shared_bytes

FORMATS = [Dense(torch.bfloat16), FP8Block(), Int8(), Int4(64), Int4(128, symmetric=True)]
forms = pytest.mark.parametrize("form", FORMATS, ids=describe)
EXPERTS = 256


@forms
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("pairs", [1, FEW_PAIRS, MANY_PAIRS, 100])
def test_tiles_fit_into_the_memory_and_the_columns(form, gated, capability, pairs):
    for experts, width in ((1, 2048), (EXPERTS, 2048), (EXPERTS, 512), (EXPERTS, 100)):
        tile = choose_tile(form, gated, pairs * experts, experts, width, capability)
        assert shared_bytes(tile, form, gated) <= {(7, 5): 64, (9, 0): 227}.get(capability, 99) * 1024
        assert all(n & (n - 1) == 0 for n in (tile.rows, tile.features, tile.columns, tile.steps))
        assert tile.rows >= 16 or tile.swapped  # the left side of the matrix instruction has at least 16
        if isinstance(form, Int4):
            assert tile.columns == form.group_size


@forms
def test_a_handful_of_pairs_takes_half_the_rows_where_triton_multiplies_so_few(form):
    def rows(pairs: int, least_rows: int) -> int:
        return choose_tile(form, True, pairs * EXPERTS, EXPERTS, 2048, (9, 0), least_rows).rows

    assert rows(FEW_PAIRS, 16) >= 16
    assert rows(FEW_PAIRS + 1, 8) >= 16
    if not isinstance(form, FP8Block):
        assert rows(FEW_PAIRS, 8) == 8
    assert choose_tile(form, True, FEW_PAIRS * EXPERTS, EXPERTS, 2048, (7, 5)).rows >= 16  # no matrix instructions
