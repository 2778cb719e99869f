"""The recurrence with its gradient in parallel.

All that a policy decides is when each token is freed. Once that is known, attention under the mask
`born <= i < dies` is the recurrence: the tokens of a block can be differentiated through at once, and nothing that the
recurrence held on its way has to be kept for it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.attention import lifetime_attention
from jaxcompress.pallas_kernels.contract import Backend
from jaxcompress.policies.base import Placement, Policy, Rotate
from jaxcompress.recurrence import Advanced, advance, death_times
from jaxcompress.shapes import Keys, Positions, Queries, Values
from jaxcompress.state import KVState
from jaxcompress.storage import Quantised

FOREVER = jnp.iinfo(jnp.int32).max


def check_parallel(policy: Policy, placement: Placement | None = None) -> None:
    """Raises ValueError if death times are not all that a policy decides; says what else it does."""
    for mine in policy.layers or (policy,):
        reasons = {
            "changes what enters": mine.joins,
            "merges or summarises what it evicts": mine.reduces,
            "moves tokens to other positions": (placement or mine.placement) != "absolute",
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(
                    f"policy {mine.name} {reason}, so that its gradient does not follow from death times: "
                    "differentiate through `advance` instead"
                )


def advance_parallel(
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
    """As `jaxcompress.recurrence.advance`, with the same results and the same gradient.

    The forward pass is the recurrence itself. The gradient is that of attention under the death times it found, for
    blocks of queries at once: no step of the recurrence is repeated or reversed.

    Raises:
      ValueError: a policy that does more than evict (see `check_parallel`), or a quantised state.
    """
    check_parallel(policy, placement)
    one = state.take(layer)
    if isinstance(one.keys, Quantised) or isinstance(one.values, Quantised):
        raise ValueError(f"no gradient passes through keys stored as {one.keys.dtype}; train in a plain dtype")
    still = jax.lax.stop_gradient
    how: dict[str, Any] = dict(
        chunk=chunk, rotate=rotate, placement=placement, window=window,
        project=None if project is None else still(project), backend=backend,
    )  # fmt: skip
    done = advance(still(q), still(k), still(v), positions, still(one), 0, policy, **how)

    b, t, h, d = q.shape
    group = h // k.shape[2]
    if policy.scope == "query_head":
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    kv = k.shape[2]
    at = positions[..., None]
    q, k = rotate(q, at), rotate(k, at)
    keys, values = (x.swapaxes(1, 2).astype(one.keys.dtype) for x in (k, v))  # [B, K, T, D], as cached
    # As when both were attended to: from the slots as they were, and the block.
    wide = lambda x: jnp.broadcast_to(x[0], (b, kv, *x.shape[3:]))
    before = one.positions[0]
    if one.owner is not None:
        before = jnp.where(one.owner[0] == jnp.arange(kv)[:, None], before, -1)
    born = jnp.concatenate([before, jnp.broadcast_to(positions[:, None], (*before.shape[:2], t))], axis=-1)
    dies = _dies(before, positions, one.seen, done)
    if window is not None:
        dies = jnp.minimum(dies, jnp.where(born > FOREVER - window, FOREVER, born + window))
    alive = one.positions.shape[-1] + (chunk if chunk > 1 else 0)
    out: Any = _given(
        alive, q.reshape(b, t, kv, -1, d), jnp.concatenate([wide(one.keys), keys], axis=2),
        jnp.concatenate([wide(one.values), values], axis=2), done.out.reshape(b, t, kv, -1, d), (positions, born, dies),
    )  # fmt: skip

    # Slots never move: what a slot holds is what it held, or came with this block.
    after = done.state
    column = _column(after.positions[0], positions)
    fresh = (after.positions[0] >= one.seen[:, None, None])[..., None]

    def settle(old: Array, block: Array) -> Array:
        if after.owner is not None:  # a pool, of all heads' tokens
            new = block[jnp.arange(b)[:, None, None], after.owner[0], column]
        else:
            new = jnp.take_along_axis(block, jnp.broadcast_to(column, (b, kv, column.shape[-1]))[..., None], axis=2)
        return jnp.where(fresh, new, old[0])[None]

    held = replace(after, keys=settle(one.keys, keys), values=settle(one.values, values))
    return done._replace(out=out.reshape(b, t, h, d), state=state.put(layer, held))


def _dies(before: Int[Array, "B P S"], positions: Positions, seen: Int[Array, " B"], done: Advanced) -> Array:
    """[B, P, S + T]: when the tokens in the slots and those of the block die."""
    flat = lambda x: x.transpose(1, 2, 0, 3).reshape(*x.shape[1:3], -1)
    freed, died = flat(done.freed), flat(done.died)
    hit = (freed[..., None] == before[:, :, None]) & (freed[..., None] >= 0)
    old = jnp.where(hit, died[..., None], -1).max(2)
    first = seen[:, None, None]
    fresh = jnp.where(done.freed >= first, done.freed - first, -1)
    new = first + death_times(fresh, done.died - first, positions.shape[1])  # after the block is never, within it
    column = jnp.maximum(positions - seen[:, None], 0)[:, None]
    new = jnp.take_along_axis(new, jnp.broadcast_to(column, new.shape), axis=-1)
    return jnp.concatenate([jnp.where(old < 0, FOREVER, old), new], axis=-1)


def _column(held: Int[Array, "B P S"], positions: Positions) -> Int[Array, "B P S"]:
    """Where in the block each token is; anything for those that are not in it. Padding may stand between tokens."""
    filled = jax.lax.cummax(positions, axis=1)
    return jax.vmap(lambda row, at: jnp.searchsorted(row, at))(filled, held).clip(max=positions.shape[1] - 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _given(alive: int, q: Array, keys: Array, values: Array, out: Array, lives: Any) -> Array:
    """`out`, with the gradient of `lifetime_attention`, of which it is the result."""
    return out


def _forward(alive: int, q: Array, keys: Array, values: Array, out: Array, lives: Any) -> tuple[Array, Any]:
    return out, (q, keys, values, lives)


def _backward(alive: int, saved: Any, cotangent: Array) -> tuple[Any, ...]:
    q, keys, values, lives = saved
    attend = lambda q, keys, values: lifetime_attention(q, keys, values, *lives, alive=alive)
    _, pull = jax.vjp(attend, q, keys, values)
    return *pull(cotangent), jnp.zeros_like(cotangent), None


_given.defvjp(_forward, _backward)
