"""A policy whose evicted tokens are reduced instead of dropped."""

from __future__ import annotations

from typing import NamedTuple

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
)
from jaxcompress.policies.combine import per_layer
from jaxcompress.policies.policy import Policy, leaf, policy, wrapper
from jaxcompress.policies.reductions.reduction import Reduction
from jaxcompress.policies.summary import Summary
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.shapes import SlotScores


def with_reduce(policy: Policy, reduction: Reduction) -> Policy:
    """The policy, with evicted tokens reduced instead of dropped. What is kept follows the same rule as without.

    The policy's stats become (its own, the reduction's), and so does its memory. Of a policy with layers of their own,
    those that forget are given the reduction. Whatever works on scores may come before or after: `every(p, 16)` and
    `protect(p, first=4)` of a reduced p are the same as reducing these.

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
    reduces = True  # type: ignore[assignment]

    def check(self) -> None:
        one = self.policy
        if not one.evicts:
            raise ValueError(f"policy {one.name} never forgets, so there is nothing to reduce; give one that evicts")
        if one.schedule.when == "before":
            raise ValueError(f"policy {one.name} makes room before it sees a token; a reduction needs evict='after'")
        if one.reduces:
            raise ValueError(f"policy {one.name} reduces what it evicts already; give the policy without")
        _check_placement(one.name, one.placement, self.reduction)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.policy.name}/{self.reduction.name}"

    def __repr__(self) -> str:
        return f"with_reduce({self.policy!r}, {self.reduction!r})"

    @property
    def _heads(self) -> _PerHead:
        return _PerHead(self.policy)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return self.policy.score(stats[0], held._replace(memory=held.memory[0]))

    def init(self, incoming: CacheView) -> Stats:
        mine = self._heads.pack(self.reduction.init(self._heads.positions(incoming)))
        return self.policy.init(incoming._replace(memory=incoming.memory[0])), mine

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        mass = seen.per_set("pool" if self.scope == "pool" else "kv_head").sum(2)
        mine = self._heads.pack(self.reduction.observe(self._heads.numbers(stats[1]), mass))
        return self.policy.observe(stats[0], seen), mine

    def memory(self, held: CacheView) -> Memory:
        rows, width = held.keys.shape[0], held.keys.shape[-1]
        return self.policy.memory(held), self.reduction.memory(rows, self._heads.count(held), width)

    def remember(self, memory: Memory, incoming: IncomingTokens) -> Memory:
        return self.policy.remember(memory[0], incoming), memory[1]

    def enter(self, memory: Memory, incoming: IncomingTokens, layer: Int[Array, ""], context: LayerContext) -> Entering:
        entering = self.policy.enter(memory[0], incoming, layer, context)
        return entering._replace(memory=(entering.memory, memory[1]))

    def absorb(self, stats: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        _check_placement(self.policy.name, held.context.placement, self.reduction)
        heads = self._heads
        kept, lost = heads.split(held), heads.split_gone(gone, held.context)
        numbers = jax.tree.map(lambda x: jnp.broadcast_to(x, kept.positions.shape), heads.numbers(stats[1]))
        done = self.reduction.absorb(numbers, kept._replace(memory=held.memory[1]), lost)
        values, changed, numbers = heads.join(done, kept.positions)
        return Absorbed(values, changed, (stats[0], numbers), (held.memory[0], done.memory))

    def bias(self, stats: Stats) -> Float[Array, "B K N"] | None:
        theirs = self.policy.bias(stats[0])
        if not self.reduction.weighs:
            return theirs
        mine = self.reduction.bias(self._heads.numbers(stats[1]))
        return mine if theirs is None else mine + theirs

    def summary(self, memory: Memory, context: LayerContext) -> Summary | None:
        if not self.reduction.summarises:
            return None
        _check_placement(self.policy.name, context.placement, self.reduction)
        return self._heads.shown(self.reduction.summary(memory[1], context), context)


def _check_placement(name: str, placement: str, reduce: Reduction) -> None:
    if reduce.summarises and placement != "absolute":
        raise ValueError(
            f"{reduce.name} needs tokens at absolute positions, policy {name} places them by {placement}; "
            "use placement='absolute' or merge instead"
        )


class _PerHead(NamedTuple):
    """Between the sets of a policy and single kv heads.

    Heads that share a set still merge each into another token, so that their numbers differ: they are kept as
    [B, 1, N, K]. Where every head has a set, and in a pool, they are [B, P, N].
    """

    policy: Policy

    def count(self, held: CacheView) -> int:
        """K of the layer, in a pool too."""
        return held.context.heads[1] if self.policy.scope == "pool" else held.keys.shape[1]

    def positions(self, incoming: CacheView) -> Array:
        """[B, P, T] -> [B, K, T]; in a pool, where every token has one head, as they are."""
        if self.policy.scope == "pool":
            return incoming.positions
        return jnp.broadcast_to(incoming.positions, incoming.keys.shape[:3])

    def numbers(self, stats: Stats) -> Stats:
        """[B, P, N, ...] -> [B, K, N]; in a pool [B, 1, N]."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1)[:, :, 0], stats) if self.policy.scope == "layer" else stats

    def pack(self, numbers: Stats) -> Stats:
        """Back again."""
        if self.policy.scope != "layer":
            return numbers
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, -1)[:, None], numbers)

    def split(self, held: CacheView) -> CacheView:
        """Every head with positions of its own. In a pool, keys and values of all are repeated for each head."""
        owner, k = held.owner, self.count(held)
        wide = lambda x: jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:]))
        positions = wide(held.positions)
        context = held.context
        if owner is not None:
            positions = jnp.where(owner == jnp.arange(k)[:, None], positions, -1)
            context = context._replace(which=tuple(range(k)))
        keys, values = (wide(x.astype(jnp.float32)) for x in (held.keys, held.values))
        return held._replace(keys=keys, values=values, positions=positions, owner=None, context=context)

    def split_gone(self, gone: Evicted, context: LayerContext) -> Evicted:
        """Likewise."""
        k = context.heads[1] if gone.owner is not None else gone.keys.shape[1]
        wide = lambda x: jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:]))
        positions = wide(gone.positions)
        if gone.owner is not None:
            positions = jnp.where(gone.owner == jnp.arange(k)[:, None], positions, -1)
        keys, values = (wide(x.astype(jnp.float32)) for x in (gone.keys, gone.values))
        return Evicted(keys, values, positions, jax.tree.map(wide, self.numbers(gone.stats[1])))

    def join(self, done: Absorbed, positions: Array) -> tuple[Array, Array, Stats]:
        """Values, what changed and numbers, as the policy has them."""
        if self.policy.scope != "pool":
            return done.values, done.changed, self.pack(done.stats)
        mine = positions >= 0  # each slot belongs to one head
        only = lambda x: jnp.where(mine.reshape(*mine.shape, *[1] * (x.ndim - 3)), x, 0).sum(1, keepdims=True)
        return only(done.values), (done.changed & mine).any(1, keepdims=True), jax.tree.map(only, done.stats)

    def shown(self, summary: Summary, context: LayerContext) -> Summary:
        """In a pool, where all queries look at the same slots: each at the stand-ins of its own head."""
        if self.policy.scope != "pool":
            return summary
        b, k, m, d = summary.keys.shape
        own = jnp.arange(context.heads[0])[:, None] // context.group == jnp.arange(k * m) // m  # [H, K * M]
        bias = jnp.where(own, summary.bias.reshape(b, 1, 1, k * m), -jnp.inf)
        keys, values = (x.reshape(b, 1, k * m, d) for x in (summary.keys, summary.values))
        return summary._replace(keys=keys, values=values, bias=bias)
