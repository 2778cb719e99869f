"""The words of a text, and the subwords of each word.

    spans = segment("We don't know: 4,200?")  # We | don't | know | : | 4,200 | ?
    groups = align(spans, offsets)  # offsets of subwords, from any tokenizer
    of_words(numbers_of_subwords, groups)

Words are found in the text, not in a tokenizer's pieces, so all scorers (an encoder, a language model, counting) have
the same words. A word consists of whole graphemes: cutting between words never cuts an emoji, a syllable, or a letter
from its accents.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
import regex
from jaxtyping import Int, Num

from jaxcompress.inputs.encoder_tokenizer import Offsets

Spans = Int[np.ndarray, "W 2"]
Costs = Int[np.ndarray, " W"]  # tokens of words

_APART = r"\p{Han}\p{Hiragana}\p{Katakana}"  # scripts without spaces: cut where the script changes, Han at each sign
_WORD = regex.compile(
    r"""
    \G ( \s*+ )  # what stands before a word, so that matches lie end to end; nothing is tried within white space
    (
    \p{Nd}+ (?: [.,:] \p{Nd}+ )+                                        # 4,200  3.6  9:45
    | \p{Han} \p{M}*
    | [\p{Hiragana}ー] [\p{Hiragana}\p{M}ー]*
    | \p{Katakana} [\p{Katakana}\p{M}ー]*
    | [[\p{L}\p{N}\p{M}_]--[APART]] [[\p{L}\p{N}\p{M}_\u200c\u200d]--[APART]]*
      (?: ['’] [[\p{L}\p{M}]--[APART]]+                                 # don't
        | [\u00ad\u2060\ufeff]++ [[\p{L}\p{M}]--[APART]] [[\p{L}\p{N}\p{M}_\u200c\u200d]--[APART]]* )*  # a soft hyphen
    | (?! \s ) \X                                                       # punctuation, signs, emoji
    )
    """.replace("APART", _APART),
    regex.VERBOSE | regex.VERSION1,
)
_GRAPHEME = regex.compile(r"\X")
# Without any of these every character is a grapheme of its own, except for line ends.
_JOINS = regex.compile(
    r"[^\p{GCB=Other}\p{GCB=LV}\p{GCB=LVT}\p{GCB=Control}\p{GCB=CR}\p{GCB=LF}]", regex.VERSION1
)  # fmt: skip


class Groups(NamedTuple):
    """The subwords t of each word: `first <= t < last`. A subword that covers several words belongs to all of them. A
    word that the tokenizer drops (a control character, say) has `first == last`."""

    first: Int[np.ndarray, " W"]
    last: Int[np.ndarray, " W"]


def segment(text: str) -> Spans:
    """Start and end of every word in characters [W, 2], in order; white space belongs to no word.

    A run of letters and digits is a word, also with an apostrophe or a soft hyphen inside or, between digits, with `.`,
    `,` or `:`. Han characters are words by themselves, runs of hiragana and katakana are words, and so is everything
    else, one grapheme at a time.
    """
    lengths = map(len, chain.from_iterable(_WORD.findall(text)))
    spans = np.cumsum(np.fromiter(lengths, np.int64)).reshape(-1, 2)
    if text.isascii() or _JOINS.search(text) is None:
        return spans
    return _on_graphemes(spans, text)


def _on_graphemes(spans: Spans, text: str) -> Int[np.ndarray, "N 2"]:
    """Spans grown to whole graphemes; those that then overlap become one."""
    ends = np.array([0, *(match.end() for match in _GRAPHEME.finditer(text))])
    starts = ends[np.searchsorted(ends, spans[:, 0], side="right") - 1]
    stops = ends[np.searchsorted(ends, spans[:, 1], side="left")]
    begins = np.concatenate([[True], starts[1:] >= np.maximum.accumulate(stops)[:-1]])[: len(spans)]
    at = np.flatnonzero(begins)
    return np.stack([starts[at], np.maximum.reduceat(stops, at)], axis=1) if len(at) else spans


def align(spans: Spans, offsets: Offsets) -> Groups:
    """The subwords of every word, found by their places in the text.

    Args:
      spans: of words, in order.
      offsets: of subwords, in order, as Hugging Face tokenizers give them.
    """
    starts, ends = np.maximum.accumulate(offsets[:, 0]), np.maximum.accumulate(offsets[:, 1])
    first = np.searchsorted(ends, spans[:, 0], side="right")
    return Groups(first, np.maximum(np.searchsorted(starts, spans[:, 1], side="left"), first))


def owners(groups: Groups, subwords: int) -> Int[np.ndarray, " T"]:
    """The one word that each subword is a cost of, [T]; -1 if there are no words.

    A subword that covers several words belongs to the first; one in no word (a lone `▁`, say) to the next word, at the
    end to the last.
    """
    upto = np.maximum.accumulate(groups.last)
    return np.minimum(np.searchsorted(upto, np.arange(subwords), side="right"), len(upto) - 1)


def of_words(numbers: Num[np.ndarray, " T"], groups: Groups, how: str = "mean") -> np.ndarray:
    """One number for each word, float32 [W]: the mean of its subwords' numbers, or the first; 0 without subwords.

    Raises:
      ValueError: `how` is neither.
    """
    if how not in ("mean", "first"):
        raise ValueError(f"a word's number is the 'mean' of its subwords' or the 'first' one, not {how!r}")
    numbers = np.append(numbers.astype(np.float64), 0.0)
    count = groups.last - groups.first
    if how == "first":
        return np.where(count > 0, numbers[groups.first], 0.0).astype(np.float32)
    sums = np.concatenate([[0.0], np.cumsum(numbers)])
    return ((sums[groups.last] - sums[groups.first]) / np.maximum(count, 1)).astype(np.float32)
