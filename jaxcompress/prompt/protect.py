"""Words that have to stay: those of given strings, which may go as repeats; and those of protected kinds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from jaxcompress.prompt.kinds import Kind, protected_spans
from jaxcompress.prompt.words import Spans


def checked(force: Sequence[str]) -> tuple[str, ...]:
    """The strings. Raises TypeError for anything but a list of strings, ValueError for an empty string in it."""
    if isinstance(force, str) or not all(isinstance(item, str) for item in force):
        raise TypeError(f"force is a list of strings, such as ['.', '\\n'], not {force!r}")
    if not all(force):
        raise ValueError("force has an empty string in it; leave it out")
    return tuple(force)


def forced(text: str, spans: Spans, force: Sequence[str]) -> Bool[np.ndarray, " W"]:
    """Marks words where a string of `force` stands as whole words."""
    marked = np.zeros(len(spans), bool)
    for string in force:
        string = string.strip()
        at = text.find(string) if string else -1
        while at >= 0:
            first = int(np.searchsorted(spans[:, 0], at))
            last = int(np.searchsorted(spans[:, 1], at + len(string), side="right"))
            if first < last and spans[first, 0] == at and spans[last - 1, 1] == at + len(string):
                marked[first:last] = True
            at = text.find(string, at + 1)
    return marked


def protected(text: str, spans: Spans, kinds: Sequence[Kind]) -> Bool[np.ndarray, " W"]:
    """Marks every word of which a character belongs to one of these kinds (`protected_spans`)."""
    if not kinds or not len(spans):
        return np.zeros(len(spans), bool)
    found = protected_spans(text, kinds)
    change = np.zeros(len(spans) + 1, np.int64)
    np.add.at(change, np.searchsorted(spans[:, 1], found[:, 0], side="right"), 1)
    np.add.at(change, np.searchsorted(spans[:, 0], found[:, 1], side="left"), -1)
    return np.cumsum(change)[:-1] > 0


def repeats(
    text: str,
    spans: Spans,
    kept: Bool[np.ndarray, " W"],
    marked: Bool[np.ndarray, " W"],
    whole: Bool[np.ndarray, " W"],
) -> Bool[np.ndarray, " W"]:
    """Marks kept forced words that follow an equal forced word, among the kept words; not those of protected kinds."""
    found, at = np.zeros(len(spans), bool), np.flatnonzero(kept)
    for before, here in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
        if marked[here] and marked[before] and not whole[here]:
            found[here] = text[slice(*spans[before])] == text[slice(*spans[here])]
    return found
