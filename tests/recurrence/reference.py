"""The recurrence restated from the definitions, in NumPy and float64: one sequence, no slots, no masks, no tricks.

A set of tokens is a dict from position to the policy's number for it. What is tested against this file shares no
code with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

THETA = 50.0  # base of RoPE: small, so that few positions already turn every channel far


@dataclass(frozen=True)
class Rule:
    """What a policy does, in words that the reference understands.

    kind: `tova` (mass from the last query), `h2o` (summed mass), `window` (position), `full`.
    recent: newest tokens that are protected; sinks: first tokens that are.
    """

    kind: str
    scope: str = "layer"
    evict: str = "after"
    recent: int = 0
    sinks: int = 0


@dataclass
class History:
    """out: [n, H, D]; held: for each piece and set the sorted positions; death: [sets, n]."""

    out: np.ndarray
    held: list[list[list[int]]] = field(default_factory=list)
    death: np.ndarray = field(default_factory=lambda: np.zeros(0))


def rope(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """x [..., D] at positions [...]: channel c turns together with c + D/2."""
    d = x.shape[-1]
    angle = np.asarray(at, np.float64)[..., None] / THETA ** (np.arange(0, d, 2) / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def places(positions: list[int], placement: str) -> dict[int, float]:
    """Where each of the (sorted) tokens stands."""
    if placement == "absolute":
        return {j: float(j) for j in positions}
    if placement == "slot":
        return {j: float(rank) for rank, j in enumerate(positions)}
    at, before, now = {}, None, 0.0
    for j in positions:
        gap = 0 if before is None else j - before
        now += np.log(np.log(gap)) if gap > 10 else gap
        at[j], before = now, j
    return at


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def safe(stats: dict[int, float], rule: Rule) -> dict[int, float]:
    """The tokens that are protected."""
    newest = max(stats, default=0)
    return {j: x for j, x in stats.items() if j < rule.sinks or j > newest - rule.recent}


def keep(stats: dict[int, float], rule: Rule, n: int) -> dict[int, float]:
    """The n tokens that stay: protected before others, higher scores before lower, older before younger."""
    protected = safe(stats, rule)

    def order(j: int) -> tuple[bool, float, int]:
        score = j if rule.kind == "window" else stats[j]
        return (j not in protected, 0.0 if j in protected else -score, j)

    return {j: stats[j] for j in sorted(sorted(stats, key=order)[:n])}


def recurrence(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, rule: Rule, capacity: int, pieces: list[list[int]],
    placement: str = "absolute", window: int | None = None, sinks: np.ndarray | None = None,
) -> History:  # fmt: skip
    """q [n, H, D], k and v [n, K, D] of one sequence, not rotated; `pieces` cut range(n) into what comes at once."""
    shares = lambda scores, h: softmax(scores) if sinks is None else softmax(np.append(scores, sinks[h]))[:-1]
    n, heads, d = q.shape
    group = heads // k.shape[1]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    members = {
        "layer": [list(range(heads))],
        "kv_head": [list(range(g, g + group)) for g in range(0, heads, group)],
        "query_head": [[h] for h in range(heads)],
    }[rule.scope]
    result = History(np.zeros((n, heads, d)), death=np.full((len(members), n), n))
    sets: list[dict[int, float]] = [{} for _ in members]
    sees = lambda i, j: j <= i and (window is None or j > i - window)
    for piece in pieces:
        for s, stats in enumerate(sets):
            if not piece:
                continue
            stats = {j: x for j, x in stats.items() if sees(piece[0], j)}
            if rule.evict == "before":
                kept = keep(stats, rule, max(capacity - len(piece), 0)) | safe(stats, rule)
                result.death[s, [j for j in stats if j not in kept]] = piece[0]
                stats = kept
            stats = stats | dict.fromkeys(piece, 0.0)
            at = places(list(stats), placement)
            for i in piece:
                visible = [j for j in stats if sees(i, j)]
                where = np.array([at[j] for j in visible])
                mass = np.zeros(len(visible))
                for h in members[s]:
                    keys = rope(k[visible, h // group], where)
                    weights = shares(keys @ rope(q[i, h], at[i]) / np.sqrt(d), h)
                    result.out[i, h] = weights @ v[visible, h // group]
                    mass += weights / len(members[s])
                if rule.kind == "tova":
                    stats = dict.fromkeys(stats, 0.0)
                for j, m in zip(visible, mass, strict=True):
                    stats[j] += m
            stats = {j: x for j, x in stats.items() if sees(piece[-1], j)}
            kept = stats if rule.kind == "full" else keep(stats, rule, capacity)
            result.death[s, [j for j in stats if j not in kept]] = piece[-1] + 1
            sets[s] = kept
        result.held.append([sorted(stats) for stats in sets])
    if window is not None:
        result.death = np.minimum(result.death, np.arange(n) + window)
    return result
