"""What a policy is.

A policy says how slots are scored. It is a value: a few pure functions of arrays, and the settings and weights that
they need (see `jaxcompress.state.values`). It passes through `jax.jit` like any argument, and knows no models. A new
one is a
few lines:

    @policy
    class Quiet(Policy):
        scope = "kv_head"

        def score(self, stats, held):
            return -jnp.linalg.norm(held.keys, axis=-1)
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.policies.cache_view import (
    Absorbed,
    CacheView,
    Entering,
    Evicted,
    IncomingTokens,
    LayerContext,
    Observation,
    Scope,
)
from jaxcompress.policies.summary import Summary
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import SlotScores
from jaxcompress.state.values import Value, leaf, value

__all__ = ["Policy", "Schedule", "check_part", "leaf", "policy", "protect_newest", "wrapper"]

policy = value
"""Makes a class of policies: `@policy class Quiet(Policy): ...`."""


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

    def scores(self, stats: Stats, held: CacheView) -> SlotScores:
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

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        """[B, P, N] float32; the lowest go. Asked only when something has to."""
        raise NotImplementedError(f"policy {self.name} has no score")

    def init(self, incoming: CacheView) -> Stats:
        """The numbers of tokens that come in, [B, P, T, ...] each."""
        return ()

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        """The numbers after a block of queries. A fold: one definition serves prompts, chunks and single steps."""
        return stats

    # Numbers per row.

    def memory(self, held: CacheView) -> Memory:
        """Fresh numbers per row, [B, ...] each; only shapes and layer of the candidates count."""
        return ()

    def remember(self, memory: Memory, incoming: IncomingTokens) -> Memory:
        """The numbers per row after a block; called before the block attends."""
        return memory

    # What few policies do.

    def enter(self, memory: Memory, incoming: IncomingTokens, layer: Int[Array, ""], context: LayerContext) -> Entering:
        """What goes into slots instead of the tokens; called with all tokens of a read at once, if the policy `joins`.

        For scope `kv_head`.
        """
        raise NotImplementedError(f"policy {self.name} does not change what enters")

    def absorb(self, stats: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        """What is held after tokens have gone, if the policy `reduces`."""
        raise NotImplementedError(f"policy {self.name} drops what goes")

    def bias(self, stats: Stats) -> Float[Array, "B K N"] | None:
        """[B, K or 1, N] float32, added to the attention scores of slots; None for none."""
        return None

    def summary(self, memory: Memory, context: LayerContext) -> Summary | None:
        """Stand-ins that queries see beside the slots; None for none."""
        return None

    def rule(self, capacity: int) -> EvictionRule | None:
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

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return self.policy.score(stats, held)

    def init(self, incoming: CacheView) -> Stats:
        return self.policy.init(incoming)

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return self.policy.observe(stats, seen)

    def memory(self, held: CacheView) -> Memory:
        return self.policy.memory(held)

    def remember(self, memory: Memory, incoming: IncomingTokens) -> Memory:
        return self.policy.remember(memory, incoming)

    def enter(self, memory: Memory, incoming: IncomingTokens, layer: Int[Array, ""], context: LayerContext) -> Entering:
        return self.policy.enter(memory, incoming, layer, context)

    def absorb(self, stats: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        return self.policy.absorb(stats, held, gone)

    def bias(self, stats: Stats) -> Float[Array, "B K N"] | None:
        return self.policy.bias(stats)

    def summary(self, memory: Memory, context: LayerContext) -> Summary | None:
        return self.policy.summary(memory, context)


def protect_newest(scores: SlotScores, held: CacheView, recent: Any) -> SlotScores:
    """Gives +inf to the `recent` newest positions; `recent` may be 0."""
    return jnp.where(held.positions > held.newest - recent, jnp.inf, scores)
