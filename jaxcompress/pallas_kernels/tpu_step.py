"""One decoding step on a TPU: K and V of a layer are read once, one tile of each is written.

A grid step takes some kv heads of a row and a tile of their slots. The usual pipeline loads the tile into VMEM, where
the new token is written into it. Only the aligned rows around the token are copied back into the state, which is the
aliased output. Over several tiles the kernel uses the online softmax; raw scores stay in VMEM and become probabilities
at the end.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxcompress.pallas_kernels import rules
from jaxcompress.pallas_kernels.tpu_limits import QUANTISED, VMEM, group_rows, step_sizes
from jaxcompress.pallas_kernels.tpu_slots import (
    LANES,
    MASKED,
    Place,
    as_numbers,
    as_scale,
    each,
    in_hbm,
    multiply_dtype,
    nbytes,
    places,
    product,
    with_row,
)
from jaxcompress.pallas_kernels.types import KernelCall, stored_as
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.storage import Quantised, Stored


class _Plan(NamedTuple):
    """Static facts of a launch."""

    heads: int  # heads of a block
    slots: int  # of a block
    tiles: int  # blocks along the slots
    every: int  # S
    sets: int  # P
    dtype: str
    rule: EvictionRule | None
    numbered: bool  # the rule has numbers
    padded: bool  # memory is padded to groups of rows


def step(q, new, stored, layer, index, visible, present, *, interpret=False):
    """See `Kernels.step`."""
    out, weights, _, stored = _launch(q, new, stored, layer, index, visible, None, present, None, interpret)
    return out, weights, stored


def step_evict(q, new, stored, layer, index, held, numbers, present, rule, *, interpret=False):
    """See `Kernels.step_evict`."""
    out, numbers, goes, stored = _launch(q, new, stored, layer, index, held, numbers, present, rule, interpret)
    return out, numbers, goes, stored


def _launch(q, new, stored, layer, index, seen, numbers, present, rule, interpret):
    b, k, g, d = q.shape
    sets, s = seen.shape[1:]
    dtype = stored_as(stored[0])
    size = step_sizes(
        "step" if rule is None else "step_evict", KernelCall(b, k, g, s, d, sets, 1, dtype, q.dtype.name, rule)
    )
    plan = _Plan(
        heads=size["heads"], slots=size["slots"], tiles=pl.cdiv(s, size["slots"]), every=s, sets=sets, dtype=dtype,
        rule=rule, numbered=numbers is not None, padded=not interpret,
    )  # fmt: skip
    kb, pb, wide = plan.heads, plan.heads if sets > 1 else 1, plan.tiles * plan.slots
    stored = tuple(map(partial(_scaled, layer=layer, index=index), stored, new))
    codes = [in_hbm(_codes(x), interpret) for x in stored]
    scales = [x.scale for x in stored if isinstance(x, Quantised)]

    def spec(shape: tuple[int | None, ...], at: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, h, s, layer, index, present: at(b, h, s, layer[0]))

    of_head = lambda *shape: spec((None, kb, *shape), lambda b, h, s, at: (b, h, 0, 0))
    of_set = lambda width: spec((None, pb, 1, width), lambda b, h, s, at: (b, h if sets > 1 else 0, 0, 0))
    of_tile = spec((None, pb, 1, plan.slots), lambda b, h, s, at: (b, h if sets > 1 else 0, 0, s))
    of_state = spec((1, 1, kb, plan.slots, d), lambda b, h, s, at: (at, b, h, s, 0))
    of_scale = spec((None, None, kb, plan.slots), lambda b, h, s, at: (at, b, h, s))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    shape = jax.ShapeDtypeStruct

    seen = seen.astype(jnp.int32)[:, :, None]
    ins = [of_head(g, d), of_head(1, d), of_head(1, d), of_state, of_state, *[of_scale] * len(scales), of_tile]
    args = [q, *(_codes(x)[:, :, None] for x in new), *codes, *scales, seen]
    outs = [anywhere, anywhere, of_head(g, d)]
    shapes = [*(shape(x.shape, x.dtype) for x in codes), shape(q.shape, q.dtype)]
    if rule is None:
        outs, shapes = [*outs, of_head(g, wide)], [*shapes, shape((b, k, g, wide), jnp.float32)]
    else:
        ins, args = [*ins, of_set(s)], [*args, seen]
        outs, shapes = [*outs, of_set(LANES)], [*shapes, shape((b, sets, 1, LANES), jnp.int32)]
    if numbers is not None:
        ins, args = [*ins, of_set(s)], [*args, numbers[:, :, None]]
        outs, shapes = [*outs, of_set(s)], [*shapes, shape((b, sets, 1, s), jnp.float32)]
    scratch = [pltpu.VMEM((kb, g, 1), jnp.float32), pltpu.VMEM((kb, g, 1), jnp.float32),
               pltpu.VMEM((kb, g, d), jnp.float32), pltpu.SemaphoreType.DMA((2, kb))]  # fmt: skip
    keys, values, out, *rest = pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, k // kb, plan.tiles),
            in_specs=ins,
            out_specs=outs,
            scratch_shapes=scratch if rule is None else [*scratch, pltpu.VMEM((kb, g, wide), jnp.float32)],
        ),
        out_shape=shapes,
        input_output_aliases={6: 0, 7: 1},  # indices include the three prefetched arguments
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * q.size * s,
            transcendentals=q.size // d * s,
            bytes_accessed=2 * b * k * (wide + group_rows(dtype)) * d * codes[0].dtype.itemsize
            + nbytes(q, q, *new, seen)
            + (0 if rule else 4 * q.size // d * wide),
        ),
        interpret=interpret,
        name="decode_step" if rule is None else "decode_step_evict",
    )(jnp.reshape(layer, 1).astype(jnp.int32), index.reshape(-1), present.astype(jnp.int32), *args)
    stored = tuple(
        Quantised(now, old.scale, old.dtype) if isinstance(old, Quantised) else now
        for now, old in zip((keys, values), stored, strict=True)
    )
    if rule is None:
        return out, rest[0][..., :s], None, stored
    return out, None if numbers is None else rest[1][:, :, 0], rest[0][:, :, 0, 0], stored


def _codes(stored: Stored) -> Array:
    return stored.codes if isinstance(stored, Quantised) else stored


def _scaled(stored: Stored, new: Stored, *, layer: Array, index: Array) -> Stored:
    """The stored vectors with the scale of the new vector in its slot. Scales are small, and no copy can write just
    one."""
    if not isinstance(stored, Quantised):
        return stored
    assert isinstance(new, Quantised)
    here = jnp.arange(stored.scale.shape[-1]) == index[..., None]
    scale = stored.scale.at[layer].set(jnp.where(here, new.scale[..., None], stored.scale[layer]))
    return replace(stored, scale=scale)


def _kernel(plan: _Plan, layer, index, present, *refs) -> None:
    take = iter(refs)
    q, *new = (next(take) for _ in range(3))
    state = next(take), next(take)
    scales = (next(take), next(take)) if plan.dtype in QUANTISED else None
    seen = next(take)
    held = None if plan.rule is None else next(take)
    numbers = next(take) if plan.numbered else None
    target = next(take), next(take)
    out, result = next(take), next(take)
    numbers_out = next(take) if plan.numbered else None
    most, total, sums, copied, *raw = take
    weights = raw[0] if raw else result

    row, block, tile = (pl.program_id(axis) for axis in range(3))
    first = pl.multiple_of(tile * plan.slots, LANES) if plan.tiles > 1 else 0
    rows = group_rows(plan.dtype)
    there = present[row] > 0

    def slot(head: int) -> Array:
        return index[row * plan.sets + (block * plan.heads + head if plan.sets > 1 else 0)]

    def copies(head: int, place: Place) -> list[Any]:
        here = pl.ds(place.start, place.size)
        there = pl.ds(pl.multiple_of(first + place.start, rows), place.size)
        return [
            pltpu.make_async_copy(
                state[i].at[0, 0, head, here],
                target[i].at[layer[0], row, block * plan.heads + head, there],
                copied.at[i, head],
            )
            for i in range(2)
        ]

    def write(head: int, place: Place) -> None:
        group = pl.ds(place.start, place.size)
        for i in range(2):
            state[i][0, 0, head, group] = with_row(
                state[i][0, 0, head, group], slot(head) - first - place.start, new[i][head]
            )
        for copy in copies(head, place):
            copy.start()

    def wait(head: int, place: Place) -> None:
        for copy in copies(head, place):
            copy.wait()

    def written(do: Any) -> None:
        for head in range(plan.heads):
            each(places(slot(head), first, plan.slots, plan.every, rows, plan.padded), partial(do, head))

    written(write)

    @pl.when(tile == 0)
    def _() -> None:
        most[...] = jnp.full(most.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    ragged = plan.every % plan.slots != 0  # the last tile extends beyond the slots
    multiply = multiply_dtype(q.dtype.name, plan.dtype)
    value_dtype = multiply if plan.dtype in QUANTISED else state[1].dtype
    for head in range(plan.heads):
        of_set = head if plan.sets > 1 else 0
        keys = as_numbers(state[0][0, 0, head], plan.dtype, multiply)
        values = as_numbers(state[1][0, 0, head], plan.dtype, value_dtype)
        scores = product(q[head].astype(multiply), keys, 1) * q.shape[-1] ** -0.5
        if scales is not None:
            scores *= as_scale(scales[0][pl.ds(head, 1)], plan.dtype)
        visible = seen[of_set] > 0 if plan.rule is None else seen[of_set] >= 0
        scores = jnp.where(visible, scores, MASKED)
        if ragged:
            left = plan.every - first
            scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < left, scores, -jnp.inf)
            exists = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < left
            values = jnp.where(exists, values.astype(jnp.float32), 0).astype(value_dtype)
        weights[head, :, pl.ds(first, plan.slots)] = scores
        before = most[head]
        now = jnp.maximum(before, scores.max(-1, keepdims=True))
        shares = jnp.exp(scores - now)
        less = jnp.exp(before - now)
        most[head] = now
        total[head] = total[head] * less + shares.sum(-1, keepdims=True)
        if scales is not None:
            shares *= as_scale(scales[1][pl.ds(head, 1)], plan.dtype)
        sums[head] = sums[head] * less + product(shares.astype(value_dtype), values, 0)

    @pl.when(tile == plan.tiles - 1)
    def _() -> None:
        mass = []
        for head in range(plan.heads):
            share = jnp.where(there, 1 / total[head], 0.0)
            out[head] = (sums[head] * share).astype(out.dtype)
            final = jnp.exp(weights[head] - most[head]) * share
            if plan.rule is None:
                weights[head] = final
            else:
                mass.append(final[:, : plan.every].mean(0, keepdims=True))
        if plan.rule is None:
            return
        assert held is not None
        if plan.sets == 1:
            mass = [sum(mass[1:], mass[0]) / plan.heads]
        for i, each_mass in enumerate(mass):
            numbered = None
            if numbers is not None and numbers_out is not None:
                numbered = rules.fold(plan.rule, numbers[i], each_mass, there)
                numbers_out[i] = numbered
            result[i] = jnp.broadcast_to(rules.victim(plan.rule, numbered, held[i]), result.shape[1:])

    written(wait)
