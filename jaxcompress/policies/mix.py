"""Policies side by side: weighted sums of scores, or one policy after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxcompress.inputs.scalars import number
from jaxcompress.policies.cache_view import CacheView, IncomingTokens, Observation
from jaxcompress.policies.policy import Policy, leaf, policy
from jaxcompress.policies.shields import least_kept, union
from jaxcompress.policies.wrapper import check_part, check_shields, wrapper
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.select import rank
from jaxcompress.state.shapes import SlotScores


@policy
class ranked(wrapper):
    """Replaces scores by their rank among the tokens held, from 0 to 1: a common scale for `mix`. Costs a sort.

    Protected tokens (+inf) stay protected.

    Raises:
      ValueError: a policy that never evicts.
    """

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = self.policy.score(stats, held)
        count = held.occupied.sum(-1, keepdims=True)
        share = 1 - rank(scores, held.positions) / jnp.maximum(count - 1, 1)
        return jnp.where(jnp.isposinf(scores), jnp.inf, share)


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
            if one.reduction or one.gates or one.schedule.frees > 1 or one.schedule.when == "once":
                raise ValueError(
                    f"{what}: apply gates, merging, every and once to the {what}, not to its part {one.name}"
                )

    scope = property(lambda self: self.parts[0].scope)  # type: ignore[assignment]
    placement = property(lambda self: self.parts[0].placement)  # type: ignore[assignment]
    schedule = property(lambda self: self.parts[0].schedule)  # type: ignore[assignment]
    needs = property(lambda self: max(one.needs for one in self.parts))  # type: ignore[assignment]

    def shields(self, capacity: int) -> tuple[int, int]:
        return union(*(one.shields(capacity) for one in self.parts))

    @property
    def oneshot_only(self) -> bool:
        return any(one.oneshot_only for one in self.parts)

    @property
    def watches(self) -> int | None:
        each = [one.watches for one in self.parts]
        return None if None in each else max(n for n in each if n is not None)

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

    Scores are added as they are; `ranked` brings them to a common scale. A token that any part protects is protected.

    Raises:
      ValueError: fewer than two parts, weights that are not positive numbers, or parts that do not fit together:
        another scope, eviction or placement, a part that never evicts, that merges, or that frees several slots at once
        (apply these to the mix), parts that together protect everything.
    """

    weights: tuple[float, ...]
    policies: tuple[Policy, ...] = leaf()

    def __init__(self, *parts: tuple[float, Policy]) -> None:
        pairs = [part for part in parts if isinstance(part, tuple) and len(part) == 2]
        if len(parts) < 2 or len(pairs) < len(parts) or not all(_is_weight(weight) for weight, _ in pairs):
            raise ValueError(f"a mix needs two parts or more, each with a positive weight, not {parts}")
        object.__setattr__(self, "weights", tuple(float(weight) for weight, _ in parts))
        object.__setattr__(self, "policies", tuple(one for _, one in parts))
        self.__post_init__()

    def __repr__(self) -> str:
        return f"mix({', '.join(f'({w!r}, {one!r})' for w, one in zip(self.weights, self.policies, strict=True))})"

    parts = property(lambda self: self.policies)  # type: ignore[assignment]

    def check(self) -> None:
        super().check()
        check_shields(self)

    @property
    def needs(self) -> int:  # type: ignore[override]
        return max(super().needs, least_kept(self.shields))  # parts free one slot at a time

    @property
    def name(self) -> str:
        parts = (f"{weight}*{one.name}" for weight, one in zip(self.weights, self.policies, strict=True))
        return f"mix({','.join(parts)})"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = [weight * mine for weight, mine in zip(self.weights, self.each(stats, held), strict=True)]
        protected = jnp.isposinf(jnp.stack(scores)).any(0)
        return jnp.where(protected, jnp.inf, sum(scores))


def _is_weight(given: Any) -> bool:
    try:
        return number(given, "a weight") > 0
    except ValueError:
        return False


@policy
class then(_several):
    """Selects from the prompt, read at once (mode `oneshot`), with one policy and from then on with another.

    `then(SnapKV(), Window(4, "kv_head"))` compresses the prompt by what its end looks at, then decodes in the same
    slots with a window. Both policies watch from the start. Token by token or in chunks there is no moment at which
    the first could select from the prompt, so that these modes are refused.

    Raises:
      ValueError: policies that do not fit together (see `mix`).
    """

    first: Policy = leaf()
    later: Policy = leaf()

    oneshot_only = True  # type: ignore[assignment]
    parts = property(lambda self: (self.first, self.later))  # type: ignore[assignment]

    @property
    def name(self) -> str:
        return f"then({self.first.name},{self.later.name})"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        one, other = self.each(stats, held)
        return jnp.where((held.seen == 0)[:, None, None], one, other)
