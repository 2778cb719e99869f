"""The choice of slots to free when a full state takes a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress.policies.checks import checked_scores
from jaxcompress.recurrence.layer import absorbed, by_owner, cache_view, entries_per_token, evicted_at, spare_slots
from jaxcompress.recurrence.step import StepSpec
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.select import keep_top, unranked, worst


def evict(state: KVState, layer: Any, spec: StepSpec, rows: Array | None = None) -> tuple[KVState, Array, Array | None]:
    """Frees slots of each set that has no room for another token.

    Returns the state, the freed positions (-1 for none), and [B] the rows in which a token was freed although
    the scores did not decide which.
    """
    policy, held = spec.policy, state.positions[layer]
    if not policy.evicts:
        return state, jnp.full((*held.shape[:2], 1), -1, jnp.int32), None
    n = policy.schedule.frees * entries_per_token(state, spec)

    def ranked() -> Array:
        stats = jax.tree.map(lambda x: x[layer], state.stats)
        return checked_scores(policy, stats, cache_view(state, layer, spec))

    if n == 1:
        scores = ranked()
        goes = jnp.arange(held.shape[-1]) == worst(scores, held, spare_slots(state, spec))[..., None]
        unclear = unranked(scores, held)
    else:
        full = (held < 0).sum(-1) < entries_per_token(state, spec) + spare_slots(state, spec)

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
    elif not policy.reduction and state.owner is None:
        freed = jax.lax.top_k(marked, n)[0]
    else:
        freed = None
    after = replace(state, positions=state.positions.at[layer].set(jnp.where(goes, -1, held)))
    if freed is None or policy.reduction:
        index = jax.lax.top_k(jnp.where(goes, held, -1), n)[1]
        gone = jnp.take_along_axis(marked, index, axis=-1)
        if policy.reduction:
            merged = lambda: absorbed(after, layer, spec, evicted_at(state, layer, index, gone))
            # If many slots are freed at once, most steps free none.
            after = merged() if policy.schedule.frees == 1 else jax.lax.cond((gone >= 0).any(), merged, lambda: after)
        freed = by_owner(gone, index, jax.tree.map(lambda x: x[layer], state.owner), spec)
    return after, freed, unclear
