"""The policy that every other has to beat."""

from __future__ import annotations

from functools import cache

from jaxcompress.policies.draws import per_token
from jaxcompress.policies.policy import Candidates, Policy, Scope
from jaxcompress.state import Stats


@cache
def random(seed: int = 0, scope: Scope = "layer") -> Policy:
    """Keeps a uniformly random subset of all tokens so far (reservoir sampling, Vitter 1985).

    score[n] = a uniform number that depends on seed, layer, head and position only: the same subset results however
    the sequence is cut into chunks, and rows of a batch do not depend on one another.
    """

    def init(incoming: Candidates) -> Stats:
        return per_token(seed, incoming)

    return Policy("random", score=lambda stats, held: stats, init=init, scope=scope)
