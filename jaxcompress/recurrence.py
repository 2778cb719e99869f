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

from jaxcompress._layer import (
    Block,
    How,
    rule_numbers,
    rule_of,
    why_no_rule,
    with_layer,
    with_rule_numbers,
    with_stored,
)
from jaxcompress._many_tokens import many_tokens
from jaxcompress._one_token import one_token
from jaxcompress.attention import call_of, stream_attention
from jaxcompress.pallas_kernels.by_device import by_device
from jaxcompress.pallas_kernels.contract import Backend, Rule, choose
from jaxcompress.policies.base import Around, Incoming, Placement, Policy, Rotate
from jaxcompress.shapes import AttentionOut, Keys, Positions, Queries, Values
from jaxcompress.state import KVState
from jaxcompress.storage import store


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
    run = partial(_advance, q, k, v, positions, state, layer, policy, chunk, rotate, placement, window, project)
    return by_device(run, backend, (q, k, v, positions, state))


def _advance(
    q: Queries, k: Keys, v: Values, positions: Positions, state: KVState, layer: Int[Array, ""] | int, policy: Policy,
    chunk: int, rotate: Rotate, placement: Placement | None, window: Int[Array, ""] | int | None,
    project: Float[Array, "K G D E"] | None, backend: Backend,
) -> Advanced:  # fmt: skip
    b, t, h, d = q.shape
    placement = placement or policy.placement
    around = Around(rotate, placement, project, (h, k.shape[2]), state.heads or tuple(range(state.kv_heads)))
    bare = Incoming(q, k, v, positions)
    replaces = None
    if policy.joins:
        entering = policy.enter(jax.tree.map(lambda x: x[layer], state.memory), bare, state.layer[layer], around)
        k, v, replaces = entering.k, entering.v, entering.replaces
        state = replace(state, memory=with_layer(state.memory, layer, jax.lax.stop_gradient(entering.memory)))
    if policy.scope == "query_head":
        k, v = (jnp.repeat(x, h // k.shape[2], axis=2) for x in (k, v))
    if placement == "absolute":
        at = positions[..., None]
        q, k = rotate(q, at), rotate(k, at)
    keys, values = store(k, state.keys), store(v, state.values)  # all at once, and never again
    how = How(policy, around, window, backend)
    rule = rule_of(state, how)
    if t == 1:
        done = one_token(Block(q, keys, values, positions, bare, replaces), state, layer, how)
        return Advanced(done.out.reshape(b, 1, h, d).astype(q.dtype), done.state, done.freed[None], done.died[None])
    if chunk == 1:
        done = _stream(Block(q, keys, values, positions, bare, replaces), state, layer, how, rule)
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
        block = Block(q, keys, values, positions, Incoming(bare[0], bare[1], bare[2], positions), replaces)
        done = one_token(block, one, 0, how) if chunk == 1 else many_tokens(block, one, how)
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


def _stream(block: Block, state: KVState, layer: Any, how: How, rule: Rule | None) -> Advanced | None:
    """All tokens in one launch of a kernel that follows the policy; None where there is none that will."""
    q, held = block.grouped(state), state.positions[layer]
    chosen = choose("segment", call_of(q, state.keys, state.sets, rule), how.backend, why_no_rule(rule, how))
    if chosen is None or rule is None:
        return None
    out, stored, held, numbers, freed = stream_attention(
        chosen, q, (block.k, block.v), (state.keys, state.values), layer, block.positions, held,
        rule_numbers(state, layer), how.window, rule,
    )  # fmt: skip
    state = with_rule_numbers(with_stored(state, stored), layer, numbers)
    state = replace(state, positions=state.positions.at[layer].set(held))
    freed = freed.transpose(2, 0, 1)[..., None]  # [T, B, P, 1]
    died = jnp.broadcast_to((block.positions + 1).T[:, :, None, None], freed.shape)
    return Advanced(out, state, freed, died)


def death_times(freed: Int[Array, "n B P F"], died: Int[Array, "n B P F"], total: int) -> Int[Array, "B P total"]:
    """The first position whose query no longer sees each token; `total` for tokens still held.

    Under these times the mask `j <= i < death[j]` makes plain attention equal to the recurrence.
    """
    n, b, sets, f = freed.shape
    flat = lambda x: x.transpose(1, 2, 0, 3).reshape(b, sets, n * f)
    token = jnp.where(flat(freed) >= 0, flat(freed), total)  # out of bounds: dropped
    rows, heads = jnp.indices((b, sets, 1), sparse=True)[:2]
    return jnp.full((b, sets, total), total, jnp.int32).at[rows, heads, token].set(flat(died), mode="drop")
