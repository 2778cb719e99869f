"""LongLLMLingua (Jiang et al. 2024): many documents and a question; the relevant ones are kept, more of each, and put
where models look.

    short = long_llmlingua(reader, documents, question, rate=0.3)
    short.text
    short.recover("what the model answered")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxcompress.inputs.scalars import Number, number, share
from jaxcompress.prompt.information import Reader
from jaxcompress.prompt.llmlingua import after, contrastive
from jaxcompress.prompt.surface import Word, words_of
from jaxcompress.prompt.word_scores import Kept, Scorer, keep

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
    """A rate per document, linear in its rank: `rate` + `spread` for the first, `rate` - `spread` for the last, within
    [0, 1] (section 4.3)."""
    n = len(order)
    rates = np.empty(n)
    rates[list(order)] = np.clip(rate + spread * (np.linspace(1, -1, n) if n > 1 else np.zeros(n)), 0.0, 1.0)
    return rates


def arranged(kept: Sequence[int], order: Order) -> list[int]:
    """Documents, given best first, in the order that they are shown in.

    `original`: by number. `ranked`: best first. `ends`: the best at both ends, the worst in the middle, where models
    look least.
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
        return "\n\n".join(one.text for one in self.kept)

    def recover(self, answer: str) -> str:
        """An answer with what it quotes of the shortened text given back as it was in the original (section 4.5)."""
        return recover(self.kept, answer)


def long_llmlingua(
    reader: Reader,
    documents: Sequence[str],
    question: str,
    *,
    rate: Number,
    spread: Number = 0.3,
    room: Number = 1.4,
    order: Order = "ends",
    scorer: Scorer | None = None,
) -> Shortened:
    """Shortens documents to exactly the share `rate` of their words, for a question.

    Documents are taken by relevance until they have `room` times the words that may stay; of each, more the better it
    ranks (`dynamic_rates`), and the words that the question makes more likely (`contrastive`).

    Args:
      spread: of the rates; 0: the same share of each.
      scorer: of words, instead of `contrastive`; LLMLingua-2 inside LongLLMLingua is a classifier here.

    Raises:
      ValueError: no documents, an empty question, a rate outside (0, 1], or a room below 1.
    """
    if isinstance(documents, str):
        raise ValueError("documents are a list of texts, not one text; write [document]")
    if not len(documents):
        raise ValueError("no documents were given")
    rate, spread, room = share(rate, of="words"), number(spread, "spread"), number(room, "room")
    if room < 1:
        raise ValueError(f"room is at least 1 (the words that may stay), not {room}")
    scorer = contrastive(reader, question, rate=rate) if scorer is None else scorer
    ranked = np.argsort(-relevance(reader, documents, question), kind="stable").tolist()
    sizes = np.array([len(words_of(document)) for document in documents])
    budget = int(np.floor(sizes.sum() * rate + 0.5))
    chosen: list[int] = []
    for document in ranked:
        if chosen and sizes[chosen].sum() >= room * budget:
            break
        chosen.append(document)
    local = min(1.0, budget / max(int(sizes[chosen].sum()), 1))
    rates = dynamic_rates(range(len(chosen)), local, spread)
    counts = _shared(budget, rates * sizes[chosen], sizes[chosen])
    kept = {
        document: keep(scorer(documents[document]), n=count)
        for document, count in zip(chosen, counts, strict=True)
        if count
    }  # fmt: skip
    shown = arranged([document for document in chosen if document in kept], order)
    return Shortened(shown, [kept[document] for document in shown], ranked)


def _shared(total: int, wanted: np.ndarray, most: np.ndarray) -> list[int]:
    """Whole numbers near `wanted`, none above `most`, with the given sum (largest remainders); earlier ones first."""
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
    """An answer with every run of words that it quotes from a shortened text given back as it was in the original.

    From left to right, the longest run of the answer's words that stands in a shortened text, in lower case, is
    replaced by the original from its first word to its last, dropped words included. A single word is left as it is.
    """
    lower = lambda text, words: [text[word.start : word.end].lower() for word in words]
    sources = []
    for one in kept:
        words = [word for word, stays in zip(one.scored.words, one.labels, strict=True) if stays]
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
