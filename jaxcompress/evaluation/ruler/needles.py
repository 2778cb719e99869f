"""Needles in a haystack: one of several keys, values or queries (RULER, scripts/data/synthetic/niah.py)."""

from __future__ import annotations

import random
import uuid
from typing import Literal

from jaxcompress.evaluation.ruler.sample import Make, Question, Sample, Sources
from jaxcompress.evaluation.ruler.words import random_word

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_BEFORE = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n"
)
_ASKED = "What {are_all} the special magic {kind} for {query} mentioned in the provided text? "
_PREFIX = "The special magic {kind} for {query} mentioned in the provided text {are}"
_DEPTHS = [round(100 * i / 39) for i in range(40)]

Hay = Literal["repeat", "essay", "needle"]
Kind = Literal["numbers", "words", "uuids"]


def needles(
    hay: Hay, *, key: Kind = "words", value: Kind = "numbers", keys: int = 1, values: int = 1, queries: int = 1
) -> Make:
    """A task whose context hides needles.

    Args:
      hay: what they are hidden in: one sentence many times, text, or other needles.
      key, value: what keys and values are.
      keys, values, queries: keys, values of each key, and keys asked for in one question.
    """
    keys = max(keys, queries)

    def make(size: int, rng: random.Random, sources: Sources) -> Sample:
        named = [_drawn(key, rng) for _ in range(keys)]
        held = [[_drawn(value, rng) for _ in range(values)] for _ in range(keys)]
        lines = [_NEEDLE.format(kind=value, key=k, value=v) for k, mine in zip(named, held, strict=True) for v in mine]
        rng.shuffle(lines)
        context = _context(hay, key, value, size, lines, rng, sources)
        order = rng.sample(range(keys), keys)
        groups = [order[i : i + queries] for i in range(0, keys - queries + 1, queries)]
        one = queries * values == 1
        kind = value[:-1] if one else value
        before = _BEFORE.format(some="A" if one else "Some", kind=kind, are="is" if one else "are")
        questions = tuple(_question(kind, [named[i] for i in group], [held[i] for i in group]) for group in groups)
        return Sample(f"{before}{context}\n", questions)

    return make


def _question(kind: str, keys: list[str], values: list[list[str]]) -> Question:
    one = len(keys) * len(values[0]) == 1
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    return Question(
        _ASKED.format(are_all="is" if one else "are all", kind=kind, query=query),
        _PREFIX.format(are="is" if one else "are", kind=kind, query=query),
        tuple(value for mine in values for value in mine),
    )


def _context(
    hay: Hay, key: Kind, value: Kind, size: int, lines: list[str], rng: random.Random, sources: Sources
) -> str:
    """The haystack with the needles at drawn places."""
    if hay == "essay":
        sentences = sources.sentences(size, rng)
        count = len(sentences)
        cuts = [0, *sorted(int(count * depth / 100) for depth in rng.sample(_DEPTHS, len(lines))), count]
        parts = []
        for i, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            parts += [" ".join(sentences[start:stop])] + lines[i : i + 1]
        return " ".join(part for part in parts if part)
    other = lambda: _NEEDLE.format(kind=value, key=_drawn(key, rng), value=_drawn(value, rng))
    straw = [NOISE if hay == "repeat" else other() for _ in range(size)]
    places = sorted(rng.sample(range(size), min(len(lines), size)), reverse=True)
    for place, line in zip(places, lines, strict=True):
        straw.insert(place, line)
    return "\n".join(straw)


def _drawn(kind: Kind, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return random_word(rng)
