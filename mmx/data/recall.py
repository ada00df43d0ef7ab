"""Samples of long-context question answering, made from real text: what is asked for stands at a known place in it.

Three kinds. ``fact``: invented sentences spliced between the lines of the text, some asked for and as many not.
``table``: parts of a table of keys (words of the text) and values, spliced likewise. ``dialogue``: rounds in which
passages of the text are asked for and given, then asked for once more. Each ends with questions and their answers, the
more of them the longer it is; depths are spread evenly over the text. Wordings vary, as the report asks of
question-answer data (section 4.1), and are not those of the evaluations.

Everything is tokens: text is taken from prepared documents and only what is added is tokenized, so lengths are exact.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError
from mmx.data.corpus import Corpus
from mmx.data.tokenizer import Tokenizer

Span = tuple[int, int]


class Sample(NamedTuple):
    """A document whose answers are to be learnt; spans are (start, stop) in its tokens."""

    kind: str
    tokens: np.ndarray  # int32, marks of the document's ends included
    answers: list[Span]
    evidence: list[Span]  # of each answer, where the text gives it


class Piece(NamedTuple):
    """Tokens of a sample under construction; ``evidence`` and ``answer`` are numbers of questions."""

    tokens: Sequence[int] | np.ndarray
    evidence: int | None = None
    answer: int | None = None


_QUESTION_TOKENS = 4096
_MOST_QUESTIONS = 8
# A line of a passage that is asked for: long enough to be worth it, short enough to be known by its beginning.
_LINE_TOKENS = (8, 48)
_LINE_SEARCH = 256

_ADJECTIVES = (
    *("amber", "brass", "cobalt", "crimson", "dusty", "hollow", "ivory", "jade"),
    *("lunar", "mossy", "narrow", "ochre", "quiet", "rusty", "silver", "velvet"),
)
_NOUNS = (
    *("anchor", "basket", "beacon", "candle", "compass", "drum", "engine", "ferry"),
    *("harp", "kettle", "ladder", "mirror", "orchard", "parcel", "quill", "wagon"),
)
_FACTS = (
    ("The {key} was entered under number {value}.", "Under which number was the {key} entered?"),
    ("Shelf {value} holds the {key}.", "Which shelf holds the {key}?"),
    ("It took {value} days to find the {key}.", "How many days did it take to find the {key}?"),
    ("Whoever asks for the {key} must say {value}.", "What must be said to get the {key}?"),
)
_ROWS = ("| {key} | {value} |", "{key}: {value}", "{key} = {value}", "{value} <- {key}")
_LOOK_UPS = ("Which value does the table give for {key}?", "Look up {key}.", "What stands beside {key} in the table?")
_REQUESTS = (
    ("Read me the passage filed under {key}.", "What was the first line of the passage filed under {key}?"),
    ("Show the excerpt called {key}.", "Give me the opening line of the excerpt called {key} again."),
    ("Now the {key} section, please.", "Repeat how the {key} section began, one line only."),
)
# What comes before a question, before its answer and after it.
_TURNS = (
    ("Question: ", "\nAnswer:", "\n"),
    ("Q: ", "\nA:", "\n"),
    ("User: ", "\nAssistant:", "\n\n"),
    ("- ", "\n  ->", "\n"),
)


class Text:
    """The documents of a corpus as one endless text, each read through, in an order drawn at random for every turn."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, rng: np.random.Generator):
        self._corpus, self._tokenizer, self._rng = corpus, tokenizer, rng
        pieces = [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)]
        self._breaks_line = np.asarray([piece.startswith(b"\n") for piece in pieces])
        self._break = tokenizer.encode("\n\n")
        self._order: list[int] = []
        self._place = 0
        self._ahead = np.empty(0, np.int32)  # Read already, and not taken.

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` tokens."""
        taken, self._ahead = [self._ahead[:count]], self._ahead[count:]
        missing = count - len(taken[0])
        while missing:
            if not self._order:
                self._order = self._rng.permutation(len(self._corpus)).tolist()
            document = self._order[-1]
            end = int(self._corpus.lengths[document]) - 1  # Without its marks.
            start = max(1, self._place)
            stop = min(end, start + missing)
            if start < stop:
                taken.append(self._corpus.read(document, start, stop))
                missing -= stop - start
            self._place = stop
            if stop == end:
                self._order.pop()
                self._place = 0
                taken.append(np.asarray(self._break[:missing], np.int32))
                missing -= len(taken[-1])
        return np.concatenate(taken)

    def take_lines(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` tokens from the start of a line on: those of that line, without its break, and the rest."""
        tokens = self.take(count + _LINE_SEARCH)
        shortest, longest = _LINE_TOKENS
        fitting = (
            (before + 1, after)
            for before, after in itertools.pairwise(self.line_breaks(tokens).tolist())
            if before < _LINE_SEARCH and shortest < after - before <= min(longest, count)
        )
        start, stop = next(fitting, (0, shortest))
        # The passage may go on.
        self._ahead = np.concatenate([tokens[start + count :], self._ahead])
        return tokens[start:stop], tokens[stop : start + count]

    def line_breaks(self, tokens: np.ndarray) -> np.ndarray:
        """Places of the tokens that break a line; the next line's indentation may be in them."""
        return np.flatnonzero(self._breaks_line[tokens])

    def words(self, count: int) -> list[str]:
        """Different words of the text, made distinct by numbers if it has too few."""
        found = dict.fromkeys(re.findall(r"[A-Za-z_]{4,20}", self._tokenizer.decode(self.take(32 * count).tolist())))
        words = list(found)[:count]
        return words + [f"entry_{n}" for n in range(count - len(words))]


class RecallTasks:
    """Makes samples of the three kinds, each exactly as long as it is asked for."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, rng: np.random.Generator):
        self._text = Text(corpus, tokenizer, rng)
        self._tokenizer, self._rng = tokenizer, rng
        self._kinds: dict[str, Callable[[int, int], list[Piece]]] = {
            "fact": self._fact,
            "table": self._table,
            "dialogue": self._dialogue,
        }
        self.kinds = tuple(self._kinds)

    def sample(self, kind: str, length: int) -> Sample:
        """A sample of ``length`` tokens. Raises ConfigError if that leaves too little room for text."""
        questions = int(np.clip(length // _QUESTION_TOKENS, 1, _MOST_QUESTIONS))
        inner = self._kinds[kind](length - 2, questions)
        marks = ([self._tokenizer.begin_of_document], [self._tokenizer.end_of_document])
        return _assemble(kind, [Piece(marks[0]), *inner, Piece(marks[1])])

    def _fact(self, length: int, questions: int) -> list[Piece]:
        statement, question = self._one_of(_FACTS)
        count = 2 * questions  # Half of them are asked for.
        keys = self._keys(count)
        values = [str(self._rng.integers(10**5, 10**6)) for _ in keys]
        sentences = [
            [Piece(self._encode("\n" + statement.format(key=key, value=value)), evidence=n if n < questions else None)]
            for n, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
        asked = [(question.format(key=key), self._encode(f" {value}")) for key, value in zip(keys, values, strict=True)]
        return self._spliced(sentences, self._closing(asked[:questions]), length)

    def _table(self, length: int, questions: int) -> list[Piece]:
        row, question = self._one_of(_ROWS), self._one_of(_LOOK_UPS)
        rows = int(np.clip(length // (256 * questions), 3, 64))
        keys = self._text.words(rows * questions)
        values = [f"{value:06x}" for value in self._rng.integers(0, 2**24, len(keys))]
        tables, asked = [], []
        for n in range(questions):
            wanted = n * rows + int(self._rng.integers(rows))
            table = []
            for place in range(n * rows, (n + 1) * rows):
                line = "\n" + row.format(key=keys[place], value=values[place])
                table.append(Piece(self._encode(line), evidence=n if place == wanted else None))
            tables.append(table)
            asked.append((question.format(key=keys[wanted]), self._encode(f" {values[wanted]}")))
        return self._spliced(tables, self._closing(asked), length)

    def _dialogue(self, length: int, questions: int) -> list[Piece]:
        request, again = self._one_of(_REQUESTS)
        before, answer, after = self._one_of(_TURNS)
        turns = (before, answer + "\n", after)
        rounds = int(np.clip(length // 1024, 2, 64))
        keys = self._keys(rounds)
        asked = self._one_in_each(questions, rounds)
        prompts = [self._encode(turns[0] + request.format(key=key) + turns[1]) for key in keys]
        end = self._encode(after)

        def closing(lines: Iterable[Sequence[int]]) -> list[Piece]:
            questions = [again.format(key=keys[n]) for n in asked]
            return self._closing(list(zip(questions, lines, strict=True)), turns)

        # Lines are as long as they turn out: what they leave of the longest ones goes to the last passage.
        reserved = _size(closing([[0] * _LINE_TOKENS[1]] * questions))
        room = length - sum(map(len, prompts)) - rounds * len(end) - reserved
        self._check(room, length)
        passages = [self._text.take_lines(room // rounds) for _ in prompts]
        ending = closing([passages[n][0] for n in asked])
        line, rest = passages[-1]
        passages[-1] = line, np.concatenate([rest, self._text.take(room % rounds + reserved - _size(ending))])
        pieces = []
        for n, (prompt, (line, rest)) in enumerate(zip(prompts, passages, strict=True)):
            evidence = asked.index(n) if n in asked else None
            pieces += [Piece(prompt), Piece(line, evidence=evidence), Piece(rest), Piece(end)]
        return pieces + ending

    def _spliced(self, blocks: list[list[Piece]], closing: list[Piece], length: int) -> list[Piece]:
        """Text with the blocks between its lines, one in each equal stretch of it, and the closing behind."""
        size = length - _size(closing) - sum(map(_size, blocks))
        self._check(size, length)
        text = self._text.take(size)
        breaks = self._text.line_breaks(text)
        pieces, start = [], 0
        for n, block in enumerate(self._rng.permutation(len(blocks))):
            place = int((n + self._rng.random()) / len(blocks) * size)
            following = breaks[np.searchsorted(breaks, place) :][:1]
            if len(following) and following[0] < place + _LINE_SEARCH:  # Else the text has no lines there.
                place = int(following[0])
            pieces += [Piece(text[start:place]), *blocks[block]]
            start = place
        return [*pieces, Piece(text[start:]), *closing]

    def _closing(
        self, asked: list[tuple[str, Sequence[int]]], turns: tuple[str, str, str] | None = None
    ) -> list[Piece]:
        """Questions, given as text, and their answers, as tokens, in any order."""
        before, answer, after = turns or self._one_of(_TURNS)
        pieces = [Piece(self._encode("\n"))]
        for n in self._rng.permutation(len(asked)):
            question, tokens = asked[n]
            pieces += [
                Piece(self._encode(before + question + answer)),
                Piece(tokens, answer=int(n)),
                Piece(self._encode(after)),
            ]
        return pieces

    def _one_in_each(self, count: int, total: int) -> list[int]:
        """``count`` different numbers below ``total``, one from each equal part."""
        edges = np.linspace(0, total, count + 1).astype(int)
        return [int(self._rng.integers(low, high)) for low, high in itertools.pairwise(edges)]

    def _keys(self, count: int) -> list[str]:
        chosen = self._rng.choice(len(_ADJECTIVES) * len(_NOUNS), count, replace=False)
        return [f"{_ADJECTIVES[n // len(_NOUNS)]} {_NOUNS[n % len(_NOUNS)]}" for n in chosen]

    def _one_of(self, choices: Sequence):
        return choices[self._rng.integers(len(choices))]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _check(self, room: int, length: int) -> None:
        if room < length // 4:
            raise ConfigError(
                f"a long-context question of {length} tokens would be hardly any text: raise the shortest of "
                "--long_qa_lengths"
            )


def _size(pieces: Iterable[Piece]) -> int:
    return sum(len(piece.tokens) for piece in pieces)


def _assemble(kind: str, pieces: list[Piece]) -> Sample:
    answers: dict[int, Span] = {}
    evidence: dict[int, Span] = {}
    place = 0
    for piece in pieces:
        span = place, place + len(piece.tokens)
        if piece.evidence is not None:
            evidence[piece.evidence] = span
        if piece.answer is not None:
            answers[piece.answer] = span
        place = span[1]
    # Answers in the order in which they are given.
    order = sorted(answers, key=lambda n: answers[n])
    tokens = np.concatenate([np.asarray(piece.tokens, np.int32) for piece in pieces])
    return Sample(kind, tokens, [answers[n] for n in order], [evidence[n] for n in order])
