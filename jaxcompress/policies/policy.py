"""What a policy is.

A policy scores tokens; the lowest scores go. It is a value: pure functions of arrays, with the settings and weights
that they need (see `jaxcompress.state.values`). It passes through `jax.jit` like any argument, and knows no models. A
new one is a few lines:

    @policy
    class Quiet(Policy):
        scope = "kv_head"

        def score(self, stats, held):
            return jnp.linalg.norm(held.values, axis=-1)
"""

from __future__ import annotations

from typing import Any, get_args

from jaxcompress.policies.cache_view import CacheView, IncomingTokens, Observation, Scope
from jaxcompress.policies.entry import Gates
from jaxcompress.policies.labels import Named, choices
from jaxcompress.policies.reduction import Reduction
from jaxcompress.policies.schedule import Schedule
from jaxcompress.policies.shields import least_kept
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import SlotScores
from jaxcompress.state.values import leaf, value

__all__ = ["Policy", "Schedule", "leaf", "policy"]

policy = value
"""Makes a class of policies: `@policy class Quiet(Policy): ...`."""


class Policy(Named):
    """How a bounded state decides what to forget.

    A policy overrides `score`. Most need little more than `scope`, `init` and `observe`.

    Attributes:
      name: for tables, messages and `get_policy`; follows from `label` and the settings.
      scope: who shares a set of tokens.
      schedule: when tokens go, and how many.
      placement: where tokens stand for RoPE, as published; can be overridden wherever a policy is used.
      needs: the least capacity that the policy can work with; follows from `shields`.
      gates: what joins incoming tokens to those before them (see `gated`); None: each token takes its own slot.
      reduction: what becomes of evicted tokens (see `with_reduce`); None: they are dropped.
      layers: a policy for each layer of the model (see `per_layer`); everything else is then asked of these. () for one
        for all.
    """

    scope: Scope = "layer"
    schedule: Schedule = Schedule()
    placement: Placement = "absolute"
    needs: int = property(lambda self: least_kept(self.shields) + self.schedule.frees - 1)  # type: ignore[assignment]
    gates: Gates | None = None
    reduction: Reduction | None = None
    layers: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"scope": get_args(Scope), "placement": get_args(Placement)} | choices(type(self))
        for name, words in known.items():
            given = getattr(self, name)
            if given not in words:
                raise ValueError(
                    f"{name} of policy {self.name} must be one of {', '.join(map(str, words))}, not {given!r}"
                )

    def __init_subclass__(cls, **options: Any) -> None:
        """A class that computes other numbers than its base does not follow its base's rule, nor watch as it does."""
        super().__init_subclass__(**options)
        if "observe" in vars(cls) and "watches" not in vars(cls):
            cls.watches = None  # type: ignore[assignment]
        if "rule" not in vars(cls) and not _COMPUTED.isdisjoint(vars(cls)):
            cls.rule = Policy.rule

    # What a policy computes.

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        """[B, P, N] float32, higher stays. Asked only when something has to go; gets no gradient."""
        raise NotImplementedError(f"policy {self.name} has no score")

    def init(self, incoming: CacheView) -> Stats:
        """The numbers of incoming tokens, [B, P, T, ...] each."""
        return ()

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        """The numbers after a block of queries. A fold: one definition serves prompts, chunks and single steps."""
        return stats

    @property
    def watches(self) -> int | None:
        """The number of newest queries that `observe` needs to see; None: all of them.

        A block of more queries shows it only these, which costs less. A class that overrides `observe` watches all
        queries unless it says otherwise.
        """
        return 0

    def memory(self, held: CacheView) -> Memory:
        """Fresh numbers per row, [B, ...] each; only shapes and layer of the candidates count."""
        return ()

    def remember(self, memory: Memory, incoming: IncomingTokens) -> Memory:
        """The numbers per row after a block; called before the block attends."""
        return memory

    def shields(self, capacity: int) -> tuple[int, int]:
        """How many of the first tokens of a sequence and of the newest never go, of so many of a set that stay.

        A policy whose `score` protects tokens says so here: they come before whatever else has a score of +inf, and
        states too small for them are refused.
        """
        return 0, 0

    def rule(self, capacity: int) -> EvictionRule | None:
        """What a kernel may follow instead of `init`, `observe` and `score`, for a capacity per set; None: nothing."""
        return None

    # What follows from these.

    def at(self, layer: int) -> Policy:
        """The policy of one layer of the model."""
        return self.layers[layer] if self.layers else self

    @property
    def evicts(self) -> bool:
        """Whether anything ever goes."""
        return any(one.schedule.when != "never" for one in self.layers or (self,))

    @property
    def forgets(self) -> bool:
        """Whether a full state can take another token; else reading more than fits is an error."""
        return all(one.schedule.when in ("after", "before") for one in self.layers or (self,))

    @property
    def oneshot_only(self) -> bool:
        """Whether it means something only where a whole prompt is selected from at once."""
        return any(one.oneshot_only for one in self.layers) if self.layers else self.schedule.keep > 0

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


_COMPUTED = {"score", "init", "observe", "memory", "remember"}
