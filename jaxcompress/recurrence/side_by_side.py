"""The slots of a layer and the tokens of a block side by side: slots first, [B, K or P, S + T, ...]."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress.recurrence.chunk_attention import ChunkKeys
from jaxcompress.recurrence.layer import cache_view, entries_of, entries_per_token
from jaxcompress.recurrence.reindexing import rotated
from jaxcompress.recurrence.step import StepSpec, TokenBlock
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.placement import place
from jaxcompress.state.precision import wide
from jaxcompress.state.slots import write_slots
from jaxcompress.state.storage import load_vectors, split


def stay_in_block(state: KVState, spec: StepSpec) -> int:
    """The number of tokens of a set that stay, out of slots and block."""
    schedule = spec.policy.schedule
    return schedule.keep * entries_per_token(state, spec) if schedule.when == "once" else state.capacity


def joined(block: TokenBlock, state: KVState, spec: StepSpec) -> dict[str, Any]:
    """The fields that have a slot axis, with the block's tokens after the slots: [B, K or P, S + T, ...]."""
    entries = entries_of(block, state)
    fresh = spec.policy.init(cache_view(state, 0, spec, stay_in_block(state, spec), entries))
    fresh = jax.tree.map(lambda x: jnp.broadcast_to(x, (*entries.positions.shape, *x.shape[3:])), fresh)
    old = state.slotted()
    new = dict(keys=entries.keys, values=entries.values, positions=entries.positions, owner=entries.owner, stats=fresh)
    join = lambda x, y: jnp.concatenate([x[0], y], axis=2)
    return {name: jax.tree.map(join, old[name], new[name]) for name in old}


def keys_met(block: TokenBlock, state: KVState, whole: dict[str, Any], spec: StepSpec) -> tuple[Array, ChunkKeys]:
    """Queries [B, T, K, G, D], and the keys and values that they attend to."""
    context, q = spec.context, block.grouped(state)
    keys, key_scale = split(whole["keys"])
    values, value_scale = split(whole["values"])
    if context.placement != "absolute":
        places = place(whole["positions"], context.placement)
        keys, key_scale = rotated(load_vectors(whole["keys"]), places, places.shape[-1], context), None
        own = places[..., -block.positions.shape[1] :].swapaxes(1, 2)  # [B, T, P]
        q = rotated(q, own[..., None], places.shape[-1], context)
    dtypes, slots, occupied = (keys.dtype, values.dtype), state.positions.shape[-1], (state.positions >= 0).any()
    return q, ChunkKeys(wide(keys), wide(values), key_scale, value_scale, dtypes, slots, occupied)


def settle(everything: KVState, kept: Array, slots: int) -> KVState:
    """Slots and block, some of them kept -> slots. Kept slots stay put, kept block tokens fill free slots in order."""
    stays, comes = kept[..., :slots], kept[..., slots:]
    free_first = jnp.argsort(stays, axis=-1, stable=True)
    nth = jnp.minimum(jnp.cumsum(comes, axis=-1) - 1, slots - 1)
    to = jnp.where(comes, jnp.take_along_axis(free_first, jnp.maximum(nth, 0), axis=-1), slots)  # [B, P, T]

    def move(x: Array) -> Array:
        """[1, B, K or P, slots + T, ...] -> [1, B, K or P, slots, ...]"""
        return write_slots(x[:, :, :, :slots], x[0, :, :, slots:], 0, to)

    marked = replace(everything, positions=jnp.where(kept, everything.positions[0], -1)[None])
    return replace(everything, **jax.tree.map(move, marked.slotted()))
