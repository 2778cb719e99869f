"""Words whose tokens are exactly as many as asked for.

Words cost different numbers of tokens, so the best n tokens are rarely whole words: the last word does not fit. The
gap is closed among the words around the threshold, by dynamic programming over this small core (the idea of Pisinger
1997 for the knapsack problem). No word far from the threshold is touched.

The bits of one integer tell how many tokens the words of a core can have, so only a core that can close the gap is
filled. Of a large core few words are open: the best filling is near the one by score per token (Eisenbrand & Weismantel
2019, theorem 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcompress.state.select import best_first

CORE = 16  # words around the threshold among which the gap is closed; doubled until it can be
_TABLE = 1 << 16  # bytes of the table that a dynamic programme keeps; a larger one is halved


def words_best_first(
    scores: Float[np.ndarray, " W"], allowed: Bool[np.ndarray, " W"] | None = None
) -> Int[np.ndarray, " N"]:
    """The words that may stay from the best to the worst, by the rule of `jaxcompress.state.select`: a word's position
    is its place in the text.

    Args:
      allowed: words that may stay; all by default.
    """
    places = np.arange(len(scores))
    if allowed is None:
        return np.asarray(best_first(scores, places, np))
    return np.asarray(best_first(scores, np.where(allowed, places, -1), np))[: int(allowed.sum())]


def choose_words(
    scores: Float[np.ndarray, " W"],
    costs: Int[np.ndarray, " W"],
    n: int,
    allowed: Bool[np.ndarray, " W"] | None = None,
) -> Bool[np.ndarray, " W"]:
    """The words that stay: the best ones whose costs add up to n, or to the largest number below n that any words have.

    The words that fit in the order of their scores stay if they cost exactly so much. Else the smallest core around the
    threshold whose words can cost so much is filled with those of its words whose scores have the largest sum. (A
    score of -inf or NaN counts as one below all others.)

    Memory grows in proportion to the words and n, and so does time, except for sorting. It takes longer only if words
    far from the threshold are needed and some of them cost hundreds of tokens.

    Args:
      scores: higher stays; +inf always stays.
      costs: tokens of each word.
      n: at least what the words with score +inf cost.
      allowed: words that may stay; all by default.
    """
    order = words_best_first(scores, allowed)
    running = np.concatenate([[0], np.cumsum(costs[order])])
    kept = np.zeros(len(scores), bool)
    fits = int(np.searchsorted(running, n, side="right")) - 1
    kept[order[:fits]] = True
    if running[fits] == n or fits == len(order):
        return kept
    protected, most, smallest = int(np.isposinf(scores[order]).sum()), int(running[fits]), None
    for start, stop in _cores(fits, protected, len(order)):
        reached = int(running[start]) + reachable(costs[order[start:stop]], n - int(running[start]))
        if reached > most:
            most, smallest = reached, (start, stop)
        if most == n:
            break
    if smallest is not None:
        core = order[slice(*smallest)]
        kept[core] = fill(_summable(scores[core]), costs[core], most - int(running[smallest[0]]))
    return kept


def _summable(scores: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """float64, with -inf and NaN so far below all others that a sum with fewer of them is always larger."""
    finite = np.isfinite(scores)
    values = scores.astype(np.float64)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    return np.where(finite, values, low - (len(scores) + 1) * max(high - low, abs(low), abs(high), 1.0))


def _cores(fits: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ever larger ranges of words around the threshold, to all of them."""
    half = CORE // 2
    while True:
        start, stop = max(first, fits - half), min(last, fits + half)
        yield start, stop
        if (start, stop) == (first, last):
            return
        half *= 2


def reachable(costs: Int[np.ndarray, " N"], room: int) -> int:
    """The largest number within the room that any items cost together."""
    counts = np.bincount(costs[costs <= room])
    each = np.flatnonzero(counts[1:]) + 1
    unit = int(np.gcd.reduce(each)) or 1
    room //= unit
    sums, within = 1, (1 << (room + 1)) - 1  # bit s: some items cost s units together
    for cost, count in zip((each // unit).tolist(), counts[each].tolist(), strict=True):
        left, part = min(count, room // cost), 1
        while left:  # 1, 2, 4, ... and the rest: every number up to `left` is a sum of some of these
            part = min(part, left)
            sums |= (sums << (cost * part)) & within
            left, part = left - part, 2 * part
    return (sums.bit_length() - 1) * unit


def fill(values: Float[np.ndarray, " N"], costs: Int[np.ndarray, " N"], room: int) -> Bool[np.ndarray, " N"]:
    """The items with the largest sum of values among all that cost exactly `room` together.

    Args:
      values: descending.
      room: a number that some items cost together.
    """
    if len(costs) * (room + 1) <= _TABLE:
        return _from_table(values, costs, room)
    taken = (costs == 0) & (values > 0)
    at = np.flatnonzero(costs)
    unit = int(np.gcd.reduce(costs))
    values, costs, room = values[at], costs[at] // unit, room // unit
    settled, unsure = _near(values, costs, room)
    taken[at[settled]] = True
    taken[at[unsure]] = _exactly(values[unsure], costs[unsure], room - int(costs[settled].sum()))
    return taken


def _near(
    values: Float[np.ndarray, " N"], costs: Int[np.ndarray, " N"], room: int
) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Items that are in the best filling, and items that may or may not be in it.

    Of the items of one cost, a best filling takes those with the highest values. Compare it with the filling by value
    per cost. No group of items that it adds costs the same as a group that it removes: the two could be swapped back
    without loss. So for every cost h: of the items that cost up to h, fewer than 2 h differ until all further
    differences are on one side, and those cost together at most h, the dearest item, and all items above h. The h with
    the smallest bound is used.
    """
    by_density = np.argsort(-values / costs, kind="stable")
    first = by_density[np.cumsum(costs[by_density]) <= room]  # up to the one that does not fit, since costs are above 0
    each, kind, counts = np.unique(costs, return_inverse=True, return_counts=True)
    rank = np.empty(len(costs), np.int64)  # among those of the same cost
    rank[np.argsort(kind, kind="stable")] = np.arange(len(costs)) - np.repeat(np.cumsum(counts) - counts, counts)
    past = rank - np.bincount(kind[first], minlength=len(counts))[kind]
    above = costs.sum() - np.cumsum(each * counts)
    differ = (2 * each + (each + each[-1] + above) // each[:, None]).min(1)
    reach = np.minimum(differ, 2 * each[-1])[kind]
    return past < -reach, (past >= -reach) & (past < reach)


def _exactly(values: Float[np.ndarray, " N"], costs: Int[np.ndarray, " N"], room: int) -> Bool[np.ndarray, " N"]:
    """`fill` by dynamic programming. A table that is too large is halved (Hirschberg 1975): what each half costs in
    the best filling is computed first."""
    if len(costs) < 2 or len(costs) * (room + 1) <= _TABLE:
        return _from_table(values, costs, room)
    half = len(costs) // 2
    parts = (values[:half], costs[:half]), (values[half:], costs[half:])
    left, right = (_best_sums(*part, room) for part in parts)
    split = int(np.argmax(left + right[::-1]))
    return np.concatenate([_exactly(*parts[0], split), _exactly(*parts[1], room - split)])


def _from_table(values: Float[np.ndarray, " N"], costs: Int[np.ndarray, " N"], room: int) -> Bool[np.ndarray, " N"]:
    took = np.zeros((len(costs), room + 1), bool)
    _best_sums(values, costs, room, took)
    taken, left = np.zeros(len(costs), bool), room
    for n in range(len(costs) - 1, -1, -1):
        if took[n, left]:
            taken[n] = True
            left -= int(costs[n])
    return taken


def _best_sums(
    values: Float[np.ndarray, " N"],
    costs: Int[np.ndarray, " N"],
    room: int,
    took: Bool[np.ndarray, "N S"] | None = None,
) -> Float[np.ndarray, " S"]:
    """The largest sum of values of items that cost exactly s, for s from 0 to `room`; -inf where no items do. Marks in
    `took` the last of these items."""
    best, top = np.full(room + 1, -np.inf), 0
    best[0] = 0.0
    for n, (value, cost) in enumerate(zip(values.tolist(), costs.tolist(), strict=True)):
        top = min(room, top + cost)
        if cost > room:
            continue
        with_it = best[: top + 1 - cost] + value
        if took is not None:
            took[n, cost : top + 1] = with_it > best[cost : top + 1]
        np.maximum(best[cost : top + 1], with_it, out=best[cost : top + 1])
    return best


def apportion(
    total: int, weights: Int[np.ndarray, " U"], least: Int[np.ndarray, " U"] | None = None
) -> Int[np.ndarray, " U"]:
    """Parts of a total in proportion to weights, by largest remainders; none below `least` or above its weight.

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
    by_remainder = np.argsort(whole - share, kind="stable")
    room = by_remainder[whole[by_remainder] < weights[by_remainder]]
    whole[room[: max(0, total - int(whole.sum()))]] += 1
    return whole
