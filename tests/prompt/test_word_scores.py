"""Scorers, and keeping words by their scores: exact numbers, ties, protection, and a text that reads as it did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt.baselines import (
    content_words,
    evenly_spread,
    first_words,
    random_words,
    relevance_to,
    tf_idf,
)
from jaxcompress.prompt.counting import WORDS
from jaxcompress.prompt.keeping import BudgetTooSmall, keep
from jaxcompress.prompt.word_scores import ScoredWords, Scorer, mixed, ranks
from jaxcompress.prompt.words import segment

TEXT = "The council will vote, on Monday. The budget (of 3.5 million) is large."


def scored(text: str, scores: Sequence[float]) -> ScoredWords:
    return ScoredWords(text, segment(text), np.array(scores, np.float32), "test")


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan"), -float("inf")]), max_size=40), st.floats(0.01, 1.0))
def test_exactly_the_rate_stays(scores: list[float], rate: float) -> None:
    kept = keep(scored(" ".join("w" for _ in scores), scores), WORDS, rate=rate)
    assert kept.labels.sum() == kept.tokens_after == min(len(scores), max(1, int(np.floor(len(scores) * rate + 0.5))))
    clean = np.nan_to_num(np.array(scores), nan=-np.inf, neginf=-np.inf)
    if 0 < kept.labels.sum() < len(scores):
        assert clean[kept.labels].min() >= clean[~kept.labels].max()


def test_the_earlier_word_stays_on_a_tie() -> None:
    assert keep(scored("a b c d", [1, 1, 1, 1]), WORDS, tokens=2).text == "a b"


def test_protected_words_stay_or_it_is_said() -> None:
    infinite = float("inf")
    assert keep(scored("a b c d", [0, infinite, 1, infinite]), WORDS, tokens=2).text == "b d"
    budgets: list[dict[str, Any]] = [dict(tokens=1), dict(rate=0.25)]
    for budget in budgets:
        with pytest.raises(BudgetTooSmall, match="needs 2 of 4 tokens, more than the 1 asked for"):
            keep(scored("a b c d", [0, infinite, 1, infinite]), WORDS, **budget)


class Priced:
    """Words that cost given numbers of tokens."""

    def __init__(self, costs: list[int]):
        self.costs = costs

    def __call__(self, text: str) -> int:
        return sum(self.costs)

    def price(self, text: str, spans: np.ndarray) -> tuple[np.ndarray, int]:
        return np.array(self.costs, np.int64), sum(self.costs)

    def total(self, texts: list[str], cost: int) -> int:
        return cost


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=12), st.data())
def test_exactly_so_many_tokens(words: list[tuple[int, int]], data: st.DataObject) -> None:
    costs = np.array([cost for cost, _ in words])
    n = data.draw(st.integers(1, int(costs.sum())))
    kept = keep(scored("w " * len(words), [score for _, score in words]), Priced(costs.tolist()), tokens=n)
    sums = {0}
    for cost in costs.tolist():
        sums |= {one + cost for one in sums}
    assert costs[kept.labels].sum() == kept.tokens_after == max(one for one in sums if one <= n)


@pytest.mark.parametrize("asked", [dict(rate=0.5, tokens=1), dict(rate=0.0), dict(rate=1.5), dict(tokens=0)])
def test_what_cannot_be_asked(asked: dict) -> None:
    with pytest.raises(ValueError):
        keep(scored("a b", [0, 1]), WORDS, **asked)


def test_texts_without_words() -> None:
    for text in ("", " \n "):
        kept = keep(scored(text, []), WORDS, rate=0.5)
        assert (kept.text, kept.ratio) == ("", 1.0)


def test_text_of_what_stays() -> None:
    text = "The vote, on Monday,\nwas  late."
    best = scored(text, [0, 1, 1, 1, 1, 0, 0, 1, 1])
    assert keep(best, WORDS, tokens=6).text == "vote, on Monday late."
    assert keep(best, WORDS, tokens=6, force=["\n"]).text == "vote, on Monday\nlate."
    assert keep(scored(text, [1] * 9), WORDS, rate=1.0).text == text
    assert keep(scored(text, [0] * 8 + [1]), WORDS, tokens=1).text == "."


SCORERS = [
    random_words(1),
    evenly_spread(),
    first_words(),
    tf_idf(),
    content_words(),
    relevance_to("When will the council vote?"),
]


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer("a").by)
def test_every_scorer(scorer: Scorer) -> None:
    for text in (TEXT, "", " ", "word", "会议将于10月开始。👍🏽"):
        found = scorer(text)
        np.testing.assert_array_equal(found.spans, segment(text))
        assert found.scores.shape == (len(found.words),)
        assert found.scores.dtype == np.float32
        assert np.isfinite(found.scores).all()
        assert scorer(text).scores.tolist() == found.scores.tolist()


def test_random_differs_by_seed() -> None:
    assert random_words(0)(TEXT).scores.tolist() != random_words(1)(TEXT).scores.tolist()


@given(st.integers(1, 200), st.floats(0.02, 1.0))
def test_evenly_spread_words_are(total: int, rate: float) -> None:
    labels = keep(evenly_spread()("w " * total), WORDS, rate=rate).labels
    places = np.flatnonzero(labels)
    if len(places) > 1:
        assert np.diff(places).max() <= 2 * total / len(places) + 2


def test_first_words() -> None:
    assert keep(first_words()("a b c d"), WORDS, tokens=2).text == "a b"


def test_every_second_word() -> None:
    assert keep(evenly_spread()("a b c d e f g h"), WORDS, tokens=4).text == "a c e g"


def test_rare_words_score_higher() -> None:
    background = ["the vote", "the budget", "the council"]
    found = dict(zip(TEXT.split(), tf_idf(background)(TEXT.replace(",", "")).scores, strict=False))
    assert found["council"] > found["The"]
    assert tf_idf(background)("the ,").scores[1] == 0


def test_words_of_the_question_and_around_them() -> None:
    found = relevance_to("Who will vote?", reach=2)("a b c vote d e f")
    assert found.scores.argmax() == 3
    assert (found.scores > 0).tolist() == [False, True, True, True, True, True, False]


def test_mixing_is_the_mean_of_ranks() -> None:
    text = "a b c"
    one = lambda text: scored(text, [3, 2, 1])
    other = lambda text: scored(text, [10, 30, 20])
    assert np.allclose(mixed((3.0, one), (1.0, other))(text).scores, [0.75, 0.625, 0.125])
    assert np.allclose(mixed((1.0, one))(text).scores, ranks(np.array([3, 2, 1], np.float32)))
    protected = lambda text: scored(text, [0, 0, float("inf")])
    assert np.isposinf(mixed((1.0, one), (1.0, protected))(text).scores).tolist() == [False, False, True]
    assert "0.75 test" in mixed((3.0, one), (1.0, other))(text).by


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="positive"):
        mixed()
    with pytest.raises(ValueError, match="positive"):
        mixed((-1.0, content_words()))
    shorter = lambda text: ScoredWords(text, segment(text)[1:], np.zeros(len(segment(text)) - 1, np.float32), "other")
    with pytest.raises(ValueError, match="different words"):
        mixed((1.0, content_words()), (1.0, shorter))("a b")
