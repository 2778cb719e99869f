"""What a policy is.

A policy says how slots are scored: three pure functions and who shares a set, like an optax transformation. It knows
arrays, not models. A new one is a few lines:

    def knorm() -> Policy:
        return Policy("knorm", score=lambda stats, state: -jnp.linalg.norm(state.keys[0], axis=-1), scope="kv_head")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.shapes import Positions, SlotScores, Weights
from jaxcompress.state import KVState, Stats

Scope = Literal["layer", "kv_head", "query_head"]

Placement = Literal["absolute", "slot", "compact"]
"""Where tokens stand for RoPE.

  absolute  at their position in the sequence; keys are cached rotated (TOVA, H2O)
  slot      at their rank among the tokens held, so that no distance exceeds the capacity (StreamingLLM)
  compact   at re-indexed positions: the gap g between neighbours held becomes ln(ln(g)) if it is over 10 (Oren et al.
            2024, section 7.2)

Both re-indexings cache keys un-rotated and rotate them at every step.
"""


class Observation(NamedTuple):
    """What one attention call over a block of T queries showed.

    Attributes:
      weights: [B, K, G, T, N] float32, attention probabilities; zero in the rows of padded queries.
      queries: [B, T] int32, positions of the queries, -1 for padding.
    """

    weights: Weights
    queries: Positions

    def per_set(self, scope: Scope) -> Float[Array, "B P T N"]:
        """Probabilities averaged over the heads that share a set."""
        return self.weights.mean((1, 2))[:, None] if scope == "layer" else self.weights.mean(2)

    def last(self, per_query: Float[Array, "B P T N"]) -> tuple[Float[Array, "B P N"], Array]:
        """The row of the newest query, and whether there is one: [B, P, N] and [B, 1, 1] bool."""
        newest = self.queries.argmax(-1)
        row = jnp.take_along_axis(per_query, newest[:, None, None, None], axis=2)[:, :, 0]
        return row, (self.queries.max(-1) >= 0)[:, None, None]


class Policy(NamedTuple):
    """How a bounded state decides what to forget.

    Attributes:
      name: for tables and messages.
      score: (stats, state) -> [B, P, N] float32, higher is kept. `state` is one layer's (L = 1) and may hold, besides
        the slots, the tokens of an incoming block. Asked only when something has to go. None: nothing ever goes.
      init: (state of incoming tokens only, L = 1) -> their stats, [B, P, T] each.
      observe: (stats, observation) -> stats, a fold over blocks of queries: the same definition serves one-shot and
        chunked prefill and single decoding steps.
      scope: who shares a set of tokens: all heads of a layer, the query heads of one kv head, or none.
      evict: `after`: the incoming token's query sees capacity + 1 keys, then one goes. `before`: room is made first,
        and a query sees at most capacity keys.
      placement: where tokens stand for RoPE, as published; can be overridden wherever a policy is used.
      needs: the least capacity that the policy can work with.
    """

    name: str
    score: Callable[[Stats, KVState], SlotScores] | None
    init: Callable[[KVState], Stats] = lambda incoming: ()
    observe: Callable[[Stats, Observation], Stats] = lambda stats, observation: stats
    scope: Scope = "layer"
    evict: Literal["after", "before"] = "after"
    placement: Placement = "absolute"
    needs: int = 1

    def sets(self, heads: int) -> int:
        """P, for a state of so many heads."""
        return 1 if self.scope == "layer" else heads

    def slots(self, capacity: int) -> int:
        """S: how many slots are allocated. A token that comes before another goes needs one of its own."""
        return capacity + (self.score is not None and self.evict == "after")


def protect_newest(scores: SlotScores, state: KVState, recent: Any) -> SlotScores:
    """Gives +inf to the `recent` newest positions; `recent` may be 0."""
    newest = state.positions[0].max(-1, keepdims=True)
    return jnp.where(state.positions[0] > newest - recent, jnp.inf, scores)
