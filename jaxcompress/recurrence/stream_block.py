"""A block of tokens, one at a time: the same recurrence as `decode_step`, with the products of the block done at once.

A token that is evicted while the block is read keeps its column until the block ends. So keys and values stand still:
all scores are one product before the first step, and all outputs one after the last. What is left for each step is the
softmax over the tokens that live, the policy's numbers, and the choice of the token to evict.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.policies.cache_view import Observation
from jaxcompress.policies.checks import checked_scores
from jaxcompress.recurrence.chunk_attention import chunk_scores, weighted_sum
from jaxcompress.recurrence.layer import cache_view, observed, spare_slots, within_window
from jaxcompress.recurrence.side_by_side import joined, keys_met, settle
from jaxcompress.recurrence.softmax import exponentials
from jaxcompress.recurrence.step import StepResult, StepSpec, TokenBlock
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.select import last_position, unranked

BLOCK = 64
"""Maximum number of tokens whose products are done at once."""

FEWEST_SLOTS = 384
"""Below this number of slots, products of single tokens are as fast on a CPU."""


def reads_blocks(state: KVState, spec: StepSpec) -> bool:
    """Whether a block of tokens is read this way: there are many slots, all heads share them, tokens leave one at a
    time, and nothing else changes keys, values or scores while the block is read."""
    policy = spec.policy
    if policy.scope != "layer" or state.positions.shape[-1] < FEWEST_SLOTS:
        return False
    one_by_one = policy.schedule.when in ("after", "never") and policy.schedule.frees == 1
    plain = not policy.gates and not policy.reduction
    return one_by_one and plain and spec.context.placement == "absolute" and not jax.tree.leaves(state.memory)


class _Reading(NamedTuple):
    """What changes from token to token.

    Attributes:
      held: [B, P, N], positions of the tokens that live; -1 for those that left or have not come.
      stats: the policy's numbers, [B, P, N, ...].
      seen: [B], tokens read.
    """

    held: Int[Array, "B P N"]
    stats: Any
    seen: Int[Array, " B"]


def stream_block(block: TokenBlock, state: KVState, spec: StepSpec) -> StepResult:
    """T tokens into a state of one layer, each of which sees the state after the token before it.

    Kept slots stay in place. Tokens of the block that are still held at its end go into the free slots.
    """
    policy, slots = spec.policy, state.positions.shape[-1]
    whole = joined(block, state, spec)
    q, given = keys_met(block, state, whole, spec)
    traits = spec.context.traits
    scores = traits.capped(chunk_scores(q.transpose(0, 2, 3, 1, 4), given))
    scores = jnp.moveaxis(scores, 3, 0)  # [T, B, K, G, N]
    columns = jnp.arange(slots + block.positions.shape[1])
    everything = replace(state, **jax.tree.map(lambda x: x[None], whole))
    most = slots - spare_slots(state, spec)

    def step(now: _Reading, token: tuple[Array, Array, Array]) -> tuple[_Reading, Any]:
        scores, position, nth = token
        present = (position >= 0)[:, None]  # [B, 1]
        held = within_window(now.held, position, spec.window)
        comes = present if policy.forgets else present & ((held >= 0).sum(-1) < most)
        held = jnp.where((columns == slots + nth) & comes[..., None], position[:, None, None], held)
        count = (held >= 0).sum(-1)
        parts = exponentials(scores, (held >= 0)[:, :, None], sink=traits.sinks_beside(scores))
        weights = parts.visible * (present[:, :, None, None] / parts.total)
        seen = Observation(
            weights[:, :, :, None], position[:, None], count[..., None].astype(jnp.float32), spec.context.group
        )
        one = replace(everything, positions=held[None], stats=jax.tree.map(lambda x: x[None], now.stats), seen=now.seen)
        one = observed(one, 0, policy, seen)
        freed, unclear = _leaving(one, spec, count == most)
        broken = (unclear | (present & ~comes)).any(-1)
        left = jnp.where(held == freed[..., None], -1, held)
        after = _Reading(left, jax.tree.map(lambda x: x[0], one.stats), jnp.maximum(now.seen, position + 1))
        return after, (weights, freed[..., None], broken)

    began = _Reading(whole["positions"].at[:, :, slots:].set(-1), whole["stats"], state.seen)
    tokens = scores, block.positions.T, jnp.arange(block.positions.shape[1])
    ended, (weights, freed, broken) = jax.lax.scan(step, began, tokens)
    out = weighted_sum(jnp.moveaxis(weights, 0, 3), given).astype(block.q.dtype).transpose(0, 3, 1, 2, 4)
    out = jnp.where(broken.T[:, :, None, None, None], jnp.nan, out)
    last = replace(everything, positions=ended.held[None], stats=jax.tree.map(lambda x: x[None], ended.stats))
    after = replace(settle(last, ended.held >= 0, slots), seen=ended.seen)
    died = jnp.broadcast_to((block.positions + 1).T[:, :, None, None], freed.shape)
    return StepResult(out, after, freed, died)


def _leaving(one: KVState, spec: StepSpec, full: Array) -> tuple[Array, Array]:
    """[B, P]: the position of the token that leaves each full set, -1 for none; and where scores did not decide it."""
    held = one.positions[0]
    if not spec.policy.evicts:
        return jnp.full(full.shape, -1, jnp.int32), jnp.zeros(full.shape, bool)
    scores = checked_scores(spec.policy, jax.tree.map(lambda x: x[0], one.stats), cache_view(one, 0, spec))
    return jnp.where(full, last_position(scores, held), -1), full & unranked(scores, held)
