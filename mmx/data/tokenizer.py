"""Byte-level BPE, trained with ``tokenizers``, with the released model's special tokens behind the learned ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmx.config import ConfigError

BEGIN_OF_DOCUMENT = "<begin_of_document>"
END_OF_DOCUMENT = "<end_of_document>"
# Names from the released tokenizer; its order of the learned part is its own, so ids differ.
SPECIAL_TOKENS = (
    BEGIN_OF_DOCUMENT,
    END_OF_DOCUMENT,
    "<beginning_of_sentence>",
    "<end_of_sentence>",
    "<tools>",
    "</tools>",
    "<tool_calls>",
    "</tool_calls>",
    "<image>",
)
# The byte-level alphabet: printable Latin-1 characters stand for themselves, other bytes for characters from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)
}
# The library needs a hundred bytes and more a character of a text: long ones are handed over in parts.
_PART_CHARACTERS = 2**18
_BATCH_CHARACTERS = 2**21
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
    """Text to token ids and back; every byte string can be written."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner
        missing = [token for token in (BEGIN_OF_DOCUMENT, END_OF_DOCUMENT) if inner.token_to_id(token) is None]
        if missing:
            raise ConfigError(f"the tokenizer lacks {' and '.join(missing)}: train one with launch.prepare")
        self.begin_of_document: int = inner.token_to_id(BEGIN_OF_DOCUMENT)
        self.end_of_document: int = inner.token_to_id(END_OF_DOCUMENT)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns merges from texts until there are ``vocab_size`` tokens, special ones included, or no more pairs."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens make "
                f"{SMALLEST_VOCABULARY}"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
        inner.add_special_tokens(list(SPECIAL_TOKENS))
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a ``tokenizer.json``. Raises ConfigError if it cannot be read."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except ConfigError:
            raise
        except Exception as error:  # The library raises plain Exception for a missing or broken file.
            raise ConfigError(f"cannot read the tokenizer {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes a ``tokenizer.json``."""
        self._inner.save(str(path))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; ids are below it."""
        return self._inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without marks of document ends. Special tokens in the text are not parsed."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, in parallel."""
        self._inner.encode_special_tokens = True  # Text that spells a special token must not become one.
        ids: list[list[int]] = [[] for _ in texts]
        parts = ((number, part) for number, text in enumerate(texts) for part in _parts(text))
        for batch in _batches(parts):
            encodings = self._inner.encode_batch_fast([part for _, part in batch], add_special_tokens=False)
            for (number, _), encoding in zip(batch, encodings, strict=True):
                ids[number] += encoding.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_name(self, token: int) -> str:
        """How the vocabulary spells a token, special ones included."""
        return self._inner.id_to_token(token)

    def token_text(self, token: int) -> bytes:
        """The bytes that one token stands for, which need not be whole characters; none for a special token."""
        if token >= self.vocab_size or token in self._inner.get_added_tokens_decoder():
            return b""
        return bytes(_BYTE_OF_CHARACTER[character] for character in self._inner.id_to_token(token))

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for, int32 [vocab_size]; 0 for special tokens."""
        special = {token.content for token in self._inner.get_added_tokens_decoder().values()}
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self._inner.get_vocab().items():
            # The byte-level alphabet writes each byte as one character.
            sizes[index] = 0 if token in special else len(token)
        return sizes


def _parts(text: str) -> Iterator[str]:
    """A text in parts that are tokenized as they are in the whole: pre-tokenization breaks where a line does."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        stop = text.rfind("\n", start + 1, start + _PART_CHARACTERS)
        # White space before the break would be one token with it.
        while stop > 0 and text[stop - 1].isspace():
            stop = text.rfind("\n", start + 1, stop)
        if stop <= 0:  # No such break: cut anywhere.
            stop = start + _PART_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _batches(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch, size = [], 0
    for number, part in parts:
        batch.append((number, part))
        size += len(part)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
