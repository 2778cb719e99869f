"""The recurrence over a whole segment in one launch: the state stays in a multiprocessor's shared memory.

A block of threads handles one row and kv head. It loads the keys and values of its slots once and then processes one
token at a time (write it into a free slot, attend, add the mass, free the slot with the lowest score). It writes the
state back at the end. Queries and new tokens are prefetched. Held positions and the numbers of the slots stay in
registers.

If heads share a set (`sets` is 1 with several kv heads), their blocks would have to synchronise at every token. The
kernel declines such calls, unless the rule has no numbers, so that every head reaches the same decision alone.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxcompress.pallas_kernels.gpu_limits import LINE, PASS, STAGES, TOKENS, rounded
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
from jaxcompress.pallas_kernels.types import stored_as
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.storage import Quantised, Stored

BEYOND = -2  # position of padding that rounds up the number of slots
_NEVER = jnp.iinfo(jnp.int32).max

# Mosaic GPU treats the result of a selection as unsigned if a scalar comes first (seen in 0.10.2 and 0.11.2), and then
# compares it as unsigned. So selections of integers below put the array first.


def segment(
    q, new, stored, layer, positions, held, numbers, window, rule: EvictionRule, *, interpret: Any = False
) -> tuple[Any, ...]:
    """See `Kernels.segment`."""
    b, t, k, g, d = q.shape
    keys = stored[0]
    slots, sets, dtype = held.shape[2], held.shape[1], stored_as(keys)
    quantised = isinstance(keys, Quantised)
    flat = rounded(slots, LINE)
    pad = lambda x, value: jnp.pad(x, [(0, 0), (0, 0), (0, flat - slots)], constant_values=value)
    per_slot = [pad(held, BEYOND)]
    if numbers is not None:
        per_slot.append(pad(numbers, 0))
    scales, fresh = [], []
    if quantised:
        scales = [pad(_scale(x.scale[layer], dtype), 0) for x in stored]
        fresh = [_scale(x.scale, dtype).swapaxes(1, 2) for x in new]  # [B, K, T]
    codes = [_codes(x).reshape(-1, slots, d) for x in stored]
    refs = [jax.new_ref(x, memory_space=plgpu.GMEM) for x in codes]
    ones = functools.partial(jnp.asarray, dtype=jnp.int32)
    bounds = jnp.stack([ones(layer), ones(_NEVER if window is None else window)])

    shape = jax.ShapeDtypeStruct
    rows = rounded(slots, PASS)
    out_type = [shape((b, t, k, g, d), q.dtype), shape((b, sets, t), jnp.int32), shape((b, sets, flat), jnp.int32)]
    out_type += [shape((b, sets, flat), jnp.float32)] * (numbers is not None)
    out_type += [shape((b, k, flat), jnp.float32)] * (2 * quantised)
    scratch = dict(
        k_slots=plgpu.SMEM((rows, d), codes[0].dtype),
        v_slots=plgpu.SMEM((rows, d), codes[0].dtype),
        q_ring=plgpu.SMEM((STAGES, TOKENS, g, d), q.dtype),
        k_ring=plgpu.SMEM((STAGES, TOKENS, d), codes[0].dtype),
        v_ring=plgpu.SMEM((STAGES, TOKENS, d), codes[0].dtype),
        at_slots=plgpu.SMEM((flat,), jnp.int32),
        masses=plgpu.SMEM((g, flat), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        loaded=plgpu.Barrier(num_arrivals=2 * (rows // _chunk(rows))),
    )
    if quantised:
        scratch |= dict(k_scale=plgpu.SMEM((flat,), jnp.float32), v_scale=plgpu.SMEM((flat,), jnp.float32))
    body = functools.partial(_body, dtype=dtype, slots=slots, rule=rule, given=len(per_slot) + 2 * len(scales))
    out, freed, held, *more = launch(
        body, tuple(out_type), (b, k), ("row", "head"), scratch, "recurrence", interpret
    )(q, *(_codes(x) for x in new), positions.astype(jnp.int32), bounds, *per_slot, *scales, *fresh, *refs)  # fmt: skip

    stored = [_with_codes(x, jax.freeze(ref)) for x, ref in zip(stored, refs, strict=True)]
    if quantised:
        bits = [_bits(x[..., :slots], dtype) for x in more[-2:]]
        stored = [_with_scale(x, layer, y) for x, y in zip(stored, bits, strict=True)]
    numbers = None if numbers is None else more[0][..., :slots]
    return out, tuple(stored), held[..., :slots], numbers, freed


def _body(
    q, key, value, positions, bounds, *refs, dtype: str, slots: int, rule: EvictionRule, given: int, k_slots, v_slots,
    q_ring, k_ring, v_ring, at_slots, masses, arrived, loaded, k_scale: Any = None, v_scale: Any = None,
):  # fmt: skip
    """The kernel body for one row and kv head.

    q [B, T, K, G, D]; key, value [B, T, K, D] as stored; positions [B, T]; bounds: layer and window; held, and numbers
    if the rule has them, [B, P, flat]; if scaled, scales of the slots [B, K, flat] and of the tokens [B, K, T]; keys
    and values [L x B x K, S, D]; out as q, freed [B, P, T], held, numbers, scales.
    """
    folds, scaled = rule.fold != "age", k_scale is not None
    ins, outs = list(refs[: given + 2]), list(refs[given + 2 :])
    held_in = ins.pop(0)
    numbers_in: Any = ins.pop(0) if folds else None
    scales_in, one_scale = ([ins.pop(0), ins.pop(0)], [ins.pop(0), ins.pop(0)]) if scaled else ([], [])
    keys, values = ins
    out, freed, held_out, *outs = outs
    b, h = lax.axis_index("row"), lax.axis_index("head")
    _, tokens, heads, group, d = q.shape
    sets, flat = held_in.shape[1:]
    a_set = h if sets > 1 else 0
    at = (bounds[0] * q.shape[0] + b) * heads + h
    window = bounds[1]
    rows = k_slots.shape[0]
    chunk = _chunk(rows)
    over_slots = plgpu.Layout.WG_STRIDED((flat,), vec_size=1)
    blocks = pl.cdiv(tokens, TOKENS)

    def fetch(block, stage):
        some = pl.ds(block * TOKENS, TOKENS)
        plgpu.copy_gmem_to_smem(q.at[b, some, h], q_ring.at[stage], arrived.at[stage])
        plgpu.copy_gmem_to_smem(key.at[b, some, h], k_ring.at[stage], arrived.at[stage])
        plgpu.copy_gmem_to_smem(value.at[b, some, h], v_ring.at[stage], arrived.at[stage])

    @pl.loop(0, rows // chunk)
    def _(i):
        some = pl.ds(i * chunk, chunk)  # reads beyond the slots return zeros
        plgpu.copy_gmem_to_smem(keys.at[at, some], k_slots.at[some], loaded)
        plgpu.copy_gmem_to_smem(values.at[at, some], v_slots.at[some], loaded)

    @pl.loop(0, min(STAGES, blocks))
    def _(i):
        fetch(i, i)

    held = load_rows(held_in.at[b, a_set], over_slots)
    number = load_rows(numbers_in.at[b, a_set], over_slots) if folds else None
    for g in range(group):
        masses[g] = full((flat,), -jnp.inf, over_slots)
    for there, here in zip(scales_in, (k_scale, v_scale), strict=False):
        here[...] = load_rows(there.at[b, h], over_slots)
    plgpu.barrier_wait(loaded)

    def token(i, stage, carry, block):
        held, number = carry
        t = block * TOKENS + i
        position = positions[b, t]
        present = position >= 0
        oldest = jnp.where(present & (window < _NEVER), position - window, -1)
        held = jnp.where((held < 0) | (held > oldest), held, -1)
        slot = plgpu.broadcasted_iota(jnp.int32, (flat,), 0, layout=over_slots)
        index = jnp.where(held == -1, slot, slots).min()
        enters = present & (index < slots)
        new = enters & (slot == index)
        held = jnp.where(~new, held, position)
        if folds:
            number = jnp.where(new, 0.0, number)
        at_slots[...] = held

        @pl.when(enters)
        def _():
            k_slots[index] = load_rows(k_ring.at[stage, i], PER_COLUMN)
            v_slots[index] = load_rows(v_ring.at[stage, i], PER_COLUMN)
            for x, y in zip((k_scale, v_scale), one_scale, strict=False):
                x[index] = y[b, h, t]

        plgpu.commit_smem()  # the token is now in its slot
        queries = [load_rows(q_ring.at[stage, i, g], PER_COLUMN).astype(jnp.float32) * d**-0.5 for g in range(group)]
        tops, totals = [], []
        for g, (top, total, summed) in enumerate(attend(queries)):
            highest = top.max(0)
            fade = jnp.exp(top - highest)
            whole = (total * fade).sum(0)
            result = (summed * along_rows(fade, d)).sum(0) / whole
            out[b, t, h, g] = jnp.where(present, result, 0.0).astype(out.dtype)
            tops.append(highest)
            totals.append(whole)
        gone = jnp.int32(-1)
        if folds:
            plgpu.commit_smem()  # all scores are now written
            shares = [jnp.exp(load_rows(masses.at[g], over_slots) - tops[g]) / totals[g] for g in range(group)]
            mass = functools.reduce(jnp.add, shares) * (1 / group)
            number = jnp.where(present, number + mass if rule.fold == "sum" else mass, number)
        victim = _victim(rule, number, held, position)
        gone = jnp.where(present & (victim != _NEVER), victim, -1)
        held = jnp.where((held < 0) | (held != gone), held, -1)

        @pl.when((h == 0) | (sets > 1))
        def _():
            freed[b, a_set, t] = gone

        return held, number

    def attend(queries):
        """Online softmax over all slots, a separate one for every eighth slot and each query: maximum, sum, output."""

        def some(i, carry):
            first = [i * PASS + u for u in range(0, PASS, UNIT)]
            parts = [pl.ds(x, UNIT) for x in first]
            k = [numbers(load_rows(k_slots.at[x], ROWS), dtype) for x in parts]
            there = [load_rows(at_slots.at[x], PER_ROW) for x in parts]
            scales = [[load_rows(y.at[x], PER_ROW) for x in parts] for y in (k_scale, v_scale)] if scaled else None
            done = []
            for g, query in enumerate(queries):
                top, total, summed = carry[g]
                scores = [(x * along_columns(query)).sum(1) for x in k]
                if scales is not None:
                    scores = [x * y for x, y in zip(scores, scales[0], strict=True)]
                hidden = [jnp.where(x == BEYOND, -jnp.inf, MASKED) for x in there]
                scores = [jnp.where(x >= 0, s, y) for s, x, y in zip(scores, there, hidden, strict=True)]
                if folds:
                    for s, x in zip(scores, parts, strict=True):
                        masses[g, x] = s
                higher = functools.reduce(jnp.maximum, scores, top)
                fade = jnp.exp(top - higher)
                p = [jnp.exp(s - higher) for s in scores]
                total = total * fade + functools.reduce(jnp.add, p)
                p = p if scales is None else [x * y for x, y in zip(p, scales[1], strict=True)]
                done.append((higher, total, summed * along_rows(fade, d), p))
            for u, x in enumerate(parts):
                v = numbers(load_rows(v_slots.at[x], ROWS), dtype)
                done = [(top, total, summed + along_rows(p[u], d) * v, p) for top, total, summed, p in done]
            return tuple(x[:3] for x in done)

        nothing = full((UNIT,), MASKED, PER_ROW), full((UNIT,), 0.0, PER_ROW), full((UNIT, d), 0.0, ROWS)
        return lax.fori_loop(0, rows // PASS, some, (nothing,) * group)

    def some_tokens(block, carry):
        stage = lax.rem(block, STAGES)
        plgpu.barrier_wait(arrived.at[stage])
        count = jnp.minimum(tokens - block * TOKENS, TOKENS)
        carry = lax.fori_loop(0, count, lambda i, x: _all(token(i, stage, _two(x, folds), block)), carry)
        plgpu.commit_smem()  # all threads have read before the buffers are filled again
        pl.when(block + STAGES < blocks)(lambda: fetch(block + STAGES, stage))
        return carry

    held, number = _two(lax.fori_loop(0, blocks, some_tokens, _all((held, number))), folds)
    plgpu.commit_smem()

    @pl.loop(0, rows // chunk)
    def _(i):
        some = pl.ds(i * chunk, chunk)  # writes beyond the slots are dropped
        plgpu.copy_smem_to_gmem(k_slots.at[some], keys.at[at, some])
        plgpu.copy_smem_to_gmem(v_slots.at[some], values.at[at, some])

    @pl.when((h == 0) | (sets > 1))
    def _():
        held_out[b, a_set] = held
        if folds:
            outs[0][b, a_set] = number

    for x, y in zip((k_scale, v_scale), outs[folds:], strict=False):
        y[b, h] = load_rows(x, over_slots)
    plgpu.wait_smem_to_gmem(0)


def _victim(rule: EvictionRule, number: Any, held: Array, newest: Array) -> Array:
    """The position of the token to evict; `_NEVER` if a slot is free. As `rules.victim`, with reductions to scalars."""
    age = (newest - held).astype(jnp.float32)
    kept = -age if number is None else jnp.where(number == number, number, -jnp.inf)  # NaN counts as the lowest
    if rule.first:
        kept = jnp.where(held < rule.first, jnp.inf, kept)
    if rule.recent:
        kept = jnp.where(held > newest - rule.recent, jnp.inf, kept)
    candidate = jnp.where(held >= 0, kept, jnp.where(held == BEYOND, jnp.inf, -jnp.inf))
    youth = jnp.where(held != -1, held, _NEVER)
    return jnp.where(candidate == candidate.min(), youth, -1).max()


def _all(carry: tuple[Array, Array | None]) -> tuple[Array, ...]:
    """The carry as a tuple of arrays, since a loop carries arrays only."""
    return tuple(x for x in carry if x is not None)


def _two(carry: tuple[Array, ...], folds: bool) -> tuple[Array, Array | None]:
    return (carry[0], carry[1]) if folds else (carry[0], None)


def _chunk(rows: int) -> int:
    """The number of rows that one copy moves, at most 256, out of `rows`."""
    return max(x for x in range(PASS, 257, PASS) if rows % x == 0)


def _codes(x: Stored) -> Array:
    return x.codes if isinstance(x, Quantised) else x


def _with_codes(x: Stored, codes: Array) -> Stored:
    codes = codes.reshape(_codes(x).shape)
    return replace(x, codes=codes) if isinstance(x, Quantised) else codes


def _with_scale(x: Any, layer: Any, bits: Array) -> Stored:
    return replace(x, scale=x.scale.at[layer].set(bits))


def _scale(bits: Array, dtype: str) -> Array:
    scale = lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
    return scale * 256 if dtype == "float8_e4m3fn" else scale


def _bits(scale: Array, dtype: str) -> Array:
    scale = scale / 256 if dtype == "float8_e4m3fn" else scale
    return lax.bitcast_convert_type(scale.astype(jnp.bfloat16), jnp.uint16)
