"""Questions over two documents among others (RULER, scripts/data/synthetic/qa.py).

RULER takes questions and documents from HotpotQA, which has to be fetched; `Sources.puzzles` holds such a file. Without
one, pairs of documents are made up: one names the town where somebody was born, another what that town is known for.
Three more such pairs and paragraphs of ordinary text stand beside them.
"""

from __future__ import annotations

import random

from jaxcompress.evaluation.ruler.hops import Puzzle
from jaxcompress.evaluation.ruler.sample import Question, Sample, Sources

LEAST = 2
PAIRS = 4

_BEFORE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n"
)
_ASKED = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {question} "
)
_PREFIX = "Answer:"
_FIRST = "Mira Tomas Elsa Ruben Ada Felix Nora Hugo Iris Oskar Lena Anton Vera Jonas Clara Emil"
_LAST = "Halden Reiner Marlow Voss Keller Brandt Lindqvist Harrow Castell Moreau Falk Derwent Olsen Pryce"
_TOWN = "Oster Falken Brook Stone Linden Raven Elm Harbor Wester Silver Marsh Thorn Cedar Winter Amber"
_END = "by ford ton wick haven field bridge mouth"
_CRAFT = (
    "clock glass rope paper violin lantern saddle pottery candle compass mirror bell carpet button ribbon kite needle "
    "barrel"
)


def two_hops(size: int, rng: random.Random, sources: Sources) -> Sample:
    """A question over documents, of which `size` are filler."""
    puzzle = rng.choice(sources.puzzles) if sources.puzzles else _made_up(rng)
    others = [one for other in sources.puzzles for one in other.documents if one not in puzzle.documents]
    filler = others or sources.paragraphs
    if not filler:
        raise ValueError(
            "the text has no paragraphs of 20 to 120 words, which the documents of two-hop questions are; give prose "
            "whose paragraphs are parted by empty lines"
        )
    at = rng.randrange(len(filler))
    documents = [*puzzle.documents, *(filler[(at + i) % len(filler)] for i in range(size))]
    rng.shuffle(documents)
    numbered = "\n\n".join(f"Document {number}:\n{one}" for number, one in enumerate(documents, 1))
    return Sample(
        f"{_BEFORE}{numbered}\n\n", (Question(_ASKED.format(question=puzzle.question), _PREFIX, puzzle.answers),)
    )  # fmt: skip


def _made_up(rng: random.Random) -> Puzzle:
    some = lambda words: rng.sample(words.split(), PAIRS)
    people = [f"{first} {last}" for first, last in zip(some(_FIRST), some(_LAST), strict=True)]
    towns = [start + end for start, end in zip(some(_TOWN), some(_END), strict=True)]
    crafts = some(_CRAFT)
    documents = []
    for person, town, craft in zip(people, towns, crafts, strict=True):
        documents.append(f"{person}\n{person} is a writer of short stories. {person} was born in the town of {town}.")
        documents.append(f"{town}\n{town} lies on a river. The town of {town} is known for its {craft} factory.")
    question = f"What kind of factory is the town known for in which {people[0]} was born?"
    return Puzzle(question, (crafts[0],), tuple(documents))
