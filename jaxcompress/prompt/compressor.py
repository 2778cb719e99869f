"""Prompt compression by a token classifier (LLMLingua-2, Pan et al. 2024), with budgets that are met.

    compressor = Compressor.load("folder or hub id")
    shorter = compressor.compress(text, rate=0.5, force=[".", "\\n"], digits=True)
    shorter.text, shorter.tokens_before, shorter.tokens_after

score: an encoder gives each subword the probability that it is kept, words get the mean; keep: the best words, as many
as fit the budget exactly; reduce: the others are dropped. The published arithmetic is in `official`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcompress import embedded
from jaxcompress.checkpoints import load_encoder
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer, Subwords
from jaxcompress.inputs.scalars import Number, share, whole
from jaxcompress.inputs.text import clean
from jaxcompress.models.encoder import Encoder
from jaxcompress.prompt import protect
from jaxcompress.prompt.budget import apportion, best_first, choose_words
from jaxcompress.prompt.chunks import chunks
from jaxcompress.prompt.counting import Counts
from jaxcompress.prompt.joining import join
from jaxcompress.prompt.official import OfficialCompressor
from jaxcompress.prompt.scoring import score
from jaxcompress.prompt.words import Spans, align, of_words, owners, segment

BudgetScope = Literal["chunk", "document", "corpus"]
Rate = Number
SEPARATOR = "\n\n"  # between contexts
_CORRECTIONS = 6  # of the budget, where tokens of a text are not the sum of its words'
_FILLERS = 24  # words tried for what is then still missing


class Contexts(NamedTuple):
    """How many whole contexts stay, the best first; exactly one of the first three.

    Attributes:
      rate: of their number, in (0, 1]; rounded, at least one.
      count: how many.
      tokens: as many contexts, in order of score, as have at most so many tokens together; at least one.
      force: indices of contexts that stay in any case, and count.
    """

    rate: Number | None = None
    count: Number | None = None  # pyright: ignore[reportIncompatibleMethodOverride]  nobody counts its fields
    tokens: Number | None = None
    force: tuple[int, ...] = ()


@dataclass(frozen=True)
class Document:
    """One context, word by word.

    Attributes:
      source, text: before and after.
      spans: of its words, in characters of `source`.
      probabilities: of staying, as the encoder has them.
      costs: tokens of each word.
      chunk: the chunk each word was scored in.
      forced, kept: whether it had to stay, whether it did.
    """

    source: str
    text: str
    spans: Spans
    probabilities: Float[np.ndarray, " W"]
    costs: Int[np.ndarray, " W"]
    chunk: Int[np.ndarray, " W"]
    forced: Bool[np.ndarray, " W"]
    kept: Bool[np.ndarray, " W"]

    @property
    def words(self) -> list[str]:
        return [self.source[start:end] for start, end in self.spans.tolist()]

    @property
    def labels(self) -> list[int]:
        """1 for each word that stayed, else 0."""
        return self.kept.astype(int).tolist()


@dataclass(frozen=True)
class Compressed:
    """What came out.

    Attributes:
      text: of all contexts that have some left, an empty line between them.
      documents: one for each context.
      tokens_before, tokens_after: as the target counts them.
      asked: for how many.
    """

    text: str
    documents: tuple[Document, ...]
    tokens_before: int
    tokens_after: int
    asked: int

    @property
    def ratio(self) -> float:
        """How many times shorter; 1 for nothing."""
        return self.tokens_before / self.tokens_after if self.tokens_after else 1.0

    @property
    def saved(self) -> int:
        """Tokens."""
        return self.tokens_before - self.tokens_after

    @property
    def words(self) -> list[str]:
        return [word for document in self.documents for word in document.words]

    @property
    def labels(self) -> list[int]:
        return [label for document in self.documents for label in document.labels]

    @property
    def probabilities(self) -> Float[np.ndarray, " W"]:
        return np.concatenate([np.zeros(0, np.float32), *(document.probabilities for document in self.documents)])


class ScoredDocument(NamedTuple):
    """A text before anything is chosen; fields as in `Document`. `tokens`: of the whole text."""

    source: str
    spans: Spans
    probabilities: Float[np.ndarray, " W"]
    costs: Int[np.ndarray, " W"]
    chunk: Int[np.ndarray, " W"]
    tokens: int


@dataclass(frozen=True)
class Compressor:
    """Drops the words of a prompt that a classifier would not miss.

    Attributes:
      encoder, tokenizer: from the same folder.
      count: how many tokens a text has for the model that will read it; the encoder's subwords if None.
    """

    encoder: Encoder
    tokenizer: EncoderTokenizer
    count: Callable[[str], int] | None = None

    @classmethod
    def load(
        cls, source: str | Path | None = None, *, dtype: str | None = None, count: Callable[[str], int] | None = None
    ) -> Compressor:
        """From a Hugging Face folder or hub id; the compressor that ships with the package if None.

        Raises:
          FileNotFoundError, ValueError: as `load_encoder` and `EncoderTokenizer`.
        """
        loaded = load_encoder(embedded.compressor_folder() if source is None else source, dtype=dtype)
        return cls(loaded.model, loaded.tokenizer, count)

    @cached_property
    def official(self) -> OfficialCompressor:
        """The published algorithm on the same encoder and count, for comparing with published numbers."""
        return OfficialCompressor(self.encoder, self.tokenizer, self.count or self.tokenizer.count)

    def compress(
        self,
        contexts: str | Sequence[str],
        *,
        rate: Rate | Sequence[Rate] | None = None,
        tokens: Number | None = None,
        scope: BudgetScope = "document",
        force: Sequence[str] = (),
        digits: bool = False,
        drop_consecutive: bool = False,
        filter: Contexts | None = None,
        word: str = "mean",
    ) -> Compressed:
        """Keeps exactly as many tokens as asked for, whole words of the text in their order.

        Texts that hold nothing but white space become "". Where no set of whole words has exactly the asked number
        of tokens, the largest number below it is met.

        Args:
          contexts: one text or several. Halves of characters, as a cut emoji leaves them, are read as U+FFFD.
          rate: the share of tokens that stays, in (0, 1]; 0.5 if neither this nor `tokens` is given. Of a text that
            has any, at least one token stays, and all that are forced. One for each context: each meets its own.
          tokens: that stay of all contexts together, at least 1.
          scope: where words compete: all over the "corpus" (which keeps more of what is dense), or for a share that
            is in proportion within every "document" or "chunk" (as long as what is forced fits into it).
          force: strings that stay wherever they stand as whole words ("." or "New York"), or white space that stays
            as it is where something around it is dropped ("\\n": ends of lines, as the text has them). They count.
            Strings that do not occur do nothing.
          digits: words with a digit stay, and count.
          drop_consecutive: of equal forced words that would follow one another, the first stays.
          filter: drops whole contexts first; what stays is still so many of the tokens of all.
          word: a word's probability is the "mean" of its subwords' or that of the "first".

        Raises:
          ValueError: a rate outside (0, 1], tokens below 1, both of them, an unknown scope or `word`; forced words
            alone have more than `tokens`; a filter that does not say exactly one thing.
          TypeError: `force` is no list of strings.
        """
        texts = [contexts] if isinstance(contexts, str) else list(contexts)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a context is a string; give one or a list of them")
        rate, tokens = _asked(rate, tokens, len(texts))  # before anything is computed
        options: dict[str, Any] = dict(force=protect.checked(force), digits=digits, drop_consecutive=drop_consecutive)
        return self.select(self.score(texts, word), rate=rate, tokens=tokens, scope=scope, filter=filter, **options)

    def select(
        self,
        scored: Sequence[ScoredDocument],
        *,
        rate: Rate | Sequence[Rate] | None = None,
        tokens: Number | None = None,
        scope: BudgetScope = "document",
        force: Sequence[str] = (),
        digits: bool = False,
        drop_consecutive: bool = False,
        filter: Contexts | None = None,
    ) -> Compressed:
        """The second half of `compress`, for texts whose words have scores already, from wherever: higher stays.

        Example:
          >>> mine = [one._replace(probabilities=of_my_own(one)) for one in compressor.score(texts)]  # doctest: +SKIP
        """
        rates, tokens = _asked(rate, tokens, len(scored))
        if scope not in ("chunk", "document", "corpus"):
            raise ValueError(f"unknown scope {scope!r}; known: 'chunk', 'document', 'corpus'")
        force = protect.checked(force)
        present = self._present(scored, filter)
        marked = [protect.forced(one.source, one.spans, force, digits) for one in scored]
        breaks = tuple(string for string in force if string.isspace())
        return _Job(self, scored, present, marked, breaks, drop_consecutive, scope).run(rates, tokens)

    def score(self, texts: Sequence[str], word: str = "mean") -> list[ScoredDocument]:
        """Words with probabilities and costs, of every text; see `compress`."""
        texts = [clean(text) for text in texts]
        with ThreadPoolExecutor(1) as beside:  # the tokenizer runs outside of Python
            encoded = beside.submit(self.tokenizer.encode_batch, texts)
            spans = [segment(text) for text in texts]
        pieces = encoded.result()
        most = self.encoder.config.max_length - 2
        cuts = [chunks(*item, most) for item in zip(texts, (p.offsets for p in pieces), spans, strict=True)]
        opening, closing = [self.tokenizer.opening], [self.tokenizer.closing]
        rows = [
            np.concatenate([opening, piece.ids[start:end], closing]).astype(np.int32)
            for piece, cut in zip(pieces, cuts, strict=True)
            for start, end in cut
        ]
        scores = iter(score(self.encoder, rows))
        return [
            self._scored(text, piece, own, [next(scores)[1:-1] for _ in cut], word)
            for text, piece, own, cut in zip(texts, pieces, spans, cuts, strict=True)
        ]

    def _scored(self, text: str, piece: Subwords, spans: Spans, scores: list[np.ndarray], word: str) -> ScoredDocument:
        groups = align(spans, piece.offsets)
        chunk = np.append(np.repeat(np.arange(len(scores)), [len(s) for s in scores]), max(len(scores) - 1, 0))
        if self.count is None:
            owner, tokens = owners(groups, len(piece.ids)), len(piece.ids)
            costs = np.bincount(owner[owner >= 0], minlength=len(spans))
        else:
            costs, tokens = _costs(text, spans, self.count), self.count(text)
        probabilities = of_words(np.concatenate([np.zeros(0, np.float32), *scores]), groups, word)
        return ScoredDocument(text, spans, probabilities, costs, chunk[groups.first], tokens)

    def _present(self, scored: Sequence[ScoredDocument], filter: Contexts | None) -> Bool[np.ndarray, " N"]:
        present = np.ones(len(scored), bool)
        if filter is None or len(scored) < 2:
            return present
        given = [filter.rate, filter.count, filter.tokens]
        if sum(item is not None for item in given) != 1:
            raise ValueError(f"a filter of contexts needs one of rate, count and tokens, not {filter}")
        rate = None if filter.rate is None else share(filter.rate, "a filter's rate", of="contexts")
        count = None if filter.count is None else whole(filter.count, "a filter's count", least=1)
        tokens = None if filter.tokens is None else whole(filter.tokens, "a filter's tokens", least=1)
        if outside := [i for i in filter.force if not 0 <= i < len(scored)]:
            raise ValueError(f"there is no context {outside[0]}: there are {len(scored)}, counted from 0")
        means = np.array([one.probabilities.mean() if len(one.spans) else 0.0 for one in scored], np.float32)
        means[list(filter.force)] = np.inf
        if tokens is not None:
            order = best_first(means)
            sizes = np.cumsum([scored[i].tokens for i in order])
            count = int(np.searchsorted(sizes, tokens, side="right"))
        elif rate is not None:
            count = int(rate * len(scored) + 0.5)
        return choose_words(means, np.ones(len(scored), np.int64), max(count or 0, 1, len(set(filter.force))))


@dataclass(frozen=True)
class _Job:
    """One call, all texts scored."""

    owner: Compressor
    scored: Sequence[ScoredDocument]
    present: Bool[np.ndarray, " N"]
    marked: list[Bool[np.ndarray, "..."]]
    breaks: tuple[str, ...]
    drop: bool
    scope: BudgetScope
    memo: dict[Any, Any] = field(default_factory=dict)  # of what a correction of the budget leaves as it was

    def run(self, rates: list[float] | None, tokens: int | None) -> Compressed:
        before = [one.tokens for one in self.scored]
        least = self._least()
        if tokens is not None and sum(least) > tokens:
            raise ValueError(
                f"what is forced has {sum(least)} tokens, more than the {tokens} asked for; ask for more or force less"
            )
        most = [int(here) * int(one.costs.sum()) for one, here in zip(self.scored, self.present, strict=True)]
        if rates is None or len(set(rates)) <= 1:
            total = tokens if tokens is not None else _share(rates[0] if rates else 1.0, sum(before))
            total = max(total, sum(least))
            masks, texts, after = self._fitted(total, most, least, range(len(self.scored)))
        else:
            masks, texts, after, total = [], [], 0, 0
            for n, rate in enumerate(rates):
                asked = max(_share(rate, before[n]), least[n])
                mask, text, own = self._fitted(asked, [most[n]], [least[n]], range(n, n + 1))
                masks, texts, after, total = masks + mask, texts + text, after + own, total + asked
        documents = tuple(
            Document(s.source, text, s.spans, s.probabilities, s.costs, s.chunk, forced, kept)
            for s, text, forced, kept in zip(self.scored, texts, self.marked, masks, strict=True)
        )
        return Compressed(_joined(texts), documents, sum(before), after, total)

    def _least(self) -> list[int]:
        """What forced words cost in every text."""
        costs = []
        for one, marked, here in zip(self.scored, self.marked, self.present, strict=True):
            stays = marked & here
            if self.drop:
                stays &= ~protect.repeats(one.source, one.spans, stays, marked)
            costs.append(int(one.costs[stays].sum()))
        return costs

    def _fitted(
        self, total: int, most: list[int], least: list[int], which: range
    ) -> tuple[list[np.ndarray], list[str], int]:
        """Masks and texts of some texts whose tokens, counted in what comes out, are the total.

        Tokens of a text need not be the sum of its words': the budget of the words is corrected by what was missed.
        """
        if sum(most) <= total and all(self.present[n] for n in which):
            whole = [np.ones(len(self.scored[n].spans), bool) for n in which]
            texts = [self.scored[n].source if len(self.scored[n].spans) else "" for n in which]
            return whole, texts, sum(self.scored[n].tokens for n in which if len(self.scored[n].spans))
        tried: dict[int, tuple[list[np.ndarray], list[str], int]] = {}
        budget = min(total, sum(most))
        for _ in range(_CORRECTIONS):
            if budget in tried:
                break
            masks = self._select(budget, most, least, which)
            texts = [self._text(n, mask) for n, mask in zip(which, masks, strict=True)]
            after = self._measure(texts)
            tried[budget] = masks, texts, after
            if after == total:
                break
            budget = min(max(budget + total - after, sum(least)), sum(most))
        within = [result for result in tried.values() if result[2] <= total]
        best = (
            max(within, key=lambda result: result[2]) if within else min(tried.values(), key=lambda result: result[2])
        )
        return best if best[2] >= total else self._filled(best, total, which)

    def _filled(
        self, result: tuple[list[np.ndarray], list[str], int], total: int, which: range
    ) -> tuple[list[np.ndarray], list[str], int]:
        """The same with small words added, one by one, as long as tokens are missing."""
        masks, texts, after = result
        small = [~mask & self.present[n] & (self.scored[n].costs <= total - after)
                 for n, mask in zip(which, masks, strict=True)]  # fmt: skip
        out = [(i, w) for i, mask in enumerate(small) for w in np.flatnonzero(mask).tolist()]
        scores = np.concatenate([self.scored[n].probabilities[mask] for n, mask in zip(which, small, strict=True)])
        for i, w in (out[at] for at in best_first(scores)[:_FILLERS].tolist()):
            if after == total:
                break
            one, mask = self.scored[which[i]], masks[i].copy()
            mask[w] = True
            if self.drop and protect.repeats(one.source, one.spans, mask, self.marked[which[i]]).any():
                continue
            changed = [*texts[:i], self._text(which[i], mask), *texts[i + 1 :]]
            if after < (now := self._measure(changed)) <= total:
                masks, texts, after = [*masks[:i], mask, *masks[i + 1 :]], changed, now
        return masks, texts, after

    def _measure(self, texts: list[str]) -> int:
        if self.owner.count is not None:
            return self.owner.count(_joined(texts))
        for text in texts:
            if ("tokens", text) not in self.memo:
                self.memo["tokens", text] = self.counts.of(text)
        return sum(self.memo["tokens", text] for text in texts)

    @cached_property
    def counts(self) -> Counts:
        read = [(one.source, one.spans, one.costs) for one in self.scored if one.costs.sum() == one.tokens]
        return Counts(self.owner.tokenizer, read)

    def _text(self, n: int, mask: np.ndarray) -> str:
        key = "text", n, mask.tobytes()
        if key not in self.memo:
            self.memo[key] = join(self.scored[n].source, self.scored[n].spans, mask, self.breaks)
        return self.memo[key]

    def _select(self, total: int, most: list[int], least: list[int], which: range) -> list[np.ndarray]:
        """Words of some texts with so many tokens in sum."""
        if self.scope == "corpus":
            one = self._words(list(which))
            kept = self._keep(one, total)
            return np.split(kept, np.cumsum([len(self.scored[n].spans) for n in which])[:-1])
        shares = apportion(total, np.array(most, np.int64), np.array(least, np.int64)).tolist()
        return [self._of_one(n, share) for n, share in zip(which, shares, strict=True)]

    def _of_one(self, n: int, share: int) -> np.ndarray:
        key = "words", n, share
        if key not in self.memo:
            one = self._words([n])
            by_chunk = self.scope == "chunk"
            self.memo[key] = self._by_chunk(one, share, self.scored[n].chunk) if by_chunk else self._keep(one, share)
        return self.memo[key]

    def _by_chunk(self, one: _Words, share: int, chunk: np.ndarray) -> np.ndarray:
        kept = np.zeros(len(chunk), bool)
        if not len(chunk):
            return kept
        sums = lambda values: np.bincount(chunk, values, minlength=int(chunk.max()) + 1).astype(np.int64)
        least = sums(one.costs * np.isposinf(one.scores) * ~self._repeated(one, np.isposinf(one.scores)))
        able = sums(one.costs * ~np.isneginf(one.scores))
        members = np.split(np.argsort(chunk, kind="stable"), np.cumsum(np.bincount(chunk))[:-1])
        for inside, part in zip(members, apportion(share, able, least).tolist(), strict=True):
            kept[inside] = self._keep(one.part(inside), part)
        return kept

    def _words(self, which: list[int]) -> _Words:
        """The words of some texts in one row; forced ones score +inf, those of dropped contexts -inf."""
        parts = [self.scored[n] for n in which]
        scores = [
            np.where(self.marked[n], np.inf, one.probabilities) if self.present[n] else np.full(len(one.spans), -np.inf)
            for n, one in zip(which, parts, strict=True)
        ]
        return _Words(
            np.concatenate([np.zeros(0), *scores]).astype(np.float32),
            np.concatenate([np.zeros(0, np.int64), *(one.costs for one in parts)]),
            [(one.source, *span) for one in parts for span in one.spans.tolist()] if self.drop else [],
            np.concatenate([np.zeros(0, np.int64), *(np.full(len(self.scored[n].spans), n) for n in which)]),
        )

    def _keep(self, one: _Words, n: int) -> np.ndarray:
        if not self.drop:
            return choose_words(one.scores, one.costs, n)
        scores = one.scores.copy()
        while True:
            # Words are only ever barred, so this ends; with all forced words in a row it may do so right away.
            forced = np.isposinf(scores)
            if int(one.costs[forced].sum()) > n:
                scores[self._repeated(one, forced)] = -np.inf
            kept = choose_words(scores, one.costs, n)
            again = self._repeated(one, kept)
            if not again.any():
                return kept
            scores[again] = -np.inf

    def _repeated(self, one: _Words, kept: np.ndarray) -> np.ndarray:
        found = np.zeros(len(kept), bool)
        if not self.drop:
            return found
        at, forced = np.flatnonzero(kept), np.isposinf(one.scores)
        text = lambda w: one.places[w][0][one.places[w][1] : one.places[w][2]]
        for before, here in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
            same = one.document[before] == one.document[here]
            found[here] = same and forced[before] and forced[here] and text(before) == text(here)
        return found


class _Words(NamedTuple):
    """Words in one row: scores, costs, where they stand, and in which text."""

    scores: np.ndarray
    costs: np.ndarray
    places: list[tuple[str, int, int]]
    document: np.ndarray

    def part(self, inside: Int[np.ndarray, " N"]) -> _Words:
        places = [self.places[w] for w in inside.tolist()] if self.places else []
        return _Words(self.scores[inside], self.costs[inside], places, self.document[inside])


def _asked(
    rate: Rate | Sequence[Rate] | None, tokens: Number | None, texts: int
) -> tuple[list[float] | None, int | None]:
    """A rate for each text, or a number of tokens of all."""
    if tokens is not None:
        if rate is not None:
            raise ValueError("give a rate or a number of tokens, not both")
        return None, whole(tokens, "tokens", least=1)
    given: Any = 0.5 if rate is None else rate
    if np.ndim(given) == 0:
        return [share(given)] * texts, None
    rates = [share(one) for one in given]
    if len(rates) != texts:
        raise ValueError(f"there are {len(rates)} rates for {texts} contexts; give one for all or one for each")
    return rates, None


def _share(rate: float, tokens: int) -> int:
    return min(tokens, max(1, int(rate * tokens + 0.5)))


def _joined(texts: Sequence[str]) -> str:
    return SEPARATOR.join(text for text in texts if text)


def _costs(text: str, spans: Spans, count: Callable[[str], int]) -> np.ndarray:
    """Tokens of words, each with a space before it where it has one in the text."""
    known: dict[str, int] = {}

    def cost(start: int, end: int) -> int:
        word = (" " if start and text[start - 1].isspace() else "") + text[start:end]
        if word not in known:
            known[word] = count(word)
        return known[word]

    return np.array([cost(start, end) for start, end in spans.tolist()], np.int64)


def shown(document: Document, begin: str = "\x1b[1;32m", end: str = "\x1b[0m", dim: str = "\x1b[2m") -> Iterator[str]:
    """The source with kept words in one colour and dropped ones in another, for a terminal."""
    at = 0
    for (start, stop), kept in zip(document.spans.tolist(), document.kept.tolist(), strict=True):
        yield document.source[at:start]
        yield (begin if kept else dim) + document.source[start:stop] + end
        at = stop
    yield document.source[at:]
