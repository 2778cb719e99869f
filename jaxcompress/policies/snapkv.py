"""SnapKV: what the end of the prompt looks at (Li et al. 2024)."""

from __future__ import annotations

from functools import cache

from jaxcompress.policies.policy import Candidates, Observation, Policy, Scope, protect_newest
from jaxcompress.policies.pooled import Pool, neighbours
from jaxcompress.policies.recent_queries import Ring, empty_ring, record
from jaxcompress.shapes import SlotScores


@cache
def snapkv(window: int = 32, kernel: int = 5, pool: Pool = "avg", scope: Scope = "kv_head") -> Policy:
    """Keeps the last `window` tokens and, of the others, those to which their queries attend most.

    score[n] = mean, over the last `window` queries, of the probability that they gave token n, pooled over `kernel`
    neighbours of the prefix; +inf for the window. "The last queries" are exactly that in every mode: at the end of a
    one-shot prompt this is the published method, while streaming it looks at the last `window` queries at every step.

    The authors' code sums over queries and keeps a set per query head, which costs as many times more memory as there
    are query heads per kv head (scope="query_head", pool="max" or "avg"); kvpress averages within the group, as here.
    With pool="max" this pools after averaging. Costs `window` float32 numbers per slot, and a sort per selection:
    combine with `every` for decoding.

    Raises:
      ValueError: a window below 1 or an even kernel.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 query, not {window}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be an odd number of tokens, not {kernel}")

    def init(incoming: Candidates) -> Ring:
        return empty_ring(incoming, window)

    def observe(ring: Ring, seen: Observation) -> Ring:
        return record(ring, seen, scope)

    def score(ring: Ring, held: Candidates) -> SlotScores:
        prefix = held.positions <= held.newest - window
        scores = ring.mean(-1)
        if kernel > 1:
            scores = neighbours(scores, held, prefix, kernel, pool)
        return protect_newest(scores, held, window)

    name = f"snapkv+{window}" + f"-{scope}" * (scope != "kv_head")
    return Policy(name, score, init, observe, scope=scope, needs=window + 1)
