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
from jaxcompress.prompt.fitting import Fitted, Fitter
from jaxcompress.prompt.joining import joined
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
      tokens_before, tokens_after: as the reader counts the texts one after the other, with what stands between.
      asked: the number of tokens asked for; with a rate for each text, the sum of theirs and of what stands between.
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


def keep(  # nine parameters: one budget, and each option of the published `compress_prompt` by itself
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

    A text that holds nothing but white space becomes "". If no set of whole words has exactly the asked number of
    tokens, the largest number below it is met. A score of +inf protects a word as `force` does.

    Args:
      scored: one text or several.
      count: tokens of a text for its reader, the model that will read it: `TokenizerCounter(tokenizer)` or any function
        of a text; `WORDS` counts words.
      rate: the share of the reader's tokens that stays, in (0, 1]; 0.5 if neither this nor `tokens` is given. At least
        one token stays of a text that has any. With one rate for each text, each text meets its own, also if they are
        all the same.
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
    rate, tokens = checked_budget(len(texts), rate, tokens)
    fitter = _fitter(texts, count, scope, force, protect, drop_consecutive, filter)
    return _compressed(fitter, rate, tokens)


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


def keep_forced(
    scored: ScoredWords | Sequence[ScoredWords],
    count: Count,
    *,
    scope: BudgetScope = "document",
    force: Sequence[str] = (),
    protect: Sequence[Kind] = (),
    drop_consecutive: bool = False,
) -> Compressed:
    """Keeps what is forced and protected, and nothing else: as `keep`, if it could be asked for 0 tokens."""
    texts = [scored] if isinstance(scored, ScoredWords) else list(scored)
    fitter = _fitter(texts, count, scope, force, protect, drop_consecutive)
    return _result(fitter, fitter.forced(range(len(texts))), 0)


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
    priced = []
    for one in texts:
        whole = protected(one.text, one.spans, kinds)
        priced.append(PricedText(one, *counter.price(one.text, one.spans), _forced(one, whole, force), whole, True))
    fitter = Fitter(Selection(priced, "document", False), counter, [one for one in force if one.isspace()])
    left = fitter.chosen([one.forced | (one.scored.scores > threshold) for one in priced])
    return _result(fitter, left, left.tokens)


def _fitter(
    texts: Sequence[ScoredWords],
    count: Count,
    scope: BudgetScope,
    force: Sequence[str],
    protect: Sequence[Kind],
    drop_consecutive: bool,
    filter: Contexts | None = None,
) -> Fitter:
    """What `keep` chooses words with. Raises ValueError and TypeError as it does."""
    force, kinds = checked_force(scope, force), checked_kinds(protect)
    counter = counter_of(count)
    prices = [counter.price(one.text, one.spans) for one in texts]
    present = contexts_that_stay(texts, [tokens for _, tokens in prices], filter)
    whole = [protected(one.text, one.spans, kinds) for one in texts]
    forced = [_forced(one, stays, force) for one, stays in zip(texts, whole, strict=True)]
    parts = zip(texts, prices, zip(forced, whole, strict=True), present.tolist(), strict=True)
    priced = [PricedText(one, *price, *marks, here) for one, price, marks, here in parts]
    return Fitter(Selection(priced, scope, drop_consecutive), counter, [one for one in force if one.isspace()])


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
) -> tuple[float | list[float] | None, int | None]:
    """Either a rate (of all texts, or one for each), or a number of tokens of all. Raises ValueError as `keep`."""
    if tokens is not None:
        if rate is not None:
            raise ValueError("give a rate or a number of tokens, not both")
        return None, whole(tokens, "tokens", least=1)
    given: Any = 0.5 if rate is None else rate
    if np.ndim(given) == 0:
        return share(given), None
    rates = [share(one) for one in given]
    if len(rates) != texts:
        raise ValueError(f"there are {len(rates)} rates for {texts} contexts; give one for all or one for each")
    return rates, None


def _compressed(fitter: Fitter, rate: float | list[float] | None, tokens: int | None) -> Compressed:
    """Meets one budget for all texts, or each text's own with a rate for each."""
    priced = fitter.selection.texts
    if isinstance(rate, list):
        goals = [(tokens_at(rate[n], one.tokens), range(n, n + 1)) for n, one in enumerate(priced)]
    else:
        goals = [(tokens or tokens_at(rate or 1.0, fitter.tokens), range(len(priced)))]
    for goal in goals:
        _check_forced(fitter, *goal)
    found = [fitter.fit(*goal) for goal in goals]
    left = fitter.together(found)
    between = left.tokens - sum(one.tokens for one in found)  # what stands between texts that each met their own
    return _result(fitter, left, sum(asked for asked, _ in goals) + between)


def _result(fitter: Fitter, left: Fitted, asked: int) -> Compressed:
    texts = fitter.selection.texts
    documents = tuple(
        Kept(one.scored, one.costs, one.forced, mask, text)
        for one, mask, text in zip(texts, left.masks, left.texts, strict=True)
    )
    forced = fitter.forced(range(len(texts))).tokens
    return Compressed(joined(left.texts), documents, fitter.tokens, left.tokens, asked, forced)


def _check_forced(fitter: Fitter, asked: int, which: range) -> None:
    """Raises BudgetTooSmall if what is forced of some texts has more tokens than asked for."""
    needed = fitter.forced(which).tokens
    if needed > asked:
        one_of_many = len(which) < len(fitter.selection.texts)
        of = fitter.selection.texts[which[0]].tokens if one_of_many else fitter.tokens
        raise BudgetTooSmall(needed, asked, of, f" of context {which[0]}" if one_of_many else "")


def tokens_at(rate: float, tokens: int) -> int:
    """The number of tokens that a rate leaves of so many: rounded, at least one of a text that has any."""
    return min(tokens, max(1, int(rate * tokens + 0.5)))
