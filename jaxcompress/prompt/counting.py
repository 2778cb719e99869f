"""How many tokens texts have for the model that will read them: the reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer, Offsets, Subwords
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.prompt.joining import joined
from jaxcompress.prompt.words import Costs, Spans, align, owners, segment


@runtime_checkable
class Counter(Protocol):
    """Counts tokens, and divides a text's tokens among its words."""

    def __call__(self, text: str, /) -> int:
        """Tokens of a text."""
        ...

    def price(self, text: str, spans: Spans) -> tuple[Costs, int]:
        """Tokens of each word [W], and of the whole text. The sum over the words may differ from the whole."""
        ...

    def total(self, texts: Sequence[str], cost: int) -> int:
        """Tokens of texts that are read one after the other (`joined`).

        Args:
          texts: what is left of texts that were priced before.
          cost: the sum of what their words cost.
        """
        ...


Count = Callable[[str], int] | Counter
"""What counts tokens: a function of a text, or a `Counter`, which takes less time for long texts."""


def counter_of(count: Count) -> Counter:
    """A `Counter` as it is; one made of a function."""
    return count if isinstance(count, Counter) else FunctionCounter(count)


def apart(count: Count) -> Counter:
    """A `Counter` of texts that are read apart. Word counts are theirs already, and so are an encoder's subwords."""
    counter = counter_of(count)
    return counter if isinstance(counter, WordCounter | SubwordCounter) else ApartCounter(counter)


class TokenizerCounter:
    """Tokens of a decoder's tokenizer, without the begin token: `keep(scored, TokenizerCounter(tokenizer), rate=0.5)`.

    A word costs the tokens that end in it, with the white space before it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, text: str, /) -> int:
        return len(self._tokenizer.encode(text, add_bos=False))

    def price(self, text: str, spans: Spans) -> tuple[Costs, int]:
        ids, places = self._tokenizer.encode_with_places(text)
        return _costs(spans, places), len(ids)

    def total(self, texts: Sequence[str], cost: int) -> int:
        return self(joined(texts))


class ApartCounter:
    """Tokens of texts that are read apart, so that nothing stands between them: messages, strings of JSON."""

    def __init__(self, counter: Counter):
        self._counter = counter
        self._texts: dict[str, int] = {}

    def __call__(self, text: str, /) -> int:
        if text not in self._texts:
            self._texts[text] = self._counter(text)
        return self._texts[text]

    def price(self, text: str, spans: Spans) -> tuple[Costs, int]:
        costs, self._texts[text] = self._counter.price(text, spans)
        return costs, self._texts[text]

    def total(self, texts: Sequence[str], cost: int) -> int:
        return sum(self(text) for text in texts if text)


class FunctionCounter:
    """Tokens by a function of a text. A word costs what it has alone, with a space before it if it has one there."""

    def __init__(self, count: Callable[[str], int]):
        self._count = count
        self._words: dict[str, int] = {}

    def __call__(self, text: str, /) -> int:
        return self._count(text)

    def price(self, text: str, spans: Spans) -> tuple[Costs, int]:
        return np.array([self._cost(text, start, end) for start, end in spans.tolist()], np.int64), self(text)

    def total(self, texts: Sequence[str], cost: int) -> int:
        return self(joined(texts))

    def _cost(self, text: str, start: int, end: int) -> int:
        word = (" " if start and text[start - 1].isspace() else "") + text[start:end]
        if word not in self._words:
            self._words[word] = self._count(word)
        return self._words[word]


class WordCounter:
    """Every word counts as one token, to compare scorers by numbers of words."""

    def __call__(self, text: str, /) -> int:
        return len(segment(text))

    def price(self, text: str, spans: Spans) -> tuple[Costs, int]:
        return np.ones(len(spans), np.int64), len(spans)

    def total(self, texts: Sequence[str], cost: int) -> int:
        return cost


WORDS = WordCounter()


class SubwordCounter:
    """Subwords of an encoder's tokenizer. Of a text that is left, only the parts that are new are tokenized.

    No subword reaches over a space: what stands between two spaces costs the same everywhere. Of several texts each is
    counted alone, since white space between them has no subwords.
    """

    def __init__(self, tokenizer: EncoderTokenizer, encoded: Mapping[str, Subwords] | None = None):
        """`encoded` holds the subwords of texts that were tokenized before."""
        self._tokenizer, self._encoded = tokenizer, {} if encoded is None else encoded
        self._priced: list[tuple[str, Int[np.ndarray, " T"]]] = []  # parts of these are not known yet
        self._parts: dict[str, int] = {}
        self._texts: dict[str, int] = {}

    def __call__(self, text: str, /) -> int:
        if text not in self._texts:
            self._texts[text] = self._sum_of_parts(text)
        return self._texts[text]

    def price(self, text: str, spans: Spans) -> tuple[Costs, int]:
        pieces = self._encoded[text] if text in self._encoded else self._tokenizer.encode(text)
        self._priced.append((text, pieces.offsets[:, 0]))  # not the costs: a span may be a sentence of many parts
        return _costs(spans, pieces.offsets), len(pieces.ids)

    def total(self, texts: Sequence[str], cost: int) -> int:
        return sum(map(self, texts))

    def _sum_of_parts(self, text: str) -> int:
        for whole, places in self._priced:
            self._learn(self._tokenizer.apart(whole), places)
        self._priced.clear()
        parts = self._tokenizer.apart(text)
        if new := list(dict.fromkeys(part for part in parts if part not in self._parts)):
            self._learn(new, self._tokenizer.encode("".join(new)).offsets[:, 0])
        return sum(map(self._parts.__getitem__, parts))

    def _learn(self, parts: Sequence[str], places: Int[np.ndarray, " T"]) -> None:
        """The subwords of parts that stand one after the other in a text, from where subwords begin in it."""
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        sums = np.bincount(np.searchsorted(ends, places, side="right"), minlength=len(parts))
        self._parts.update(zip(parts, sums.tolist(), strict=True))


def _costs(spans: Spans, offsets: Offsets) -> Costs:
    """Tokens of each word; every token belongs to one word (see `owners`)."""
    owner = owners(align(spans, offsets), len(offsets))
    return np.bincount(owner[owner >= 0], minlength=len(spans))
