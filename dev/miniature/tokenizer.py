"""The miniature's text tokenizer: a byte-level BPE trained on the world's texts, with the model's special tokens."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llada_core.prompts import EDIT, INTERLEAVED, TEXT_TO_IMAGE, THINKING, UNCONDITION, UNDERSTAND
from llada_core.vocabulary import Vocabulary

from .sizes import SEED, Sizes
from .worlds import World

SPECIAL = ("<|endoftext|>", "<|mask|>", "<|image|>", "<|/image|>", "<boi>", "<role>", "</role>")
_TEXTS = 4000  # examples whose texts are learnt from


def build(world: World) -> Tokenizer:
    """A world's tokenizer: the one that it keeps, or else one learnt now, always the same for the same texts.

    What is learnt depends on every phrase and share of the world. Where those change between two parts of a training,
    the weights would read each prompt as noise; so a world that goes on being trained keeps its tokenizer.
    """
    return Tokenizer.from_file(str(world.tokenizer)) if world.tokenizer else learn(world)


def learn(world: World) -> Tokenizer:
    """Learn a tokenizer from a world's texts."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Letters that are to be written one by one are tokens one by one.
    apart = [pre_tokenizers.Split(Regex(world.apart), "isolated")] if world.apart else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*apart, words]) if apart else words
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + world.sizes.merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(world), trainer)
    reserved = tuple(f"<|reserved_token_{size}|>" for size in range(world.sizes.dimensions))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL + reserved])
    return tokenizer


def _texts(world: World) -> Iterator[str]:
    rng = random.Random(SEED)
    for _ in range(_TEXTS):
        made = world.example(rng, None)
        yield made.instruction
        yield from (text for text, _ in made.frames if text)
    # Every prompt holds these, so they are worth whole words.
    for text in (UNDERSTAND, TEXT_TO_IMAGE, THINKING, EDIT, INTERLEAVED, f" {UNCONDITION}", "SYSTEM", "HUMAN"):
        yield from [text, f" {text} ", "ASSISTANT", UNCONDITION] * 300


def vocabulary(tokenizer: Tokenizer, sizes: Sizes) -> Vocabulary:
    """Text ids, then the image ids, counted from the next multiple of 64."""
    offset = -(-tokenizer.get_vocab_size(with_added_tokens=True) // 64) * 64
    return Vocabulary(tokenizer, offset, offset + sizes.codes)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the two small files beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "mask_token": SPECIAL[1]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
