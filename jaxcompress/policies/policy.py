"""What a policy is.

A policy says how slots are scored: a few pure functions and who shares a set, like an optax transformation. It knows
arrays, not models. A new one is a few lines:

    def knorm() -> Policy:
        return Policy("knorm", score=lambda stats, held: -jnp.linalg.norm(held.keys, axis=-1), scope="kv_head")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from jaxcompress.attention import Summary
from jaxcompress.pallas_kernels.contract import Rule
from jaxcompress.shapes import Positions, SlotPositions, SlotScores, Weights
from jaxcompress.state import Memory, Stats

Scope = Literal["layer", "kv_head", "query_head", "pool"]
"""Who shares a set of tokens.

  layer       all heads of a layer hold the same tokens
  kv_head     every kv head holds its own
  query_head  every query head holds its own: the state is as many times larger as there are query heads per kv head
  pool        the kv heads of a layer share a pool of slots, so that how many each holds follows from the scores (AdaKV)
"""

Placement = Literal["absolute", "slot", "compact"]
"""Where tokens stand for RoPE.

  absolute  at their position in the sequence; keys are cached rotated (TOVA, H2O)
  slot      at their rank among the tokens held, so that no distance exceeds the capacity (StreamingLLM)
  compact   at re-indexed positions: the gap g between neighbours held becomes ln(ln(g)) if it is over 10 (Oren et al.
            2024, section 7.2)

Both re-indexings cache keys un-rotated and rotate them at every step.
"""

Rotate = Callable[[Float[Array, "... D"], Real[Array, "..."]], Float[Array, "... D"]]
"""(vectors, positions) -> vectors: the model's position embedding."""


class Around(NamedTuple):
    """What a policy may know of the layer in which it works.

    Attributes:
      rotate: the model's position embedding.
      placement: where tokens stand for it; keys are cached rotated if this is `absolute`.
      out: [K, G, D, E], the output projection of each query head; None where there is no model around.
      heads: H and K of the layer, or of the part of it that has these slots.
      which: the indices of the state's heads in the layer.
    """

    rotate: Rotate
    placement: Placement
    out: Float[Array, "K G D E"] | None
    heads: tuple[int, int]
    which: tuple[int, ...]

    @property
    def group(self) -> int:
        """G, query heads per kv head."""
        return self.heads[0] // self.heads[1]


class Candidates(NamedTuple):
    """The tokens among which a policy chooses in one layer: those in the slots and, in a block, those that come in.

    Attributes:
      keys, values: [B, K, N, D], as they are cached.
      positions: [B, P, N] int32, -1 for what is free or padding.
      owner: [B, 1, N] int32 in a pool, the kv head of each; else None.
      seen: [B] int32, tokens read before these came.
      layer: index of the layer in the model, a scalar.
      memory: the policy's numbers per row, [B, ...].
      capacity: how many may stay.
      around: what else may be known of the layer.
    """

    keys: Float[Array, "B K N D"]
    values: Float[Array, "B K N D"]
    positions: SlotPositions
    owner: Int[Array, "B 1 N"] | None
    seen: Int[Array, " B"]
    layer: Int[Array, ""]
    memory: Memory
    capacity: int
    around: Around

    @property
    def occupied(self) -> Array:
        """[B, P, N] bool."""
        return self.positions >= 0

    @property
    def per_set(self) -> int:
        """Capacity per head: in a pool the mean."""
        return self.capacity if self.owner is None else self.capacity // self.around.heads[1]

    @property
    def newest(self) -> Array:
        """[B, P, 1] int32, the newest position held."""
        return self.positions.max(-1, keepdims=True)


class Observation(NamedTuple):
    """What one attention call over a block of T queries showed.

    Attributes:
      weights: [B, K, G, T, N] float32, attention probabilities; zero in the rows of padded queries, and in a pool
        between queries and keys of different heads.
      queries: [B, T] int32, positions of the queries, -1 for padding.
      visible: [B, P, T] float32, how many candidates each query saw; in a pool the mean over its heads.
      group: query heads per kv head.
      every, present: where only queries at multiples of `every` are watched (see `sampled`): this number, and the
        positions of all queries; the others have no weights and are -1 in `queries`. None where all are watched.
    """

    weights: Weights
    queries: Positions
    visible: Float[Array, "B P T"]
    group: int
    every: int | None = None
    present: Positions | None = None

    def per_set(self, scope: Scope) -> Float[Array, "B P T N"]:
        """Probabilities averaged over the heads that share a set."""
        if scope == "layer":
            return self.weights.mean((1, 2))[:, None]
        if scope == "pool":  # only the queries of a key's own head have given it any
            return self.weights.sum(2) / self.group
        return self.weights.mean(2)

    def last(self, per_query: Float[Array, "B P T N"]) -> tuple[Float[Array, "B P N"], Array]:
        """The row of the newest query, and whether there is one: [B, P, N] and [B, 1, 1] bool."""
        newest = self.queries.argmax(-1)
        row = jnp.take_along_axis(per_query, newest[:, None, None, None], axis=2)[:, :, 0]
        return row, (self.queries.max(-1) >= 0)[:, None, None]


class Incoming(NamedTuple):
    """The tokens that come in, before RoPE.

    Attributes:
      q: [B, T, H, D].
      k, v: [B, T, K, D].
      positions: [B, T] int32, -1 for padding.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    positions: Positions


class Entering(NamedTuple):
    """What goes into slots when tokens come in.

    Attributes:
      k, v: [B, T, K, D], before RoPE, in place of the tokens' own.
      replaces: [B, T, K] bool, where a token takes the slot of the one before it, whose content it carries on.
      memory: as for the policy, after the tokens.
    """

    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    replaces: Array
    memory: Memory


class Gone(NamedTuple):
    """Tokens that were just evicted, before their slots are used again.

    Attributes:
      keys, values: [B, K, M, D], as they were cached.
      positions: [B, P, M] int32, the newest first, -1 for nothing.
      stats: their stats, [B, P, M, ...].
      owner: [B, 1, M] int32 in a pool, the kv head of each; else None.
    """

    keys: Float[Array, "B K M D"]
    values: Float[Array, "B K M D"]
    positions: Int[Array, "B P M"]
    stats: Stats
    owner: Int[Array, "B 1 M"] | None = None


class Absorbed(NamedTuple):
    """What is held after evicted tokens were merged into it.

    Attributes:
      values: [B, K, N, D].
      changed: [B, K, N] bool, where they differ from before; nothing else is written.
      stats, memory: as for the policy.
    """

    values: Float[Array, "B K N D"]
    changed: Array
    stats: Stats
    memory: Memory


class Ruled(NamedTuple):
    """That a kernel may follow a policy on its own.

    Attributes:
      rule: (capacity per set) -> the rule.
      init, observe, score: the policy's functions, which do the same. A policy with others does not follow the rule.
    """

    rule: Callable[[int], Rule | None]
    init: Callable[..., Stats]
    observe: Callable[..., Stats]
    score: Callable[..., SlotScores]


def _no_numbers(incoming: Candidates) -> Stats:
    return ()


def _as_before(stats: Stats, seen: Observation) -> Stats:
    return stats


class Policy(NamedTuple):
    """How a bounded state decides what to forget, and what becomes of it.

    Attributes:
      name: for tables and messages.
      score: (stats, candidates) -> [B, P, N] float32, higher is kept. Asked only when something has to go. None:
        nothing ever goes.
      init: (incoming tokens as candidates) -> their stats, [B, P, T, ...] each.
      observe: (stats, observation) -> stats, a fold over blocks of queries: the same definition serves one-shot and
        chunked prefill and single decoding steps.
      memory: (candidates) -> fresh numbers per row, [B, ...] each; only shapes and layer of the candidates count.
      remember: (memory, incoming) -> memory, called with every block before it attends.
      enter: (memory, incoming, layer, around) -> what goes into slots instead of the tokens, called with all tokens of
        a read at once; None: they enter as they are. For scope `kv_head`.
      scope: who shares a set of tokens.
      evict: `after`: the incoming token's query sees capacity + 1 keys, then one goes. `before`: room is made first,
        and a query sees at most capacity keys. `once`: the first block (a one-shot prompt) is reduced to `keep` tokens,
        and nothing goes after that.
      placement: where tokens stand for RoPE, as published; can be overridden wherever a policy is used.
      needs: the least capacity that the policy can work with.
      frees: how many slots are freed at once when a full state has to take a token.
      keep: for `once`.
      absorb: (stats, candidates that stay, what goes) -> what is held then; None: what goes is dropped.
      bias: (stats) -> [B, K or 1, N] float32, added to the attention scores of slots; None for none.
      summary: (memory, around) -> stand-ins that queries see beside the slots; None for none.
      oneshot_only: the policy means something only where a whole prompt is selected from at once.
      ruled: that a kernel may follow it on its own; see `follow`.
      layers: a policy for each layer of the model; everything else is then asked of these.
    """

    name: str
    score: Callable[[Stats, Candidates], SlotScores] | None
    init: Callable[[Candidates], Stats] = _no_numbers
    observe: Callable[[Stats, Observation], Stats] = _as_before
    memory: Callable[[Candidates], Memory] = lambda held: ()
    remember: Callable[[Memory, Incoming], Memory] = lambda memory, incoming: memory
    enter: Callable[[Memory, Incoming, Int[Array, ""], Around], Entering] | None = None
    scope: Scope = "layer"
    evict: Literal["after", "before", "once"] = "after"
    placement: Placement = "absolute"
    needs: int = 1
    frees: int = 1
    keep: int = 0
    absorb: Callable[[Stats, Candidates, Gone], Absorbed] | None = None
    bias: Callable[[Stats], Float[Array, "B K N"]] | None = None
    summary: Callable[[Memory, Around], Summary] | None = None
    oneshot_only: bool = False
    ruled: Ruled | None = None
    layers: tuple[Policy, ...] = ()

    def follow(self, rule: Callable[[int], Rule | None]) -> Policy:
        """The same policy, which kernels may follow by a rule: (capacity per set) -> rule.

        It holds for `init`, `observe` and `score` as they are: with others it is void.
        """
        assert self.score is not None
        return self._replace(ruled=Ruled(rule, self.init, self.observe, self.score))

    def rule(self, capacity: int) -> Rule | None:
        """What a kernel may follow; None where the policy does more or otherwise."""
        ruled, own = self.ruled, (self.init, self.observe, self.score)
        if ruled is None or own != (ruled.init, ruled.observe, ruled.score) or self.frees != 1 or self.evict != "after":
            return None
        more = self.enter or self.absorb or self.bias or self.summary
        if more or self.scope == "pool" or self.remember is not Policy._field_defaults["remember"]:
            return None
        return ruled.rule(capacity)

    def at(self, layer: int) -> Policy:
        """The policy of one layer of the model."""
        return self.layers[layer] if self.layers else self

    @property
    def forgets(self) -> bool:
        """Whether a full state can take another token; else reading more than fits is an error."""
        if self.layers:
            return all(policy.forgets for policy in self.layers)
        return self.score is not None and self.evict != "once"

    def heads(self, query_heads: int, kv_heads: int) -> int:
        """K of the state."""
        return {"query_head": query_heads, "pool": 1}.get(self.scope, kv_heads)

    def sets(self, heads: int) -> int:
        """P, for a state of so many heads."""
        return 1 if self.scope in ("layer", "pool") else heads

    def slots(self, capacity: int, entries: int = 1) -> int:
        """S: how many slots are allocated. Tokens that come before others go need slots of their own.

        Args:
          entries: how many slots one token takes in a set; in a pool one for each kv head.
        """
        return capacity + entries * (self.forgets and self.evict == "after")


def protect_newest(scores: SlotScores, held: Candidates, recent: Any) -> SlotScores:
    """Gives +inf to the `recent` newest positions; `recent` may be 0."""
    return jnp.where(held.positions > held.newest - recent, jnp.inf, scores)
