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
from jaxcompress.prompt.joining import beside_fence, found_break
from jaxcompress.prompt.keeping import Compressed, Kept, keep_forced, keep_with_forced, tokens_at
from jaxcompress.prompt.kinds import Kind, checked_kinds, end_of_fence, open_fence, protected_spans
from jaxcompress.prompt.protect import checked

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
    ones make up for; nothing but forced words stays of a window whose share is used up. A window does not end inside of
    what is protected, unless that is longer than half a window.

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
    compressor.check_force(options.get("force", ()))
    read = kept = forced = 0
    gap = ""  # white space that has been read and not written
    before: Kept | None = None  # the last window of which something is left
    adjoins = False  # nothing was dropped between that and the next window
    breaks = [one for one in checked(options.get("force", ())) if one.isspace()]
    for text, inside in _windows(pieces, window, checked_kinds(options.get("protect", ()))):
        body = clean(text.strip())
        gap += text[: len(text) - len(text.lstrip())]
        if rate < 1 and not inside and len(gap) > window:  # only what `_lead` makes of it counts
            gap = found_break(gap, 0, len(gap), breaks) or " "
        if not body:
            continue
        size = compressor.tokens(body)
        read += size
        scored, given = compressor(body), dict(options)
        if inside:
            scored = scored._replace(scores=np.full(len(scored.scores), np.inf, np.float32))
            given["drop_consecutive"] = False
        left = tokens_at(rate, read) - kept
        if left < 1 <= size:
            result = keep_forced(scored, compressor.counter, **given)
        else:
            result = keep_with_forced(scored, compressor.counter, tokens=max(1, min(left, size)), **given)
        kept, forced = kept + result.tokens_after, forced + result.forced
        (here,) = result.documents
        if result.text:
            whole_gap = rate == 1 or inside or (adjoins and bool(here.labels[0]))
            result = replace(result, text=_lead(gap, whole_gap, breaks, before, here) + result.text)
            before, gap = here, ""
        yield result
        adjoins = bool(here.labels[-1:].any())
        gap += text[len(text.rstrip()) :]
    if forced and kept > (asked := tokens_at(rate, read)):
        raise ValueError(
            f"{kept:,} of {read:,} tokens stayed, more than the {asked:,} asked for: what is forced and protected "
            f"needs {forced:,}, in the last windows more than their share; raise the rate, or force and protect less"
        )


def _lead(gap: str, whole: bool, breaks: Sequence[str], before: Kept | None, here: Kept) -> str:
    """What stands between two windows instead of the white space there; nothing before the first.

    Args:
      whole: the white space stays as it is.
    """
    if before is None:
        return ""
    if whole:
        return gap
    if not gap:
        return " " if before.text[-1:].isalnum() and here.text[:1].isalnum() else ""
    end, both = len(before.text), before.text + gap + here.text
    if beside_fence(both, end, end + len(gap)):
        breaks = (*breaks, "\n")
    kept = found_break(gap, 0, len(gap), breaks)
    return " " if kept is None else kept


def _windows(pieces: Iterable[str], window: int, kinds: Sequence[Kind] = ()) -> Iterator[tuple[str, bool]]:
    """The text in parts of about a window; joined they are the text. With each, whether all of it is code.

    Half a window more is read ahead to see where what is protected ends. A fence of code that is longer than that goes
    on in the next parts, up to its end.
    """
    held, ahead = "", window // 2 if kinds else 0
    fence: str | None = None  # the mark of the code that the text held begins in

    def cuts(most: int) -> Iterator[tuple[str, bool]]:
        nonlocal held, fence
        while len(held) > most:
            end = None if fence is None else end_of_fence(held[:window], fence)
            if end is None or end == window:  # where the line may go on
                end = _cut(held, window, protected_spans(held, [] if fence else kinds))
            if not end:
                return
            part, inside, held = held[:end], fence is not None, held[end:]
            fence = open_fence(part, fence) if "code" in kinds else None
            yield part, inside

    for piece in pieces:
        for start in range(0, len(piece), window):
            held += piece[start : start + window]
            yield from cuts(window + ahead)
    yield from cuts(window)
    if fence and (end := end_of_fence(held, fence)):
        yield held[:end], True
        held, fence = held[end:], None
    if held:
        yield held, fence is not None


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
