"""Many tokens, one at a time, exactly as in decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.pallas_kernels.dispatch import choose_kernel
from jaxcompress.pallas_kernels.types import Chosen
from jaxcompress.recurrence.attention import call_of, stream_attention
from jaxcompress.recurrence.decode_step import decode_step
from jaxcompress.recurrence.following import rule_numbers, rule_of, why_no_rule, with_rule_numbers
from jaxcompress.recurrence.layer import with_stored
from jaxcompress.recurrence.step import StepResult, StepSpec, TokenBlock, cut_block, join_chunks, settled
from jaxcompress.recurrence.stream_block import BLOCK, reads_blocks, stream_block
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import KVState


@settled
def stream(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
    """T tokens, each of which sees the state after the token before it: a scan of `decode_step` over one layer."""
    rule = rule_of(state, spec)
    call = call_of(block.grouped(state), state.keys, state.sets, rule)
    kernel = choose_kernel("segment", call, spec.backend, why_no_rule(rule, spec))
    if kernel is not None and rule is not None:
        return _stream_by_rule(kernel, block, state, layer, spec, rule)

    if reads_blocks(state, spec):
        return _stream_in_blocks(block, state, layer, spec)

    def step(one: KVState, token: TokenBlock) -> tuple[KVState, Any]:
        done = decode_step(token, one, 0, spec)
        seen = jnp.maximum(
            one.seen, token.positions.max(-1) + 1
        )  # so that policies tell the first token from later ones
        return replace(done.state, seen=seen), (done.out, done.freed[0], done.died[0])

    one, (out, freed, died) = jax.lax.scan(step, state.take(layer), cut_block(block, 1))
    return StepResult(join_chunks(out, block), state.put(layer, one), freed, died)


def _stream_in_blocks(block: TokenBlock, state: KVState, layer: Any, spec: StepSpec) -> StepResult:
    """All tokens in blocks whose products are done at once."""

    def step(one: KVState, some: TokenBlock) -> tuple[KVState, Any]:
        done = stream_block(some, one, spec)
        return done.state, (done.out, done.freed, done.died)

    tokens = block.positions.shape[1]
    one, (out, freed, died) = jax.lax.scan(step, state.take(layer), cut_block(block, min(tokens, BLOCK)))
    each = lambda x: x.reshape(-1, *x.shape[2:])[:tokens]  # without the padding of the last block
    return StepResult(join_chunks(out, block), state.put(layer, one), each(freed), each(died))


def _stream_by_rule(
    kernel: Chosen, block: TokenBlock, state: KVState, layer: Any, spec: StepSpec, rule: EvictionRule
) -> StepResult:
    """All tokens in one launch of a kernel that applies the policy's rule."""
    out, stored, held, numbers, freed = stream_attention(
        kernel, block.grouped(state), (block.k, block.v), (state.keys, state.values), layer, block.positions,
        state.positions[layer], rule_numbers(state, layer), spec.window, rule,
    )  # fmt: skip
    state = with_rule_numbers(with_stored(state, stored), layer, numbers)
    state = replace(state, positions=state.positions.at[layer].set(held))
    freed = freed.transpose(2, 0, 1)[..., None]  # [T, B, P, 1]
    died = jnp.broadcast_to((block.positions + 1).T[:, :, None, None], freed.shape)
    return StepResult(out, state, freed, died)
