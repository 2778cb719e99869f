"""Many tokens at once: they attend to the slots and to each other, then all are selected from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcompress._layer import (
    Block,
    Done,
    How,
    absorbed,
    by_owner,
    candidates_of,
    entries_of,
    entries_per_token,
    extra_of,
    gone_at,
    remembered,
    replaced_by_next,
    rule_of,
    seen_by,
    spare_slots,
    why_no_rule,
    within_window,
)
from jaxcompress.attention import block_attention, call_of, masked_softmax
from jaxcompress.pallas_kernels.contract import choose
from jaxcompress.placement import place
from jaxcompress.policies.base import Observation
from jaxcompress.precision import scores as scores_of
from jaxcompress.precision import weighted, wide
from jaxcompress.select import keep_top, unranked
from jaxcompress.state import KVState
from jaxcompress.storage import load, split

QUERY_BLOCK = 128  # queries that attend at once to slots and chunk: bounds the memory of a one-shot prompt


def many_tokens(block: Block, state: KVState, how: How) -> Done:
    """T tokens at once into a state of one layer: attend to slots and each other, then select from all of them.

    What stays of the slots stays where it is; what stays of the block goes into the slots set free.
    """
    policy, around, positions = how.policy, how.around, block.positions
    newest = positions.max(-1)
    oldest = jnp.where(positions >= 0, positions, newest[:, None]).min(-1)  # -1 in rows without a token
    freed_before = None
    once = policy.schedule.when == "once"
    stay = policy.schedule.keep * entries_per_token(state, how) if once else state.capacity
    if policy.schedule.when == "before":
        state = replace(state, positions=within_window(state.positions[0], oldest, how.window)[None])
        state, freed_before = _make_room(state, how, positions >= 0)
    state = remembered(state, 0, policy, block.bare)
    entries = entries_of(block, state)
    fresh = policy.init(candidates_of(state, 0, how, stay, entries))
    fresh = jax.tree.map(lambda x: jnp.broadcast_to(x, (*entries.positions.shape, *x.shape[3:])), fresh)
    old = state.slotted()
    new = dict(keys=entries.keys, values=entries.values, positions=entries.positions, owner=entries.owner, stats=fresh)
    join = lambda x, y: jnp.concatenate([x[0], y], axis=2)
    whole = {name: jax.tree.map(join, old[name], new[name]) for name in old}
    held, stats = whole["positions"], whole["stats"]

    q = block.grouped(state)
    keys, key_scale = split(whole["keys"])
    values, value_scale = split(whole["values"])
    if around.placement != "absolute":
        places = place(held, around.placement)
        keys, key_scale = around.rotate(load(whole["keys"]), places), None
        own = places[..., -positions.shape[1] :].swapaxes(1, 2)  # [B, T, P]
        q = around.rotate(q, own[..., None])
    stored = keys.dtype, values.dtype
    keys, values = wide(keys), wide(values)  # which all blocks of queries share
    mine = seen_by(held, whole["owner"], around.heads[0], around.group)[:, :, :, None]
    replaced = jnp.zeros((), bool) if block.replaces is None else replaced_by_next(held, block, state.seen)
    summary = extra_of(state, 0, how).summary

    def attend(stats: Any, queries: Any) -> tuple[Any, Array]:
        q, at = queries
        scores = scores_of("btkgd,bknd->bkgtn", q, keys, stored[0])
        if key_scale is not None:
            scores *= key_scale[:, :, None, None]
        bias = policy.bias(stats)
        if bias is not None:
            scores += bias[:, :, None, None]
        visible = held[:, :, None] <= at[:, None, :, None]
        if how.window is not None:
            visible &= held[:, :, None] > at[:, None, :, None] - how.window
        if block.replaces is not None:  # by the next token, for which they are no longer there
            visible &= (held[:, :, None] == at[:, None, :, None]) | ~replaced[:, :, None]
        visible, present = visible[:, :, None] & mine, (at >= 0)[:, None, None, :, None]
        if summary is None:
            weights = masked_softmax(scores, visible, present)
        else:
            more = summary.scores(q)
            seen = jnp.concatenate([jnp.broadcast_to(visible, scores.shape), jnp.isfinite(more)], axis=-1)
            weights = masked_softmax(jnp.concatenate([scores, more], axis=-1), seen, present)
            weights, shares = jnp.split(weights, [scores.shape[-1]], axis=-1)
        scaled = weights if value_scale is None else weights * value_scale[:, :, None, None]
        out = weighted("bkgtn,bknd->btkgd", scaled, values, stored[1])
        if summary is not None:
            out += weighted("bkgtm,bkmd->btkgd", shares, summary.values)
        seen = Observation(weights, at, visible.sum(-1, dtype=jnp.float32).mean(2), around.group)
        return policy.observed(stats, seen), out.astype(q.dtype)

    folded = _fold(block, state, how, whole, q)
    stats, out = _scan_queries(attend, stats, q, positions) if folded is None else folded
    now = jnp.where(newest >= 0, newest, state.seen - 1)
    lived = within_window(held, now, how.window)
    alive = jnp.where(replaced, -1, lived)
    everything = replace(state, **jax.tree.map(lambda x: x[None], dict(whole, positions=alive, stats=stats)))
    if not policy.evicts:
        kept = alive >= 0
    else:
        scores = policy.scores(stats, candidates_of(everything, 0, how, stay))
        most = jnp.full(state.seen.shape, stay)
        if once:
            most = jnp.where(state.seen == 0, stay, alive.shape[-1])
        kept = keep_top(scores, alive, most[:, None])
        unclear = unranked(scores, alive) & (kept.sum(-1) < (alive >= 0).sum(-1))
        out = jnp.where(unclear.any(-1)[:, None, None, None, None], jnp.nan, out)  # nothing said what should stay
    freed = jnp.where((lived >= 0) & ~kept, lived, -1)
    slots = state.positions.shape[-1]
    settled = _settle(everything, kept, slots)
    if policy.reduces:
        index = jax.lax.top_k(freed, freed.shape[-1] - min(state.capacity, freed.shape[-1] - 1))[1]
        gone = gone_at(everything, 0, index, jnp.take_along_axis(freed, index, axis=-1))
        settled = absorbed(settled, 0, how, gone)
    every = jnp.broadcast_to(jnp.arange(freed.shape[-1]), freed.shape)
    freed = by_owner(freed, every, whole["owner"], how)
    died = jnp.where(replaced, held + 1, jnp.broadcast_to((newest + 1)[:, None, None], freed.shape))
    if freed_before is not None:
        died = jnp.concatenate([jnp.broadcast_to(oldest[:, None, None], freed_before.shape), died], axis=-1)
        freed = jnp.concatenate([freed_before, freed], axis=-1)
    if not policy.forgets:
        lost = (kept.sum(-1) > slots - spare_slots(state, how))[:, None, :, None, None]
        out = jnp.where(lost, jnp.nan, out)
    return Done(out, settled, freed, died)


def _fold(block: Block, state: KVState, how: How, whole: Any, q: Array) -> tuple[Any, Array] | None:
    """Stats and output by a kernel, where the policy follows a rule; None: where none will."""
    rule, held, positions = rule_of(state, how), whole["positions"], block.positions
    chosen = choose("block", call_of(q, whole["keys"], held.shape[1], rule), how.backend, why_no_rule(rule, how))
    if chosen is None or rule is None:
        return None
    out, last, total = block_attention(chosen, q, positions, whole["keys"], whole["values"], held, how.window)
    present = (positions.max(-1) >= 0)[:, None, None]
    mean = lambda x: x.mean((1, 2))[:, None] if held.shape[1] == 1 else x.mean(2)
    observed = lambda x: x + mean(total) if rule.fold == "sum" else jnp.where(present, mean(last), x)
    return jax.tree.map(observed, whole["stats"]), out  # no stats where nothing is folded


def _make_room(state: KVState, how: How, valid: Array) -> tuple[KVState, Array]:
    """Evicts before a block, so that slots and block together fill the capacity."""
    held, coming, block_length = state.positions[0], valid.sum(-1), valid.shape[1]
    stay = max(state.capacity - block_length, 0)
    scores = how.policy.scores(jax.tree.map(lambda x: x[0], state.stats), candidates_of(state, 0, how, stay))
    kept = keep_top(scores, held, jnp.maximum(state.capacity - coming, 0)[:, None])
    freed = jnp.where((held >= 0) & ~kept, held, -1)
    return replace(state, positions=jnp.where(kept, held, -1)[None]), freed


def _scan_queries(attend: Any, stats: Any, q: Array, positions: Array) -> tuple[Any, Array]:
    """Folds `attend` over blocks of queries, so that no array of all queries by all keys exists."""
    t = positions.shape[1]
    if t <= QUERY_BLOCK:
        return attend(stats, (q, positions))
    n = -(-t // QUERY_BLOCK)
    pad = n * QUERY_BLOCK - t
    q = jnp.pad(q, [(0, 0), (0, pad), *[(0, 0)] * (q.ndim - 2)])
    positions = jnp.pad(positions, [(0, 0), (0, pad)], constant_values=-1)
    cut = lambda x: x.reshape(x.shape[0], n, QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1)
    stats, out = jax.lax.scan(attend, stats, (cut(q), cut(positions)))
    return stats, out.swapaxes(0, 1).reshape(q.shape)[:, :t]


def _settle(everything: KVState, kept: Array, slots: int) -> KVState:
    """Slots and block, some of them kept -> slots. Kept slots stay put, kept block tokens fill free slots in order."""
    stays, comes = kept[..., :slots], kept[..., slots:]
    free_first = jnp.argsort(stays, axis=-1, stable=True)
    nth = jnp.minimum(jnp.cumsum(comes, axis=-1) - 1, slots - 1)
    to = jnp.where(comes, jnp.take_along_axis(free_first, jnp.maximum(nth, 0), axis=-1), slots)  # [B, P, T]
    b = everything.positions.shape[1]

    def move(x: Array) -> Array:
        """[1, B, K or P, slots + T, ...] -> [1, B, K or P, slots, ...]"""
        x = x[0]
        width = x.shape[1]
        rows, head = jnp.arange(b)[:, None, None], jnp.arange(width)[None, :, None]
        target = jnp.broadcast_to(to, (b, width, to.shape[-1]))
        return x[:, :, :slots].at[rows, head, target].set(x[:, :, slots:], mode="drop")[None]

    marked = replace(everything, positions=jnp.where(kept, everything.positions[0], -1)[None])
    return replace(everything, **jax.tree.map(move, marked.slotted()))
