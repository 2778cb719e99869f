"""From kept words back to a text: their own characters, with spaces where words were dropped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import regex
from jaxtyping import Bool

from jaxcompress.prompt.words import Spans

SEPARATOR = "\n\n"  # between texts that are read one after the other

_ENDS = regex.compile(r"[\p{L}\p{N}_]\p{M}*\Z")
_FOLLOWS = regex.compile(
    r"""
    (?! [\p{L}\p{N}_] )
    (?: (?<= [\p{L}\p{M}\p{N}_] )                              # right after a word
      | [\p{Pe}\p{Pf}%‰٪％。、．，：；！？]
      | [.,:;!?…"'] (?! \.{0,2}+ [\p{L}\p{N}_/\\] )          # not ./a .5 :id "a"
    )
    """,
    regex.VERBOSE,
)
"""A sign that follows its word; others open what comes after them."""
_UNSPACED = r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}]"
_BEGINS_UNSPACED, _ENDS_UNSPACED = regex.compile(_UNSPACED), regex.compile(_UNSPACED + r"\p{M}*\Z")

_WHITE, _LEAD = r"[\x20\t]*", r"(?: (?: [>*+\-] | \d{1,9}[.)] ) [\x20\t]* ){0,9}"  # before fences in lists and quotes
_FENCE_BEGINS = regex.compile(rf"(?<= ^ {_WHITE} ) {_LEAD} (?: `{{3}} | ~{{3}} )", regex.VERBOSE | regex.MULTILINE)
_FENCE_ENDS = regex.compile(
    rf"(?<= ^ {_WHITE} {_LEAD} (?: `{{3,9}} | ~{{3,9}} ) ) \s", regex.VERBOSE | regex.MULTILINE
)  # fmt: skip

_LINE_ENDS = {"\n": r"(?:\r\n|\r(?!\n)|(?<!\r)\n)", "\r": r"\r(?!\n)"}
_MARKS = 16  # characters looked back over for a letter with accents


def joined(texts: Sequence[str]) -> str:
    """Texts one after the other, an empty line between them; empty ones are left out."""
    return SEPARATOR.join(text for text in texts if text)


def join(text: str, spans: Spans, kept: Bool[np.ndarray, " W"], breaks: Sequence[str] = ()) -> str:
    """The text of the kept words. Neighbouring words keep what stands between them.

    Two kept words with dropped words between them are joined by the first of these that applies: one of `breaks`, if
    the text has it there; the end of a line, beside a line that opens or closes a fence of code; nothing, if the second
    word is a sign that follows its word directly (a comma); a space, if the text has white space there; nothing. Words
    that did not touch in the text, with the signs that open them (-5, /etc), touch only in scripts without spaces.

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


def beside_fence(text: str, end: int, start: int) -> bool:
    """Whether a line ends in text[end:start], and what is before closes a fence of code or what follows opens one."""
    return text.find("\n", end, start) >= 0 and bool(_FENCE_ENDS.match(text, end) or _FENCE_BEGINS.match(text, start))


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
    if beside_fence(text, end, start):
        breaks = (*breaks, "\n")
    if (kept := found_break(text, end, start, breaks)) is not None:
        return kept
    if text[start - 1].isspace():
        return " "
    if _FOLLOWS.match(text, start):
        return ""
    return " " if any(map(str.isspace, text[end:start])) or _is_new_word(text, end, start) else ""


def _is_new_word(text: str, end: int, start: int) -> bool:
    """Whether what begins at `start` would look like one word with what ends at `end`; not in scripts without spaces.
    A sign that opens a word looks like a part of it."""
    first = max(end - _MARKS, 0)
    if _ENDS.search(text, first, end) is None:
        return False
    return _ENDS_UNSPACED.search(text, first, end) is None or _BEGINS_UNSPACED.match(text, start) is None
