"""LongLLMLingua (Jiang et al. 2024): many documents and a question. The relevant documents are kept, more of those that
rank higher, and they are put where models look.

    short = long_llmlingua(reader, documents, question, rate=0.3)
    short.text
    short.recover("what the model answered")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxcompress.inputs.scalars import Number, number, share
from jaxcompress.prompt.counting import Count, TokenizerCounter
from jaxcompress.prompt.information import Reader
from jaxcompress.prompt.joining import joined
from jaxcompress.prompt.keeping import Kept, keep, tokens_at
from jaxcompress.prompt.llmlingua import after, contrastive
from jaxcompress.prompt.surface import Word, words_of
from jaxcompress.prompt.word_scores import Scorer

RESTRICT = " We can get the answer to this question in the given documents."
"""Said after the question when documents are ranked (the paper's, section 4.1)."""

Order = Literal["original", "ranked", "ends"]


def relevance(reader: Reader, documents: Sequence[str], question: str, *, restrict: str = RESTRICT) -> np.ndarray:
    """How likely each document makes the question: the mean log-probability of question and `restrict` after it, [K].

    The paper's r_k (section 4.1). Higher is more relevant.
    """
    asked = reader.tokenizer.encode_with_places(f"\n{question}{restrict}")[0][None]
    fresh = reader.begin()
    losses = [reader.losses(after(reader, fresh, document), asked)[0] for document in documents]
    return -np.array([np.nanmean(nats) for nats in losses], np.float32).reshape(-1)


def dynamic_rates(order: Sequence[int], rate: float, spread: float) -> np.ndarray:
    """A rate per document, linear in its rank (section 4.3): from `rate` + `spread` for the first to `rate` - `spread`
    for the last, within [0, 1]."""
    n = len(order)
    rates = np.empty(n)
    rates[list(order)] = np.clip(rate + spread * (np.linspace(1, -1, n) if n > 1 else np.zeros(n)), 0.0, 1.0)
    return rates


def arranged(kept: Sequence[int], order: Order) -> list[int]:
    """The order in which documents are shown.

    Args:
      kept: numbers of documents, the best first.
      order: `original`: by number. `ranked`: the best first. `ends`: the best at both ends, the worst in the middle,
        where models look least.
    """
    if order not in get_args(Order):
        raise ValueError(f"unknown order {order!r}; known: {', '.join(get_args(Order))}")
    if order == "original":
        return sorted(kept)
    return list(kept) if order == "ranked" else [*kept[::2], *kept[1::2][::-1]]


class Shortened(NamedTuple):
    """What is left of documents.

    Attributes:
      documents: which of them, in the order of the text.
      kept: what is left of each of these.
      order: all documents, most relevant first.
    """

    documents: list[int]
    kept: list[Kept]
    order: list[int]

    @property
    def text(self) -> str:
        return joined([one.text for one in self.kept])

    def recover(self, answer: str) -> str:
        """An answer, its quotations of the shortened text replaced by the original (section 4.5; see `recover`)."""
        return recover(self.kept, answer)


def long_llmlingua(  # nine parameters: those of the paper's method
    reader: Reader,
    documents: Sequence[str],
    question: str,
    *,
    rate: Number,
    spread: Number = 0.3,
    room: Number = 1.4,
    order: Order = "ends",
    scorer: Scorer | None = None,
    count: Count | None = None,
) -> Shortened:
    """Shortens documents for a question, to the share `rate` of their tokens.

    Documents are taken by relevance until they have `room` times the tokens that may stay. More is kept of a document
    that ranks higher (`dynamic_rates`): the words that the question makes more likely (`contrastive`).

    Args:
      rate: the share of the reader's tokens that stays, as in `keep`.
      spread: between the rates of documents; 0: the same rate for each.
      scorer: of words, instead of `contrastive`. A `Compressor` here is LLMLingua-2 inside LongLLMLingua.
      count: tokens of a text for the model that will read it; those of `reader` if None.

    Raises:
      ValueError: no documents, an empty question, a rate outside (0, 1], or a room below 1.
    """
    if isinstance(documents, str):
        raise ValueError("documents are a list of texts, not one text: write [document]")
    if not len(documents):
        raise ValueError("no documents were given")
    rate, spread, room = share(rate), number(spread, "spread"), number(room, "room")
    if room < 1:
        raise ValueError(f"room is at least 1 (the tokens that may stay), not {room}")
    scorer = contrastive(reader, question, word_rate=rate) if scorer is None else scorer
    ranked = np.argsort(-relevance(reader, documents, question), kind="stable").tolist()
    count = TokenizerCounter(reader.tokenizer) if count is None else count
    sizes = np.array([count(document) for document in documents])
    budget = tokens_at(rate, int(sizes.sum()))
    chosen: list[int] = []
    for document in ranked:
        if chosen and sizes[chosen].sum() >= room * budget:
            break
        chosen.append(document)
    local = min(1.0, budget / max(int(sizes[chosen].sum()), 1))
    rates = dynamic_rates(range(len(chosen)), local, spread)
    parts = _shared(budget, rates * sizes[chosen], sizes[chosen])
    kept = {
        document: keep(scorer(documents[document]), count, rate=part / sizes[document]).documents[0]
        for document, part in zip(chosen, parts, strict=True)
        if part
    }  # fmt: skip
    shown = arranged([document for document in chosen if document in kept], order)
    return Shortened(shown, [kept[document] for document in shown], ranked)


def _shared(total: int, wanted: np.ndarray, most: np.ndarray) -> list[int]:
    """Whole numbers near `wanted`, none above `most`, with the given sum, by largest remainders; earlier ones first."""
    total = min(total, int(most.sum()))
    share = np.minimum(wanted, most).astype(float)
    for _ in range(len(share)):  # what does not fit goes to those with room
        short = total - share.sum()
        free = most - share if short > 0 else share
        if abs(short) < 1e-9 or free.sum() <= 0:
            break
        share = np.clip(share + free * short / free.sum(), 0, most)
    counts = np.floor(share + 1e-9).astype(int)
    order = np.argsort(-(share - counts), kind="stable")
    for at in [*order, *order]:
        if counts.sum() < total and counts[at] < most[at]:
            counts[at] += 1
    return counts.tolist()


def recover(kept: Sequence[Kept], answer: str) -> str:
    """Replaces every run of words that an answer quotes from a shortened text by the original.

    From left to right, the longest run of the answer's words that stands in a shortened text (in lower case) is
    replaced by the original text from its first word to its last, dropped words included. A single word stays.
    """
    lower = lambda text, words: [text[word.start : word.end].lower() for word in words]
    sources = []
    for one in kept:
        words = [Word(start, end) for start, end in one.scored.spans[one.labels].tolist()]
        sources.append((one.scored.text, words, lower(one.scored.text, words)))
    words = words_of(answer)
    said = lower(answer, words)
    out, end, at = [], 0, 0
    while at < len(words):
        length, text, span = max((_longest(said, at, source) for source in sources), default=(0, "", Word(0, 0)))
        if length > 1:
            out += [answer[end : words[at].start], text[span.start : span.end]]
            end = words[at + length - 1].end
        at += max(length, 1)
    return "".join([*out, answer[end:]])


def _longest(said: list[str], at: int, source: tuple[str, list[Word], list[str]]) -> tuple[int, str, Word]:
    text, words, spelled = source
    best = (0, "", Word(0, 0))
    for start, word in enumerate(spelled):
        if word == said[at]:
            n = 0
            while at + n < len(said) and start + n < len(spelled) and said[at + n] == spelled[start + n]:
                n += 1
            if n > best[0]:
                best = (n, text, Word(words[start].start, words[start + n - 1].end))
    return best
