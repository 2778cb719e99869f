"""The recurrence with its gradient in parallel.

A policy decides only when each token is freed. Once these times are known, attention under the mask `born <= i < dies`
equals the recurrence. All tokens of a block can then be differentiated at once, and no intermediate state of the
recurrence has to be stored.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.advance import death_times, steps
from jaxcompress.recurrence.block_attention import lifetime_attention
from jaxcompress.recurrence.step import StepResult, StepSpec, TokenBlock
from jaxcompress.state.attention_traits import AttentionTraits
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import Positions
from jaxcompress.state.storage import Quantised

FOREVER = jnp.iinfo(jnp.int32).max


def check_parallel(policy: Policy, placement: Placement | None = None) -> None:
    """Raises ValueError if a policy decides more than death times; the message says what else it does."""
    for mine in policy.layers or (policy,):
        reasons = {
            "changes what enters": mine.gates is not None,
            "merges or summarises what it evicts": mine.reduction is not None,
            "moves tokens to other positions": (placement or mine.placement) != "absolute",
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(
                    f"policy {mine.name} {reason}, so that its gradient does not follow from death times: "
                    "differentiate through `advance` instead"
                )


def parallel_gradient(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
    """The recurrence, with the gradient of attention under the death times of its forward pass.

    Results and gradient are those of `jaxcompress.recurrence.advance.steps`. The gradient is taken for blocks of
    queries at once: no step of the recurrence is repeated or reversed.

    Raises:
      ValueError: the policy does more than evict (see `check_parallel`), or the state is quantised.
    """
    check_parallel(spec.policy, spec.context.placement)
    one = state.take(layer)
    if isinstance(one.keys, Quantised) or isinstance(one.values, Quantised):
        raise ValueError(f"no gradient passes through keys stored as {one.keys.dtype}; train in a plain dtype")
    still = jax.lax.stop_gradient
    context = spec.context
    context = context._replace(out=None if context.out is None else still(context.out), traits=still(context.traits))
    done = steps(still(block), still(one), 0, spec._replace(context=context))

    positions = block.positions
    k, v = cast(tuple[Array, Array], (block.k, block.v))
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, D], as cached
    b, kv, t = keys.shape[:3]
    # As at the time of attention: the slots before the block, and the block.
    wide = lambda x: jnp.broadcast_to(x[0], (b, kv, *x.shape[3:]))
    before = one.positions[0]
    if one.owner is not None:
        before = jnp.where(one.owner[0] == jnp.arange(kv)[:, None], before, -1)
    born = jnp.concatenate([before, jnp.broadcast_to(positions[:, None], (*before.shape[:2], t))], axis=-1)
    dies = _dies(before, positions, one.seen, done)
    if spec.window is not None:
        dies = jnp.minimum(dies, jnp.where(born > FOREVER - spec.window, FOREVER, born + spec.window))
    alive = one.positions.shape[-1] + (spec.chunk if spec.chunk > 1 else 0)
    q = block.q.reshape(b, t, kv, -1, block.q.shape[-1])
    out: Any = _given(
        alive, q, jnp.concatenate([wide(one.keys), keys], axis=2), jnp.concatenate([wide(one.values), values], axis=2),
        spec.context.traits, done.out.reshape(q.shape), (positions, born, dies),
    )  # fmt: skip

    # Slots never move: a slot holds its old token or a token of this block.
    after = done.state
    column = _column(after.positions[0], positions)
    fresh = (after.positions[0] >= one.seen[:, None, None])[..., None]

    def settle(old: Array, block: Array) -> Array:
        if after.owner is not None:  # a pool holds the tokens of all heads
            new = block[jnp.arange(b)[:, None, None], after.owner[0], column]
        else:
            new = jnp.take_along_axis(block, jnp.broadcast_to(column, (b, kv, column.shape[-1]))[..., None], axis=2)
        return jnp.where(fresh, new, old[0])[None]

    held = replace(after, keys=settle(one.keys, keys), values=settle(one.values, values))
    return done._replace(out=out.reshape(done.out.shape), state=state.put(layer, held))


def _dies(before: Int[Array, "B P S"], positions: Positions, seen: Int[Array, " B"], done: StepResult) -> Array:
    """[B, P, S + T]: the death times of the tokens in the slots and of those in the block."""
    flat = lambda x: x.transpose(1, 2, 0, 3).reshape(*x.shape[1:3], -1)
    freed, died = flat(done.freed), flat(done.died)
    hit = (freed[..., None] == before[:, :, None]) & (freed[..., None] >= 0)
    old = jnp.where(hit, died[..., None], -1).max(2)
    first = seen[:, None, None]
    fresh = jnp.where(done.freed >= first, done.freed - first, -1)
    new = first + death_times(fresh, done.died - first, positions.shape[1])  # beyond the block: still held
    column = jnp.maximum(positions - seen[:, None], 0)[:, None]
    new = jnp.take_along_axis(new, jnp.broadcast_to(column, new.shape), axis=-1)
    return jnp.concatenate([jnp.where(old < 0, FOREVER, old), new], axis=-1)


def _column(held: Int[Array, "B P S"], positions: Positions) -> Int[Array, "B P S"]:
    """The index of each token in the block; arbitrary for tokens outside it. Padding may stand between tokens."""
    filled = jax.lax.cummax(positions, axis=1)
    return jax.vmap(lambda row, at: jnp.searchsorted(row, at))(filled, held).clip(max=positions.shape[1] - 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _given(alive: int, q: Array, keys: Array, values: Array, traits: AttentionTraits, out: Array, lives: Any) -> Array:
    """Returns `out`, the result of `lifetime_attention`, with the gradient of that function."""
    return out


def _forward(
    alive: int, q: Array, keys: Array, values: Array, traits: AttentionTraits, out: Array, lives: Any
) -> tuple[Array, Any]:
    return out, (q, keys, values, traits, lives)


def _backward(alive: int, saved: Any, cotangent: Array) -> tuple[Any, ...]:
    *inputs, lives = saved
    attend = lambda q, keys, values, traits: lifetime_attention(q, keys, values, *lives, alive=alive, traits=traits)
    _, pull = jax.vjp(attend, *inputs)
    return *pull(cotangent), jnp.zeros_like(cotangent), None


_given.defvjp(_forward, _backward)
