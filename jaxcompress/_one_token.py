"""One token: into a free slot, attend, evict by marking slots free. K and V are read once, never moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress._layer import (
    Block,
    Done,
    Entries,
    How,
    absorbed,
    by_owner,
    candidates_of,
    entries_of,
    entries_per_token,
    extra_of,
    gone_at,
    observed,
    remembered,
    replaced_by_next,
    rule_numbers,
    rule_of,
    seen_by,
    spare_slots,
    with_rule_numbers,
    with_stored,
    within_window,
)
from jaxcompress.attention import call_of, slot_attention, slot_step, slot_step_by_rule, slot_write
from jaxcompress.pallas_kernels.contract import choose
from jaxcompress.placement import place
from jaxcompress.policies.base import Observation
from jaxcompress.select import keep_top, unranked, worst
from jaxcompress.state import KVState
from jaxcompress.storage import load


def one_token(block: Block, state: KVState, layer: Int[Array, ""] | int, how: How) -> Done:
    """One token: into a free slot, attend, evict by marking slots free. K and V are read once, never moved."""
    policy, position = how.policy, block.positions[:, 0]
    freed, died, replaced, unclear = None, position, None, None
    if how.window is not None:  # first of all: what has left the window takes no other token's place
        held = within_window(state.positions[layer], position, how.window)
        state = replace(state, positions=state.positions.at[layer].set(held))
    if block.replaces is not None:
        held = state.positions[layer]
        goes = replaced_by_next(held, block, state.seen)
        replaced = jnp.where(goes, held, -1).max(-1, keepdims=True)
        state = replace(state, positions=state.positions.at[layer].set(jnp.where(goes, -1, held)))
    if policy.schedule.when == "before":
        state, freed, unclear = _evict(state, layer, how, rows=position >= 0)
        died = position
    state = remembered(state, layer, policy, block.bare)
    entries = entries_of(block, state)
    state, index = _enter(state, layer, entries, how)
    held, owner = state.positions[layer], jax.tree.map(lambda x: x[layer], state.owner)
    q, new, stored = block.grouped(state)[:, 0], (entries.keys, entries.values), (state.keys, state.values)
    rule = rule_of(state, how)
    if rule is not None and replaced is None:
        chosen = choose("step_evict", call_of(q[:, None], state.keys, state.sets, rule), how.backend)
        if chosen is not None:
            out, numbers, goes, stored = slot_step_by_rule(
                chosen, q, new, stored, layer, index, held, rule_numbers(state, layer), position >= 0, rule
            )
            state = with_rule_numbers(with_stored(state, stored), layer, numbers)
            leaves = jnp.arange(held.shape[-1]) == goes[..., None]
            state = replace(state, positions=state.positions.at[layer].set(jnp.where(leaves, -1, held)))
            freed = jnp.where(leaves, held, -1).max(-1, keepdims=True)
            return Done(out[:, None], state, freed, jnp.broadcast_to((position + 1)[:, None, None], freed.shape))
    visible, extra = seen_by(held, owner, how.around.heads[0], how.around.group), extra_of(state, layer, how)
    if how.around.placement == "absolute":
        out, weights, stored = slot_step(
            q, new, stored, layer, index, visible, position >= 0, extra, backend=how.backend
        )
    else:
        choose("step", call_of(q[:, None], state.keys, state.sets), how.backend, "keys are re-indexed at each step")
        stored = slot_write(stored, new, layer, index)
        keys, values = jax.tree.map(lambda x: x[layer], stored)
        places = place(held, how.around.placement)
        keys = how.around.rotate(load(keys), places)
        own = jnp.where(held == position[:, None, None], places, 0).max(-1)  # [B, P]
        q = how.around.rotate(q, own[..., None])
        out, weights = slot_attention(q, keys, values, visible, position >= 0, extra)
    state = with_stored(state, stored)
    if not policy.forgets:
        # Nothing is freed, so a token that found no slot must not go unnoticed.
        stored = ((held == position[:, None, None]).any(-1) | (position < 0)[:, None])[..., None, None]
        out = jnp.where(stored, out, jnp.nan)
    count = visible.sum(-1, dtype=jnp.float32).mean(-1, keepdims=True)
    seen = Observation(weights[:, :, :, None], position[:, None], count, how.around.group)
    state = observed(state, layer, policy, seen)
    if policy.schedule.when == "after":
        state, freed, unclear = _evict(state, layer, how)
        died = position + 1
    if unclear is not None:  # no score says what should have stayed: this must not go unnoticed
        out = jnp.where(unclear[:, None, None, None], jnp.nan, out)
    if freed is None:
        freed, died = jnp.full((*held.shape[:2], 1), -1, jnp.int32), position
    died = jnp.broadcast_to(jnp.reshape(died, (-1, 1, 1)), freed.shape)
    if replaced is not None:
        freed = jnp.concatenate([freed, replaced], axis=-1)
        died = jnp.concatenate([died, jnp.broadcast_to(position[:, None, None], replaced.shape)], axis=-1)
    return Done(out[:, None], state, freed, died)


def _enter(state: KVState, layer: Any, entries: Entries, how: How) -> tuple[KVState, Array]:
    """Gives the entries of one token free slots of each set; nothing happens in rows without a token.

    Returns the state, in which keys and values are still to be written, and where: [B, P, M], S for nowhere.
    """
    held = state.positions[layer]
    slots, m = held.shape[-1], entries.positions.shape[-1]
    # A free slot has -1, so it comes before all others.
    index = held.argmin(-1, keepdims=True) if m == 1 else jax.lax.top_k(-held, m)[1]
    free = jnp.take_along_axis(held, index, axis=-1) < 0
    spare = spare_slots(state, how)
    if spare and not how.policy.forgets:  # else there is room at every step
        free &= (held < 0).sum(-1, keepdims=True) >= m + spare
    index = jnp.where(free & (entries.positions >= 0), index, slots)  # [B, P, M]; out of bounds: dropped
    stats = how.policy.init(candidates_of(state, layer, how, entries=entries))

    def put(old: Array, new: Array) -> Array:
        """old [L, B, P, S, ...], new [B, P, M, ...]"""
        if new.ndim == 3 and m == 1:  # numbers per slot: a comparison is cheaper than a scatter
            here = jnp.arange(slots, dtype=index.dtype) == index
            return old.at[layer].set(jnp.where(here, new, old[layer]))
        rows, heads = jnp.indices(new.shape[:2], sparse=True)
        to = jnp.broadcast_to(index, new.shape[:3])
        return old.at[layer, rows[..., None], heads[..., None], to].set(new, mode="drop")

    stats = jax.tree.map(lambda x: jnp.broadcast_to(x, (*entries.positions.shape, *x.shape[3:])), stats)
    old = state.slotted()
    new = dict(positions=entries.positions, owner=entries.owner, stats=stats)
    return replace(state, **{name: jax.tree.map(put, old[name], value) for name, value in new.items()}), index


def _evict(state: KVState, layer: Any, how: How, rows: Array | None = None) -> tuple[KVState, Array, Array | None]:
    """Frees slots of each set in which there is no room for another token.

    Returns the state, the freed positions, -1 for none, and [B] the rows in which something went though no score said
    what.
    """
    policy, held = how.policy, state.positions[layer]
    if not policy.evicts:
        return state, jnp.full((*held.shape[:2], 1), -1, jnp.int32), None
    n = policy.schedule.frees * entries_per_token(state, how)

    def ranked() -> Array:
        stats = jax.tree.map(lambda x: x[layer], state.stats)
        return policy.scores(stats, candidates_of(state, layer, how))

    if n == 1:
        scores = ranked()
        goes = jnp.arange(held.shape[-1]) == worst(scores, held, spare_slots(state, how))[..., None]
        unclear = unranked(scores, held)
    else:
        full = (held < 0).sum(-1) < entries_per_token(state, how) + spare_slots(state, how)

        def lowest() -> tuple[Array, Array]:
            scores, stay = ranked(), (held >= 0).sum(-1) - jnp.where(full, n, 0)
            return (held >= 0) & ~keep_top(scores, held, stay), unranked(scores, held)

        nothing = lambda: (jnp.zeros(held.shape, bool), jnp.zeros(held.shape[:2], bool))
        goes, unclear = jax.lax.cond(full.any(), lowest, nothing)
    if rows is not None:
        goes &= rows[:, None, None]
    marked = jnp.where(goes, held, -1)
    unclear = (unclear & (marked >= 0).any(-1)).any(-1)
    if n == 1:
        freed = marked.max(-1, keepdims=True)
    elif not policy.reduces and state.owner is None:
        freed = jax.lax.top_k(marked, n)[0]
    else:
        freed = None
    after = replace(state, positions=state.positions.at[layer].set(jnp.where(goes, -1, held)))
    if freed is None or policy.reduces:
        index = jax.lax.top_k(jnp.where(goes, held, -1), n)[1]
        gone = jnp.take_along_axis(marked, index, axis=-1)
        if policy.reduces:
            merged = lambda: absorbed(after, layer, how, gone_at(state, layer, index, gone))
            # Where many are freed at once, most steps free nothing.
            after = merged() if policy.schedule.frees == 1 else jax.lax.cond((gone >= 0).any(), merged, lambda: after)
        freed = by_owner(gone, index, jax.tree.map(lambda x: x[layer], state.owner), how)
    return after, freed, unclear
