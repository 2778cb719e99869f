"""Scores while decoding, against their definitions in NumPy and float64: token by token, from a state that is full.

What each query gave to the tokens held is written down when it attends, and never computed anew: what a policy
remembers must equal what its definition finds in this record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence.harness import RULES, B, C, Case, D, H, held, name_of, ragged, run
from recurrence.reference import rope, softmax

from jaxcompress import policies

from .reference import cur, keydiff, knorm, lagkv, pooled, protect, rkv

RULES["rkv-any"] = policies.RKV(0.5, window=2, kernel=3, threshold=-2.0), None  # every key has a look-alike
RULES["sampled-snapkv"] = policies.sampled(policies.SnapKV(4, 3), 3), None


class Seen:
    """What one set may know when something has to go.

    mass [i + 1, n]: what each query so far gave to the n tokens held, the oldest first; saw [i + 1]: how many it saw;
    at [n]: their positions; q, k, v [n, 1, D]: of these tokens, rotated, of the first head.
    """

    def __init__(self, mass: np.ndarray, saw: np.ndarray, at: np.ndarray, *qkv: np.ndarray) -> None:
        self.mass, self.saw, self.at = mass, saw, at
        self.q, self.k, self.v = (x[:, None] for x in qkv)
        self.total, self.last = mass.sum(0), mass[-1]

    def before(self, recent: int, score: np.ndarray, pool: Literal["avg", "max"] = "avg") -> np.ndarray:
        """Pooled over 3 of the tokens before the recent ones, which are safe."""
        prefix = self.at <= self.at[-1] - recent
        safe = np.full(len(prefix), np.inf)
        safe[prefix] = pooled(score[prefix], 3, pool)
        return safe

    def even(self, history: int) -> np.ndarray:
        """How many of the last queries gave at least an even share."""
        return (self.mass * self.saw[:, None] >= 1)[-history:].sum(0).astype(float)

    def newest(self, n: int, score: np.ndarray) -> np.ndarray:
        return np.where(self.at > self.at[-1] - n, np.inf, score)

    def chunks(self, length: int) -> list[np.ndarray]:
        return [self.at // length == chunk for chunk in np.unique(self.at // length)]


def rank(score: np.ndarray) -> np.ndarray:
    """0 for the worst to 1 for the best."""
    return score.argsort(kind="stable").argsort() / (len(score) - 1)


def sampled_snapkv(x: Seen) -> np.ndarray:
    """The watched ones of the 4 queries up to the newest watched one."""
    watched = np.arange(len(x.mass))[::3]
    return x.before(4, x.mass[watched[watched > watched[-1] - 4]].sum(0) / 4)


def within(x: Seen) -> np.ndarray:
    score = knorm(x.k)[0]
    for chunk in x.chunks(4):
        score[chunk] = -(-score[chunk]).argsort(kind="stable").argsort()
    return score


SCORES: dict[str, Callable[[Seen], np.ndarray]] = {
    "observed_attention": lambda x: x.total / (x.at[-1] - x.at + 1),
    "scissorhands": lambda x: x.newest(1, x.even(5)),
    "scissorhands-layer": lambda x: x.even(40),
    "snapkv": lambda x: x.before(2, x.mass[-2:].mean(0)),
    "snapkv-max": lambda x: x.before(3, x.mass[-3:].mean(0), "max"),
    "rkv-any": lambda x: rkv(x.q, x.k, 2, 3, 0.5, -2.0)[0],
    "knorm": lambda x: knorm(x.k)[0],
    "keydiff": lambda x: keydiff(x.k)[0],
    "lagkv": lambda x: lagkv(x.k, x.v, 1, 2)[0],
    "lagkv-cross": lambda x: lagkv(x.k, x.v, 1, 2, cross=True)[0],
    "cur": lambda x: cur(x.k, x.v, 1, 4)[0],
    "protect": lambda x: np.where(x.at < 1, np.inf, x.newest(2, x.last)),
    "pooled": lambda x: x.before(0, x.total),
    "chunks": lambda x: sum(np.where(chunk, x.last[chunk].mean(), 0) for chunk in x.chunks(3)) + np.zeros(len(x.at)),
    "within": within,
    "mix": lambda x: 0.7 * rank(x.last) + 0.3 * rank(x.at),
    "then": lambda x: protect(x.at.astype(float), first=1),
    "sampled": lambda x: x.newest(3, x.mass[::3].sum(0)),
    "sampled-snapkv": sampled_snapkv,
    "every": lambda x: keydiff(x.k)[0],
    "every-tova": lambda x: x.last,
}
CASES = [
    *(Case(name) for name in SCORES if name != "rkv-any"),
    Case("rkv-any", kv_heads=4),  # the definition takes a group's maximum elsewhere
    *(Case(name, window=8) for name in ("snapkv", "scissorhands")),  # sliding-window layers
]


def decode(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Attention output [n, H, D] of one sequence, and the positions that each set holds in the end."""
    policy, n, group = RULES[case.policy][0], len(q), H // case.kv_heads
    at = np.arange(n)[:, None]
    q, k, v = rope(q, at), rope(np.repeat(k, group, 1), at), np.repeat(v.astype(np.float64), group, 1)
    sets = np.split(np.arange(H), {"layer": 1, "kv_head": case.kv_heads, "query_head": H}[policy.scope])
    out, kept = np.zeros((n, H, D)), []
    for heads in sets:
        mass, saw, mine = np.zeros((n, n)), np.zeros(n), np.zeros(0, int)
        for i in range(n):
            mine = np.append(mine[mine > i - (case.window or n)], i)
            saw[i] = len(mine)
            for h in heads:
                weights = softmax(k[mine, h] @ q[i, h] / np.sqrt(D))
                out[i, h] = weights @ v[mine, h]
                mass[i, mine] += weights / len(heads)
            if len(mine) > C:
                one = heads[0]
                score = SCORES[case.policy](
                    Seen(mass[: i + 1, mine], saw[: i + 1], mine, q[mine, one], k[mine, one], v[mine, one])
                )
                best = np.argsort(-score, kind="stable")[: C + 1 - policy.schedule.frees]  # of equals the older stay
                mine = np.sort(mine[best])
        kept.append(mine.tolist())
    return out, kept


@pytest.mark.parametrize("case", CASES, ids=name_of)
@settings(max_examples=4)
@given(draws=st.data())
def test_equals_the_definition(case: Case, draws: st.DataObject) -> None:
    rows = draws.draw(ragged(case.kv_heads))
    trace = run(case, rows)
    for b in range(B):
        out, kept = decode(case, *rows.row(b))
        np.testing.assert_allclose(trace.out[b, rows.valid[b]], out, rtol=1e-4, atol=1e-4)
        assert [held(p) for p in trace.last.positions[0, b]] == kept
