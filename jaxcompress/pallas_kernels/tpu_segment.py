"""The recurrence over a segment in one launch on a TPU: a row's slots stay in VMEM while its tokens are processed.

Keys and values of a row are copied into VMEM once, before its first token, and back once, after its last token. Queries
and new tokens are streamed in blocks. Each token goes into a free slot, attends, and frees a slot, as in decoding.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxcompress.pallas_kernels import rules
from jaxcompress.pallas_kernels.tpu_limits import VMEM, group_rows, segment_sizes
from jaxcompress.pallas_kernels.tpu_slots import MASKED, in_hbm, multiply_dtype, nbytes, places, product, with_row
from jaxcompress.pallas_kernels.types import KernelCall, stored_as
from jaxcompress.state.eviction_rule import EvictionRule


class _Plan(NamedTuple):
    """Static facts of a launch."""

    tokens: int  # tokens of a block
    total: int  # T, padding included
    heads: int  # K
    sets: int  # P
    slots: int  # S
    dtype: str
    rule: EvictionRule
    numbered: bool  # the rule has numbers
    windowed: bool
    padded: bool  # memory is padded to groups of rows


def segment(q, new, stored, layer, positions, held, numbers, window, rule, *, interpret=False):
    """See `Kernels.segment`."""
    b, t, k, g, d = q.shape
    sets, s = held.shape[1:]
    dtype = stored_as(stored[0])
    size = segment_sizes(KernelCall(b, k, g, s, d, sets, t, dtype, q.dtype.name, rule))
    tokens = size["tokens"]
    pad = -t % tokens
    plan = _Plan(
        tokens, t + pad, k, sets, s, dtype, rule, numbers is not None, window is not None, padded=not interpret
    )
    longer = lambda x, fill=0: jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
    at = longer(positions, -1).reshape(-1)
    window = jnp.reshape(jnp.zeros((), jnp.int32) if window is None else window, 1).astype(jnp.int32)

    of_tokens = lambda *shape: pl.BlockSpec((None, tokens, *shape), lambda b, i, *_: (b, i, *[0] * len(shape)))
    of_row = lambda *shape: pl.BlockSpec((None, *shape), lambda b, i, *_: (b, *[0] * len(shape)))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    folded = [] if numbers is None else [numbers]
    slotted = [of_row(sets, s)] * (1 + len(folded))
    keys, values, out, freed, held, *folded = pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, plan.total // tokens),
            in_specs=[anywhere, anywhere, of_tokens(k, g, d), of_tokens(k, d), of_tokens(k, d), *slotted],
            out_specs=[anywhere, anywhere, of_tokens(k, g, d), of_row(sets, plan.total), *slotted],
            scratch_shapes=[
                pltpu.VMEM((k, s, d), stored[0].dtype),
                pltpu.VMEM((k, s, d), stored[1].dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            *map(shape, stored),
            jax.ShapeDtypeStruct((b, plan.total, k, g, d), q.dtype),
            jax.ShapeDtypeStruct((b, sets, plan.total), jnp.int32),
            *map(shape, [held, *folded]),
        ],
        input_output_aliases={3: 0, 4: 1},  # indices include the three prefetched arguments
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=pl.CostEstimate(
            flops=4 * q.size * s, transcendentals=q.size // d * s,
            bytes_accessed=nbytes(q, q, *new, held, held) + 4 * nbytes(stored[0]) // stored[0].shape[0],
        ),
        interpret=interpret,
        name="stream_segment",
    )(
        jnp.reshape(layer, 1).astype(jnp.int32), at, window,
        *(in_hbm(x, interpret) for x in stored), longer(q), *map(longer, new), held, *folded,
    )  # fmt: skip
    return out[:, :t], (keys, values), held, folded[0] if folded else None, freed[..., :t]


def _kernel(plan: _Plan, layer, at, window, *refs) -> None:
    take = iter(refs)
    source, q, new = (next(take), next(take)), next(take), (next(take), next(take))
    held_in, *numbers_in = [next(take) for _ in range(1 + plan.numbered)]
    target, out, freed = (next(take), next(take)), next(take), next(take)
    held, *numbers = [next(take) for _ in range(1 + plan.numbered)]
    *state, copied = take

    row, block = pl.program_id(0), pl.program_id(1)

    def copy(i: int, back: bool) -> Any:
        there = (target if back else source)[i].at[layer[0], row]
        return pltpu.make_async_copy(*((state[i], there) if back else (there, state[i])), copied.at[i])

    def copy_both(back: bool) -> None:
        for i in range(2):
            copy(i, back).start()
        for i in range(2):
            copy(i, back).wait()

    @pl.when(block == 0)
    def _() -> None:
        copy_both(back=False)
        held[...] = held_in[...]
        freed[...] = jnp.full(freed.shape, -1, jnp.int32)
        if plan.numbered:
            numbers[0][...] = numbers_in[0][...]

    def token(i: Array, carry: None) -> None:
        nth = block * plan.tokens + i
        position = at[row * plan.total + nth]
        there = position >= 0
        here = held[...]
        if plan.windowed:
            here = jnp.where(here > position - window[0], here, -1)
        slot = rules.first(here < 0)  # [P, 1]
        column = jax.lax.broadcasted_iota(jnp.int32, here.shape, 1)
        enters = (column == slot) & there
        here = jnp.where(enters, position, here)
        for head in range(plan.heads):
            of_set = head if plan.sets > 1 else 0
            if of_set or not head:
                which = jnp.where(there, jnp.min(slot[of_set : of_set + 1]), plan.slots)
            _write(plan, state, new, head, which, i)  # pyright: ignore[reportPossiblyUnboundVariable]  head 0 sets it
        mass = [_attend(plan, state, q, out, here, head, i, there) for head in range(plan.heads)]
        mass = jnp.concatenate(mass, axis=0) if plan.sets > 1 else sum(mass[1:], mass[0]) / plan.heads
        known = None
        if plan.numbered:
            known = rules.fold(plan.rule, jnp.where(enters, 0.0, numbers[0][...]), mass, there)
            numbers[0][...] = known
        leaves = column == rules.victim(plan.rule, known, here)
        gone = jnp.where(leaves, here, -1).max(-1, keepdims=True)
        held[...] = jnp.where(leaves, -1, here)
        freed[...] = jnp.where(jax.lax.broadcasted_iota(jnp.int32, freed.shape, 1) == nth, gone, freed[...])

    jax.lax.fori_loop(0, plan.tokens, token, None)

    @pl.when(block == pl.num_programs(1) - 1)
    def _() -> None:
        copy_both(back=True)


def _write(plan: _Plan, state: Any, new: Any, head: int, slot: Array, i: Array) -> None:
    """Writes a token's key and value into a slot of a head; writes nothing if the slot is S."""

    def put(start: Any, size: int) -> None:
        group = pl.ds(start, size)
        for memory, fresh in zip(state, new, strict=True):
            memory[head, group] = with_row(memory[head, group], slot - start, fresh[i, pl.ds(head, 1)])

    for place in places(slot, 0, plan.slots, plan.slots, group_rows(plan.dtype), plan.padded):
        pl.when(place.here)(partial(put, place.start, place.size))


def _attend(plan: _Plan, state: Any, q: Any, out: Any, held: Array, head: int, i: Array, there: Array) -> Array:
    """Writes a head's output; returns the mean mass of its queries, [1, S]."""
    of_set = head if plan.sets > 1 else 0
    multiply = multiply_dtype(q.dtype.name, plan.dtype)
    scores = product(q[i, head].astype(multiply), state[0][head].astype(multiply), 1) * q.shape[-1] ** -0.5
    scores = jnp.where(held[of_set : of_set + 1] >= 0, scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights *= jnp.where(there, 1 / weights.sum(-1, keepdims=True), 0.0)
    values = state[1][head]
    out[i, head] = product(weights.astype(values.dtype), values, 0).astype(out.dtype)
    return weights.mean(0, keepdims=True)
