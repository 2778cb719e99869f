"""Keeping words so that their tokens are exactly as many as asked for.

Words cost different numbers of tokens, so the best n tokens are rarely whole words: the last one does not fit. The
gap is closed among the words around the threshold, by dynamic programming over this small core (the idea of Pisinger
1997 for the knapsack problem), so that no word far from the threshold is touched.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

CORE = 16  # words around the threshold among which the gap is closed; doubled until it can be


def best_first(scores: Float[np.ndarray, " W"]) -> Int[np.ndarray, " W"]:
    """Words from the highest score to the lowest, the earlier first on a tie: the order of `select.rank`, on the host
    where texts are, since a call of a device takes longer than the sort."""
    scores = scores.astype(np.float32)
    return np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")


def choose(scores: Float[np.ndarray, " W"], costs: Int[np.ndarray, " W"], n: int) -> Bool[np.ndarray, " W"]:
    """The words that stay: the best ones, whose costs add up to n, or to the most below n that any words do.

    Args:
      scores: higher stays, +inf always, -inf never.
      costs: tokens of each word.
      n: at least what words with score +inf cost.
    """
    order = best_first(scores)
    order = order[~np.isneginf(scores[order])]
    running = np.concatenate([[0], np.cumsum(costs[order])])
    kept = np.zeros(len(scores), bool)
    fits = int(np.searchsorted(running, n, side="right")) - 1
    kept[order[:fits]] = True
    if running[fits] == n or fits == len(order):
        return kept
    protected = int(np.isposinf(scores).sum())
    half, best = CORE // 2, int(running[fits])
    while True:
        start, stop = max(protected, fits - half), min(len(order), fits + half)
        core = order[start:stop]
        taken, reached = _fill(scores[core].astype(np.float64), costs[core], n - int(running[start]))
        if reached + running[start] > best:
            kept[core] = taken
            best = int(reached + running[start])
        if best == n or (start == protected and stop == len(order)):
            return kept
        half *= 2


def _fill(values: np.ndarray, costs: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """Which items have the largest sum of values among those that fill the most of the room, and how much that is."""
    most = min(room, int(costs.sum()))
    best = np.full(most + 1, -np.inf)
    best[0] = 0.0
    took = np.zeros((len(costs), most + 1), bool)
    for n, (value, cost) in enumerate(zip(values.tolist(), costs.tolist(), strict=True)):
        if cost > most:
            continue
        with_it = best[: most + 1 - cost] + value
        took[n, cost:] = with_it > best[cost:]
        best[cost:] = np.where(took[n, cost:], with_it, best[cost:])
    reached = int(np.flatnonzero(np.isfinite(best))[-1])
    taken, left = np.zeros(len(costs), bool), reached
    for n in range(len(costs) - 1, -1, -1):
        if took[n, left]:
            taken[n] = True
            left -= int(costs[n])
    return taken, reached


def apportion(
    total: int, weights: Int[np.ndarray, " U"], least: Int[np.ndarray, " U"] | None = None
) -> Int[np.ndarray, " U"]:
    """Shares of a total in proportion to weights, by largest remainders, none below `least` or above its weight.

    Args:
      total: between the sums of `least` and of the weights.
    """
    least = np.zeros_like(weights) if least is None else least
    share, fixed = np.zeros(len(weights)), np.zeros(len(weights), bool)
    while not fixed.all():
        free = weights[~fixed].sum()
        share[~fixed] = (total - share[fixed].sum()) * weights[~fixed] / free if free else 0.0
        below = ~fixed & (share < least)
        if not below.any():
            break
        share[below], fixed = least[below], fixed | below
    whole = np.floor(share + 1e-9).astype(np.int64)
    for unit in np.argsort(whole - share, kind="stable"):
        if whole.sum() >= total:
            break
        whole[unit] += whole[unit] < weights[unit]
    return whole
