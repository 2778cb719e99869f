"""Selective-Context (Li et al. 2023): units of a text that a decoder expected are left out."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from jaxcompress.prompt.information import Reader, TokenLosses, per_unit
from jaxcompress.prompt.surface import Word, words_of
from jaxcompress.prompt.units import phrases, sentences
from jaxcompress.prompt.word_scores import ScoredWords, Scorer

Unit = Literal["word", "phrase", "sentence"]
_ROWS = 8


def selective_context(reader: Reader, unit: Unit = "phrase") -> Scorer:
    """Scores every word by its unit's self-information, the mean of -log p over the unit's tokens.

    Each sentence is read on its own, after the begin token, as in the paper. Phrases are ours (`units.phrases`): the
    paper's noun chunks need a parser. `keep` then keeps an exact number of words, so that the last unit may be kept in
    part; the paper drops whole units below a percentile.

    Raises:
      ValueError: an unknown unit.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unknown unit {unit!r}; known: {', '.join(get_args(Unit))}")

    def score(text: str) -> ScoredWords:
        words, whole = words_of(text), sentences(text)
        units = {"word": lambda: words, "phrase": lambda: phrases(text), "sentence": lambda: whole}[unit]()
        values = per_unit(units, read_apart(reader, text, whole))
        owner = np.searchsorted([one.start for one in units], [word.start for word in words], side="right") - 1
        scores = values[owner] if words else np.zeros(0, np.float32)
        return ScoredWords(text, words, scores, f"selective context ({unit}s)")

    return score


def read_apart(reader: Reader, text: str, parts: list[Word]) -> TokenLosses:
    """Reads parts of a text, each as if it were all; several at a time."""
    encoded = [reader.tokenizer.encode_with_places(text[part.start : part.end]) for part in parts]
    order = sorted(range(len(parts)), key=lambda at: len(encoded[at][0]))  # little padding
    nats: list[np.ndarray] = [np.zeros(0, np.float32)] * len(parts)
    for first in range(0, len(order), _ROWS):
        now = order[first : first + _ROWS]
        tokens = np.full((_ROWS, max(len(encoded[at][0]) for at in now)), -1, np.int32)
        for row, at in enumerate(now):
            tokens[row, : len(encoded[at][0])] = encoded[at][0]
        losses, _ = reader.losses(reader.begin(_ROWS), tokens)
        for row, at in enumerate(now):
            nats[at] = losses[row, : len(encoded[at][0])]
    if not parts:
        return TokenLosses(np.zeros(0, np.int32), np.zeros((0, 2), np.int32), np.zeros(0, np.float32))
    places = [places + part.start for (_, places), part in zip(encoded, parts, strict=True)]
    return TokenLosses(np.concatenate([ids for ids, _ in encoded]), np.concatenate(places), np.concatenate(nats))
