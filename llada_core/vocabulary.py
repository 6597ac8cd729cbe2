"""Text and image ids of a checkpoint: special tokens, image headers, text (docs/model.md, Tokens and prompts)."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from .checkpoint.bounds import check_json_size
from .errors import CheckpointError, InputError
from .image_tokens import ImageTokens

SPECIAL = {
    "end": "<|endoftext|>",
    "mask": "<|mask|>",
    "image": "<|image|>",
    "image_end": "<|/image|>",
    "boi": "<boi>",
    "role": "<role>",
    "role_end": "</role>",
}


class Vocabulary:
    """Text and image ids of one checkpoint.

    Args:
        tokenizer: a loaded `tokenizer.json`, used as it is.
        image_offset: id of image code 0 (config.json, image_token_offset).
        vocab_size: number of ids in all; ids from image_offset on are image codes.

    Raises:
        CheckpointError: the tokenizer lacks a special token, or its ids reach into the image ids.
    """

    def __init__(self, tokenizer: Tokenizer, image_offset: int, vocab_size: int):
        self._tokenizer = tokenizer
        self.image_offset = image_offset
        self.vocab_size = vocab_size
        self.end, self.mask, self.image, self.image_end, self.boi, self.role, self.role_end = (
            self._special(token) for token in SPECIAL.values()
        )
        self._dimensions = self._reserved()
        self._sizes = {token: value for value, token in enumerate(self._dimensions)}
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        if highest >= image_offset:
            remedy = "tokenizer.json and config.json belong to different models; download both again."
            raise CheckpointError("tokenizer.json", f"id {highest}", f"text ids below {image_offset}", remedy)

    @classmethod
    def open(cls, path: Path, image_offset: int, vocab_size: int) -> "Vocabulary":
        """Read `tokenizer.json` at path. Raises CheckpointError where that fails."""
        check_json_size("checkpoint", path)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            remedy = "Download the tokenizer files again."
            raise CheckpointError("tokenizer.json", f"an unreadable file ({error})", "a tokenizer", remedy) from error
        return cls(tokenizer, image_offset, vocab_size)

    def _special(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            remedy = "Download the tokenizer files of this model again."
            raise CheckpointError("tokenizer.json", f"no token {token}", "every special token of the model", remedy)
        return found

    def _reserved(self) -> list[int]:
        ids: list[int] = []
        while (found := self._tokenizer.token_to_id(f"<|reserved_token_{len(ids)}|>")) is not None:
            ids.append(found)
        return ids or [self._special("<|reserved_token_0|>")]

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where the tokenizer has none."""
        return self._tokenizer.token_to_id(token)

    @property
    def largest_dimension(self) -> int:
        """The most tokens that a header can give a picture each way."""
        return len(self._dimensions) - 1

    @property
    def codebook_size(self) -> int:
        """Number of image codes."""
        return self.vocab_size - self.image_offset

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens written in it are plain characters: a prompt cannot forge a header."""
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and image codes."""
        text = [i for i in ids if i < self.image_offset]
        return self._tokenizer.decode(text, skip_special_tokens=True)

    def header(self, height: int, width: int) -> list[int]:
        """What announces an image of height x width tokens. Raises InputError beyond the largest dimension token."""
        largest = self.largest_dimension
        if not (1 <= height <= largest and 1 <= width <= largest):
            expected = f"1 to {largest} tokens each way ({largest * 32} pixels of output)"
            raise InputError("size", f"{height} x {width} tokens", expected, "Choose a smaller width or height.")
        return [self.image, self._dimensions[height], self._dimensions[width], self.boi]

    def read_header(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """(height, width) in tokens where `ids` ends in a well-formed header, else None."""
        if len(ids) < 4 or ids[-4] != self.image or ids[-1] != self.boi:
            return None
        height, width = self._sizes.get(ids[-3], 0), self._sizes.get(ids[-2], 0)
        return (height, width) if height and width else None

    def images(self, tokens: ImageTokens | None) -> list[int]:
        """Blocks of all images in a row: header, body, end of image."""
        ids: list[int] = []
        for grid in tokens.for_codebook(self.codebook_size).grids if tokens else ():
            body = (grid.flatten() + self.image_offset).tolist()
            ids += [*self.header(*grid.shape), *body, self.image_end]
        return ids
