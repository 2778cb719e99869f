"""The one recurrence: attend over the slots and the incoming tokens, observe, select back to capacity.

    advance(q, k, v, positions, state, layer, policy, chunk=m) -> out, state, ...

Only this is sequential in a transformer with a bounded state: projections and MLPs of a whole segment run at once, and
`advance` scans over the segment's tokens inside one layer's attention. How the segment is cut is the mode, and modes
keep different tokens wherever scores depend on attention:

  streaming   chunk = 1: one token after the other, exactly as in decoding
  chunked     chunk = m: m tokens attend to the slots and to each other, then all are selected from at once
  one-shot    chunk = T: the whole prompt attends to itself, then one selection (official TOVA, H2O, SnapKV, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from jaxcompress.attention import masked_softmax, slot_attention
from jaxcompress.policies.policy import Observation, Placement, Policy
from jaxcompress.select import keep_top, worst
from jaxcompress.shapes import AttentionOut, Keys, Positions, Queries, SlotPositions, Values
from jaxcompress.state import KVState

Rotate = Callable[[Float[Array, "... D"], Real[Array, "..."]], Float[Array, "... D"]]
"""(vectors, positions) -> vectors: the model's position embedding."""

QUERY_BLOCK = 128  # queries that attend at once to slots and chunk: bounds the memory of a one-shot prompt


class Advanced(NamedTuple):
    """Result of `advance`.

    Attributes:
      out: [B, T, H, D], in the dtype of the queries, whatever the state's.
      state: the stack with this layer advanced; `seen` is left to the caller, since all layers share it.
      freed: [n, B, P, F] int32, positions of the tokens that each of the n chunks freed, -1 for none.
      died: [n, B, P, F] int32, the first position whose query no longer sees each of them.
    """

    out: AttentionOut
    state: KVState
    freed: Int[Array, "n B P F"]
    died: Int[Array, "n B P F"]


def advance(
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    state: KVState,
    layer: Int[Array, ""] | int,
    policy: Policy,
    *,
    chunk: int = 1,
    rotate: Rotate = lambda x, positions: x,
    placement: Placement | None = None,
    window: Int[Array, ""] | int | None = None,
) -> Advanced:
    """Advances one layer of a state over a block of T tokens.

    Args:
      q, k, v: of the incoming tokens, not rotated.
      positions: [B, T], growing along T; -1 where a row has no token (padding, at any side).
      state: a stack of layers.
      layer: index into the stack.
      policy: what to forget.
      chunk: tokens between two selections (see above). T is padded up to a multiple of it.
      rotate, placement: position embedding, and where tokens stand for it (None: where the policy puts them).
      window: width of a sliding-window layer; tokens that no later query can see free their slot.
    """
    b, t, h, d = q.shape
    placement = placement or policy.placement
    if policy.scope == "query_head":
        k, v = (jnp.repeat(x, h // k.shape[2], axis=2) for x in (k, v))
    if placement == "absolute":
        at = positions[..., None]
        q, k, rotate = rotate(q, at), rotate(k, at), lambda x, positions: x
    q = q.reshape(b, t, k.shape[2], -1, d)
    how = _How(policy, rotate, placement, window)
    if t == 1:
        done = _token(q[:, 0], k[:, 0], v[:, 0], positions[:, 0], state, layer, how)
        return Advanced(done.out.reshape(b, 1, h, d).astype(q.dtype), done.state, done.freed[None], done.died[None])

    one = state.take(layer)
    n = -(-t // chunk)
    pad = n * chunk - t

    def chunks(x: Array, fill: int = 0) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        return x.reshape(b, n, chunk, *x.shape[2:]).swapaxes(0, 1)

    def body(one: KVState, inputs: Any) -> tuple[KVState, Any]:
        q, k, v, positions = inputs
        if chunk == 1:
            done = _token(q[:, 0], k[:, 0], v[:, 0], positions[:, 0], one, 0, how)
            done = done._replace(out=done.out[:, None])
        else:
            done = _block(q, k, v, positions, one, how)
        return done.state, (done.out, done.freed, done.died)

    inputs = chunks(q), chunks(k), chunks(v), chunks(positions, -1)
    one, (out, freed, died) = jax.lax.scan(body, one, inputs)
    out = out.swapaxes(0, 1).reshape(b, n * chunk, h, d)[:, :t].astype(q.dtype)
    return Advanced(out, state.put(layer, one), freed, died)


class _How(NamedTuple):
    policy: Policy
    rotate: Rotate
    placement: Placement
    window: Any


class _Done(NamedTuple):
    out: Array
    state: KVState
    freed: Array
    died: Array


def _token(
    q: Float[Array, "B K G D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    position: Int[Array, " B"],
    state: KVState,
    layer: Int[Array, ""] | int,
    how: _How,
) -> _Done:
    """One token: into the free slot, attend, evict by marking one slot free. K and V are read once, never moved."""
    policy = how.policy
    before = policy.evict == "before"
    freed = jnp.full((*state.positions.shape[1:3], 1), -1, jnp.int32)
    if how.window is not None:  # first of all: what has left the window takes no other token's place
        held = _alive(state.positions[layer], position, how.window)
        state = replace(state, positions=state.positions.at[layer].set(held))
    if before:
        state, freed = _evict(state, layer, policy, rows=position >= 0)
    state = _write(state, layer, k, v, position, policy)
    held = state.positions[layer]
    keys, values = state.keys[layer], state.values[layer]
    if how.placement != "absolute":
        places = place(held, how.placement)
        keys = how.rotate(keys, places)
        own = jnp.where(held == position[:, None, None], places, 0).max(-1)  # [B, P]
        q = how.rotate(q, own[..., None])
    out, weights = slot_attention(q, keys, values, held >= 0, position >= 0)
    if policy.score is None:
        # Nothing is ever freed, so a token that found no slot must not go unnoticed.
        stored = ((held == position[:, None, None]).any(-1) | (position < 0)[:, None])[..., None, None]
        out = jnp.where(stored, out, jnp.nan)
    state = _observe(state, layer, policy, Observation(weights[:, :, :, None], position[:, None]))
    if not before:
        state, freed = _evict(state, layer, policy)
    died = position if before else position + 1
    return _Done(out, state, freed, jnp.broadcast_to(died[:, None, None], freed.shape))


def _write(state: KVState, layer: Any, k: Array, v: Array, position: Array, policy: Policy) -> KVState:
    """Puts a token into a free slot of each set; nothing happens in rows without a token."""
    held = state.positions[layer]
    slots = held.shape[-1]
    index = held.argmin(-1)  # a free slot has -1, so it comes before all others
    free = jnp.take_along_axis(held, index[..., None], axis=-1)[..., 0] < 0
    index = jnp.where(free & (position >= 0)[:, None], index, slots)  # out of bounds: dropped
    new = jnp.arange(slots, dtype=index.dtype) == index[..., None]
    rows, heads = jnp.indices(k.shape[:2], sparse=True)
    to = (layer, rows, heads, jnp.broadcast_to(index, k.shape[:2]))
    stats = policy.init(_incoming(state, layer, k[:, :, None], v[:, :, None], position[:, None]))
    at = lambda old, fresh: old.at[layer].set(jnp.where(new, fresh, old[layer]))
    return replace(
        state,
        keys=state.keys.at[to].set(k.astype(state.keys.dtype), mode="drop"),
        values=state.values.at[to].set(v.astype(state.values.dtype), mode="drop"),
        positions=at(state.positions, position[:, None, None]),
        stats=jax.tree.map(at, state.stats, stats),
    )


def _incoming(state: KVState, layer: Any, k: Array, v: Array, positions: Array) -> KVState:
    """The incoming tokens as a state of their own, which is how a policy's `init` sees them."""
    held = jnp.broadcast_to(positions[:, None], (positions.shape[0], state.sets, positions.shape[1]))
    return KVState(k[None], v[None], held[None], (), state.seen, state.layer[layer][None], state.capacity)


def _observe(state: KVState, layer: Any, policy: Policy, seen: Observation) -> KVState:
    old = jax.tree.map(lambda x: x[layer], state.stats)
    new = policy.observe(old, jax.lax.stop_gradient(seen))
    return replace(state, stats=jax.tree.map(lambda x, y: x.at[layer].set(y), state.stats, new))


def _evict(state: KVState, layer: Any, policy: Policy, rows: Array | None = None) -> tuple[KVState, Array]:
    """Frees one slot of each set in which no slot is free; returns the freed positions [B, P, 1], -1 for none."""
    held = state.positions[layer]
    if policy.score is None:
        return state, jnp.full((*held.shape[:2], 1), -1, jnp.int32)
    one = state.take(layer)
    scores = jax.lax.stop_gradient(policy.score(jax.tree.map(lambda x: x[0], one.stats), one))
    goes = jnp.arange(held.shape[-1]) == worst(scores, held)[..., None]
    if rows is not None:
        goes &= rows[:, None, None]
    freed = jnp.where(goes, held, -1).max(-1, keepdims=True)
    return replace(state, positions=state.positions.at[layer].set(jnp.where(goes, -1, held))), freed


def _block(
    q: Float[Array, "B T K G D"],
    k: Keys,
    v: Values,
    positions: Positions,
    state: KVState,
    how: _How,
) -> _Done:
    """T tokens at once into a state of one layer: attend to slots and each other, then select from all of them.

    What stays of the slots stays where it is; what stays of the block goes into the slots set free.
    """
    policy, t = how.policy, q.shape[1]
    k, v = k.swapaxes(1, 2).astype(state.keys.dtype), v.swapaxes(1, 2).astype(state.values.dtype)
    incoming = _incoming(state, 0, k, v, positions)
    newest = positions.max(-1)
    oldest = jnp.where(positions >= 0, positions, newest[:, None]).min(-1)  # -1 in rows without a token
    if policy.evict == "before":
        state = replace(state, positions=_alive(state.positions[0], oldest, how.window)[None])
        state, freed_before = _make_room(state, policy, (positions >= 0).sum(-1))

    held = jnp.concatenate([state.positions[0], incoming.positions[0]], axis=-1)
    keys, values = jnp.concatenate([state.keys[0], k], axis=2), jnp.concatenate([state.values[0], v], axis=2)
    stats = jax.tree.map(
        lambda old, new: jnp.concatenate([old[0], jnp.broadcast_to(new, incoming.positions[0].shape)], axis=-1),
        state.stats,
        policy.init(incoming),
    )
    rotated = keys
    if how.placement != "absolute":
        places = place(held, how.placement)
        rotated = how.rotate(keys, places)
        own = places[..., -t:].swapaxes(1, 2)  # [B, T, P]
        q = how.rotate(q, own[..., None])

    def attend(stats: Any, queries: Any) -> tuple[Any, Array]:
        q, at = queries
        scores = jnp.einsum("btkgd,bknd->bkgtn", q, rotated, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        visible = (held[:, :, None] >= 0) & (held[:, :, None] <= at[:, None, :, None])
        if how.window is not None:
            visible &= held[:, :, None] > at[:, None, :, None] - how.window
        weights = masked_softmax(scores, visible[:, :, None], (at >= 0)[:, None, None, :, None])
        out = jnp.einsum("bkgtn,bknd->btkgd", weights.astype(values.dtype), values)
        return policy.observe(stats, jax.lax.stop_gradient(Observation(weights, at))), out

    stats, out = _scan_queries(attend, stats, q, positions)
    now = jnp.where(newest >= 0, newest, state.seen - 1)
    alive = _alive(held, now, how.window)
    everything = replace(
        state,
        keys=keys[None], values=values[None], positions=alive[None], stats=jax.tree.map(lambda x: x[None], stats),
    )  # fmt: skip
    if policy.score is None:
        kept = alive >= 0
    else:
        kept = keep_top(jax.lax.stop_gradient(policy.score(stats, everything)), alive, state.capacity)
    freed = jnp.where((alive >= 0) & ~kept, alive, -1)
    died = jnp.broadcast_to((newest + 1)[:, None, None], freed.shape)
    if policy.evict == "before":
        died = jnp.concatenate([jnp.broadcast_to(oldest[:, None, None], freed_before.shape), died], axis=-1)
        freed = jnp.concatenate([freed_before, freed], axis=-1)
    state = _settle(everything, kept, slots=state.positions.shape[-1])
    if policy.score is None:
        lost = (kept.sum(-1) > state.capacity)[:, None, :, None, None]
        out = jnp.where(lost, jnp.nan, out)
    return _Done(out, state, freed, died)


def _make_room(state: KVState, policy: Policy, coming: Array) -> tuple[KVState, Array]:
    """Evicts before a block, so that slots and block together fill the capacity."""
    held = state.positions[0]
    assert policy.score is not None
    scores = policy.score(jax.tree.map(lambda x: x[0], state.stats), state)
    kept = keep_top(jax.lax.stop_gradient(scores), held, jnp.maximum(state.capacity - coming, 0)[:, None])
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
    b, heads = everything.keys.shape[1:3]

    def move(x: Array, empty: Any = None) -> Array:
        """x [B, K or P, slots + T, ...]"""
        width = x.shape[1]
        rows, head = jnp.arange(b)[:, None, None], jnp.arange(width)[None, :, None]
        target = jnp.broadcast_to(to, (b, width, to.shape[-1]))
        old = x[:, :, :slots] if empty is None else jnp.where(stays, x[:, :, :slots], empty)
        return old.at[rows, head, target].set(x[:, :, slots:], mode="drop")

    return replace(
        everything,
        keys=move(everything.keys[0])[None],
        values=move(everything.values[0])[None],
        positions=move(everything.positions[0], empty=-1)[None],
        stats=jax.tree.map(lambda x: move(x[0])[None], everything.stats),
    )


def _alive(held: SlotPositions, now: Int[Array, " B"], window: Any) -> SlotPositions:
    """Without the tokens that have left a sliding window for good."""
    if window is None:
        return held
    return jnp.where(held > (now - window)[:, None, None], held, -1)


def place(held: SlotPositions, placement: Placement) -> Float[Array, "B P N"]:
    """Re-indexed positions of the tokens held (see `Placement`); what free slots get has no meaning."""
    if placement == "absolute":
        return held.astype(jnp.float32)
    order = jnp.argsort(jnp.where(held >= 0, held, jnp.iinfo(jnp.int32).max), axis=-1, stable=True)
    if placement == "slot":
        places = jnp.broadcast_to(jnp.arange(held.shape[-1], dtype=jnp.float32), held.shape)
    else:
        ordered = jnp.take_along_axis(held, order, axis=-1)
        gaps = jnp.diff(ordered, axis=-1, prepend=ordered[..., :1] * 0).astype(jnp.float32)
        squashed = jnp.where(gaps > 10, jnp.log(jnp.log(jnp.maximum(gaps, 11.0))), gaps)
        places = jnp.cumsum(jnp.maximum(squashed, 0.0), axis=-1)
    return jnp.put_along_axis(jnp.zeros(held.shape, jnp.float32), order, places, axis=-1, inplace=False)


def death_times(freed: Int[Array, "n B P F"], died: Int[Array, "n B P F"], total: int) -> Int[Array, "B P total"]:
    """The first position whose query no longer sees each token; `total` for tokens still held.

    Under these times the mask `j <= i < death[j]` makes plain attention equal to the recurrence.
    """
    n, b, sets, f = freed.shape
    flat = lambda x: x.transpose(1, 2, 0, 3).reshape(b, sets, n * f)
    token = jnp.where(flat(freed) >= 0, flat(freed), total)  # out of bounds: dropped
    rows, heads = jnp.indices((b, sets, 1), sparse=True)[:2]
    return jnp.full((b, sets, total), total, jnp.int32).at[rows, heads, token].set(flat(died), mode="drop")
