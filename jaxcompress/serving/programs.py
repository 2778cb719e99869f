"""The compiled programs of a pool: write a row, take a row, read into a row, write tokens with some rows.

Their shapes are those of the pool. What arrives, and when, are values, so that nothing is compiled after `warm_up`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxcompress.distributed.rules import ShardingRules, placed
from jaxcompress.generation.decode_state import DecodeArrays, first_broken
from jaxcompress.generation.sampling import remember
from jaxcompress.models.decoder import Decoder, last_hidden, read
from jaxcompress.policies.policy import Policy
from jaxcompress.serving.row_sampling import TOP, Likely, RowSampling, likely, no_likely, sample_rows
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.placement import Placement


def _by_row(per_layer: Callable[..., Any], per_row: Callable[..., Any], *given: DecodeArrays) -> DecodeArrays:
    """Applies a function to all arrays [L, B, ...], and one to all arrays [B, ...]."""

    def part(*parts: KVState) -> KVState:
        layered = jax.tree.map(per_layer, *(one.layered() for one in parts))
        return replace(parts[0], seen=per_row(*(one.seen for one in parts)), **layered)

    kv = tuple(part(*parts) for parts in zip(*(one.kv for one in given), strict=True))
    return DecodeArrays(kv, *(per_row(*arrays) for arrays in zip(*(one[1:] for one in given), strict=True)))


def rows_of(pool: DecodeArrays, index: Int[Array, " W"] | None) -> DecodeArrays:
    """The rows at these indices; None: all of them."""
    return pool if index is None else _by_row(lambda x: x[:, index], lambda x: x[index], pool)


def with_rows(pool: DecodeArrays, index: Int[Array, " W"] | None, rows: DecodeArrays) -> DecodeArrays:
    """The pool with rows replaced. No index comes twice."""
    if index is None:
        return rows
    put = lambda x, y: x.at[index].set(y, unique_indices=True)
    return _by_row(lambda x, y: x.at[:, index].set(y, unique_indices=True), put, pool, rows)


@partial(jax.jit, static_argnames="sharding", donate_argnames="pool")
def put_row(
    pool: DecodeArrays, row: Int[Array, ""] | int, one: DecodeArrays, keys: Array, sharding: ShardingRules | None = None
) -> DecodeArrays:
    """Admission: one row becomes this state of a batch of one, with a random key of its own."""
    return placed(with_rows(pool, jnp.asarray(row)[None], one._replace(keys=keys)), sharding)


@partial(jax.jit, static_argnames="sharding")
def take_row(pool: DecodeArrays, row: Int[Array, ""] | int, sharding: ShardingRules | None = None) -> DecodeArrays:
    """A copy of one row, as a state of a batch of one.

    Args:
      sharding: of this state, whose one row no devices share.
    """
    return placed(rows_of(pool, jnp.asarray(row)[None]), sharding)


@partial(jax.jit, static_argnames=("chunk", "placement", "sharding"), donate_argnames="pool")
def read_row(  # nine parameters: model, pool, row and tokens, and how they are read
    model: Decoder,
    pool: DecodeArrays,
    row: Int[Array, ""] | int,
    tokens: Int[Array, "1 T"],
    valid: Bool[Array, "1 T"],
    policy: Policy,
    *,
    chunk: int,
    placement: Placement | None,
    sharding: ShardingRules | None = None,
) -> tuple[DecodeArrays, Int[Array, " 1"]]:
    """Reads tokens into one row, as `prefill` does; returns the pool, and `broken` of the row."""
    index = jnp.asarray(row)[None]
    now = rows_of(pool, index)
    after = read(model, tokens, now.kv, policy, valid=valid, chunk=chunk, placement=placement)
    logits = model.logits(last_hidden(after, valid))[:, 0]
    logits = jnp.where(valid.any(axis=1)[:, None], logits, now.logits)
    broken = first_broken(now.broken, logits, after.state)
    appeared = remember(now.appeared, tokens, valid)
    after = DecodeArrays(after.state, logits, appeared, now.keys, now.done, broken)
    return placed(with_rows(pool, index, after), sharding), broken


class Written(NamedTuple):
    """What some rows wrote in one call.

    Attributes:
      tokens: [W, N] int32, -1 after a row's last token.
      broken: [W] int32, as `DecodeState.broken`.
      likely: arrays [W, N, ...]; zeros where no row reports log-probabilities.
    """

    tokens: Int[Array, "W N"]
    broken: Int[Array, " W"]
    likely: Likely


@partial(jax.jit, static_argnames=("group", "placement", "sharding"), donate_argnames="pool")
def write_tokens(
    model: Decoder,
    pool: DecodeArrays,
    index: Int[Array, " W"] | None,
    rows: RowSampling,
    policy: Policy,
    *,
    group: int,
    placement: Placement | None,
    sharding: ShardingRules | None = None,
) -> tuple[DecodeArrays, Written]:
    """Writes up to `group` tokens with some rows, as `decode` does; ends early when every row has stopped.

    Args:
      index: the rows, all different; None: all rows of the pool, which are then changed in place.
      rows: their settings. A row with no token left stays as it is.
    """
    started = rows_of(pool, index)
    width, vocabulary = started.logits.shape
    rows = RowSampling(*map(jnp.asarray, rows))

    def body(loop: Any) -> Any:
        step, left, now, out = loop
        done = left <= 0
        keys = jax.vmap(jax.random.fold_in)(now.keys, now.kv[0].seen)
        token = sample_rows(keys, now.logits, now.appeared, rows)
        told = jax.tree.map(lambda x, y: x.at[:, step].set(y), out.likely, likely(now.logits, token, rows.logprobs))
        tokens = out.tokens.at[:, step].set(jnp.where(done, -1, token))
        after = read(model, token[:, None], now.kv, policy, valid=~done[:, None], placement=placement)
        logits = jnp.where(done[:, None], now.logits, model.logits(after.hidden)[:, 0])
        appeared = remember(now.appeared, token[:, None], ~done[:, None])
        broken = first_broken(now.broken, logits, after.state)
        left = jnp.where((token[:, None] == rows.stop).any(axis=1), 0, left - 1)
        now = DecodeArrays(after.state, logits, appeared, now.keys, now.done, broken)
        return step + 1, left, now, out._replace(tokens=tokens, likely=told)

    out = Written(
        jnp.full((width, group), -1, jnp.int32), started.broken, no_likely((width, group), min(TOP, vocabulary))
    )
    going = lambda loop: (loop[0] < group) & (loop[1] > 0).any()
    _, _, now, out = jax.lax.while_loop(going, body, (jnp.int32(0), rows.left, started, out))
    return placed(with_rows(pool, index, now), sharding), out._replace(broken=now.broken + 0)
