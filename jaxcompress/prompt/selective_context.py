"""Selective-Context (Li et al. 2023): drops units of a text that a decoder expected."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from jaxcompress.prompt.information import Reader, TokenLosses, per_unit
from jaxcompress.prompt.surface import Word
from jaxcompress.prompt.units import phrases, sentences
from jaxcompress.prompt.word_scores import ScoredWords, Scorer
from jaxcompress.prompt.words import Spans, segment

Unit = Literal["word", "phrase", "sentence"]
_ROWS = 8


def selective_context(reader: Reader, unit: Unit = "phrase") -> Scorer:
    """Scores every word by its unit's self-information, the mean of -log p over the unit's tokens.

    Each sentence is read on its own, after the begin token, as in the paper. Phrases are our own (`units.phrases`),
    since the paper's noun chunks need a parser. `keep` meets its budget exactly, so the last unit may be kept in part;
    the paper drops whole units below a percentile.

    Raises:
      ValueError: an unknown unit.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unknown unit {unit!r}; known: {', '.join(get_args(Unit))}")

    def score(text: str) -> ScoredWords:
        spans, whole = segment(text), sentences(text)
        units = spans if unit == "word" else _spans(whole if unit == "sentence" else phrases(text))
        values = per_unit(units, read_apart(reader, text, whole))
        owner = np.searchsorted(units[:, 0], spans[:, 0], side="right") - 1
        scores = values[owner] if len(spans) else np.zeros(0, np.float32)
        return ScoredWords(text, spans, scores, f"selective context ({unit}s)")

    return score


def read_apart(reader: Reader, text: str, parts: list[Word]) -> TokenLosses:
    """Reads each part of a text on its own; several parts at a time.

    Without a begin token the first token of a part has no prediction. It gets the mean of the tokens that have one, so
    that beginnings are neither kept nor dropped for it.
    """
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
    losses = np.concatenate(nats)
    unread = np.isnan(losses)
    if not unread.all():
        losses = np.where(unread, losses[~unread].mean(), losses).astype(np.float32)
    return TokenLosses(np.concatenate([ids for ids, _ in encoded]), np.concatenate(places), losses)


def _spans(units: list[Word]) -> Spans:
    return np.array(units, np.int64).reshape(-1, 2)
