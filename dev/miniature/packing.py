"""Examples -> token sequences -> rows that train every block of them at once.

A sequence is what the engine would hold at the end of a task: the prompt, in the engine's own words, and what follows.
Its turns are the parts that the engine fills in, a text or an image body each. In a row stand the clean sequence and,
for each turn and each block that it touches, a copy of that block with some of the turn masked:

    clean 0 | clean 1 | clean 2 | block 1 of turn 0 | block 2 of turn 0 | block 2 of turn 1 | … | the next sequence

A clean position sees the clean ones of its own and of earlier blocks; a copy sees itself and the clean ones of earlier
blocks. That is what the engine computes when it fills that block with its exact cache.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llada_core import prompts
from llada_core.image_tokens import ImageTokens
from llada_core.prompts import Prompts
from llada_core.vocabulary import Vocabulary

from .examples import Example
from .sizes import BLOCK

NOT_CLEAN = 1  # group of the first copy; clean positions have group 0
FIXED, TARGET, TAIL = 0, 1, 2  # role of a position of a copy: known, to be learnt, behind the end of an image
_UNGUIDED = 0.15  # of the drawings and edits lose their text, for guidance
_BLIND = 0.04  # of the edits lose their pictures
# How many of the plans are learnt as texts; after the others the picture is. A text takes a fifth of a picture's room.
_WORKED_OUT, _TOLD = 0.75, 0.4
_ANSWER = 16.0  # what all tokens of an answer weigh in the loss; any other token weighs 1
_NEW = 2.0  # how many times more weighs what cannot be copied
_WAITING = 16  # sequences that wait for a row with room for them, at most
_SHIFTED = 0.05  # of the rest start in the middle of a block, as the longer row of a guided pair makes it


@dataclass(frozen=True)
class Turn:
    """ids[start:end] of a sequence is to be filled in.

    Attributes:
        start, end: of the turn.
        image: whether it is an image body.
        weight: of each of its tokens in the loss.
        weights: of each, where they differ.
    """

    start: int
    end: int
    image: bool
    weight: float = 1.0
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sequence:
    """Token ids, what of them is learnt, and how many padding positions stand before the first in its first block."""

    ids: list[int]
    turns: list[Turn]
    pad: int = 0


@dataclass(frozen=True)
class Manner:
    """How a world's examples become sequences.

    Attributes:
        announced: (rows, columns) that a plan ends with.
        object_weight: what an image token that is none of the ground's, and a token of a plan, weighs in the loss. What
            cannot be copied weighs twice that: cells that an edit changes, and the reasoning that a plan begins with.
        length: positions that a sequence may take with its copies; turns are left out until it does.
    """

    announced: tuple[int, int]
    object_weight: float = 1.0
    length: int = 1 << 30


def sequence(
    made: Example, codes: list[torch.Tensor], words: Vocabulary, rng: random.Random, manner: Manner
) -> Sequence:
    """An example as tokens; some lose their text or pictures, so that guidance has something to compare with.

    Args:
        made: the example.
        codes: int [h, w] for each of its scenes.
        words: the vocabulary.
        rng: of the choice.
        manner: of the world.
    """
    seq = _sequence(made, codes, words, rng, manner)
    before = (codes[0].flatten().long() + words.image_offset).tolist() if made.task == "edit" else None
    turns = [_weighted(turn, seq.ids, manner.object_weight, before) for turn in seq.turns]
    while len(turns) > 1 and length_of(Sequence(seq.ids, turns, seq.pad)) > manner.length:
        turns.pop(rng.randrange(len(turns)))
    return Sequence(seq.ids, turns, seq.pad)


def _weighted(turn: Turn, ids: list[int], heavy: float, before: list[int] | None) -> Turn:
    """An image body's tokens weighed; `before` is what it was before an edit. The ground's are a tenth of it each."""
    if not turn.image or heavy == 1:
        return turn
    body = ids[turn.start : turn.end]
    before = before or body
    counts, earlier = Counter(body), Counter(before)

    def weight(new: int, old: int) -> float:
        if 10 * counts[new] > len(body) and 10 * earlier[old] > len(body):
            return 1.0
        return heavy if new == old else _NEW * heavy

    return replace(turn, weights=tuple(map(weight, body, before)))


def _sequence(
    made: Example, codes: list[torch.Tensor], words: Vocabulary, rng: random.Random, manner: Manner
) -> Sequence:
    bodies = [(grid.flatten().long() + words.image_offset).tolist() for grid in codes]
    shown = codes[: len(made.references)]
    shown = ImageTokens(tuple(grid.long() for grid in shown), words.codebook_size) if shown else None
    if made.task == "understand":
        answer = [*words.encode(made.frames[0][0]), words.end]
        # The one token that tells would drown among the hundreds of a drawing.
        weight = max(1.0, _ANSWER / len(answer))
        return _after(
            prompts.understand(words, made.instruction, shown).conditional, answer, False, _pad(rng, False), weight
        )
    if made.task == "story":
        return _story(made, codes, bodies, words, rng)
    size = tuple(codes[-1].shape)
    if made.task == "think":
        trace = words.encode(made.frames[-1][0])
        if rng.random() < (_WORKED_OUT if made.kind else _TOLD):
            # The picture's size is the caller's choice; the trace announces the usual one.
            plan = trace + words.header(*manner.announced)
            asked = prompts.thinking(words, made.instruction).conditional
            reasoning = made.frames[-1][0].rpartition(". ")[0]
            first = len(words.encode(reasoning + ".")) if reasoning else 0
            heavy = manner.object_weight  # a plan tells of objects, and of them alone
            weights = (_NEW * heavy,) * first + (heavy,) * (len(plan) - first)
            return Sequence(asked + plan, [Turn(len(asked), len(asked) + len(plan), False, heavy, weights)])
        rows, _ = prompts.after_thinking(words, made.instruction, trace, *size)
    elif made.task == "edit":
        rows = prompts.edit(words, made.instruction, shown)
    else:
        rows = prompts.text_to_image(words, made.instruction, *size)
    prompt, changed = _guided(rows, rng)
    return _after(prompt, bodies[-1], True, _pad(rng, changed))


def _after(prompt: list[int], answer: list[int], image: bool, pad: int = 0, weight: float = 1.0) -> Sequence:
    return Sequence(prompt + answer, [Turn(len(prompt), len(prompt) + len(answer), image, weight)], pad)


def _guided(rows: Prompts, rng: random.Random) -> tuple[list[int], bool]:
    chance = rng.random()
    if rows.without_text is not None and chance < _UNGUIDED:
        return rows.without_text, True
    if rows.without_image is not None and chance < _UNGUIDED + _BLIND:
        return rows.without_image, True
    return rows.conditional, False


def _pad(rng: random.Random, always: bool) -> int:
    return rng.randrange(BLOCK) if always or rng.random() < _SHIFTED else 0


def _story(made: Example, codes, bodies, words: Vocabulary, rng: random.Random) -> Sequence:
    ids = prompts.interleaved(words, made.instruction, None)
    turns, drop = [], rng.randrange(len(bodies)) if rng.random() < _UNGUIDED else None
    for index, (text, scene) in enumerate(made.frames):
        start = len(ids)
        ids = ids + words.encode(text) + ([words.end] if scene is None else words.header(*codes[index].shape))
        turns.append(Turn(start, len(ids), False))
        if scene is None:
            break
        if index == drop:
            rows = prompts.interleaved_image(words, ids, edit=index > 0)
            blind = index > 0 and rng.random() < 0.3
            prompt = rows.without_image if blind else rows.without_text
            return _after(prompt, bodies[index], True, _pad(rng, True))
        turns.append(Turn(len(ids), len(ids) + len(bodies[index]), True))
        ids = [*ids, *bodies[index], words.image_end]
    return Sequence(ids, turns)


@dataclass
class Packed:
    """One sequence laid out for a row: eight numbers a position.

    Attributes:
        ids: what stands there (of a target: what is to be found).
        positions: for RoPE, counted from the sequence's own start.
        blocks: of the sequence.
        groups: 0 clean, then one for each copy.
        roles: FIXED, TARGET or TAIL.
        places: index in its image body of an image code, shown or to be found, else -1.
        pictures: which picture of the sequence that body is, counted from 0, else -1.
        weights: in the loss; 1 where nothing else is said.
    """

    ids: list[int]
    positions: list[int]
    blocks: list[int]
    groups: list[int]
    roles: list[int]
    places: list[int]
    pictures: list[int]
    weights: list[float]

    FIELDS = ("ids", "positions", "blocks", "groups", "roles", "places", "pictures", "weights")


def _bodies(ids: list[int], image_offset: int) -> tuple[list[int], list[int]]:
    """`Packed.places` and `Packed.pictures` of a sequence."""
    places, pictures, place, picture = [], [], -1, -1
    for token in ids:
        place = place + 1 if token >= image_offset else -1
        picture += place == 0
        places.append(place)
        pictures.append(picture if place >= 0 else -1)
    return places, pictures


def _blocks(seq: Sequence) -> tuple[list[range], int]:
    """The blocks of each turn, and how many clean positions stand before the last of them."""
    blocks = [range((t.start + seq.pad) // BLOCK, (t.end - 1 + seq.pad) // BLOCK + 1) for t in seq.turns]
    return blocks, max(0, max(own[-1] for own in blocks) * BLOCK - seq.pad)


def length_of(seq: Sequence) -> int:
    """Positions that `lay_out` gives a sequence, at most."""
    blocks, clean = _blocks(seq)
    return clean + BLOCK * sum(map(len, blocks))


def lay_out(seq: Sequence, words: Vocabulary) -> Packed:
    """A sequence with copies of the blocks of its turns; behind a text a block is filled with the end token."""
    blocks, clean = _blocks(seq)
    places, pictures = _bodies(seq.ids, words.image_offset)
    packed = Packed(
        seq.ids[:clean],
        list(range(clean)),
        [(p + seq.pad) // BLOCK for p in range(clean)],
        [0] * clean,
        [FIXED] * clean,
        places[:clean],
        pictures[:clean],
        [1.0] * clean,
    )
    group = NOT_CLEAN
    for turn, touched in zip(seq.turns, blocks, strict=True):
        for block in touched:
            for p in range(max(0, block * BLOCK - seq.pad), (block + 1) * BLOCK - seq.pad):
                inside = turn.start <= p < turn.end
                behind = p >= turn.end
                packed.ids.append(words.end if behind else seq.ids[p])
                packed.positions.append(p)
                packed.blocks.append(block)
                packed.groups.append(group)
                packed.roles.append(TARGET if inside or (behind and not turn.image) else TAIL if behind else FIXED)
                packed.places.append(-1 if behind else places[p])
                packed.pictures.append(-1 if behind else pictures[p])
                heavy = turn.weights[p - turn.start] if inside and turn.weights else turn.weight
                packed.weights.append(heavy if inside else 1.0)
            group += 1
    return packed


def _fitting(left: Iterator[Packed], waiting: list[Packed], length: int, room: int) -> Packed | None:
    """The next sequence that fits, of those that wait first; None where a few do not. The others wait."""
    if room == length and waiting:
        return waiting.pop(0)  # so that none waits for ever
    for index, one in enumerate(waiting):
        if len(one.ids) <= room:
            return waiting.pop(index)
    while len(waiting) < _WAITING:
        one = next(left, None)
        if one is None:
            return None
        if len(one.ids) > length:
            raise ValueError(f"a sequence takes {len(one.ids)} positions of a row of {length}")
        if len(one.ids) <= room:
            return one
        waiting.append(one)
    return None


def rows_of(packed: Iterable[Packed], rows: int, length: int, end: int) -> dict[str, torch.Tensor]:
    """Fill rows with sequences, as many as fit in each, until all rows are full.

    Args:
        packed: sequences, without end or few; one that does not fit waits for another row.
        rows, length: of the batch.
        end: token that fills what is left over.

    Returns:
        Packed.FIELDS and "owners" (the sequence of each position, -1 where there is none), int64 [rows, length]; the
        weights are float32.
    """
    fill = {"ids": end, "positions": 0, "blocks": 0, "groups": 0, "roles": FIXED, "owners": -1}
    fill |= {"places": -1, "pictures": -1, "weights": 1.0}
    batch = {name: torch.full((rows, length), value) for name, value in fill.items()}
    left, waiting, owner = iter(packed), [], 0
    for row in range(rows):
        at = 0
        while (one := _fitting(left, waiting, length, length - at)) is not None:
            size = len(one.ids)
            for name in Packed.FIELDS:
                batch[name][row, at : at + size] = torch.tensor(getattr(one, name))
            batch["owners"][row, at : at + size] = owner
            at, owner = at + size, owner + 1
    return batch


def sparsely_visible(batch: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`visible` as an attention of compiled layers that skips the squares in which nobody sees anybody, for a GPU."""
    owners, blocks, groups = (batch[name] for name in ("owners", "blocks", "groups"))
    rows, length = owners.shape

    def sees(row, head, query, key):
        earlier = (groups[row, key] == 0) & (blocks[row, key] < blocks[row, query])
        own = (groups[row, key] == groups[row, query]) & (blocks[row, key] == blocks[row, query])
        return (owners[row, key] == owners[row, query]) & (earlier | own)

    squares = _squares()(sees, rows, None, length, length, device=owners.device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)
        return flex_attention(q, k, v, block_mask=squares, enable_gqa=True)

    return attend


@cache
def _squares() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask, dynamic=False)  # as it stands, it writes the whole mask several times


def visible(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Who sees whom: bool [rows, 1, length, length], queries before keys."""
    owners, blocks, groups = (batch[name] for name in ("owners", "blocks", "groups"))

    def pairs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :, None], x[:, None, :]

    (query, key), (block, key_block), (group, key_group) = pairs(owners), pairs(blocks), pairs(groups)
    earlier = (key_group == 0) & (key_block < block)
    own = (key_group == group) & (key_block == block)
    return ((query == key) & (earlier | own))[:, None]
