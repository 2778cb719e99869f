"""One decoding step on a GPU: keys and values are read once, one row of each is written.

The step is limited by memory: a slot's key and value are 4 D bytes in bfloat16 and need 4 G D operations. Models have
few query heads per group, so the ordinary float32 units of Hopper keep up, exactly and without padding to the tiles of
a matrix unit. A block of threads takes some of the slots of one row and kv head. The slots arrive through a ring of
buffers in shared memory, and every lane of rows keeps its own online softmax. Each block writes raw scores, a maximum,
a sum and an output. The mass and the final output are computed from them outside the kernel, where XLA fuses them with
the policy's operations.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxcompress.pallas_kernels import rules
from jaxcompress.pallas_kernels.gpu_limits import step_sizes
from jaxcompress.pallas_kernels.gpu_rows import (
    MASKED,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    UNIT,
    along_columns,
    along_rows,
    full,
    launch,
    load_rows,
    numbers,
)
from jaxcompress.pallas_kernels.tuning import Sizes
from jaxcompress.pallas_kernels.types import KernelCall, stored_as
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.storage import Quantised, Stored


class _Plan(NamedTuple):
    """Static facts of a launch: slots are loaded in `tiles` of `rows` slots through a ring of `stages` buffers;
    `splits` blocks of threads share the slots of a row and kv head."""

    dtype: str
    slots: int
    tiles: int
    rows: int
    stages: int
    splits: int


def step(q, new, stored, layer, index, visible, present, *, interpret: Any = False, sizes: Sizes | None = None):
    """See `Kernels.step`.

    Args:
      sizes: see `gpu.step_sizes`.
    """
    keys, values = stored
    b, k, g, d = q.shape
    slots, dtype = _codes(keys).shape[3], stored_as(keys)
    sizes = sizes or step_sizes("step", _call(q, keys, index))
    plan = _Plan(dtype, slots, pl.cdiv(slots, sizes["rows"]), **sizes)
    padding = plan.rows * plan.tiles - slots
    bias = jnp.where(visible, 0.0, MASKED)
    bias = jnp.pad(bias, [(0, 0), (0, 0), (0, padding)], constant_values=-jnp.inf)
    at = jnp.where(present[:, None], index, slots).astype(jnp.int32)

    stored = jax.tree.map(lambda x, y: _scales_with(x, y, layer, at), stored, new, is_leaf=_is_stored)
    quantised = isinstance(keys, Quantised)
    scales = [jnp.pad(_scale(x, layer), [(0, 0), (0, 0), (0, padding)]) for x in stored if quantised]
    fresh = [_one_scale(x) for x in new if quantised]
    rows = lambda x: _codes(x).reshape(-1, slots, d)
    refs = [jax.new_ref(rows(x), memory_space=plgpu.GMEM) for x in stored]
    ones = functools.partial(jnp.asarray, dtype=jnp.int32)
    buffer = plgpu.SMEM((plan.stages, plan.rows, d), refs[0].dtype)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    scores, out, tops, sums = launch(
        functools.partial(_body, plan=plan, scaled=quantised),
        (
            shape((b, k, g, plan.rows * plan.tiles)),
            shape((b, k, plan.splits, g, d)),
            shape((b, k, plan.splits, g)),
            shape((b, k, plan.splits, g)),
        ),
        grid=(b, k, plan.splits),
        names=("row", "head", "split"),
        scratch=dict(
            k_ring=buffer, v_ring=buffer, arrived=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages)
        ),
        name="decode_step",
        interpret=interpret,
    )(
        q.astype(jnp.float32) * d**-0.5, *map(_codes, new), *fresh, *scales, bias,
        ones(layer)[None], at, ones(present), *refs,
    )  # fmt: skip
    stored = tuple(_with_codes(x, jax.freeze(ref)) for x, ref in zip(stored, refs, strict=True))
    here = present[:, None, None, None]
    top = tops.max(2)
    part = jnp.exp(tops - top[:, :, None])
    total = (part * sums).sum(2)[..., None]
    out = jnp.where(here, (part[..., None] * out).sum(2) / total, 0).astype(q.dtype)
    weights = jnp.where(here, jnp.exp(scores[..., :slots] - top[..., None]) / total, 0)
    return out, weights, stored


def step_evict(q, new, stored, layer, index, held, numbers, present, rule: EvictionRule, *, interpret: Any = False):
    """See `Kernels.step_evict`. The rule is applied outside the kernel, since blocks of threads do not synchronise."""
    sizes = step_sizes("step_evict", _call(q, stored[0], index, rule))
    out, weights, stored = step(q, new, stored, layer, index, held >= 0, present, interpret=interpret, sizes=sizes)
    if numbers is not None:
        mass = weights.mean((1, 2))[:, None] if held.shape[1] == 1 else weights.mean(2)
        numbers = rules.fold(rule, numbers, mass, present[:, None, None])
    return out, numbers, rules.victim(rule, numbers, held)[..., 0], stored


def _body(q, key, value, *refs, plan: _Plan, scaled: bool, k_ring, v_ring, arrived):
    """The kernel body for one block of threads: one of the `splits` parts of the slots of one row and kv head.

    q [B, K, G, D] float32, already multiplied by the factor of the scores; key, value [B, K, D] as stored; if scaled,
    their scales [B, K] and those of the slots [B, K, tiles x rows] bfloat16; bias [B, P, tiles x rows]: 0, MASKED, or
    -inf beyond the slots; layer [1], index [B, P], present [B]; keys and values [L x B x K, S, D]; the outputs of
    `step`.
    """
    one_scale, scale = ((refs[0], refs[1]), (refs[2], refs[3])) if scaled else (None, None)
    bias, layer, index, present, keys, values, s_out, o_out, m_out, l_out = refs[4 * scaled :]
    b, h, c = (lax.axis_index(name) for name in ("row", "head", "split"))
    _, heads, group, d = q.shape
    a_set = h if bias.shape[1] > 1 else 0
    at = (layer[0] * q.shape[0] + b) * heads + h
    slot = index[b, a_set]
    begin = c * plan.tiles // plan.splits
    end = jnp.where(present[b] > 0, (c + 1) * plan.tiles // plan.splits, begin)
    mine = (slot >= begin * plan.rows) & (slot < jnp.minimum(end * plan.rows, plan.slots))
    queries = [load_rows(q.at[b, h, g], PER_COLUMN) for g in range(group)]

    def fetch(tile, stage):
        rows = pl.ds(tile * plan.rows, plan.rows)  # reads beyond the slots return zeros
        plgpu.copy_gmem_to_smem(keys.at[at, rows], k_ring.at[stage], arrived.at[stage])
        plgpu.copy_gmem_to_smem(values.at[at, rows], v_ring.at[stage], arrived.at[stage])

    for stage in range(plan.stages):
        pl.when(begin + stage < end)(lambda stage=stage: fetch(begin + stage, stage))

    def fold(i, carry):
        tile, stage = begin + i, lax.rem(i, plan.stages)
        plgpu.barrier_wait(arrived.at[stage])
        units = [tile * plan.rows + u for u in range(0, plan.rows, UNIT)]
        part = [pl.ds(u, UNIT) for u in range(0, plan.rows, UNIT)]
        k = [numbers(load_rows(k_ring.at[stage, rows], ROWS), plan.dtype) for rows in part]
        biases, k_scale, v_scale = [], [], []
        for first in units:
            rows = pl.ds(first, UNIT)
            taken = plgpu.broadcasted_iota(jnp.int32, (UNIT,), 0, layout=PER_ROW) + first == slot
            biases.append(jnp.where(taken, -jnp.inf, load_rows(bias.at[b, a_set, rows], PER_ROW)))
            if scale is not None:
                k_scale.append(load_rows(scale[0].at[b, h, rows], PER_ROW).astype(jnp.float32))
                v_scale.append(load_rows(scale[1].at[b, h, rows], PER_ROW).astype(jnp.float32))
        probabilities, faded = [], []
        for g, query in enumerate(queries):
            top, total, out = carry[g]
            scores = [(x * along_columns(query)).sum(1) for x in k]
            if scale is not None:
                scores = [x * y for x, y in zip(scores, k_scale, strict=True)]
            scores = [jnp.where(x == 0, s, x) for s, x in zip(scores, biases, strict=True)]
            for first, s in zip(units, scores, strict=True):
                s_out[b, h, g, pl.ds(first, UNIT)] = s
            higher = functools.reduce(jnp.maximum, scores, top)
            fade = jnp.exp(top - higher)
            p = [jnp.exp(s - higher) for s in scores]
            total = total * fade + functools.reduce(jnp.add, p)
            faded.append((higher, total, out * along_rows(fade, d)))
            probabilities.append(p if scale is None else [x * y for x, y in zip(p, v_scale, strict=True)])
        for u, rows in enumerate(part):
            v = numbers(load_rows(v_ring.at[stage, rows], ROWS), plan.dtype)
            faded = [
                (top, total, out + along_rows(p[u], d) * v)
                for (top, total, out), p in zip(faded, probabilities, strict=True)
            ]
        plgpu.commit_smem()  # all threads have read before the buffer is filled again
        pl.when(tile + plan.stages < end)(lambda: fetch(tile + plan.stages, stage))
        return tuple(faded)

    nothing = full((UNIT,), MASKED, PER_ROW), full((UNIT,), 0.0, PER_ROW), full((UNIT, d), 0.0, ROWS)
    done = lax.fori_loop(0, end - begin, fold, (nothing,) * group)

    scaled_by = lambda i: 1.0 if one_scale is None else one_scale[i][b, h].astype(jnp.float32)
    own_key, own_value = load_rows(key.at[b, h], PER_COLUMN), load_rows(value.at[b, h], PER_COLUMN)
    own_bias = bias[b, a_set, jnp.minimum(slot, plan.slots - 1)]
    for g, (query, (top, total, out)) in enumerate(zip(queries, done, strict=True)):
        own = (query * numbers(own_key, plan.dtype)).sum(0) * scaled_by(0)
        own = jnp.where(mine, jnp.where(own_bias == 0, own, own_bias), -jnp.inf)
        highest = jnp.maximum(top.max(0), own)
        fade, p = jnp.exp(top - highest), jnp.exp(own - highest)
        o_out[b, h, c, g] = (out * along_rows(fade, d)).sum(0) + p * scaled_by(1) * numbers(own_value, plan.dtype)
        m_out[b, h, c, g] = highest
        l_out[b, h, c, g] = (total * fade).sum(0) + p

        @pl.when(mine)
        def _(g=g, own=own):
            s_out[b, h, g, slot] = own

    @pl.when(mine)
    def _():
        keys[at, slot] = own_key
        values[at, slot] = own_value


def _call(q: Array, keys: Stored, index: Array, rule: EvictionRule | None = None) -> KernelCall:
    b, k, g, d = q.shape
    return KernelCall(b, k, g, _codes(keys).shape[3], d, index.shape[1], 1, stored_as(keys), q.dtype.name, rule)


def _is_stored(x: Any) -> bool:
    return isinstance(x, Quantised)


def _codes(x: Stored) -> Array:
    return x.codes if isinstance(x, Quantised) else x


def _with_codes(x: Stored, codes: Array) -> Stored:
    codes = codes.reshape(_codes(x).shape)
    return replace(x, codes=codes) if isinstance(x, Quantised) else codes


def _bfloat16(bits: Array, dtype: str) -> Array:
    scale = lax.bitcast_convert_type(bits, jnp.bfloat16)
    return scale * 256 if dtype == "float8_e4m3fn" else scale


def _one_scale(x: Any) -> Array:
    return _bfloat16(x.scale, x.dtype)


def _scale(x: Any, layer: Any) -> Array:
    return _bfloat16(x.scale[layer], x.dtype)


def _scales_with(old: Stored, new: Stored, layer: Any, index: Array) -> Stored:
    """The scales with those of the new vectors in their slots; XLA writes these two bytes each."""
    if not isinstance(old, Quantised):
        return old
    assert isinstance(new, Quantised)
    here = jnp.arange(old.scale.shape[-1]) == index[..., None]
    return replace(old, scale=old.scale.at[layer].set(jnp.where(here, new.scale[..., None], old.scale[layer])))
