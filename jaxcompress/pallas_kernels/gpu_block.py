"""Attention of a block of queries on a GPU, with the mass that policies observe, without a queries-by-keys array.

Two launches use the matrix units of Hopper, with products in the queries' 16-bit type and sums in float32. In the first
launch, a block of threads takes 64 queries of a head and loops over the keys in tiles with the online softmax. It also
writes the logarithm of each query's sum, from which the second launch computes every probability. There, a block of
threads takes 64 keys, loops over the queries, and sums their attention mass. Each sum belongs to one block, so results
do not depend on the order in which blocks run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxcompress.pallas_kernels.gpu_rows import MASKED, launch, load_rows, transposed
from jaxcompress.state.storage import Quantised, Stored, parts

TILE = 64  # queries, and keys
STAGES = 2
BEYOND = -2  # position of padding that rounds up the number of keys
_NEVER = jnp.iinfo(jnp.int32).max

TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
SQUARE = plgpu.Layout.WGMMA
QUERY, KEY = SQUARE.reduce(1), SQUARE.reduce(0)  # layouts of arrays over the queries, and over the keys, of a tile


def block(q, at, keys, values, held, window, *, interpret: Any = False):
    """See `Kernels.block`."""
    b, t, k, g, d = q.shape
    sets, n = held.shape[1:]
    rows, columns = (-(-x // TILE) * TILE for x in (t, n))
    heads = jnp.pad(q.transpose(0, 2, 3, 1, 4).reshape(b, k * g, t, d), [(0, 0), (0, 0), (0, rows - t), (0, 0)])
    at = jnp.pad(at.astype(jnp.int32), [(0, 0), (0, rows - t)], constant_values=-1)
    held = jnp.pad(held.astype(jnp.int32), [(0, 0), (0, 0), (0, columns - n)], constant_values=BEYOND)
    numbers, scales = zip(*(_as(x, q.dtype, columns - n) for x in (keys, values)), strict=True)
    bounds = jnp.asarray(_NEVER if window is None else window, jnp.int32)[None]
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    scaled = isinstance(keys, Quantised)
    common = functools.partial(launch, interpret=interpret)
    tile = plgpu.SMEM((TILE, d), q.dtype, transforms=TILED)
    ring = plgpu.SMEM((STAGES, TILE, d), q.dtype, transforms=TILED)

    out, logs = common(
        functools.partial(_attend, group=g, scaled=scaled),
        (shape(heads.shape, q.dtype), shape(heads.shape[:3], f32)),
        (b, k * g, rows // TILE),
        ("row", "head", "tile"),
        dict(
            q_tile=tile,
            k_ring=ring,
            v_ring=ring,
            shares=plgpu.SMEM((TILE, TILE), q.dtype, transforms=TILED),
            loaded=plgpu.Barrier(),
            arrived=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ),
        "attend",
    )(heads, at, held, bounds, _ends(held, at), *numbers, *scales[: 2 * scaled])
    last, total = common(
        functools.partial(_mass, group=g, scaled=scaled),
        (shape((b, k * g, columns), f32), shape((b, k * g, columns), f32)),
        (b, k * g, columns // TILE),
        ("row", "head", "tile"),
        dict(k_tile=tile, q_ring=ring, loaded=plgpu.Barrier(), arrived=plgpu.Barrier(num_barriers=STAGES)),
        "mass",
    )(heads, at, held, bounds, at.argmax(-1).astype(jnp.int32), logs, numbers[0], *scales[: 1 * scaled])
    out = out[:, :, :t].reshape(b, k, g, t, d).transpose(0, 3, 1, 2, 4)
    return out, *(x[..., :n].reshape(b, k, g, n) for x in (last, total))


def _ends(held: Array, at: Array) -> Array:
    """The number of key tiles up to the last one in which a tile of queries sees any key, [B, P, tiles]."""
    cut = lambda x: x.reshape(*x.shape[:-1], -1, TILE)
    oldest = cut(jnp.where(held >= 0, held, _NEVER)).min(-1)  # [B, P, tiles of keys]
    newest = cut(at).max(-1)[:, None]  # [B, 1, tiles of queries]
    seen = oldest[:, :, None] <= newest[..., None]
    return jnp.where(seen, jnp.arange(1, seen.shape[-1] + 1), 0).max(-1).astype(jnp.int32)


def _scores(acc: Array, at: Any, held: Array, window: Any, width: int, scale: Array | None) -> Array:
    """Products of queries and keys -> scores; at: positions of the queries."""
    across = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, acc.shape, [1]), SQUARE)
    down = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, acc.shape, [0]), SQUARE)
    scores = acc * width**-0.5
    if scale is not None:
        scores = scores * across(scale)
    key, query = across(held), down(at)
    seen = (key >= 0) & (key <= query) & (query - key < window)
    return jnp.where(seen, scores, jnp.where(key == BEYOND, -jnp.inf, MASKED))


def _product(shape: tuple[int, int], a: Any, b: Any) -> Array:
    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _attend(
    q, at, held, bounds, ends, keys, values, *refs, group, scaled, q_tile, k_ring, v_ring, shares, loaded, arrived
):
    """A tile of queries of one head over all keys.

    q [B, K x G, rows, D]; at [B, rows]; held [B, P, columns]; bounds: window; ends [B, P, tiles]; keys, values
    [B, K, columns, D]; if scaled, their scales [B, K, columns]; out as q; logarithms of sums [B, K x G, rows].
    """
    *scales, out, logs = refs
    b, h, i = (lax.axis_index(name) for name in ("row", "head", "tile"))
    head, width = h // group, q.shape[3]
    a_set = head if held.shape[1] > 1 else 0
    end = ends[b, a_set, i]
    rows = pl.ds(i * TILE, TILE)
    plgpu.copy_gmem_to_smem(q.at[b, h, rows], q_tile, loaded)

    def fetch(j, stage):
        columns = pl.ds(j * TILE, TILE)
        plgpu.copy_gmem_to_smem(keys.at[b, head, columns], k_ring.at[stage], arrived.at[stage])
        plgpu.copy_gmem_to_smem(values.at[b, head, columns], v_ring.at[stage], arrived.at[stage])

    @pl.loop(0, jnp.minimum(end, STAGES))
    def _(j):
        fetch(j, j)

    position = load_rows(at.at[b, rows], QUERY)
    plgpu.barrier_wait(loaded)

    def fold(j, carry):
        top, total, summed = carry
        stage = lax.rem(j, STAGES)
        columns = pl.ds(j * TILE, TILE)
        down = lambda x, shape: plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), SQUARE)
        plgpu.barrier_wait(arrived.at[stage])
        acc = _product((TILE, TILE), q_tile, transposed(k_ring.at[stage]))
        scale = load_rows(scales[0].at[b, head, columns], KEY) if scaled else None
        scores = _scores(acc, position, load_rows(held.at[b, a_set, columns], KEY), bounds[0], width, scale)
        higher = jnp.maximum(top, scores.max(1))
        fade, p = jnp.exp(top - higher), jnp.exp(scores - down(higher, scores.shape))
        total = total * fade + p.sum(1)
        if scaled:
            v = load_rows(scales[1].at[b, head, columns], KEY)
            p = p * plgpu.layout_cast(lax.broadcast_in_dim(v, p.shape, [1]), SQUARE)
        shares[...] = p.astype(shares.dtype)
        plgpu.commit_smem()
        summed = summed * down(fade, summed.shape) + _product(summed.shape, shares, v_ring.at[stage])
        plgpu.commit_smem()  # all threads have read before the buffers are filled again
        pl.when(j + STAGES < end)(lambda: fetch(j + STAGES, stage))
        return higher, total, summed

    start = (
        plgpu.layout_cast(jnp.full((TILE,), MASKED, jnp.float32), QUERY),
        plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), QUERY),
        plgpu.layout_cast(jnp.zeros((TILE, width), jnp.float32), SQUARE),
    )
    top, total, summed = lax.fori_loop(0, end, fold, start)
    present = position >= 0
    factor = jnp.where(present, 1 / total, 0.0)
    summed = summed * plgpu.layout_cast(lax.broadcast_in_dim(factor, summed.shape, [0]), SQUARE)
    here = plgpu.layout_cast(lax.broadcast_in_dim(position, summed.shape, [0]), SQUARE) >= 0
    out[b, h, rows] = jnp.where(here, summed, 0.0).astype(out.dtype)
    logs[b, h, rows] = jnp.where(present, top + jnp.log(total), jnp.inf)


def _mass(q, at, held, bounds, newest, logs, keys, *refs, group, scaled, k_tile, q_ring, loaded, arrived):
    """A tile of keys of one head: their mass from all queries, and from the newest query.

    Arguments are as for `_attend`; newest [B], the index of the newest query; logs as `_attend` wrote them; last and
    total [B, K x G, columns].
    """
    last, total = refs[-2:]
    b, h, j = (lax.axis_index(name) for name in ("row", "head", "tile"))
    head, width = h // group, q.shape[3]
    a_set = head if held.shape[1] > 1 else 0
    columns = pl.ds(j * TILE, TILE)
    tiles = q.shape[2] // TILE
    plgpu.copy_gmem_to_smem(keys.at[b, head, columns], k_tile, loaded)

    def fetch(i, stage):
        plgpu.copy_gmem_to_smem(q.at[b, h, pl.ds(i * TILE, TILE)], q_ring.at[stage], arrived.at[stage])

    @pl.loop(0, min(STAGES, tiles))
    def _(i):
        fetch(i, i)

    key = load_rows(held.at[b, a_set, columns], KEY)
    scale = load_rows(refs[0].at[b, head, columns], KEY) if scaled else None
    plgpu.barrier_wait(loaded)

    def fold(i, carry):
        of_last, of_all = carry
        stage = lax.rem(i, STAGES)
        rows = pl.ds(i * TILE, TILE)
        plgpu.barrier_wait(arrived.at[stage])
        acc = _product((TILE, TILE), q_ring.at[stage], transposed(k_tile))
        plgpu.commit_smem()  # all threads have read before the buffers are filled again
        pl.when(i + STAGES < tiles)(lambda: fetch(i + STAGES, stage))
        scores = _scores(acc, load_rows(at.at[b, rows], QUERY), key, bounds[0], width, scale)
        down = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, scores.shape, [0]), SQUARE)
        p = jnp.exp(scores - down(load_rows(logs.at[b, h, rows], QUERY)))
        row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=SQUARE) + i * TILE
        return of_last + jnp.where(row == newest[b], p, 0.0), of_all + p

    nothing = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), SQUARE)
    of_last, of_all = lax.fori_loop(0, tiles, fold, (nothing, nothing))
    last[b, h, columns] = of_last.sum(0)
    total[b, h, columns] = of_all.sum(0)


def _as(x: Stored, dtype: Any, padding: int) -> tuple[Array, Array]:
    """Keys or values to multiply, [B, K, columns, D], and scales; 8-bit codes are exact in 16 bits."""
    (codes,), scale = parts(x)
    pad = lambda y: jnp.pad(y, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (y.ndim - 3))
    numbers = codes.astype(dtype)
    return pad(numbers), pad(jnp.ones(numbers.shape[:3], jnp.float32) if scale is None else scale)
