"""How large the product kernels' tiles are: a small table, measured on an H200 with `python -m benchmarks.tiles`.

Other devices take the same tiles, with as many stages as their shared memory holds.
"""

from dataclasses import dataclass, replace

from .formats import Dense, Format, FP8Block, Int4, Int8


@dataclass(frozen=True)
class Tile:
    """What one program of the product kernel does at a time.

    Attributes:
        rows, features, columns: of the pairs, of the output, of the input, powers of two. For 4 bits columns are one
            group, for blocks of FP8 128. Fewer rows than 16 only where weights are the left side.
        warps: of a program.
        stages: how many turns of the loop along the columns are read ahead.
        steps: of so many columns in a turn of the loop.
        split: programs that share the rows of an expert.
        swapped: whether weights or rows are the left side of the matrix instruction, which takes 16 rows of its left
            and 8 of its right side.
        registers: of a thread, at most; 0 leaves that to the compiler. Fewer let more programs wait at once.
    """

    rows: int = 16
    features: int = 64
    columns: int = 128
    warps: int = 4
    stages: int = 3
    steps: int = 1
    split: int = 1
    swapped: bool = False
    registers: int = 0


# (format, gated) -> tile where an expert has a handful of pairs: weights as the left side, so that half the matrix
# instructions do, and fewer registers hold what they add up. From compute capability 8.0 on, before which Triton has no
# such instructions.
_HANDFUL = {
    ("dense", True): Tile(8, 64, 128, 4, 3, swapped=True),
    ("dense", False): Tile(8, 128, 128, 4, 3, swapped=True),
    ("int8", True): Tile(8, 64, 128, 4, 3, swapped=True),
    ("int8", False): Tile(8, 128, 128, 4, 3, swapped=True),
    ("int4", True): Tile(8, 64, 64, 4, 3, steps=2, swapped=True),
    ("int4", False): Tile(8, 128, 64, 4, 3, swapped=True),
}
# Where it has few: one row of tiles, bound by reading the weights.
_FEW = {
    ("dense", True): Tile(16, 32, 256, 4, 3),
    ("dense", False): Tile(16, 128, 128, 4, 2),
    ("int8", True): Tile(16, 64, 128, 4, 3),
    ("int8", False): Tile(16, 128, 128, 4, 3),
    ("fp8_block", True): Tile(16, 128, 128, 4, 3),
    ("fp8_block", False): Tile(16, 128, 128, 2, 3),
    ("int4", True): Tile(16, 64, 64, 4, 3, steps=2),
    ("int4", False): Tile(16, 128, 64, 2, 3),
}
# Where it has dozens: bound by turning codes into numbers, which each row of tiles does anew.
_MANY = {
    ("dense", True): Tile(64, 64, 64, 4, 3),
    ("dense", False): Tile(64, 128, 64, 4, 3),
    ("int8", True): Tile(64, 64, 64, 4, 3),
    ("int8", False): Tile(64, 128, 64, 4, 3),
    ("fp8_block", True): Tile(32, 64, 128, 4, 3),
    ("fp8_block", False): Tile(32, 128, 128, 4, 3),
    ("int4", True): Tile(32, 64, 64, 4, 3, steps=2),
    ("int4", False): Tile(64, 128, 64, 4, 3),
}
# A linear layer has one expert, so its features are cut small to occupy the device.
_LINEAR = {
    ("dense", True): Tile(16, 32, 256, 4, 4),
    ("dense", False): Tile(64, 32, 256, 4, 4),
    ("int8", True): Tile(16, 32, 256, 4, 4),
    ("int8", False): Tile(64, 32, 256, 4, 4),
    ("fp8_block", True): Tile(16, 32, 128, 4, 4),
    ("fp8_block", False): Tile(64, 32, 128, 4, 4),
    ("int4", True): Tile(16, 32, 64, 4, 4, steps=2),
    ("int4", False): Tile(16, 32, 64, 2, 3, steps=2),
}
# Pairs of an expert, on average; the fullest has about twice as many.
MANY_PAIRS = 12
FEW_PAIRS = 4
# Bytes of shared memory that a program may take, by compute capability; others have at least the last.
_SHARED = {(7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED = 99


def choose_tile(
    form: Format,
    gated: bool,
    pairs: int,
    experts: int,
    in_features: int,
    capability: tuple[int, int],
    least_rows: int = 8,
) -> Tile:
    """The tile for so many pairs spread over so many experts.

    Args:
        form, gated: what is computed.
        pairs: in all; of one expert, rows.
        experts: 1 for a linear layer.
        in_features: of the weights.
        capability: the device's compute capability.
        least_rows: of a tile, what Triton can compile.
    """
    key = form.name, gated
    if experts == 1:
        tile = _LINEAR[key]
        tile = replace(tile, rows=16) if pairs <= 16 else tile
        tile = replace(tile, split=-(-pairs // tile.rows))
    elif pairs > MANY_PAIRS * experts:
        # Where routing is uneven, some experts have many more than the others.
        tile = replace(_MANY[key], split=1 if pairs <= 4 * MANY_PAIRS * experts else 4)
    elif pairs <= FEW_PAIRS * experts and least_rows <= 8 and capability >= (8, 0) and key in _HANDFUL:
        tile = _HANDFUL[key]
        # For compute capability 8 the compiler needs more registers: all that there are, or memory in their place.
        if gated and capability >= (9, 0):
            if isinstance(form, Int8):
                tile = replace(tile, columns=256)
            elif isinstance(form, Int4) and form.group_size == 128:
                tile = replace(tile, registers=96)
    else:
        tile = _FEW[key]
    return _within(fit(tile, form, in_features), form, gated, _SHARED.get(capability, _LEAST_SHARED) * 1024)


def fit(tile: Tile, form: Format, in_features: int) -> Tile:
    """The same with the columns that the format needs, and no more than there are."""
    if isinstance(form, Int4):
        tile = replace(tile, columns=form.group_size)
    elif isinstance(form, FP8Block):
        tile = replace(tile, columns=128)
    else:
        while tile.columns > 16 and tile.columns >= 2 * in_features:
            tile = replace(tile, columns=tile.columns // 2)
    return tile if tile.columns * tile.steps < 2 * in_features else replace(tile, steps=1)


def shared_bytes(tile: Tile, form: Format, gated: bool) -> int:
    """Bytes of shared memory that a program takes, nearly: what its stages read ahead."""
    bits = {Dense: 16, Int4: 4, Int8: 8, FP8Block: 8}[type(form)]
    columns = tile.columns * tile.steps
    weights = tile.features * columns * bits // 8 * (2 if gated else 1)
    return tile.stages * (weights + tile.rows * columns * 2)


def _within(tile: Tile, form: Format, gated: bool, most: int) -> Tile:
    """The same with so few stages, then features, then columns where the format leaves them open, that it fits."""
    while shared_bytes(tile, form, gated) > most - 4096 and tile.stages > 2:
        tile = replace(tile, stages=tile.stages - 1)
    while shared_bytes(tile, form, gated) > most - 4096 and tile.features > 16:
        tile = replace(tile, features=tile.features // 2)
    while shared_bytes(tile, form, gated) > most - 4096 and tile.columns > 16 and isinstance(form, (Dense, Int8)):
        tile = replace(tile, columns=tile.columns // 2)
    return tile
