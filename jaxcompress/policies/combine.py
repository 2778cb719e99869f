"""Policies made of policies. Each is a value that holds what it is made of, and prints as it was made."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView, IncomingTokens, Observation, Scope
from jaxcompress.policies.policy import Policy, Schedule, check_part, leaf, policy, protect_newest, wrapper
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.placement import Placement
from jaxcompress.state.select import rank
from jaxcompress.state.shapes import SlotScores


@policy
class protect(wrapper):
    """Never evicts the `first` tokens of the sequence nor the `recent` newest ones.

    Raises:
      ValueError: negative numbers, or a policy that never evicts.
    """

    first: int = 0
    recent: int = 0

    def check(self) -> None:
        super().check()
        if self.first < 0 or self.recent < 0:
            raise ValueError(f"first and recent must be 0 or more, not {self.first} and {self.recent}")

    @property
    def name(self) -> str:  # type: ignore[override]
        more = f"/first{self.first}" * (self.first > 0) + f"/recent{self.recent}" * (self.recent > 0)
        return self.policy.name + more

    @property
    def needs(self) -> int:  # type: ignore[override]
        return max(self.policy.needs, self.first + self.recent + self.schedule.frees)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = jnp.where(held.positions < self.first, jnp.inf, self.policy.score(stats, held))
        return protect_newest(scores, held, self.recent)

    def rule(self, capacity: int) -> EvictionRule | None:
        base = self.policy.rule(capacity)
        return base and base._replace(first=max(base.first, self.first), recent=max(base.recent, self.recent))


@policy
class ranked(wrapper):
    """Replaces scores by their rank among the tokens held, from 0 to 1: a common scale for `mix`. Costs a sort.

    Protected tokens (+inf) stay protected.

    Raises:
      ValueError: a policy that never evicts.
    """

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.policy.name}/ranked"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = self.policy.score(stats, held)
        count = held.occupied.sum(-1, keepdims=True)
        share = 1 - rank(scores, held.positions) / jnp.maximum(count - 1, 1)
        return jnp.where(jnp.isposinf(scores), jnp.inf, share)


@policy
class every(wrapper):
    """Frees n slots at once when the state is full, so that scores are computed only every n-th step.

    Between, between capacity - n + 1 and capacity tokens are held: the memory is the same, and a policy whose scores
    cost a pass over the keys or a sort decodes at nearly the cost of plain attention. This is also "on overflow, by a
    block". Shares that a policy protects are of what stays.

    Raises:
      ValueError: n below 1, or a policy that evicts before a step, once, or never.
    """

    n: int

    def check(self) -> None:
        super().check()
        if self.n < 1:
            raise ValueError(f"every needs 1 step or more, not {self.n}")
        when = self.policy.schedule.when
        if when != "after":
            raise ValueError(
                f"every({self.policy.name}, {self.n}): only a policy that evicts after a step can wait, not {when}"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.policy.name}/every{self.n}"

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return Schedule("after", frees=self.n)

    @property
    def needs(self) -> int:  # type: ignore[override]
        return self.policy.needs - self.policy.schedule.frees + self.n


@policy
class once(wrapper):
    """Reduces the prompt, read at once, to `keep` tokens per set; after that nothing is evicted.

    The rest of the capacity is room for what is read and written later. A token that finds no room is an error, as in a
    full cache. This is how SnapKV and most prefill methods were published. Shares that a policy protects are of `keep`.

    Raises:
      ValueError: keep below what the policy needs, or a policy that never evicts or evicts before a step.
    """

    keep: int
    oneshot_only = True  # type: ignore[assignment]

    def check(self) -> None:
        super().check()
        when = self.policy.schedule.when
        if when != "after":
            raise ValueError(
                f"once({self.policy.name}): only a policy that evicts after a block can do so once, not {when}"
            )
        if self.keep < self.policy.needs:
            raise ValueError(
                f"policy {self.policy.name} needs at least {self.policy.needs} slots, not keep={self.keep}"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.policy.name}/once{self.keep}"

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return Schedule("once", keep=self.keep)

    @property
    def needs(self) -> int:  # type: ignore[override]
        return self.keep + 1


@policy
class sampled(wrapper):
    """Watches only every n-th query of each sequence: an approximation that saves the bookkeeping of the others.

    The n newest tokens are protected, since nothing may have looked at them yet.

    Raises:
      ValueError: n below 1, or a policy that never evicts.
    """

    n: int

    def check(self) -> None:
        super().check()
        if self.n < 1:
            raise ValueError(f"sampled needs every 1st query or fewer, not every {self.n}th")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.policy.name}/sampled{self.n}"

    @property
    def needs(self) -> int:  # type: ignore[override]
        return max(self.policy.needs, self.n + self.schedule.frees)

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        watched = (seen.queries >= 0) & (seen.queries % self.n == 0)
        queries = jnp.where(watched, seen.queries, -1)
        weights = jnp.where(watched[:, None, None, :, None], seen.weights, 0.0)
        every, present = lcm(self.n, seen.every or 1), seen.queries if seen.present is None else seen.present
        return self.policy.observe(stats, seen._replace(weights=weights, queries=queries, every=every, present=present))

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return protect_newest(self.policy.score(stats, held), held, self.n)


class _several(Policy):
    """Policies side by side: the numbers of all are kept."""

    @property
    def parts(self) -> tuple[Policy, ...]:
        raise NotImplementedError

    def check(self) -> None:
        what = type(self).__name__
        for one in self.parts:
            check_part(one, what)
        first = self.parts[0]
        for one in self.parts:
            traits = [("scope", first.scope, one.scope), ("placement", first.placement, one.placement)]
            for trait, mine, other in (*traits, ("evict", first.schedule.when, one.schedule.when)):
                if mine != other:
                    raise ValueError(
                        f"{what}: {first.name} has {trait} {mine}, {one.name} has {other}; they must agree"
                    )
            if one.reduces or one.schedule.frees > 1 or one.schedule.when == "once":
                raise ValueError(f"{what}: apply merging, every and once to the {what}, not to its part {one.name}")

    scope = property(lambda self: self.parts[0].scope)  # type: ignore[assignment]
    placement = property(lambda self: self.parts[0].placement)  # type: ignore[assignment]
    schedule = property(lambda self: self.parts[0].schedule)  # type: ignore[assignment]
    needs = property(lambda self: max(one.needs for one in self.parts))  # type: ignore[assignment]
    oneshot_only = property(lambda self: any(one.oneshot_only for one in self.parts))  # type: ignore[assignment]

    def each(self, stats: Sequence[Stats], held: CacheView) -> list[SlotScores]:
        """Of each part."""
        memories = held.memory or ((),) * len(self.parts)
        return [
            one.score(numbers, held._replace(memory=memory))
            for one, numbers, memory in zip(self.parts, stats, memories, strict=True)
        ]

    def init(self, incoming: CacheView) -> Stats:
        memories = incoming.memory or ((),) * len(self.parts)
        return tuple(
            one.init(incoming._replace(memory=memory)) for one, memory in zip(self.parts, memories, strict=True)
        )

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return tuple(one.observe(numbers, seen) for one, numbers in zip(self.parts, stats, strict=True))

    def memory(self, held: CacheView) -> Memory:
        return tuple(one.memory(held) for one in self.parts)

    def remember(self, memory: Memory, incoming: IncomingTokens) -> Memory:
        return tuple(one.remember(mine, incoming) for one, mine in zip(self.parts, memory, strict=True))


@policy
class mix(_several):
    """Weighted sum of scores: `mix((0.7, ranked(TOVA())), (0.3, ranked(Window())))`.

    Scores are added as they are; `ranked` brings them to a common scale. What any part protects is protected.

    Raises:
      ValueError: fewer than two parts, weights that are not positive, or parts that do not fit together: another scope,
        eviction or placement, a part that never evicts, that merges, or that frees several slots at once (apply these
        to the mix).
    """

    weights: tuple[float, ...]
    policies: tuple[Policy, ...] = leaf()

    def __init__(self, *parts: tuple[float, Policy]) -> None:
        pairs = [part for part in parts if isinstance(part, tuple) and len(part) == 2]
        if len(parts) < 2 or len(pairs) < len(parts) or any(not weight > 0 for weight, _ in pairs):
            raise ValueError(f"a mix needs two parts or more, each with a positive weight, not {parts}")
        object.__setattr__(self, "weights", tuple(float(weight) for weight, _ in parts))
        object.__setattr__(self, "policies", tuple(one for _, one in parts))
        self.__post_init__()

    def __repr__(self) -> str:
        return f"mix({', '.join(f'({w!r}, {one!r})' for w, one in zip(self.weights, self.policies, strict=True))})"

    parts = property(lambda self: self.policies)  # type: ignore[assignment]

    @property
    def name(self) -> str:
        parts = (f"{weight:g}*{one.name}" for weight, one in zip(self.weights, self.policies, strict=True))
        return f"({'+'.join(parts)})"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = [weight * mine for weight, mine in zip(self.weights, self.each(stats, held), strict=True)]
        protected = jnp.isposinf(jnp.stack(scores)).any(0)
        return jnp.where(protected, jnp.inf, sum(scores))


@policy
class then(_several):
    """Selects from the first block (the prompt, read at once) with one policy and from then on with another.

    `then(SnapKV(), Window(4))` compresses the prompt by what its end looks at, and keeps decoding in the same slots.
    Both watch from the start.

    Raises:
      ValueError: policies that do not fit together (see `mix`).
    """

    first: Policy = leaf()
    later: Policy = leaf()

    parts = property(lambda self: (self.first, self.later))  # type: ignore[assignment]

    @property
    def name(self) -> str:
        return f"{self.first.name}>{self.later.name}"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        one, other = self.each(stats, held)
        return jnp.where((held.seen == 0)[:, None, None], one, other)


@policy
class per_layer(Policy):
    """A policy for each layer of the model, first to last: `per_layer(*[Window(4)] * 2, *[TOVA()] * 30)`.

    Layers may differ in scope, eviction and placement; consecutive layers of one policy are stacked.

    Raises:
      ValueError: no policies, or nested ones.
    """

    layers: tuple[Policy, ...] = leaf()

    def __init__(self, *layers: Policy) -> None:
        object.__setattr__(self, "layers", layers)
        self.__post_init__()

    def check(self) -> None:
        if not self.layers or any(not isinstance(one, Policy) or one.layers for one in self.layers):
            raise ValueError("per_layer needs one plain policy for each layer of the model")

    def __repr__(self) -> str:
        return f"per_layer({', '.join(map(repr, self.layers))})"

    @property
    def name(self) -> str:
        return "|".join(dict.fromkeys(one.name for one in self.layers))

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """Of the first layer."""
        return self.layers[0].scope

    @property
    def placement(self) -> Placement:  # type: ignore[override]
        """Of the first layer."""
        return self.layers[0].placement

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        """Whether any layer does."""
        return any(one.evicts for one in self.layers)

    needs = property(lambda self: max(one.needs for one in self.layers))  # type: ignore[assignment]
    oneshot_only = property(lambda self: any(one.oneshot_only for one in self.layers))  # type: ignore[assignment]
