"""Texts longer than memory: compressed window by window, in constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import regex

from jaxcompress.inputs.scalars import Number, share, whole
from jaxcompress.inputs.text import clean
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.joining import found_break
from jaxcompress.prompt.keeping import Compressed, tokens_at

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

    Words compete within a window. What one window rounds up or down, the next makes up for: after each window, the
    tokens kept are the rate's share of the tokens read, unless more is forced.

    Args:
      pieces: of the text, cut anywhere; white space at the ends of the text is lost.
      rate: the share of the reader's tokens that stays, in (0, 1].
      window: characters read before any are written; a window ends at a paragraph, line, sentence or word.
      options: as for `Compressor.compress`: scope, force, digits, drop_consecutive.

    Raises:
      ValueError: as `Compressor.compress`; a window below 1.
    """
    rate = share(rate)
    if (window := whole(window, "a window")) < 1:
        raise ValueError(f"a window must have at least 1 character, not {window}")
    read = kept = 0
    gap = ""  # white space that has been read and not written
    begun = False
    for text in _windows(pieces, window):
        body = clean(text.strip())
        gap += text[: len(text) - len(text.lstrip())]
        if not body:
            continue
        size = compressor.tokens(body)
        read += size
        wanted = max(1, tokens_at(rate, read) - kept)
        result = compressor.compress(body, rate=min(1.0, wanted / max(size, 1)), **options)
        kept += result.tokens_after
        if result.text:
            yield replace(result, text=(_lead(gap, rate, options.get("force", ())) if begun else "") + result.text)
            begun, gap = True, ""
        gap += text[len(text.rstrip()) :]


def _lead(gap: str, rate: Number, breaks: Sequence[str]) -> str:
    """What stands between two windows instead of the white space there."""
    if rate == 1:
        return gap
    kept = found_break(gap, 0, len(gap), [one for one in breaks if one.isspace()])
    return (" " if gap else "") if kept is None else kept


def _windows(pieces: Iterable[str], window: int) -> Iterator[str]:
    """The text in parts of about a window; joined they are the text."""
    held = ""
    for piece in pieces:
        for start in range(0, len(piece), window):
            held += piece[start : start + window]
            while len(held) > window and (cut := _cut(held, window)):
                yield held[:cut]
                held = held[cut:]
    if held:
        yield held


def _cut(text: str, window: int) -> int | None:
    """Where a window may end that is followed by more; None if all of the text may be one grapheme."""
    for pattern in _CUTS:
        ends = [match.end() for match in pattern.finditer(text, window // 2, window)]
        ends = [end for end in ends if not _EXTENDS.match(text, end)]
        if ends:
            return ends[-1]
    ends = [match.end() for match in _GRAPHEME.finditer(text)][:-1]  # the last one may go on
    return max((end for end in ends if end <= window), default=ends[0] if ends else None)
