"""From kept words back to a text: their own characters, with spaces where words were dropped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import regex
from jaxtyping import Bool

from jaxcompress.prompt.words import Spans

SEPARATOR = "\n\n"  # between texts that are read one after the other

_BEGINS, _ENDS = regex.compile(r"[\p{L}\p{N}_]"), regex.compile(r"[\p{L}\p{N}_]\p{M}*\Z")

_LINE_ENDS = {"\n": r"(?:\r\n|\r(?!\n)|(?<!\r)\n)", "\r": r"\r(?!\n)"}
_MARKS = 16  # characters looked back over for a letter with accents


def joined(texts: Sequence[str]) -> str:
    """Texts one after the other, an empty line between them; empty ones are left out."""
    return SEPARATOR.join(text for text in texts if text)


def join(text: str, spans: Spans, kept: Bool[np.ndarray, " W"], breaks: Sequence[str] = ()) -> str:
    """The text of the kept words. Neighbouring words keep what stands between them.

    Two kept words with dropped words between them are joined by the first of these that applies: one of `breaks`, if
    the text has it there; nothing, if the text has no white space there or the second word is a sign that follows its
    word directly (a comma); a space. Letters and digits that did not touch in the text never touch.

    Args:
      breaks: white space that stays; the first one found is taken (see `found_break`).
    """
    at = np.flatnonzero(kept)
    if not len(at):
        return ""
    cut = np.flatnonzero(np.diff(at) > 1)
    starts = spans[at[np.concatenate([[0], cut + 1])], 0].tolist()
    ends = spans[at[np.concatenate([cut, [len(at) - 1]])], 1].tolist()
    parts = [text[starts[0] : ends[0]]]
    for end, start, stop in zip(ends[:-1], starts[1:], ends[1:], strict=True):
        parts += [_between(text, end, start, breaks), text[start:stop]]
    return "".join(parts)


def found_break(text: str, start: int, end: int, breaks: Sequence[str]) -> str | None:
    """The first of `breaks` that stands in text[start:end], as the text has it; None if none does.

    A line feed in `breaks` stands for any end of a line: a text with CRLF keeps its CRLF. A carriage return stands for
    one without a line feed after it.
    """
    for kept in breaks:
        if found := _of_break(kept).search(text, start, end):
            return found[0]
    return None


@cache
def _of_break(kept: str) -> regex.Pattern[str]:
    parts = (_LINE_ENDS.get(part) or regex.escape(part) for part in regex.findall(r"\r\n|(?s:.)", kept))
    return regex.compile("".join(parts))


def _between(text: str, end: int, start: int, breaks: Sequence[str]) -> str:
    if (kept := found_break(text, end, start, breaks)) is not None:
        return kept
    if text[start - 1].isspace():
        return " "
    if _BEGINS.match(text, start) is None:
        return ""
    if any(map(str.isspace, text[end:start])):
        return " "
    return " " if _touches(text[end - 1], text[start]) and _ENDS.search(text, max(end - _MARKS, 0), end) else ""


def _touches(before: str, after: str) -> bool:
    """Whether two letters would look like one word; not in scripts without spaces."""
    return not (ord(before) >= 0x2E80 and ord(after) >= 0x2E80)
