"""The policy that every other has to beat."""

from __future__ import annotations

from jaxcompress.policies.cache_view import CacheView, Scope
from jaxcompress.policies.draws import per_token
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.shapes import SlotScores


@policy
class Random(Policy):
    """Keeps a uniformly random subset of all tokens so far (reservoir sampling, Vitter 1985).

        score[n] = a uniform number, drawn from seed, layer, head and position

    It depends on nothing else: the same subset results however the sequence is cut into chunks, and rows of a batch do
    not depend on one another.
    """

    label = "random"

    seed: int = 0
    scope: Scope = "layer"

    def init(self, incoming: CacheView) -> Stats:
        return per_token(self.seed, incoming)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return stats
