"""One layer of a state during reading: the policy's view of it, and functions that all modes of reading share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.policies.cache_view import CacheView, Evicted, IncomingTokens, Observation
from jaxcompress.policies.checks import checked_stats
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.reductions.reduced import absorb, slot_bias, stand_ins
from jaxcompress.recurrence.attention import Extra
from jaxcompress.recurrence.step import StepSpec, TokenBlock
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.shapes import SlotPositions
from jaxcompress.state.slots import with_layer
from jaxcompress.state.storage import Stored, load_vectors, store_vectors


class Entries(NamedTuple):
    """Entries to write into slots: one per token, or in a pool one per token and kv head. Keys and values are as
    stored."""

    keys: Any  # [B, K, M, D]
    values: Any
    positions: Array  # [B, P, M]
    owner: Array | None  # [B, 1, M]


def entries_of(block: TokenBlock, state: KVState) -> Entries:
    b, t, heads = jax.tree.leaves(block.k)[0].shape[:3]
    if state.owner is None:
        held = jnp.broadcast_to(block.positions[:, None], (b, state.sets, t))
        owner, turn = None, lambda x: x.swapaxes(1, 2)
    else:
        held = jnp.repeat(block.positions, heads, axis=1)[:, None]
        turn = lambda x: x.reshape(b, 1, t * heads, *x.shape[3:])
        owner = jnp.broadcast_to(jnp.tile(jnp.arange(heads), t), held.shape)
    return Entries(jax.tree.map(turn, block.k), jax.tree.map(turn, block.v), held, owner)


def cache_view(
    state: KVState, layer: Any, spec: StepSpec, stay: int | None = None, entries: Entries | None = None
) -> CacheView:
    """One layer as a policy sees it: its slots, or incoming entries.

    Args:
      stay: the number of tokens of a set that a selection among these keeps; by default that of a step (see
        `stay_in_step`).
    """
    at = lambda x: jax.tree.map(lambda y: y[layer], x)
    if entries is None:
        entries = Entries(at(state.keys), at(state.values), state.positions[layer], at(state.owner))
    return CacheView(
        load_vectors(entries.keys), load_vectors(entries.values), entries.positions, entries.owner, state.seen,
        state.layer[layer], at(state.memory), stay_in_step(state, spec) if stay is None else stay, spec.context,
    )  # fmt: skip


def remembered(state: KVState, layer: Any, policy: Policy, bare: IncomingTokens) -> KVState:
    old = jax.tree.map(lambda x: x[layer], state.memory)
    new = policy.remember(old, jax.lax.stop_gradient(bare))
    return replace(state, memory=with_layer(state.memory, layer, new))


def seen_by(held: Array, owner: Array | None, heads: int, group: int) -> Array:
    """[B, P or K, 1 or G, N]: the slots that may hold a head's tokens."""
    occupied = (held >= 0)[:, :, None]
    if owner is None:
        return occupied
    return occupied & (owner[:, :, None] == (jnp.arange(heads) // group)[:, None])


def replaced_by_next(held: SlotPositions, block: TokenBlock, seen: Int[Array, " B"]) -> Array:
    """[B, P, N] bool: the tokens whose slot the next token of the block takes."""
    assert block.replaces is not None
    b, t = block.positions.shape
    nth = jnp.where(block.positions >= 0, block.positions - seen[:, None], t)
    table = jnp.zeros((b, held.shape[1], t), bool)
    rows, sets = jnp.indices((b, held.shape[1], 1), sparse=True)[:2]
    table = table.at[rows, sets, nth[:, None]].set(block.replaces.swapaxes(1, 2), mode="drop")
    following = held + 1 - seen[:, None, None]
    found = jnp.take_along_axis(table, following.clip(0, t - 1), axis=-1)
    return found & (held >= 0) & (following >= 0) & (following < t)


def extra_of(state: KVState, layer: Any, spec: StepSpec) -> Extra:
    """What policy and layer add to attention: a bias on the slots, summaries of evicted tokens, the layer's traits."""
    policy, at = spec.policy, lambda x: jax.tree.map(lambda y: y[layer], x)
    return Extra(slot_bias(policy, at(state.stats)), stand_ins(policy, at(state.memory), spec.context), spec.traits)


def with_stored(state: KVState, stored: tuple[Stored, Stored]) -> KVState:
    return replace(state, keys=stored[0], values=stored[1])


def observed(state: KVState, layer: Any, policy: Policy, seen: Observation) -> KVState:
    old = jax.tree.map(lambda x: x[layer], state.stats)
    return replace(state, stats=with_layer(state.stats, layer, checked_stats(policy, old, seen)))


def spare_slots(state: KVState, spec: StepSpec) -> int:
    """The number of slots that are allocated but stay free (see `init_state`)."""
    return state.positions.shape[-1] - spec.policy.slots(state.capacity, entries_per_token(state, spec))


def stay_in_step(state: KVState, spec: StepSpec) -> int:
    """The number of tokens of a set that stay when a full state takes a token; after `once`, the number kept of the
    prompt."""
    entries, schedule = entries_per_token(state, spec), spec.policy.schedule
    if schedule.when == "once":
        return schedule.keep * entries
    return max(state.capacity - entries * (schedule.frees - (schedule.when == "after")), 0)


def entries_per_token(state: KVState, spec: StepSpec) -> int:
    return 1 if state.owner is None else spec.context.heads[1]


def by_owner(freed: Array, index: Array, owner: Array | None, spec: StepSpec) -> Array:
    """Freed entries of a pool [B, 1, M] -> freed entries of each kv head [B, K, M]."""
    if owner is None:
        return freed
    whose = jnp.take_along_axis(owner, index, axis=-1)
    return jnp.where(whose == jnp.arange(spec.context.heads[1])[:, None], freed, -1)


def evicted_at(state: KVState, layer: Any, index: Array, freed: Array) -> Evicted:
    """The tokens at these slots."""

    def at(x: Array) -> Array:
        x = x[layer]
        where = jnp.broadcast_to(index, (*x.shape[:2], index.shape[-1]))
        return jnp.take_along_axis(x, where.reshape(*where.shape, *[1] * (x.ndim - 3)), axis=2)

    pick = lambda x: jax.tree.map(at, x)
    return Evicted(
        load_vectors(pick(state.keys)), load_vectors(pick(state.values)), freed, pick(state.stats), pick(state.owner)
    )


def absorbed(state: KVState, layer: Any, spec: StepSpec, gone: Evicted) -> KVState:
    """Merges evicted tokens into the kept ones; only slots that change are stored again."""
    stats = jax.tree.map(lambda x: x[layer], state.stats)
    done = absorb(spec.policy, stats, cache_view(state, layer, spec), gone)
    fresh = store_vectors(done.values, jax.tree.map(lambda x: x[layer], state.values))

    def put(old: Array, new: Array) -> Array:
        changed = done.changed.reshape(*done.changed.shape, *[1] * (new.ndim - 3))
        return old.at[layer].set(jnp.where(changed, new, old[layer]))

    return replace(
        state,
        values=jax.tree.map(put, state.values, fresh),
        stats=with_layer(state.stats, layer, done.stats),
        memory=with_layer(state.memory, layer, done.memory),
    )


def within_window(held: SlotPositions, now: Int[Array, " B"], window: Any) -> SlotPositions:
    """The slot positions without the tokens that have left a sliding window for good."""
    if window is None:
        return held
    return jnp.where(held > (now - window)[:, None, None], held, -1)
