"""keep: the words of scored texts that stay, within a budget of tokens that is met.

    kept = keep(scored, TokenizerCounter(tokenizer), rate=0.5, force=[".", "\\n"], protect=["numbers"])
    kept.text, kept.tokens_before, kept.tokens_after

The rule is that of `jaxcompress.state.select`: higher scores stay, on a tie the earlier word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool

from jaxcompress.inputs.scalars import Number, number, share, whole
from jaxcompress.prompt.contexts import Contexts, contexts_that_stay
from jaxcompress.prompt.counting import Count, counter_of
from jaxcompress.prompt.fitting import Fitter
from jaxcompress.prompt.joining import join, joined
from jaxcompress.prompt.kinds import Kind, checked_kinds
from jaxcompress.prompt.protect import checked, protected
from jaxcompress.prompt.protect import forced as forced_words
from jaxcompress.prompt.selection import BudgetScope, PricedText, Selection
from jaxcompress.prompt.word_scores import ScoredWords, Scores
from jaxcompress.prompt.words import Costs


class BudgetTooSmall(ValueError):
    """What is forced and protected has more tokens than may stay.

    Attributes:
      needed: tokens of what is forced and protected.
      asked: tokens that may stay.
      of: tokens of the text.
    """

    def __init__(self, needed: int, asked: int, of: int, where: str = ""):
        self.needed, self.asked, self.of = needed, asked, of
        rate = math.ceil(needed / max(of, needed) * 1000) / 1000
        super().__init__(
            f"what is forced and protected{where} needs {needed:,} of {of:,} tokens, more than the {asked:,} asked "
            f"for; ask for at least {needed:,} tokens (a rate of {rate:g}), or force and protect less"
        )


class Kept(NamedTuple):
    """What stays of one text.

    Attributes:
      costs: [W], tokens of each word.
      forced: [W], whether it had to stay.
      labels: [W], whether it stayed.
      text: the words that stayed (see `jaxcompress.prompt.joining`).
    """

    scored: ScoredWords
    costs: Costs
    forced: Bool[np.ndarray, " W"]
    labels: Bool[np.ndarray, " W"]
    text: str


@dataclass(frozen=True)
class Compressed:
    """What stays of one text or several.

    Attributes:
      text: of all texts that have words left, an empty line between them.
      documents: one for each text.
      tokens_before, tokens_after: as the reader counts them.
      asked: the number of tokens asked for.
      forced: tokens of what is forced and protected, alone.
    """

    text: str
    documents: tuple[Kept, ...]
    tokens_before: int
    tokens_after: int
    asked: int
    forced: int

    @property
    def ratio(self) -> float:
        """How many times shorter; 1 if nothing is left."""
        return self.tokens_before / self.tokens_after if self.tokens_after else 1.0

    @property
    def saved(self) -> int:
        """Tokens that were dropped."""
        return self.tokens_before - self.tokens_after

    @property
    def words(self) -> list[str]:
        return [word for document in self.documents for word in document.scored.words]

    @property
    def labels(self) -> Bool[np.ndarray, " W"]:
        """Whether each word of all texts stayed."""
        return np.concatenate([np.zeros(0, bool), *(document.labels for document in self.documents)])

    @property
    def scores(self) -> Scores:
        return np.concatenate([np.zeros(0, np.float32), *(document.scored.scores for document in self.documents)])


def keep(
    scored: ScoredWords | Sequence[ScoredWords],
    count: Count,
    *,
    rate: Number | Sequence[Number] | None = None,
    tokens: Number | None = None,
    scope: BudgetScope = "document",
    force: Sequence[str] = (),
    protect: Sequence[Kind] = (),
    drop_consecutive: bool = False,
    filter: Contexts | None = None,
) -> Compressed:
    """Keeps exactly as many tokens as asked for, whole words of the texts in their order.

    Nine parameters: one budget, and each option of the published `compress_prompt` by itself.

    A text that holds nothing but white space becomes "". If no set of whole words has exactly the asked number of
    tokens, the largest number below it is met. A score of +inf protects a word as `force` does.

    Args:
      scored: one text or several.
      count: tokens of a text for its reader, the model that will read it: `TokenizerCounter(tokenizer)` or any function
        of a text; `WORDS` counts words.
      rate: the share of the reader's tokens that stays, in (0, 1]; 0.5 if neither this nor `tokens` is given. At least
        one token stays of a text that has any. With one rate for each text, each text meets its own.
      tokens: that stay of all texts together, at least 1.
      scope: where words compete: over all texts ("corpus", which keeps more of what is dense), or within every
        "document" or "chunk" for a proportional part of the tokens, or for what is forced there if that is more.
      force: strings that stay wherever they stand as whole words ("." or "New York"), or white space that stays as it
        is where something around it is dropped ("\\n": ends of lines, as the text has them). They count. Strings that
        do not occur do nothing.
      protect: kinds of things that stay whole wherever a text has them, and count: any of `KINDS` (see
        `jaxcompress.prompt.kinds`). All words of one stay, with what stands between them.
      drop_consecutive: of equal words of `force` that would follow one another, the first stays.
      filter: drops whole texts first; the tokens that stay are still the same share of all tokens.

    Raises:
      ValueError: a rate outside (0, 1], tokens below 1, both of them, or an unknown scope or kind; a filter that does
        not say exactly one thing.
      BudgetTooSmall: what is forced and protected has more tokens than may stay.
      TypeError: `force` or `protect` is no list of strings.
    """
    texts = [scored] if isinstance(scored, ScoredWords) else list(scored)
    rates, tokens = checked_budget(len(texts), rate, tokens)
    force, kinds = checked_force(scope, force), checked_kinds(protect)
    counter = counter_of(count)
    prices = [counter.price(one.text, one.spans) for one in texts]
    present = contexts_that_stay(texts, [tokens for _, tokens in prices], filter)
    whole = [protected(one.text, one.spans, kinds) for one in texts]
    forced = [_forced(one, stays, force) for one, stays in zip(texts, whole, strict=True)]
    parts = zip(texts, prices, zip(forced, whole, strict=True), present.tolist(), strict=True)
    priced = [PricedText(one, *price, *marks, here) for one, price, marks, here in parts]
    fitter = Fitter(Selection(priced, scope, drop_consecutive), counter, [one for one in force if one.isspace()])
    return _compressed(fitter, rates, tokens)


def keep_with_forced(scored: ScoredWords | Sequence[ScoredWords], count: Count, **options: Any) -> Compressed:
    """As `keep`, but where what is forced and protected has more tokens than may stay, that stays and nothing else.

    `Compressed.asked` is the number that was asked for.

    Args:
      options: as for `keep`.
    """
    try:
        return keep(scored, count, **options)
    except BudgetTooSmall as error:
        budget = dict(rate=None, tokens=error.needed)
        return replace(keep(scored, count, **{**options, **budget}), asked=error.asked)


def keep_above(
    scored: ScoredWords | Sequence[ScoredWords],
    count: Count,
    threshold: Number,
    *,
    force: Sequence[str] = (),
    protect: Sequence[Kind] = (),
) -> Compressed:
    """Keeps the words whose scores are above a threshold, however many they are, in their order.

    Scores of sentences (`Compressor(unit="sentence")`) are kept or dropped as in Provence. Nothing may be left.

    Args:
      scored, count, force, protect: as for `keep`.
      threshold: a finite number.

    Raises:
      ValueError: the threshold is not finite, or a kind is unknown.
      TypeError: as `keep`.
    """
    texts = [scored] if isinstance(scored, ScoredWords) else list(scored)
    threshold = number(threshold, "a threshold")
    force, kinds = checked_force("document", force), checked_kinds(protect)
    counter = counter_of(count)
    breaks = [one for one in force if one.isspace()]
    documents, before, after, forced_tokens = [], 0, 0, 0
    for one in texts:
        costs, tokens = counter.price(one.text, one.spans)
        forced = _forced(one, protected(one.text, one.spans, kinds), force)
        labels = forced | (one.scores > threshold)
        text = one.text if len(labels) and labels.all() else join(one.text, one.spans, labels, breaks)
        documents.append(Kept(one, costs, forced, labels, text))
        before += tokens
        after += counter.total([text], int(costs[labels].sum()))
        forced_tokens += counter.total([join(one.text, one.spans, forced, breaks)], int(costs[forced].sum()))
    return Compressed(joined([one.text for one in documents]), tuple(documents), before, after, after, forced_tokens)


def _forced(one: ScoredWords, whole: Bool[np.ndarray, " W"], force: Sequence[str]) -> Bool[np.ndarray, " W"]:
    """Marks the words of a text that stay in any case.

    Args:
      whole: words of what is protected.
    """
    return np.isposinf(one.scores) | whole | forced_words(one.text, one.spans, force)


def checked_force(scope: str, force: Sequence[str]) -> tuple[str, ...]:
    """The forced strings. Raises ValueError and TypeError for a scope or strings that `keep` does not take."""
    if scope not in get_args(BudgetScope):
        raise ValueError(f"unknown scope {scope!r}; known: {', '.join(map(repr, get_args(BudgetScope)))}")
    return checked(force)


def checked_budget(
    texts: int, rate: Number | Sequence[Number] | None, tokens: Number | None
) -> tuple[list[float] | None, int | None]:
    """Either a rate for each text, or a number of tokens of all. Raises ValueError as `keep`."""
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


def _compressed(fitter: Fitter, rates: list[float] | None, tokens: int | None) -> Compressed:
    """Meets one budget for all texts, or each text's own if their rates differ."""
    priced = fitter.selection.texts
    before = sum(one.tokens for one in priced)
    if rates is None or len(set(rates)) <= 1:
        goals = [(tokens if tokens is not None else tokens_at(rates[0] if rates else 1.0, before), range(len(priced)))]
    else:
        own = [tokens_at(rate, one.tokens) for rate, one in zip(rates, priced, strict=True)]
        goals = [(asked, range(n, n + 1)) for n, asked in enumerate(own)]
    forced = sum(_forced_tokens(fitter, *goal) for goal in goals)
    found = [fitter.fit(*goal) for goal in goals]
    left = [pair for one in found for pair in zip(one.masks, one.texts, strict=True)]
    documents = tuple(
        Kept(one.scored, one.costs, one.forced, *pair) for one, pair in zip(priced, left, strict=True)
    )  # fmt: skip
    after, asked = sum(one.tokens for one in found), sum(asked for asked, _ in goals)
    return Compressed(joined([text for _, text in left]), documents, before, after, asked, forced)


def _forced_tokens(fitter: Fitter, asked: int, which: range) -> int:
    """Tokens of what is forced of some texts. Raises BudgetTooSmall if they are more than asked for."""
    needed, texts = fitter.forced(which).tokens, fitter.selection.texts
    if needed > asked:
        where = f" of context {which[0]}" if len(which) < len(texts) else ""
        raise BudgetTooSmall(needed, asked, sum(texts[n].tokens for n in which), where)
    return needed


def tokens_at(rate: float, tokens: int) -> int:
    """The number of tokens that a rate leaves of so many: rounded, at least one of a text that has any."""
    return min(tokens, max(1, int(rate * tokens + 0.5)))
