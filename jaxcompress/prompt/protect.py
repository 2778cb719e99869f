"""Forced words: those of given strings and those with digits; and repeats of them, which may go."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from jaxcompress.prompt.words import Spans


def checked(force: Sequence[str]) -> tuple[str, ...]:
    """The strings. Raises TypeError for anything but a list of strings, ValueError for an empty string in it."""
    if isinstance(force, str) or not all(isinstance(item, str) for item in force):
        raise TypeError(f"force is a list of strings, such as ['.', '\\n'], not {force!r}")
    if not all(force):
        raise ValueError("force has an empty string in it; leave it out")
    return tuple(force)


def forced(text: str, spans: Spans, force: Sequence[str], digits: bool) -> Bool[np.ndarray, " W"]:
    """Marks words where a string of `force` stands as whole words and, with `digits`, words with a digit."""
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
    if digits:
        places = np.array([match.start() for match in re.finditer(r"\d", text)], np.int64)
        marked[np.searchsorted(spans[:, 0], places, side="right") - 1] = True
    return marked


def repeats(
    text: str, spans: Spans, kept: Bool[np.ndarray, " W"], marked: Bool[np.ndarray, " W"]
) -> Bool[np.ndarray, " W"]:
    """Marks kept forced words that follow an equal forced word, among the kept words."""
    found, at = np.zeros(len(spans), bool), np.flatnonzero(kept)
    for before, here in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
        if marked[here] and marked[before]:
            found[here] = text[slice(*spans[before])] == text[slice(*spans[here])]
    return found
