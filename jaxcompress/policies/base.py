"""What a policy is.

A policy says how slots are scored. It is a value: a few pure functions of arrays, and the settings and weights that
they need (see `jaxcompress.values`). It passes through `jax.jit` like any argument, and knows no models. A new one is a
few lines:

    @policy
    class Quiet(Policy):
        scope = "kv_head"

        def score(self, stats, held):
            return -jnp.linalg.norm(held.keys, axis=-1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from jaxcompress.attention import Summary
from jaxcompress.pallas_kernels.contract import Rule
from jaxcompress.shapes import Positions, SlotPositions, SlotScores, Weights
from jaxcompress.state import Memory, Stats
from jaxcompress.values import Value, leaf, value

__all__ = [
    "Absorbed", "Around", "Candidates", "Entering", "Gone", "Incoming", "Observation", "Placement", "Policy", "Rotate",
    "Schedule", "Scope", "check_part", "leaf", "policy", "protect_newest", "wrapper",
]  # fmt: skip

policy = value
"""Makes a class of policies: `@policy class Quiet(Policy): ...`."""

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
      capacity: how many of a set stay when these are selected from; in a pool of all heads together.
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


class Schedule(NamedTuple):
    """When tokens go, and how many.

    Attributes:
      when: `after`: the incoming token's query sees capacity + 1 keys, then one goes. `before`: room is made first, and
        a query sees at most capacity keys. `once`: the first block (a one-shot prompt) is reduced to `keep` tokens, and
        nothing goes after that.
      frees: how many slots are freed at once when a full state has to take a token.
      keep: for `once`.
    """

    when: Literal["after", "before", "once"] = "after"
    frees: int = 1
    keep: int = 0


class Policy(Value):
    """How a bounded state decides what to forget.

    A policy overrides `score`, and what else it needs of what follows.

    Attributes:
      scope: who shares a set of tokens.
      evicts: False for a policy that never evicts, whose `score` is never asked.
      placement: where tokens stand for RoPE, as published; can be overridden wherever a policy is used.
      oneshot_only: the policy means something only where a whole prompt is selected from at once.
      schedule: when and how many tokens go.
      needs: the least capacity that the policy can work with.
      joins: whether incoming tokens are changed, or joined to the one before, as they enter (see `enter`).
      reduces: whether evicted tokens are merged or summarised (see `absorb`) instead of dropped.
      layers: a policy for each layer of the model; everything else is then asked of these. () for one for all.
    """

    scope: Scope = "layer"
    evicts: bool = True
    placement: Placement = "absolute"
    oneshot_only: bool = False
    schedule: Schedule = Schedule()
    needs: int = 1
    joins: bool = False
    reduces: bool = False
    layers: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for trait, known in (("scope", get_args(Scope)), ("placement", get_args(Placement))):
            given = getattr(self, trait)
            if given not in known:
                raise ValueError(f"{trait} of policy {self.name} must be one of {', '.join(known)}, not {given!r}")

    def __init_subclass__(cls, **options: Any) -> None:
        """A class that computes other numbers than its base does not follow its base's rule."""
        super().__init_subclass__(**options)
        if "rule" not in vars(cls) and not _COMPUTED.isdisjoint(vars(cls)):
            cls.rule = Policy.rule

    @property
    def name(self) -> str:
        """For tables and messages."""
        return type(self).__name__

    # What a policy computes. The engine calls `scores` and `observed`, which check what `score` and `observe` give.

    def scores(self, stats: Stats, held: Candidates) -> SlotScores:
        """`score`, without gradient.

        Raises:
          ValueError: it gives something else than [B, P, N] numbers.
        """
        given = self.score(stats, held)
        shape, dtype = getattr(given, "shape", None), getattr(given, "dtype", None)
        if shape != held.positions.shape or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"score of policy {self.name} must be floats [B, P, N] = {list(held.positions.shape)}, one for each of "
                f"N candidates of P sets, got {_described(given)}; its scope is {self.scope!r}"
            )
        return jax.lax.stop_gradient(given)

    def observed(self, stats: Stats, seen: Observation) -> Stats:
        """`observe`, without gradient.

        Raises:
          ValueError: it gives other numbers than it was given.
        """
        after = self.observe(stats, jax.lax.stop_gradient(seen))
        shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
        if jax.tree.structure(after) != jax.tree.structure(stats) or shapes(after) != shapes(stats):
            raise ValueError(
                f"observe of policy {self.name} must give numbers like those it was given, {_described(stats)}, got "
                f"{_described(after)}"
            )
        return after

    def score(self, stats: Stats, held: Candidates) -> SlotScores:
        """[B, P, N] float32; the lowest go. Asked only when something has to."""
        raise NotImplementedError(f"policy {self.name} has no score")

    def init(self, incoming: Candidates) -> Stats:
        """The numbers of tokens that come in, [B, P, T, ...] each."""
        return ()

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        """The numbers after a block of queries. A fold: one definition serves prompts, chunks and single steps."""
        return stats

    # Numbers per row.

    def memory(self, held: Candidates) -> Memory:
        """Fresh numbers per row, [B, ...] each; only shapes and layer of the candidates count."""
        return ()

    def remember(self, memory: Memory, incoming: Incoming) -> Memory:
        """The numbers per row after a block; called before the block attends."""
        return memory

    # What few policies do.

    def enter(self, memory: Memory, incoming: Incoming, layer: Int[Array, ""], around: Around) -> Entering:
        """What goes into slots instead of the tokens; called with all tokens of a read at once, if the policy `joins`.

        For scope `kv_head`.
        """
        raise NotImplementedError(f"policy {self.name} does not change what enters")

    def absorb(self, stats: Stats, held: Candidates, gone: Gone) -> Absorbed:
        """What is held after tokens have gone, if the policy `reduces`."""
        raise NotImplementedError(f"policy {self.name} drops what goes")

    def bias(self, stats: Stats) -> Float[Array, "B K N"] | None:
        """[B, K or 1, N] float32, added to the attention scores of slots; None for none."""
        return None

    def summary(self, memory: Memory, around: Around) -> Summary | None:
        """Stand-ins that queries see beside the slots; None for none."""
        return None

    def rule(self, capacity: int) -> Rule | None:
        """What a kernel may follow instead of `init`, `observe` and `score`, for a capacity per set; None: nothing."""
        return None

    # What follows from these.

    def at(self, layer: int) -> Policy:
        """The policy of one layer of the model."""
        return self.layers[layer] if self.layers else self

    @property
    def forgets(self) -> bool:
        """Whether a full state can take another token; else reading more than fits is an error."""
        if self.layers:
            return all(one.forgets for one in self.layers)
        return self.evicts and self.schedule.when != "once"

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
        return capacity + entries * (self.forgets and self.schedule.when == "after")


def _described(tree: Any) -> str:
    """Dtypes and shapes of what a policy gave."""
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype} {list(tree.shape)}"
    parts = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    arrays = bool(parts) and all(hasattr(x, "shape") for x in parts)
    return f"({', '.join(map(_described, parts))})" if arrays else repr(tree)


def check_part(one: Any, what: str) -> None:
    """Raises an error if a combinator of the name `what` cannot be made of something.

    Raises:
      TypeError: it is no policy.
      ValueError: it never evicts, or differs from layer to layer.
    """
    if not isinstance(one, Policy):
        raise TypeError(f"{what} goes around a policy, such as TOVA(), not around {one!r}")
    if one.layers:
        raise ValueError(f"{what} goes inside per_layer, not around it: {one.name}")
    if not one.evicts:
        raise ValueError(f"policy {one.name} never evicts: {what} can do nothing with it")


_COMPUTED = {"score", "init", "observe", "memory", "remember", "enter", "absorb", "bias", "summary"}


@policy
class wrapper(Policy):
    """A policy around another. It does what that one does, but for what a subclass overrides.

    Attributes:
      policy: the other.
    """

    policy: Policy = leaf()

    scope = property(lambda self: self.policy.scope)  # type: ignore[assignment]
    evicts = property(lambda self: self.policy.evicts)  # type: ignore[assignment]
    placement = property(lambda self: self.policy.placement)  # type: ignore[assignment]
    oneshot_only = property(lambda self: self.policy.oneshot_only)  # type: ignore[assignment]
    schedule = property(lambda self: self.policy.schedule)  # type: ignore[assignment]
    needs = property(lambda self: self.policy.needs)  # type: ignore[assignment]
    joins = property(lambda self: self.policy.joins)  # type: ignore[assignment]
    reduces = property(lambda self: self.policy.reduces)  # type: ignore[assignment]
    name = property(lambda self: self.policy.name)  # type: ignore[assignment]

    def check(self) -> None:
        """Raises ValueError if the policy inside never evicts or differs from layer to layer."""
        check_part(self.policy, type(self).__name__)

    def score(self, stats: Stats, held: Candidates) -> SlotScores:
        return self.policy.score(stats, held)

    def init(self, incoming: Candidates) -> Stats:
        return self.policy.init(incoming)

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return self.policy.observe(stats, seen)

    def memory(self, held: Candidates) -> Memory:
        return self.policy.memory(held)

    def remember(self, memory: Memory, incoming: Incoming) -> Memory:
        return self.policy.remember(memory, incoming)

    def enter(self, memory: Memory, incoming: Incoming, layer: Int[Array, ""], around: Around) -> Entering:
        return self.policy.enter(memory, incoming, layer, around)

    def absorb(self, stats: Stats, held: Candidates, gone: Gone) -> Absorbed:
        return self.policy.absorb(stats, held, gone)

    def bias(self, stats: Stats) -> Float[Array, "B K N"] | None:
        return self.policy.bias(stats)

    def summary(self, memory: Memory, around: Around) -> Summary | None:
        return self.policy.summary(memory, around)


def protect_newest(scores: SlotScores, held: Candidates, recent: Any) -> SlotScores:
    """Gives +inf to the `recent` newest positions; `recent` may be 0."""
    return jnp.where(held.positions > held.newest - recent, jnp.inf, scores)
