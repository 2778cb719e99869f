"""An eviction rule on one set of slots, arrays [..., S] in any memory: for kernels, and for their tests.

Numbers are float32. Every reduction keeps its axis, and there is nothing but comparisons, selections and reductions, so
that the same lines compile inside a kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.state.eviction_rule import EvictionRule

_NEVER = jnp.iinfo(jnp.int32).max


def fold(
    rule: EvictionRule, numbers: Float[Array, "*set S"], mass: Float[Array, "*set S"], present: Bool[Array, "..."]
) -> Float[Array, "*set S"]:
    """Each slot's number after a query. Rows without a query keep theirs; `present` broadcasts to `numbers`."""
    return numbers + mass if rule.fold == "sum" else jnp.where(present, mass, numbers)


def scores(
    rule: EvictionRule, numbers: Float[Array, "*set S"] | None, held: Int[Array, "*set S"], newest: Int[Array, "*set 1"]
) -> Float[Array, "*set S"]:
    """The scores of the policies that follow the rule: higher stays."""
    kept = (held - newest).astype(jnp.float32) if numbers is None else numbers
    kept = jnp.where(jnp.isnan(kept), -jnp.inf, kept)
    if rule.first:
        kept = jnp.where(held < rule.first, jnp.inf, kept)
    if rule.recent:
        kept = jnp.where(held > newest - rule.recent, jnp.inf, kept)
    return kept


def victim(
    rule: EvictionRule, numbers: Float[Array, "*set S"] | None, held: Int[Array, "*set S"]
) -> Int[Array, "*set 1"]:
    """The slot to free: a free one if more than `spare` are free, else the lowest score, on a tie the youngest token
    (as `jaxcompress.state.select.worst`)."""
    newest = held.max(-1, keepdims=True)
    occupied = held >= 0
    of_free, youth_of_free = jnp.float32(-jnp.inf), jnp.int32(_NEVER)
    if rule.spare:
        free = jnp.where(occupied, 0.0, 1.0).sum(-1, keepdims=True)
        room = jnp.broadcast_to(free > rule.spare, held.shape)
        of_free, youth_of_free = jnp.where(room, -jnp.inf, jnp.inf), jnp.where(room, _NEVER, -1)
    candidate = jnp.where(occupied, scores(rule, numbers, held, newest), of_free)
    youth = jnp.where(occupied, held, youth_of_free)
    lowest = jnp.where(candidate == candidate.min(-1, keepdims=True), youth, -1)
    return first(lowest == lowest.max(-1, keepdims=True))


def first(marked: Bool[Array, "*set S"]) -> Int[Array, "*set 1"]:
    """The first marked slot; S if none is marked."""
    slot = jax.lax.broadcasted_iota(jnp.int32, marked.shape, marked.ndim - 1)
    return jnp.where(marked, slot, marked.shape[-1]).min(-1, keepdims=True)
