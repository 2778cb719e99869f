"""Policies made of policies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import lcm
from typing import Any

import jax.numpy as jnp

from jaxcompress.pallas_kernels.contract import Rule
from jaxcompress.policies.policy import Candidates, Incoming, Observation, Policy, protect_newest
from jaxcompress.select import rank
from jaxcompress.shapes import SlotScores
from jaxcompress.state import Memory, Stats


@cache
def protect(policy: Policy, first: int = 0, recent: int = 0) -> Policy:
    """Never evicts the `first` tokens of the sequence nor the `recent` newest ones.

    Raises:
      ValueError: negative numbers, or a policy that never evicts.
    """
    base = _scored(policy, "protect")
    if first < 0 or recent < 0:
        raise ValueError(f"first and recent must be 0 or more, not {first} and {recent}")

    def score(stats: Stats, held: Candidates) -> SlotScores:
        scores = jnp.where(held.positions < first, jnp.inf, base(stats, held))
        return protect_newest(scores, held, recent)

    name = policy.name + f"/first{first}" * (first > 0) + f"/recent{recent}" * (recent > 0)
    protected = policy._replace(name=name, score=score, needs=max(policy.needs, first + recent + policy.frees))

    def rule(capacity: int) -> Rule | None:
        base = policy.rule(capacity)
        return base and base._replace(first=max(base.first, first), recent=max(base.recent, recent))

    return protected.follow(rule)


@cache
def ranked(policy: Policy) -> Policy:
    """Replaces scores by their rank among the tokens held, from 0 to 1: a common scale for `mix`. Costs a sort.

    Protected tokens (+inf) stay protected.

    Raises:
      ValueError: a policy that never evicts.
    """
    base = _scored(policy, "ranked")

    def score(stats: Stats, held: Candidates) -> SlotScores:
        scores = base(stats, held)
        count = held.occupied.sum(-1, keepdims=True)
        share = 1 - rank(scores, held.positions) / jnp.maximum(count - 1, 1)
        return jnp.where(jnp.isposinf(scores), jnp.inf, share)

    return policy._replace(name=f"{policy.name}/ranked", score=score)


def mix(*parts: tuple[float, Policy]) -> Policy:
    """Weighted sum of scores: `mix((0.7, ranked(tova())), (0.3, ranked(window())))`.

    Scores are added as they are; `ranked` brings them to a common scale. What any part protects is protected.

    Raises:
      ValueError: fewer than two parts, weights that are not positive, or parts that do not fit together: another scope,
        eviction or placement, a part that never evicts, that merges, or that frees several slots at once (apply these
        to the mix).
    """
    return _mix(parts)


@cache
def _mix(parts: tuple[tuple[float, Policy], ...]) -> Policy:
    if len(parts) < 2 or any(not weight > 0 for weight, _ in parts):
        raise ValueError(f"a mix needs two parts or more, each with a positive weight, not {parts}")
    policies = [policy for _, policy in parts]
    bases = [_scored(policy, "mix") for policy in policies]
    _together(policies, "mix")

    def score(stats: Sequence[Stats], held: Candidates) -> SlotScores:
        scores = [
            weight * base(stats[i], held._replace(memory=held.memory[i]))
            for i, ((weight, _), base) in enumerate(zip(parts, bases, strict=True))
        ]
        protected = jnp.isposinf(jnp.stack(scores)).any(0)
        return jnp.where(protected, jnp.inf, sum(scores))

    name = "+".join(f"{weight:g}*{policy.name}" for weight, policy in parts)
    return _side_by_side(policies)._replace(name=f"({name})", score=score)


@cache
def then(first: Policy, later: Policy) -> Policy:
    """Selects from the first block (the prompt, read at once) with one policy and from then on with another.

    `then(snapkv(), window(4))` compresses the prompt by what its end looks at, and keeps decoding in the same slots.
    Both watch from the start.

    Raises:
      ValueError: policies that do not fit together (see `mix`).
    """
    policies = [first, later]
    bases = [_scored(policy, "then") for policy in policies]
    _together(policies, "then")

    def score(stats: Sequence[Stats], held: Candidates) -> SlotScores:
        one, other = (bases[i](stats[i], held._replace(memory=held.memory[i])) for i in (0, 1))
        return jnp.where((held.seen == 0)[:, None, None], one, other)

    return _side_by_side(policies)._replace(name=f"{first.name}>{later.name}", score=score)


@cache
def every(n: int, policy: Policy) -> Policy:
    """Frees n slots at once when the state is full, so that scores are computed only every n-th step.

    Between, between capacity - n + 1 and capacity tokens are held: the memory is the same, and a policy whose scores
    cost a pass over the keys or a sort decodes at nearly the cost of plain attention. This is also "on overflow, by a
    block".

    Raises:
      ValueError: n below 1, or a policy that evicts before a step, once, or never.
    """
    _scored(policy, "every")
    if n < 1:
        raise ValueError(f"every needs 1 step or more, not {n}")
    if policy.evict != "after":
        raise ValueError(
            f"every({n}, {policy.name}): only a policy that evicts after a step can wait, not {policy.evict}"
        )
    return policy._replace(name=f"{policy.name}/every{n}", frees=n, needs=policy.needs - policy.frees + n)


@cache
def once(policy: Policy, keep: int) -> Policy:
    """Reduces the prompt, read at once, to `keep` tokens per set; after that nothing is evicted.

    The rest of the capacity is room for what is read and written later. A token that finds no room is an error, as in a
    full cache. This is how SnapKV and most prefill methods were published.

    Raises:
      ValueError: keep below what the policy needs, or a policy that never evicts or evicts before a step.
    """
    _scored(policy, "once")
    if policy.evict != "after":
        raise ValueError(
            f"once({policy.name}): only a policy that evicts after a block can do so once, not {policy.evict}"
        )
    if keep < policy.needs:
        raise ValueError(f"policy {policy.name} needs at least {policy.needs} slots, not keep={keep}")
    return policy._replace(
        name=f"{policy.name}/once{keep}", evict="once", keep=keep, needs=keep + 1, frees=1, oneshot_only=True
    )


@cache
def sampled(n: int, policy: Policy) -> Policy:
    """Watches only every n-th query of each sequence: an approximation that saves the bookkeeping of the others.

    The n newest tokens are protected, since nothing may have looked at them yet.

    Raises:
      ValueError: n below 1, or a policy that never evicts.
    """
    _scored(policy, "sampled")
    if n < 1:
        raise ValueError(f"sampled needs every 1st query or fewer, not every {n}th")

    def observe(stats: Stats, seen: Observation) -> Stats:
        watched = (seen.queries >= 0) & (seen.queries % n == 0)
        queries = jnp.where(watched, seen.queries, -1)
        weights = jnp.where(watched[:, None, None, :, None], seen.weights, 0.0)
        every, present = lcm(n, seen.every or 1), seen.queries if seen.present is None else seen.present
        return policy.observe(stats, seen._replace(weights=weights, queries=queries, every=every, present=present))

    return protect(policy._replace(name=f"{policy.name}/sampled{n}", observe=observe), recent=n)


def per_layer(*policies: Policy) -> Policy:
    """A policy for each layer of the model, first to last: `per_layer(*[window(4)] * 2, *[tova()] * 30)`.

    Layers may differ in scope, eviction and placement; consecutive layers of one policy are stacked.

    Raises:
      ValueError: no policies, or nested ones.
    """
    if not policies or any(policy.layers for policy in policies):
        raise ValueError("per_layer needs one plain policy for each layer of the model")
    names = list(dict.fromkeys(policy.name for policy in policies))
    return policies[0]._replace(
        name="|".join(names), layers=tuple(policies), needs=max(policy.needs for policy in policies),
        oneshot_only=any(policy.oneshot_only for policy in policies),
    )  # fmt: skip


def _scored(policy: Policy, what: str) -> Any:
    if policy.layers:
        raise ValueError(f"{what} goes inside per_layer, not around it: {policy.name}")
    if policy.score is None:
        raise ValueError(f"policy {policy.name} never evicts: {what} can do nothing with it")
    return policy.score


def _together(policies: Sequence[Policy], what: str) -> None:
    a = policies[0]
    for b in policies[1:]:
        for trait in ("scope", "evict", "placement"):
            if getattr(a, trait) != getattr(b, trait):
                mine, other = getattr(a, trait), getattr(b, trait)
                raise ValueError(f"{what}: {a.name} has {trait} {mine}, {b.name} has {other}; they must agree")
    for policy in policies:
        if policy.absorb is not None or policy.frees > 1 or policy.evict == "once":
            raise ValueError(f"{what}: apply merging, every and once to the {what}, not to its part {policy.name}")


def _side_by_side(policies: Sequence[Policy]) -> Policy:
    """A policy that keeps the numbers of all."""
    observe = lambda stats, seen: tuple(p.observe(s, seen) for p, s in zip(policies, stats, strict=True))

    def init(incoming: Candidates) -> Stats:
        of = lambda i: incoming.memory[i] if incoming.memory else ()
        return tuple(policy.init(incoming._replace(memory=of(i))) for i, policy in enumerate(policies))

    def remember(memory: Memory, incoming: Incoming) -> Memory:
        return tuple(policy.remember(m, incoming) for policy, m in zip(policies, memory, strict=True))

    return policies[0]._replace(
        init=init,
        observe=observe,
        memory=lambda held: tuple(policy.memory(held) for policy in policies),
        remember=remember,
        needs=max(policy.needs for policy in policies),
        oneshot_only=any(policy.oneshot_only for policy in policies),
    )
