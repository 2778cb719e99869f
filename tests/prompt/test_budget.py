"""Which words stay, against trying all, and how much memory and time that takes."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt import budget
from jaxcompress.prompt.budget import CORE, apportion, choose_words, fill, reachable, words_best_first

COSTS = {
    "small": lambda rng, w: rng.integers(1, 5, w),
    "some free": lambda rng, w: rng.integers(0, 4, w),
    "even": lambda rng, w: 2 * rng.integers(1, 4, w),
    "thirds": lambda rng, w: rng.choice([6, 10, 15], w),
    "some long": lambda rng, w: rng.choice([3, 3, 3, 3, 7, 40], w),
    "one odd": lambda rng, w: np.where(np.arange(w) == rng.integers(w), 1, 4),
}


def by_trying(scores: np.ndarray, costs: np.ndarray, n: int, allowed: np.ndarray) -> np.ndarray:
    """The definition: of cores around the threshold, 16 words, 32, ..., the first in which words cost the most that any
    cost, and there the fewest words of the lowest score and the largest sum of the other scores. All sums of costs are
    tried."""
    order = words_best_first(scores, allowed).tolist()
    value = {w: (0, float(scores[w])) if scores[w] > -np.inf else (-1, 0.0) for w in order}
    fits = max(k for k in range(len(order) + 1) if costs[order[:k]].sum() <= n)
    kept = set(order[:fits])
    most, half, first = costs[order[:fits]].sum(), CORE // 2, sum(scores[order] == np.inf)
    while fits < len(order) and most < n:
        start, stop = max(first, fits - half), min(len(order), fits + half)
        before = order[:start]
        best = {int(costs[before].sum()): ((0, 0.0), frozenset(before))}
        for w in order[start:stop]:
            for total, ((low, high), words) in list(best.items()):
                more = total + int(costs[w]), (low + value[w][0], high + value[w][1])
                if more[0] <= n and more[1] > best.get(more[0], ((-np.inf, 0.0), words))[0]:
                    best[more[0]] = more[1], words | {w}
        if max(best) > most:
            most = max(best)
            kept = best[most][1]
        if (start, stop) == (first, len(order)):
            break
        half *= 2
    return np.isin(np.arange(len(scores)), list(kept))


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("table", [8, 1 << 16])  # the dynamic programme halved, and in one table
@given(st.integers(0, 2**32 - 1))
def test_the_documented_choice(kind: str, table: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = int(rng.integers(1, 60))
    costs, scores = COSTS[kind](rng, w).astype(np.int64), rng.normal(size=w).astype(np.float32)
    allowed = rng.random(w) >= 0.1
    if w % 2:
        scores[rng.random(w) < 0.1] = -np.inf
    scores[allowed & (rng.random(w) < 0.1)] = np.inf
    n = int(rng.integers(costs[scores == np.inf].sum(), costs.sum() + 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_TABLE", table)
        kept = choose_words(scores, costs, n, allowed)
    expected = by_trying(scores, costs, n, allowed)
    assert not kept[~allowed].any()
    if w % 2:  # words of the lowest score are as good as each other
        of = lambda words: (
            costs[words].sum(),
            np.isneginf(scores[words]).sum(),
            scores[words & np.isfinite(scores)].sum(),
        )
        np.testing.assert_allclose(of(kept), of(expected), rtol=1e-5)
    else:
        np.testing.assert_array_equal(kept, expected)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 3), (5, 8), (4, 6, 7), (3, 40)]))
def test_few_words_of_many_are_open(seed: int, of: tuple[int, ...]) -> None:
    """A core of hundreds, of which nearly all is settled by score per token, against the whole dynamic programme."""
    rng = np.random.default_rng(seed)
    costs = np.where(rng.random(300) < 0.02, of[0], rng.choice(of[1:], 300)).astype(np.int64)
    values = np.sort(rng.random(300))[::-1] - 0.2 * rng.integers(2)
    room = reachable(costs, int(rng.integers(1, costs.sum())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_TABLE", 1 << 30)
        whole = fill(values, costs, room)
        patch.setattr(budget, "_TABLE", 1)
        np.testing.assert_array_equal(fill(values, costs, room), whole)
    assert costs[whole].sum() == room


def test_numbers_that_are_none_are_the_lowest_scores() -> None:
    scores = np.array([np.nan, 0.5, np.nan, 0.1], np.float32)
    np.testing.assert_array_equal(choose_words(scores, np.array([1, 2, 1, 4]), 3), [True, True, False, False])


@pytest.mark.parametrize(
    "costs",
    [lambda w: np.full(w, 2), lambda w: np.append(np.full(w - 1, 4), 3), lambda w: np.arange(w) % 3 * 2 + 2],
    ids=["no odd sum", "the last word alone is odd", "no odd sum of several"],
)
def test_memory_and_time_of_long_texts(costs) -> None:
    """An odd number of tokens where words cost an even number: nothing near the threshold, or nothing at all, helps."""
    peaks = []
    for words in (25_000, 200_000):
        cost = costs(words).astype(np.int64)
        scores = np.linspace(1, 0, words, dtype=np.float32)
        n = int(cost.sum()) // 4 * 2 + 1
        begun = time.process_time()
        tracemalloc.start()
        kept = choose_words(scores, cost, n)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert cost[kept].sum() == n - (cost % 2 == 0).all()
        assert time.process_time() - begun < 10  # which takes 0.1; quadratic time would be an hour
    assert peaks[1] < 9 * peaks[0]
    assert peaks[1] < 200 * words


def test_shares_of_many_texts() -> None:
    weights = np.arange(1, 100_001)
    shares = apportion(int(weights.sum()) // 3, weights)
    assert shares.sum() == weights.sum() // 3
    assert (np.abs(shares - weights / 3) <= 1).all()
