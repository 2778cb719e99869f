"""Cuts a text into chunks that an encoder can take: at ends of sentences, and inside a word only if it is too long."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from jaxcompress.prompt.words import Offsets, Spans

SENTENCE_ENDS = ".!?…。！？．｡।؟"
_ENDS_SENTENCE = np.zeros(0x10000, bool)
_ENDS_SENTENCE[[ord(c) for c in SENTENCE_ENDS]] = True
_LEAST = 0.25  # of a chunk: the least that an end of a sentence must fill; else it is cut at the end of a word


def chunks(text: str, offsets: Offsets, spans: Spans, most: int) -> Int[np.ndarray, "C 2"]:
    """First and last (exclusive) subword of every chunk [C, 2]; together the chunks are all subwords, in order.

    A chunk ends after the last sentence or line that fits. If it would then be less than a quarter full, it ends after
    the last word that fits; inside a word that is longer than a chunk, anywhere.

    Args:
      offsets: of subwords.
      spans: of words.
      most: subwords that a chunk may have.
    """
    total = len(offsets)
    if total <= most:
        return np.array([[0, total]] if total else np.zeros((0, 2)), np.int64).reshape(-1, 2)
    words, sentences = _ends(text, offsets, spans)
    found, start = [], 0
    while total - start > most:
        end = _last(sentences, start + int(most * _LEAST), start + most)
        end = end or _last(words, start, start + most) or start + most
        found.append((start, end))
        start = end
    return np.array([*found, (start, total)], np.int64)


def _ends(text: str, offsets: Offsets, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """The subwords that may begin a chunk: those after the end of a word, and those after the end of a sentence."""
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    ends, starts = np.maximum.accumulate(offsets[:, 1])[:-1], offsets[1:, 0]
    inside = np.searchsorted(spans[:, 0], ends, side="left")  # after the last word that begins before the cut
    between = (starts >= ends) & (ends >= np.append(0, spans[:, 1])[inside])
    lines = np.concatenate([[0], np.cumsum(code == ord("\n"))])
    sentence = _ENDS_SENTENCE[np.minimum(code[np.maximum(ends - 1, 0)], len(_ENDS_SENTENCE) - 1)]
    sentence |= lines[np.maximum(starts, ends)] > lines[ends]
    return np.flatnonzero(between) + 1, np.flatnonzero(between & sentence) + 1


def _last(cuts: np.ndarray, after: int, until: int) -> int | None:
    n = int(np.searchsorted(cuts, until, side="right")) - 1
    return int(cuts[n]) if n >= 0 and cuts[n] > after else None
