"""One token: into a free slot, attend, evict by marking slots free. K and V are read once, never moved."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.pallas_kernels.types import Chosen
from jaxcompress.policies.cache_view import Observation
from jaxcompress.recurrence.attention import no_kernel, slot_attention, slot_step, slot_step_by_rule
from jaxcompress.recurrence.eviction import evict
from jaxcompress.recurrence.following import rule_kernel, rule_numbers, with_rule_numbers
from jaxcompress.recurrence.layer import (
    Entries,
    cache_view,
    entries_of,
    extra_of,
    observed,
    remembered,
    replaced_by_next,
    seen_by,
    spare_slots,
    with_stored,
    within_window,
)
from jaxcompress.recurrence.reindexing import rotated
from jaxcompress.recurrence.step import StepResult, StepSpec, TokenBlock, settled
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.placement import place
from jaxcompress.state.slots import write_slots
from jaxcompress.state.storage import load_vectors


@settled
def decode_step(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
    """One token: into a free slot, attend, evict by marking slots free. K and V are read once, never moved."""
    policy, context, position = spec.policy, spec.context, block.positions[:, 0]
    state, replaced = _make_room(block, state, layer, spec)
    freed, died, unclear = None, position, None
    if policy.schedule.when == "before":
        state, freed, unclear = evict(state, layer, spec, rows=position >= 0)
    state = remembered(state, layer, policy, block.bare)
    entries = entries_of(block, state)
    state, index = _write_numbers(state, layer, entries, spec)
    if replaced is None and (kernel := rule_kernel(block, state, spec)) is not None:
        return _step_by_rule(kernel, block, state, layer, entries, index)
    held, owner = state.positions[layer], jax.tree.map(lambda x: x[layer], state.owner)
    visible, extra = seen_by(held, owner, context.heads[0], context.group), extra_of(state, layer, spec)
    attend = slot_step
    if context.placement != "absolute":
        attend = partial(_reindexed_step, held=held, block=block, spec=spec)
    out, weights, stored = attend(
        block.grouped(state)[:, 0], (entries.keys, entries.values), (state.keys, state.values), layer, index, visible,
        position >= 0, extra, backend=spec.backend,
    )  # fmt: skip
    state = with_stored(state, stored)
    if not policy.forgets:  # nothing is freed, so a token without a slot must be reported
        found = (held == position[:, None, None]).any(-1) | (position < 0)[:, None]
        out = jnp.where(found[..., None, None], out, jnp.nan)
    count = visible.sum(-1, dtype=jnp.float32).mean(-1, keepdims=True)
    state = observed(state, layer, policy, Observation(weights[:, :, :, None], position[:, None], count, context.group))
    if policy.schedule.when == "after":
        state, freed, unclear = evict(state, layer, spec)
        died = position + 1
    if unclear is not None:  # the scores did not decide what stays: report it as NaN
        out = jnp.where(unclear[:, None, None, None], jnp.nan, out)
    if freed is None:
        freed, died = jnp.full((*state.positions.shape[1:3], 1), -1, jnp.int32), position
    died = jnp.broadcast_to(jnp.reshape(died, (-1, 1, 1)), freed.shape)
    if replaced is not None:
        freed = jnp.concatenate([freed, replaced], axis=-1)
        died = jnp.concatenate([died, jnp.broadcast_to(position[:, None, None], replaced.shape)], axis=-1)
    return StepResult(out[:, None], state, freed[None], died[None])


def _make_room(block: TokenBlock, state: KVState, layer: Any, spec: StepSpec) -> tuple[KVState, Array | None]:
    """Frees tokens that have left a sliding window, and the token that the new one replaces.

    Returns the state and the positions of replaced tokens, [B, P, 1]; None where the policy replaces none.
    """
    position, replaced = block.positions[:, 0], None
    if spec.window is not None:  # first, so that a token outside the window takes no other token's place
        held = within_window(state.positions[layer], position, spec.window)
        state = replace(state, positions=state.positions.at[layer].set(held))
    if block.replaces is not None:
        held = state.positions[layer]
        goes = replaced_by_next(held, block, state.seen)
        replaced = jnp.where(goes, held, -1).max(-1, keepdims=True)
        state = replace(state, positions=state.positions.at[layer].set(jnp.where(goes, -1, held)))
    return state, replaced


def _reindexed_step(  # twelve parameters: those of `slot_step`, and the inputs of the new positions
    q, new, stored, layer, index, visible, present, extra, *, backend, held: Array, block: TokenBlock, spec: StepSpec
):
    """`slot_step` for keys that are cached un-rotated and rotated to new positions at every step."""
    no_kernel("step", q[:, None], stored[0], index.shape[1], backend, "keys are re-indexed at each step")
    stored = write_slots(stored, new, layer, index)
    keys, values = jax.tree.map(lambda x: x[layer], stored)
    places, count = place(held, spec.context.placement), held.shape[-1]
    own = jnp.where(held == block.positions[:, :1, None], places, 0).max(-1)  # [B, P]
    keys = rotated(load_vectors(keys), places, count, spec.context)
    q = rotated(q, own[..., None], count, spec.context)
    return *slot_attention(q, keys, values, visible, present, extra), stored


def _step_by_rule(
    kernel: tuple[Chosen, EvictionRule], block: TokenBlock, state: KVState, layer: Any, entries: Entries, index: Array
) -> StepResult:
    """The same step by a kernel that applies the policy's rule: it attends, observes, and returns the slot to free."""
    position, held = block.positions[:, 0], state.positions[layer]
    chosen, rule = kernel
    out, numbers, goes, stored = slot_step_by_rule(
        chosen, block.grouped(state)[:, 0], (entries.keys, entries.values), (state.keys, state.values), layer, index,
        held, rule_numbers(state, layer), position >= 0, rule,
    )  # fmt: skip
    state = with_rule_numbers(with_stored(state, stored), layer, numbers)
    leaves = jnp.arange(held.shape[-1]) == goes[..., None]
    state = replace(state, positions=state.positions.at[layer].set(jnp.where(leaves, -1, held)))
    freed = jnp.where(leaves, held, -1).max(-1, keepdims=True)
    died = jnp.broadcast_to((position + 1)[:, None, None], freed.shape)
    return StepResult(out[:, None], state, freed[None], died[None])


def _write_numbers(state: KVState, layer: Any, entries: Entries, spec: StepSpec) -> tuple[KVState, Array]:
    """Assigns free slots of each set to the entries of one token, and writes their positions and stats.

    Rows without a token stay unchanged.

    Returns the state, without the new keys and values, and the slots to write them to: [B, P, M], S for none.
    """
    held = state.positions[layer]
    slots, m = held.shape[-1], entries.positions.shape[-1]
    # A free slot has position -1, so it comes before all others.
    index = held.argmin(-1, keepdims=True) if m == 1 else jax.lax.top_k(-held, m)[1]
    free = jnp.take_along_axis(held, index, axis=-1) < 0
    spare = spare_slots(state, spec)
    if spare and not spec.policy.forgets:  # otherwise every step has room
        free &= (held < 0).sum(-1, keepdims=True) >= m + spare
    index = jnp.where(free & (entries.positions >= 0), index, slots)  # [B, P, M]; out of bounds: dropped
    stats = spec.policy.init(cache_view(state, layer, spec, entries=entries))
    stats = jax.tree.map(lambda x: jnp.broadcast_to(x, (*entries.positions.shape, *x.shape[3:])), stats)
    names = ("positions", "owner", "stats")
    old, new = state.slotted(), dict(positions=entries.positions, owner=entries.owner, stats=stats)
    return replace(state, **{name: write_slots(old[name], new[name], layer, index) for name in names}), index
