"""Attention of a block of queries on a TPU, with the mass that policies observe, without a queries-by-keys array.

One launch sweeps over the keys twice for each block of queries. The first sweep computes the output with the online
softmax. The second uses the final maximum and sum to compute the probabilities of each tile and adds them to the mass.
The two rows of mass stay in VMEM throughout. Tiles in which no query sees any key are skipped.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxcompress.pallas_kernels.tpu_limits import VMEM, block_sizes
from jaxcompress.pallas_kernels.tpu_slots import LANES, MASKED, multiply_dtype, nbytes, product
from jaxcompress.pallas_kernels.types import KernelCall, stored_as

_NEVER = jnp.iinfo(jnp.int32).max


class _Plan(NamedTuple):
    """Static facts of a launch."""

    group: int  # G
    keys: int  # keys of a tile
    tiles: int
    every: int  # N
    dtype: str
    windowed: bool


def block(q, at, keys, values, held, window, *, interpret=False):
    """See `Kernels.block`."""
    b, t, k, g, d = q.shape
    sets, n = held.shape[1:]
    dtype = stored_as(keys)
    size = block_sizes(KernelCall(b, k, g, n, d, sets, t, dtype, q.dtype.name))
    plan = _Plan(g, size["keys"], pl.cdiv(n, size["keys"]), n, dtype, window is not None)
    tokens, wide = size["tokens"], plan.tiles * plan.keys
    steps = pl.cdiv(t, tokens)
    newest = at.max(-1).astype(jnp.int32)
    window = jnp.reshape(jnp.zeros((), jnp.int32) if window is None else window, 1).astype(jnp.int32)
    at = jnp.pad(at, [(0, 0), (0, steps * tokens - t)], constant_values=-1)[..., None]
    held = jnp.pad(held, [(0, 0), (0, 0), (0, wide - n)], constant_values=-1)[:, :, None]

    once = lambda j: jnp.where(j < plan.tiles, j, j - plan.tiles)
    spec = lambda shape, index: pl.BlockSpec((None, *shape), lambda b, k, i, j, *_: (b, *index(k, i, j)))
    queries = spec((None, g, tokens, d), lambda k, i, j: (k, 0, i, 0))
    mass = spec((None, g, wide), lambda k, i, j: (k, 0, 0))
    out, last, total = pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, k, steps, 2 * plan.tiles),
            in_specs=[
                queries,
                spec((tokens, 1), lambda k, i, j: (i, 0)),
                spec((None, plan.keys, d), lambda k, i, j: (k, once(j), 0)),
                spec((None, plan.keys, d), lambda k, i, j: (k, jnp.minimum(j, plan.tiles - 1), 0)),
                spec((None, 1, plan.keys), lambda k, i, j: (k if sets > 1 else 0, 0, once(j))),
            ],
            out_specs=[queries, mass, mass],
            scratch_shapes=[
                pltpu.VMEM((g, tokens, 1), jnp.float32),
                pltpu.VMEM((g, tokens, 1), jnp.float32),
                pltpu.VMEM((g, tokens, d), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, k, g, t, d), q.dtype),
            *[jax.ShapeDtypeStruct((b, k, g, wide), jnp.float32)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * q.size * n,
            transcendentals=2 * (q.size // d) * n,
            bytes_accessed=nbytes(q, q) + steps * (2 * nbytes(keys) + nbytes(values)) + 8 * b * k * g * wide,
        ),
        interpret=interpret,
        name="block_with_mass",
    )(newest, window, q.transpose(0, 2, 3, 1, 4), at, keys, values, held)
    return out.transpose(0, 3, 1, 2, 4), last[..., :n], total[..., :n]


def _kernel(plan: _Plan, newest, window, q, at, keys, values, held, out, last, total, most, sums, acc) -> None:
    row, step, tile = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    second = tile >= plan.tiles
    start = jnp.where(second, tile - plan.tiles, tile) * plan.keys

    @pl.when((step == 0) & (tile == 0))
    def _() -> None:
        last[...] = jnp.zeros(last.shape, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(tile == 0)
    def _() -> None:
        most[...] = jnp.full(most.shape, -jnp.inf, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    here, key = at[...], held[...]  # [T, 1] and [1, N] of the tile
    oldest = jnp.min(jnp.where(key >= 0, key, _NEVER))
    useful = oldest <= jnp.max(here)
    visible = (key >= 0) & (key <= here)
    if plan.windowed:
        visible &= key > here - window[0]
    multiply = multiply_dtype(q.dtype.name, plan.dtype)

    def scores(head: int) -> Array:
        products = product(q[head].astype(multiply), keys[...].astype(multiply), 1) * q.shape[-1] ** -0.5
        return jnp.where(visible, products, MASKED)

    @pl.when(useful & ~second)
    def _() -> None:
        tile_values = values[...]
        if plan.every % plan.keys:
            exists = jax.lax.broadcasted_iota(jnp.int32, tile_values.shape, 0) < plan.every - start
            tile_values = jnp.where(exists, tile_values.astype(jnp.float32), 0).astype(tile_values.dtype)
        for head in range(plan.group):
            score, before = scores(head), most[head]
            now = jnp.maximum(before, score.max(-1, keepdims=True))
            shares, less = jnp.exp(score - now), jnp.exp(before - now)
            most[head] = now
            sums[head] = sums[head] * less + shares.sum(-1, keepdims=True)
            acc[head] = acc[head] * less + product(shares.astype(tile_values.dtype), tile_values, 0)

    def share(head: int) -> Array:
        return jnp.where(here >= 0, 1 / sums[head], 0.0)

    @pl.when(useful & second)
    def _() -> None:
        tile_slots = pl.ds(pl.multiple_of(start, LANES) if plan.tiles > 1 else 0, plan.keys)
        for head in range(plan.group):
            weights = jnp.exp(scores(head) - most[head]) * share(head)
            weights = jnp.where(here >= 0, weights, 0.0)
            one = pl.ds(head, 1)
            total[one, tile_slots] += weights.sum(0, keepdims=True)
            newest_row = jnp.where(here == newest[row], weights, 0.0)
            last[one, tile_slots] += newest_row.sum(0, keepdims=True)

    @pl.when(tile == pl.num_programs(3) - 1)
    def _() -> None:
        for head in range(plan.group):
            out[head] = jnp.where(here >= 0, acc[head] * share(head), 0.0).astype(out.dtype)
