"""Policies whose evicted tokens are reduced instead of dropped, and what the recurrence asks of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import (
    Absorbed,
    CacheView,
    Evicted,
    IncomingTokens,
    LayerContext,
    Observation,
)
from jaxcompress.policies.per_layer import per_layer
from jaxcompress.policies.policy import Policy, leaf, policy
from jaxcompress.policies.reduction import Reduction
from jaxcompress.policies.reductions.per_head import PerHead
from jaxcompress.policies.summary import Summary
from jaxcompress.policies.wrapper import wrapper
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.shapes import SlotScores


def with_reduce(policy: Policy, reduction: Reduction) -> Policy:
    """The policy, with evicted tokens reduced instead of dropped. The same tokens are kept as without.

    The policy's stats become (its own, the reduction's), and so does its memory. In a `per_layer`, each policy that
    evicts gets the reduction. Combinators that change scores may go inside or outside: reducing `every(p, 16)` is the
    same as `every` of a reduced p.

    Raises:
      ValueError: nothing is ever evicted, evicted before the new token is seen, or reduced already; or a summary where
        tokens do not stand at absolute positions.
    """
    if not isinstance(reduction, Reduction):
        raise TypeError(f"with_reduce needs a reduction such as merge_nearest(), not {reduction!r}")
    if policy.layers and any(one.evicts for one in policy.layers):
        return per_layer(*(reduced(one, reduction) if one.evicts else one for one in policy.layers))
    return reduced(policy, reduction)


@policy
class reduced(wrapper):
    """What `with_reduce` makes of a policy that is the same in all layers."""

    reduction: Reduction = leaf()

    def check(self) -> None:
        one = self.policy
        if not one.evicts:
            raise ValueError(f"policy {one.name} never forgets, so there is nothing to reduce; give one that evicts")
        if one.schedule.when == "before":
            raise ValueError(f"policy {one.name} makes room before it sees a token; a reduction needs evict='after'")
        if one.reduction:
            raise ValueError(f"policy {one.name} reduces what it evicts already; give the policy without")
        _check_placement(one.name, one.placement, self.reduction)

    @property
    def name(self) -> str:
        return f"{self.policy.name}/{self.reduction.name}"

    def __repr__(self) -> str:
        return f"with_reduce({self.policy!r}, {self.reduction!r})"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return self.policy.score(stats[0], held._replace(memory=held.memory[0]))

    def init(self, incoming: CacheView) -> Stats:
        mine = PerHead(self).pack(self.reduction.init(PerHead(self).positions(incoming)))
        return self.policy.init(incoming._replace(memory=incoming.memory[0])), mine

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        mass = seen.total("pool" if self.scope == "pool" else "kv_head")
        mine = PerHead(self).pack(self.reduction.observe(PerHead(self).numbers(stats[1]), mass))
        return self.policy.observe(stats[0], seen), mine

    def memory(self, held: CacheView) -> Memory:
        rows, width = held.keys.shape[0], held.keys.shape[-1]
        return self.policy.memory(held), self.reduction.memory(rows, PerHead(self).count(held), width)

    def remember(self, memory: Memory, incoming: IncomingTokens) -> Memory:
        return self.policy.remember(memory[0], incoming), memory[1]


def absorb(policy: Policy, stats: Stats, held: CacheView, gone: Evicted) -> Absorbed:
    """What is held after tokens have gone, for a policy that has a reduction: `reduced`, or what goes around one.

    Args:
      stats: the policy's, of the tokens held.
    """
    reduction, heads = policy.reduction, PerHead(policy)
    assert reduction is not None
    _check_placement(policy.name, held.context.placement, reduction)
    kept, lost = heads.split(held), heads.split_gone(gone, held.context)
    numbers = jax.tree.map(lambda x: jnp.broadcast_to(x, kept.positions.shape), heads.numbers(stats[1]))
    done = reduction.absorb(numbers, kept._replace(memory=held.memory[1]), lost)
    values, changed, numbers = heads.join(done, kept.positions)
    return Absorbed(values, changed, (stats[0], numbers), (held.memory[0], done.memory))


def slot_bias(policy: Policy, stats: Stats) -> Float[Array, "B K N"] | None:
    """What a policy's reduction adds to the attention scores of slots, [B, K or 1, N] float32; None for nothing."""
    if policy.reduction is None or not policy.reduction.weighs:
        return None
    return policy.reduction.bias(PerHead(policy).numbers(stats[1]))


def stand_ins(policy: Policy, memory: Memory, context: LayerContext) -> Summary | None:
    """What queries see beside the slots, by a policy's reduction; None for nothing."""
    if policy.reduction is None or not policy.reduction.summarises:
        return None
    _check_placement(policy.name, context.placement, policy.reduction)
    return PerHead(policy).shown(policy.reduction.summary(memory[1], context), context)


def _check_placement(name: str, placement: str, reduce: Reduction) -> None:
    if reduce.summarises and placement != "absolute":
        raise ValueError(
            f"{reduce.name} needs tokens at absolute positions, policy {name} places them by {placement}; "
            "use placement='absolute' or merge instead"
        )
