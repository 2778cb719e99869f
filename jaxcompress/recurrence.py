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
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.attention import (
    Extra,
    block_attention,
    call_of,
    masked_softmax,
    slot_attention,
    slot_step,
    slot_step_by_rule,
    slot_write,
    stream_attention,
)
from jaxcompress.pallas_kernels.contract import Backend, Rule, choose
from jaxcompress.placement import place
from jaxcompress.policies.policy import Around, Candidates, Gone, Incoming, Observation, Placement, Policy, Rotate
from jaxcompress.select import keep_top, worst
from jaxcompress.shapes import AttentionOut, Keys, Positions, Queries, SlotPositions, Values
from jaxcompress.state import KVState
from jaxcompress.storage import Stored, load, split, store

QUERY_BLOCK = 128  # queries that attend at once to slots and chunk: bounds the memory of a one-shot prompt


class Advanced(NamedTuple):
    """Result of `advance`.

    Attributes:
      out: [B, T, H, D], in the dtype of the queries, whatever the state's.
      state: the stack with this layer advanced; `seen` is left to the caller, since all layers share it.
      freed: [n, B, P, F] int32, positions of the tokens that each of the n chunks freed, -1 for none. In a pool P is
        the number of kv heads that share it.
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
    project: Float[Array, "K G D E"] | None = None,
    backend: Backend = "auto",
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
      project: the layer's output projection, for policies that weigh values by it.
      backend: what computes: `auto`, `jnp`, or kernels by name (see `jaxcompress.pallas_kernels.contract`). For
        `read`, give `recurrence=on(backend)`.

    Raises:
      ValueError: kernels asked for by name that this device cannot run.
    """
    b, t, h, d = q.shape
    placement = placement or policy.placement
    around = Around(rotate, placement, project, (h, k.shape[2]), state.heads or tuple(range(state.kv_heads)))
    bare = Incoming(q, k, v, positions)
    replaces = None
    if policy.enter is not None:
        entering = policy.enter(jax.tree.map(lambda x: x[layer], state.memory), bare, state.layer[layer], around)
        k, v, replaces = entering.k, entering.v, entering.replaces
        state = replace(state, memory=_set(state.memory, layer, jax.lax.stop_gradient(entering.memory)))
    if policy.scope == "query_head":
        k, v = (jnp.repeat(x, h // k.shape[2], axis=2) for x in (k, v))
    if placement == "absolute":
        at = positions[..., None]
        q, k = rotate(q, at), rotate(k, at)
    keys, values = store(k, state.keys), store(v, state.values)  # all at once, and never again
    how = _How(policy, around, window, backend)
    rule = _rule(state, how)
    if t == 1:
        done = _token(_Block(q, keys, values, positions, bare, replaces), state, layer, how)
        return Advanced(done.out.reshape(b, 1, h, d).astype(q.dtype), done.state, done.freed[None], done.died[None])
    if chunk == 1:
        done = _stream(_Block(q, keys, values, positions, bare, replaces), state, layer, how, rule)
        if done is not None:
            return done._replace(out=done.out.reshape(b, t, h, d).astype(q.dtype))

    one = state.take(layer)
    n = -(-t // chunk)
    pad = n * chunk - t

    def chunks(x: Array, fill: int = 0) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        return x.reshape(b, n, chunk, *x.shape[2:]).swapaxes(0, 1)

    def body(one: KVState, inputs: Any) -> tuple[KVState, Any]:
        q, keys, values, positions, bare, replaces = inputs
        block = _Block(q, keys, values, positions, Incoming(bare[0], bare[1], bare[2], positions), replaces)
        done = _token(block, one, 0, how) if chunk == 1 else _block(block, one, how)
        seen = jnp.maximum(one.seen, positions.max(-1) + 1)  # so that policies tell the first chunk from later ones
        return replace(done.state, seen=seen), (done.out, done.freed, done.died)

    first, second = jax.tree.map(chunks, ((q, keys, values), (tuple(bare[:3]), replaces)))
    inputs = *first, chunks(positions, -1), *second
    one, (out, freed, died) = jax.lax.scan(body, one, inputs)
    out = out.swapaxes(0, 1).reshape(b, n * chunk, h, d)[:, :t].astype(q.dtype)
    return Advanced(out, state.put(layer, one), freed, died)


Recurrence = Callable[..., Advanced]
"""Something that does what `advance` does."""


def on(backend: Backend, recurrence: Recurrence = advance) -> Recurrence:
    """A recurrence computed by a backend: `read(..., recurrence=on("tpu"))`. The same one each time, so that what is
    compiled for it is found again."""
    return _on(backend, recurrence)


@cache
def _on(backend: Backend, recurrence: Recurrence) -> Recurrence:
    return partial(recurrence, backend=backend)


class _How(NamedTuple):
    policy: Policy
    around: Around
    window: Any
    backend: Backend


def _rule(state: KVState, how: _How) -> Rule | None:
    """What a kernel may follow on its own, where all else is as kernels know it."""
    rule = how.policy.rule(state.capacity) if how.around.placement == "absolute" else None
    return rule and rule._replace(spare=_spare(state, how))


def _no_rule(rule: Rule | None, how: _How) -> str | None:
    """Why a kernel that sees more than one token cannot do it."""
    return None if rule else f"policy {how.policy.name}, or where it places tokens, follows no rule that kernels know"


class _Block(NamedTuple):
    """T tokens: q [B, T, H, D], k and v [B, T, K, D] as the cache stores them, and `bare`, all three before RoPE;
    `replaces` as in `Entering`, or None."""

    q: Array
    k: Stored
    v: Stored
    positions: Array
    bare: Incoming
    replaces: Array | None

    def grouped(self, state: KVState) -> Array:
        """Queries as [B, T, K, G, D] for the heads of a state."""
        return self.q.reshape(*self.q.shape[:2], state.kv_heads, -1, self.q.shape[-1])


class _Entries(NamedTuple):
    """What goes into slots: one entry per token, or in a pool one per token and kv head. Keys and values are stored."""

    keys: Any  # [B, K, M, D]
    values: Any
    positions: Array  # [B, P, M]
    owner: Array | None  # [B, 1, M]


class _Done(NamedTuple):
    out: Array
    state: KVState
    freed: Array
    died: Array


def _entries(block: _Block, state: KVState) -> _Entries:
    b, t, heads = jax.tree.leaves(block.k)[0].shape[:3]
    if state.owner is None:
        held = jnp.broadcast_to(block.positions[:, None], (b, state.sets, t))
        owner, turn = None, lambda x: x.swapaxes(1, 2)
    else:
        held = jnp.repeat(block.positions, heads, axis=1)[:, None]
        turn = lambda x: x.reshape(b, 1, t * heads, *x.shape[3:])
        owner = jnp.broadcast_to(jnp.tile(jnp.arange(heads), t), held.shape)
    return _Entries(jax.tree.map(turn, block.k), jax.tree.map(turn, block.v), held, owner)


def _candidates(state: KVState, layer: Any, how: _How, entries: _Entries | None = None) -> Candidates:
    """One layer as a policy sees it: its slots, or entries that come in."""
    at = lambda x: jax.tree.map(lambda y: y[layer], x)
    if entries is None:
        entries = _Entries(at(state.keys), at(state.values), state.positions[layer], at(state.owner))
    return Candidates(
        load(entries.keys), load(entries.values), entries.positions, entries.owner, state.seen,
        state.layer[layer], at(state.memory), state.capacity, how.around,
    )  # fmt: skip


def _remember(state: KVState, layer: Any, policy: Policy, bare: Incoming) -> KVState:
    old = jax.tree.map(lambda x: x[layer], state.memory)
    new = policy.remember(old, jax.lax.stop_gradient(bare))
    return replace(state, memory=_set(state.memory, layer, new))


def _set(stack: Any, layer: Any, one: Any) -> Any:
    return jax.tree.map(lambda x, y: x.at[layer].set(y), stack, one)


def _seen_by(held: Array, owner: Array | None, heads: int, group: int) -> Array:
    """[B, P or K, 1 or G, N]: the slots in which a head's tokens may be."""
    occupied = (held >= 0)[:, :, None]
    if owner is None:
        return occupied
    return occupied & (owner[:, :, None] == (jnp.arange(heads) // group)[:, None])


def _token(block: _Block, state: KVState, layer: Int[Array, ""] | int, how: _How) -> _Done:
    """One token: into a free slot, attend, evict by marking slots free. K and V are read once, never moved."""
    policy, position = how.policy, block.positions[:, 0]
    freed, died, replaced = None, position, None
    if how.window is not None:  # first of all: what has left the window takes no other token's place
        held = _alive(state.positions[layer], position, how.window)
        state = replace(state, positions=state.positions.at[layer].set(held))
    if block.replaces is not None:
        held = state.positions[layer]
        goes = _replaced(held, block, state.seen)
        replaced = jnp.where(goes, held, -1).max(-1, keepdims=True)
        state = replace(state, positions=state.positions.at[layer].set(jnp.where(goes, -1, held)))
    if policy.evict == "before":
        state, freed = _evict(state, layer, how, rows=position >= 0)
        died = position
    state = _remember(state, layer, policy, block.bare)
    entries = _entries(block, state)
    state, index = _enter(state, layer, entries, how)
    held, owner = state.positions[layer], jax.tree.map(lambda x: x[layer], state.owner)
    q, new, stored = block.grouped(state)[:, 0], (entries.keys, entries.values), (state.keys, state.values)
    rule = _rule(state, how)
    if rule is not None and replaced is None:
        chosen = choose("step_evict", call_of(q[:, None], state.keys, state.sets, rule), how.backend)
        if chosen is not None:
            out, numbers, goes, stored = slot_step_by_rule(
                chosen, q, new, stored, layer, index, held, _numbers(state, layer), position >= 0, rule
            )
            state = _with_numbers(_with_stored(state, stored), layer, numbers)
            leaves = jnp.arange(held.shape[-1]) == goes[..., None]
            state = replace(state, positions=state.positions.at[layer].set(jnp.where(leaves, -1, held)))
            freed = jnp.where(leaves, held, -1).max(-1, keepdims=True)
            return _Done(out[:, None], state, freed, jnp.broadcast_to((position + 1)[:, None, None], freed.shape))
    visible, extra = _seen_by(held, owner, how.around.heads[0], how.around.group), _extra(state, layer, how)
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
    state = _with_stored(state, stored)
    if not policy.forgets:
        # Nothing is freed, so a token that found no slot must not go unnoticed.
        stored = ((held == position[:, None, None]).any(-1) | (position < 0)[:, None])[..., None, None]
        out = jnp.where(stored, out, jnp.nan)
    count = visible.sum(-1, dtype=jnp.float32).mean(-1, keepdims=True)
    seen = Observation(weights[:, :, :, None], position[:, None], count, how.around.group)
    state = _observe(state, layer, policy, seen)
    if policy.evict == "after":
        state, freed = _evict(state, layer, how)
        died = position + 1
    if freed is None:
        freed, died = jnp.full((*held.shape[:2], 1), -1, jnp.int32), position
    died = jnp.broadcast_to(jnp.reshape(died, (-1, 1, 1)), freed.shape)
    if replaced is not None:
        freed = jnp.concatenate([freed, replaced], axis=-1)
        died = jnp.concatenate([died, jnp.broadcast_to(position[:, None, None], replaced.shape)], axis=-1)
    return _Done(out[:, None], state, freed, died)


def _replaced(held: SlotPositions, block: _Block, seen: Int[Array, " B"]) -> Array:
    """[B, P, N] bool: which tokens have a next one, in the block, that takes their slot."""
    assert block.replaces is not None
    b, t = block.positions.shape
    nth = jnp.where(block.positions >= 0, block.positions - seen[:, None], t)
    table = jnp.zeros((b, held.shape[1], t), bool)
    rows, sets = jnp.indices((b, held.shape[1], 1), sparse=True)[:2]
    table = table.at[rows, sets, nth[:, None]].set(block.replaces.swapaxes(1, 2), mode="drop")
    following = held + 1 - seen[:, None, None]
    found = jnp.take_along_axis(table, following.clip(0, t - 1), axis=-1)
    return found & (held >= 0) & (following >= 0) & (following < t)


def _extra(state: KVState, layer: Any, how: _How) -> Extra:
    """What a policy adds to attention: a bias on the slots, stand-ins for what was evicted."""
    policy, at = how.policy, lambda x: jax.tree.map(lambda y: y[layer], x)
    bias = None if policy.bias is None else policy.bias(at(state.stats))
    return Extra(bias, None if policy.summary is None else policy.summary(at(state.memory), how.around))


def _enter(state: KVState, layer: Any, entries: _Entries, how: _How) -> tuple[KVState, Array]:
    """Gives the entries of one token free slots of each set; nothing happens in rows without a token.

    Returns the state, in which keys and values are still to be written, and where: [B, P, M], S for nowhere.
    """
    held = state.positions[layer]
    slots, m = held.shape[-1], entries.positions.shape[-1]
    # A free slot has -1, so it comes before all others.
    index = held.argmin(-1, keepdims=True) if m == 1 else jax.lax.top_k(-held, m)[1]
    free = jnp.take_along_axis(held, index, axis=-1) < 0
    spare = _spare(state, how)
    if spare and not how.policy.forgets:  # else there is room at every step
        free &= (held < 0).sum(-1, keepdims=True) >= m + spare
    index = jnp.where(free & (entries.positions >= 0), index, slots)  # [B, P, M]; out of bounds: dropped
    stats = how.policy.init(_candidates(state, layer, how, entries))

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


def _with_stored(state: KVState, stored: tuple[Stored, Stored]) -> KVState:
    return replace(state, keys=stored[0], values=stored[1])


def _numbers(state: KVState, layer: Any) -> Array | None:
    """The one number per slot of a policy that a kernel follows, [B, P, S], if it has any."""
    numbers = jax.tree.leaves(state.stats)
    return numbers[0][layer] if numbers else None


def _with_numbers(state: KVState, layer: Any, numbers: Array | None) -> KVState:
    if numbers is None:
        return state
    return replace(state, stats=jax.tree.map(lambda x: x.at[layer].set(numbers), state.stats))


def _stream(block: _Block, state: KVState, layer: Any, how: _How, rule: Rule | None) -> Advanced | None:
    """All tokens in one launch of a kernel that follows the policy; None where there is none that will."""
    q, held = block.grouped(state), state.positions[layer]
    chosen = choose("segment", call_of(q, state.keys, state.sets, rule), how.backend, _no_rule(rule, how))
    if chosen is None or rule is None:
        return None
    out, stored, held, numbers, freed = stream_attention(
        chosen, q, (block.k, block.v), (state.keys, state.values), layer, block.positions, held,
        _numbers(state, layer), how.window, rule,
    )  # fmt: skip
    state = _with_numbers(_with_stored(state, stored), layer, numbers)
    state = replace(state, positions=state.positions.at[layer].set(held))
    freed = freed.transpose(2, 0, 1)[..., None]  # [T, B, P, 1]
    died = jnp.broadcast_to((block.positions + 1).T[:, :, None, None], freed.shape)
    return Advanced(out, state, freed, died)


def _observe(state: KVState, layer: Any, policy: Policy, seen: Observation) -> KVState:
    old = jax.tree.map(lambda x: x[layer], state.stats)
    return replace(state, stats=_set(state.stats, layer, policy.observe(old, jax.lax.stop_gradient(seen))))


def _evict(state: KVState, layer: Any, how: _How, rows: Array | None = None) -> tuple[KVState, Array]:
    """Frees slots of each set in which there is no room for another token; returns the freed positions, -1 for none."""
    policy, held, score = how.policy, state.positions[layer], how.policy.score
    if score is None:
        return state, jnp.full((*held.shape[:2], 1), -1, jnp.int32)
    n = policy.frees * _entries_per_token(state, how)

    def ranked() -> Array:
        stats = jax.tree.map(lambda x: x[layer], state.stats)
        return jax.lax.stop_gradient(score(stats, _candidates(state, layer, how)))

    if n == 1:
        goes = jnp.arange(held.shape[-1]) == worst(ranked(), held, _spare(state, how))[..., None]
    else:
        full = (held < 0).sum(-1) < _entries_per_token(state, how) + _spare(state, how)

        def lowest() -> Array:
            stay = (held >= 0).sum(-1) - jnp.where(full, n, 0)
            return (held >= 0) & ~keep_top(ranked(), held, stay)

        goes = jax.lax.cond(full.any(), lowest, lambda: jnp.zeros(held.shape, bool))
    if rows is not None:
        goes &= rows[:, None, None]
    marked = jnp.where(goes, held, -1)
    if n == 1:
        freed = marked.max(-1, keepdims=True)
    elif policy.absorb is None and state.owner is None:
        freed = jax.lax.top_k(marked, n)[0]
    else:
        freed = None
    after = replace(state, positions=state.positions.at[layer].set(jnp.where(goes, -1, held)))
    if freed is None or policy.absorb is not None:
        index = jax.lax.top_k(jnp.where(goes, held, -1), n)[1]
        gone = jnp.take_along_axis(marked, index, axis=-1)
        if policy.absorb is not None:
            merged = lambda: _absorb(after, layer, how, _gone(state, layer, index, gone))
            # Where many are freed at once, most steps free nothing.
            after = merged() if policy.frees == 1 else jax.lax.cond((gone >= 0).any(), merged, lambda: after)
        freed = _by_owner(gone, index, jax.tree.map(lambda x: x[layer], state.owner), how)
    return after, freed


def _spare(state: KVState, how: _How) -> int:
    """Slots that are allocated and stay free (see `init_state`)."""
    return state.positions.shape[-1] - how.policy.slots(state.capacity, _entries_per_token(state, how))


def _entries_per_token(state: KVState, how: _How) -> int:
    return 1 if state.owner is None else how.around.heads[1]


def _by_owner(freed: Array, index: Array, owner: Array | None, how: _How) -> Array:
    """Freed entries of a pool [B, 1, M] -> of each kv head [B, K, M]."""
    if owner is None:
        return freed
    whose = jnp.take_along_axis(owner, index, axis=-1)
    return jnp.where(whose == jnp.arange(how.around.heads[1])[:, None], freed, -1)


def _gone(state: KVState, layer: Any, index: Array, freed: Array) -> Gone:
    """The tokens at these slots."""

    def at(x: Array) -> Array:
        x = x[layer]
        where = jnp.broadcast_to(index, (*x.shape[:2], index.shape[-1]))
        return jnp.take_along_axis(x, where.reshape(*where.shape, *[1] * (x.ndim - 3)), axis=2)

    pick = lambda x: jax.tree.map(at, x)
    return Gone(load(pick(state.keys)), load(pick(state.values)), freed, pick(state.stats), pick(state.owner))


def _absorb(state: KVState, layer: Any, how: _How, gone: Gone) -> KVState:
    """Merges evicted tokens into what stays; only slots that change are stored anew."""
    assert how.policy.absorb is not None
    stats = jax.tree.map(lambda x: x[layer], state.stats)
    done = how.policy.absorb(stats, _candidates(state, layer, how), gone)
    fresh = store(done.values, jax.tree.map(lambda x: x[layer], state.values))

    def put(old: Array, new: Array) -> Array:
        changed = done.changed.reshape(*done.changed.shape, *[1] * (new.ndim - 3))
        return old.at[layer].set(jnp.where(changed, new, old[layer]))

    return replace(
        state,
        values=jax.tree.map(put, state.values, fresh),
        stats=_set(state.stats, layer, done.stats),
        memory=_set(state.memory, layer, done.memory),
    )


def _block(block: _Block, state: KVState, how: _How) -> _Done:
    """T tokens at once into a state of one layer: attend to slots and each other, then select from all of them.

    What stays of the slots stays where it is; what stays of the block goes into the slots set free.
    """
    policy, around, positions = how.policy, how.around, block.positions
    newest = positions.max(-1)
    oldest = jnp.where(positions >= 0, positions, newest[:, None]).min(-1)  # -1 in rows without a token
    freed_before = None
    if policy.evict == "before":
        state = replace(state, positions=_alive(state.positions[0], oldest, how.window)[None])
        state, freed_before = _make_room(state, how, (positions >= 0).sum(-1))
    state = _remember(state, 0, policy, block.bare)
    entries = _entries(block, state)
    fresh = policy.init(_candidates(state, 0, how, entries))
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
    mine = _seen_by(held, whole["owner"], around.heads[0], around.group)[:, :, :, None]
    replaced = jnp.zeros((), bool) if block.replaces is None else _replaced(held, block, state.seen)
    summary = _extra(state, 0, how).summary

    def attend(stats: Any, queries: Any) -> tuple[Any, Array]:
        q, at = queries
        scores = jnp.einsum("btkgd,bknd->bkgtn", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        if key_scale is not None:
            scores *= key_scale[:, :, None, None]
        if policy.bias is not None:
            scores += policy.bias(stats)[:, :, None, None]
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
        out = jnp.einsum("bkgtn,bknd->btkgd", scaled.astype(values.dtype), values)
        if summary is not None:
            out += jnp.einsum("bkgtm,bkmd->btkgd", shares, summary.values).astype(out.dtype)
        seen = Observation(weights, at, visible.sum(-1, dtype=jnp.float32).mean(2), around.group)
        return policy.observe(stats, jax.lax.stop_gradient(seen)), out

    folded = _fold(block, state, how, whole, q)
    stats, out = _scan_queries(attend, stats, q, positions) if folded is None else folded
    now = jnp.where(newest >= 0, newest, state.seen - 1)
    lived = _alive(held, now, how.window)
    alive = jnp.where(replaced, -1, lived)
    everything = replace(state, **jax.tree.map(lambda x: x[None], dict(whole, positions=alive, stats=stats)))
    if policy.score is None:
        kept = alive >= 0
    else:
        scores = jax.lax.stop_gradient(policy.score(stats, _candidates(everything, 0, how)))
        most = jnp.full(state.seen.shape, state.capacity)
        if policy.evict == "once":
            most = jnp.where(state.seen == 0, policy.keep * _entries_per_token(state, how), alive.shape[-1])
        kept = keep_top(scores, alive, most[:, None])
    freed = jnp.where((lived >= 0) & ~kept, lived, -1)
    slots = state.positions.shape[-1]
    settled = _settle(everything, kept, slots)
    if policy.absorb is not None:
        index = jax.lax.top_k(freed, freed.shape[-1] - min(state.capacity, freed.shape[-1] - 1))[1]
        gone = _gone(everything, 0, index, jnp.take_along_axis(freed, index, axis=-1))
        settled = _absorb(settled, 0, how, gone)
    every = jnp.broadcast_to(jnp.arange(freed.shape[-1]), freed.shape)
    freed = _by_owner(freed, every, whole["owner"], how)
    died = jnp.where(replaced, held + 1, jnp.broadcast_to((newest + 1)[:, None, None], freed.shape))
    if freed_before is not None:
        died = jnp.concatenate([jnp.broadcast_to(oldest[:, None, None], freed_before.shape), died], axis=-1)
        freed = jnp.concatenate([freed_before, freed], axis=-1)
    if not policy.forgets:
        lost = (kept.sum(-1) > slots - _spare(state, how))[:, None, :, None, None]
        out = jnp.where(lost, jnp.nan, out)
    return _Done(out, settled, freed, died)


def _fold(block: _Block, state: KVState, how: _How, whole: Any, q: Array) -> tuple[Any, Array] | None:
    """Stats and output by a kernel, where the policy follows a rule; None: where none will."""
    rule, held, positions = _rule(state, how), whole["positions"], block.positions
    chosen = choose("block", call_of(q, whole["keys"], held.shape[1], rule), how.backend, _no_rule(rule, how))
    if chosen is None or rule is None:
        return None
    out, last, total = block_attention(chosen, q, positions, whole["keys"], whole["values"], held, how.window)
    present = (positions.max(-1) >= 0)[:, None, None]
    mean = lambda x: x.mean((1, 2))[:, None] if held.shape[1] == 1 else x.mean(2)
    observed = lambda x: x + mean(total) if rule.fold == "sum" else jnp.where(present, mean(last), x)
    return jax.tree.map(observed, whole["stats"]), out  # no stats where nothing is folded


def _make_room(state: KVState, how: _How, coming: Array) -> tuple[KVState, Array]:
    """Evicts before a block, so that slots and block together fill the capacity."""
    held = state.positions[0]
    assert how.policy.score is not None
    scores = how.policy.score(jax.tree.map(lambda x: x[0], state.stats), _candidates(state, 0, how))
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


def _alive(held: SlotPositions, now: Int[Array, " B"], window: Any) -> SlotPositions:
    """Without the tokens that have left a sliding window for good."""
    if window is None:
        return held
    return jnp.where(held > (now - window)[:, None, None], held, -1)


def death_times(freed: Int[Array, "n B P F"], died: Int[Array, "n B P F"], total: int) -> Int[Array, "B P total"]:
    """The first position whose query no longer sees each token; `total` for tokens still held.

    Under these times the mask `j <= i < death[j]` makes plain attention equal to the recurrence.
    """
    n, b, sets, f = freed.shape
    flat = lambda x: x.transpose(1, 2, 0, 3).reshape(b, sets, n * f)
    token = jnp.where(flat(freed) >= 0, flat(freed), total)  # out of bounds: dropped
    rows, heads = jnp.indices((b, sets, 1), sparse=True)[:2]
    return jnp.full((b, sets, total), total, jnp.int32).at[rows, heads, token].set(flat(died), mode="drop")
