"""What a RULER task gives: a context and questions about it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxcompress.evaluation.ruler.hops import Puzzle

MOST_WORDS, PIECE = 40, 10  # of a sentence in prose, on the average; of a piece of other text


class Question(NamedTuple):
    """A question about a context.

    Attributes:
      text: stands right after the context.
      prefix: the first words of the answer, which the model goes on from.
      answers: what is looked for in its answer.
    """

    text: str
    prefix: str
    answers: tuple[str, ...]


class Sample(NamedTuple):
    """A context and the questions about it."""

    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Sources:
    """What contexts are made of.

    Attributes:
      text: ordinary text, in which needles are hidden and whose paragraphs are documents.
      length: the nominal number of tokens, by which RULER chooses some numbers.
      puzzles: questions over several documents of a file; none: they are made up.
    """

    text: str
    length: int
    puzzles: tuple[Puzzle, ...] = ()

    @cached_property
    def words(self) -> list[str]:
        """The words of the text, with what is written at them."""
        words = self.text.split()
        if not words:
            raise ValueError("the text to hide needles in is empty; give a file of prose")
        return words

    @cached_property
    def paragraphs(self) -> list[str]:
        """Paragraphs of 20 to 120 words."""
        found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", self.text))
        return [one for one in found if 20 <= one.count(" ") <= 120]

    @cached_property
    def is_prose(self) -> bool:
        """Whether its sentences are as long as people write them. Logs, tables and most code have few ends of them."""
        return len(self.words) < MOST_WORDS * len(_sentences(" ".join(self.words)))

    def sentences(self, words: int, rng: random.Random) -> list[str]:
        """The sentences of so many words in their order, from a drawn place on; the text begins anew where it ends.

        A text that is not prose is cut after every `PIECE` words, so that a needle can stand anywhere in it.
        """
        at = rng.randrange(len(self.words))
        drawn = [self.words[(at + i) % len(self.words)] for i in range(words)]
        if self.is_prose:
            return _sentences(" ".join(drawn))
        return [" ".join(drawn[start : start + PIECE]) for start in range(0, words, PIECE)]


def _sentences(text: str) -> list[str]:
    return [one for one in re.split(r"(?<=[.!?]) (?=[\"'(\[]?[A-Z])", text) if one]


Make = Callable[[int, random.Random, Sources], Sample]
"""Makes a sample from an amount of filler, which is at least the task's `least`."""


class Task(NamedTuple):
    """A task of RULER.

    Attributes:
      make: gives a sample of any size.
      new_tokens: tokens of an answer, at most.
      least: the smallest amount of filler.
      match_any: whether one of the answers suffices (`string_match_part`); else the share of them counts.
    """

    make: Make
    new_tokens: int
    least: int = 1
    match_any: bool = False
