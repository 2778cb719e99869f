"""SnapKV: what the end of the prompt looks at (Li et al. 2024)."""

from __future__ import annotations

from jaxcompress.policies.cache_view import CacheView, Scope
from jaxcompress.policies.policy import policy
from jaxcompress.policies.pooled import Pool, neighbours
from jaxcompress.policies.protect import protected
from jaxcompress.policies.recent_queries import RecentQueries, Ring
from jaxcompress.state.shapes import SlotScores


@policy
class SnapKV(RecentQueries):
    """Keeps the last `window` tokens and, of the others, those to which their queries attend most.

        score[n] = pool over `kernel` neighbours of n of (mean over the last `window` queries q of p(q -> n))
        score[n] = +inf for the last `window` tokens

    p is the attention probability; neighbours are those of the prefix. The last queries are the same in every mode. At
    the end of a one-shot prompt this is the published method; while streaming, every step looks at its last `window`
    queries.

    The authors' code sums over queries and keeps a set per query head, which takes H / K times the memory
    (scope="query_head", pool="max" or "avg"). kvpress averages within the group, as here. pool="max" pools after
    averaging. Costs `window` float32 numbers per slot, and a sort per selection: combine with `every` for decoding.

    Raises:
      ValueError: a window below 1 or an even kernel.
    """

    label = "snapkv+{window}"

    window: int = 32
    kernel: int = 5
    pool: Pool = "avg"
    scope: Scope = "kv_head"

    def check(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 query, not {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of tokens, not {self.kernel}")

    def score(self, stats: Ring, held: CacheView) -> SlotScores:
        prefix = held.positions <= held.newest - self.window
        scores = stats.mean(-1)
        if self.kernel > 1:
            scores = neighbours(scores, held, prefix, self.kernel, self.pool)
        return protected(scores, held, recent=self.window)
