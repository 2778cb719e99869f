"""Texts longer than memory: compressed window by window, in constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import regex
from jaxtyping import Int

from jaxcompress.inputs.scalars import Number, share, whole
from jaxcompress.inputs.text import clean
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.joining import found_break
from jaxcompress.prompt.keeping import Compressed, Kept, keep_with_forced, tokens_at
from jaxcompress.prompt.kinds import Kind, checked_kinds, protected_spans

WINDOW = 1 << 18  # characters
# Where a window is cut, the best first: after a paragraph, a line, a sentence, a word.
_CUTS = tuple(regex.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"[.!?]\s+|[。！？]", r"\s+"))
_GRAPHEME, _EXTENDS = regex.compile(r"\X"), regex.compile(r"[\p{M}\p{Grapheme_Extend}\u200d]")


def compress_stream(
    compressor: Compressor,
    pieces: Iterable[str],
    *,
    rate: Number = 0.5,
    window: Number = WINDOW,
    **options: Any,
) -> Iterator[Compressed]:
    """Compresses a text that comes in pieces; the `text` of each result, joined, is the shorter text.

    Words compete within a window. What one window rounds up or down, or has in forced words beyond its share, the next
    ones make up for. A window does not end inside of what is protected, unless that is longer than half a window.

    Args:
      pieces: of the text, cut anywhere; white space at the ends of the text is lost.
      rate: the share of the reader's tokens that stays, in (0, 1].
      window: characters read before any are written; a window ends at a paragraph, line, sentence or word.
      options: as for `Compressor.compress`: scope, force, protect, drop_consecutive.

    Raises:
      ValueError: as `Compressor.compress`; a window below 1. After the last result: forced words in the last windows
        left more tokens than the rate's share of all that were read.
    """
    rate = share(rate)
    if (window := whole(window, "a window")) < 1:
        raise ValueError(f"a window must have at least 1 character, not {window}")
    read = kept = forced = 0
    gap = ""  # white space that has been read and not written
    before: Kept | None = None
    for text in _windows(pieces, window, checked_kinds(options.get("protect", ()))):
        body = clean(text.strip())
        gap += text[: len(text) - len(text.lstrip())]
        if not body:
            continue
        size = compressor.tokens(body)
        read += size
        wanted = min(max(1, tokens_at(rate, read) - kept), max(size, 1))
        result = keep_with_forced(compressor.score([body]), compressor.counter, tokens=wanted, **options)
        kept, forced = kept + result.tokens_after, forced + result.forced
        if result.text:
            (here,) = result.documents
            yield replace(result, text=_lead(gap, rate, options.get("force", ()), before, here) + result.text)
            before, gap = here, ""
        gap += text[len(text.rstrip()) :]
    if forced and kept > (asked := tokens_at(rate, read)):
        raise ValueError(
            f"{kept:,} of {read:,} tokens stayed, more than the {asked:,} asked for: what is forced and protected "
            f"needs {forced:,}, in the last windows more than their share; raise the rate, or force and protect less"
        )


def _lead(gap: str, rate: Number, breaks: Sequence[str], before: Kept | None, here: Kept) -> str:
    """What stands between two windows instead of the white space there; nothing before the first."""
    if before is None:
        return ""
    if rate == 1:
        return gap
    if not gap:
        neighbours = before.labels[-1] and here.labels[0]
        return " " if not neighbours and before.text[-1:].isalnum() and here.text[:1].isalnum() else ""
    kept = found_break(gap, 0, len(gap), [one for one in breaks if one.isspace()])
    return " " if kept is None else kept


def _windows(pieces: Iterable[str], window: int, kinds: Sequence[Kind] = ()) -> Iterator[str]:
    """The text in parts of about a window; joined they are the text.

    Half a window more is read ahead to see where what is protected ends.
    """
    held, ahead = "", window // 2 if kinds else 0
    for piece in pieces:
        for start in range(0, len(piece), window):
            held += piece[start : start + window]
            while len(held) > window + ahead and (cut := _cut(held, window, protected_spans(held, kinds))):
                yield held[:cut]
                held = held[cut:]
    while len(held) > window and (cut := _cut(held, window, protected_spans(held, kinds))):
        yield held[:cut]
        held = held[cut:]
    if held:
        yield held


def _cut(text: str, window: int, spans: Int[np.ndarray, "N 2"]) -> int | None:
    """Where a window may end that is followed by more; None if all of the text may be one grapheme."""
    inside = np.zeros(len(text) + 2, np.int64)
    np.add.at(inside, spans[:, 0] + 1, 1)
    np.add.at(inside, spans[:, 1], -1)
    outside = np.cumsum(inside) <= 0
    for pattern in _CUTS:
        ends = [match.end() for match in pattern.finditer(text, window // 2, window)]
        ends = [end for end in ends if outside[end] and not _EXTENDS.match(text, end)]
        if ends:
            return ends[-1]
    if len(spans):
        ends = np.array([match.end() for match in _GRAPHEME.finditer(text, 0, window + 1)][:-1], np.int64)
        ends = ends[outside[ends] & (ends <= window)]
        return int(ends[-1]) if len(ends) else _cut(text, window, spans[:0])
    ends = [match.end() for match in _GRAPHEME.finditer(text)][:-1]  # the last one may go on
    return max((end for end in ends if end <= window), default=ends[0] if ends else None)
