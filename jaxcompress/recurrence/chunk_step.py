"""Many tokens at once: they attend to the slots and to each other, then one selection among all follows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.pallas_kernels.dispatch import choose_kernel
from jaxcompress.policies.cache_view import Observation
from jaxcompress.policies.checks import checked_scores, checked_stats
from jaxcompress.policies.reductions.reduced import slot_bias
from jaxcompress.recurrence.attention import Extra, block_attention, call_of
from jaxcompress.recurrence.chunk_attention import Watch, chunk_attention
from jaxcompress.recurrence.following import rule_of, why_no_rule
from jaxcompress.recurrence.layer import (
    absorbed,
    by_owner,
    cache_view,
    evicted_at,
    extra_of,
    remembered,
    replaced_by_next,
    seen_by,
    spare_slots,
    within_window,
)
from jaxcompress.recurrence.side_by_side import joined, keys_met, settle, stay_in_block
from jaxcompress.recurrence.step import StepResult, StepSpec, TokenBlock, cut_block, join_chunks, settled
from jaxcompress.state.kv_state import KVState, Stats
from jaxcompress.state.select import keep_top, unranked


@settled
def chunk_steps(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
    """T tokens in chunks: a scan of `chunk_step` over one layer."""

    def step(one: KVState, chunk: TokenBlock) -> tuple[KVState, Any]:
        done = chunk_step(chunk, one, spec)
        seen = jnp.maximum(one.seen, chunk.positions.max(-1) + 1)  # so that policies know the first chunk
        return replace(done.state, seen=seen), (done.out, done.freed[0], done.died[0])

    one, (out, freed, died) = jax.lax.scan(step, state.take(layer), cut_block(block, spec.chunk))
    return StepResult(join_chunks(out, block), state.put(layer, one), freed, died)


def chunk_step(block: TokenBlock, state: KVState, spec: StepSpec) -> StepResult:
    """T tokens at once into a state of one layer: attend to slots and each other, then select from all of them.

    Kept slots stay in place. Kept tokens of the block go into the freed slots.
    """
    policy, positions = spec.policy, block.positions
    newest = positions.max(-1)
    oldest = jnp.where(positions >= 0, positions, newest[:, None]).min(-1)  # -1 in rows without a token
    freed_before = None
    if policy.schedule.when == "before":
        state = replace(state, positions=within_window(state.positions[0], oldest, spec.window)[None])
        state, freed_before = _make_room(state, spec, positions >= 0)
    state = remembered(state, 0, policy, block.bare)
    whole = joined(block, state, spec)
    held, slots = whole["positions"], state.positions.shape[-1]
    replaced = None if block.replaces is None else replaced_by_next(held, block, state.seen)
    q, given = keys_met(block, state, whole, spec)
    folded = _fold_by_rule(block, state, spec, whole, q)
    if folded is None:
        summary = extra_of(state, 0, spec).summary
        watch = Watch(
            partial(_visible, whole=whole, replaced=replaced, spec=spec),
            lambda stats: Extra(slot_bias(policy, stats), summary, spec.context.traits),
            partial(_observe, spec=spec),
            policy.watches,
        )
        folded = chunk_attention(q, positions, given, whole["stats"], watch)
    stats, out = folded
    lived = within_window(held, jnp.where(newest >= 0, newest, state.seen - 1), spec.window)
    alive = lived if replaced is None else jnp.where(replaced, -1, lived)
    everything = replace(state, **jax.tree.map(lambda x: x[None], dict(whole, positions=alive, stats=stats)))
    kept, unclear = _select(everything, spec)
    # The output is NaN where the scores do not decide what stays, or where a token finds no slot.
    out = jnp.where(unclear[:, None, None, None, None], jnp.nan, out)
    if not policy.forgets:
        lost = kept.sum(-1) > slots - spare_slots(state, spec)
        out = jnp.where(lost[:, None, :, None, None], jnp.nan, out)
    freed = jnp.where((lived >= 0) & ~kept, lived, -1)
    after = settle(everything, kept, slots)
    if policy.reduction:
        gone = jnp.where(kept, -1, alive)  # without replaced tokens, which are in those that replace them
        index = jax.lax.top_k(gone, gone.shape[-1] - min(state.capacity, gone.shape[-1] - 1))[1]
        evicted = evicted_at(everything, 0, index, jnp.take_along_axis(gone, index, axis=-1))
        after = absorbed(after, 0, spec, evicted)
    every = jnp.broadcast_to(jnp.arange(freed.shape[-1]), freed.shape)
    freed = by_owner(freed, every, whole["owner"], spec)
    died = jnp.broadcast_to((newest + 1)[:, None, None], freed.shape)
    died = died if replaced is None else jnp.where(replaced, held + 1, died)
    if freed_before is not None:
        died = jnp.concatenate([jnp.broadcast_to(oldest[:, None, None], freed_before.shape), died], axis=-1)
        freed = jnp.concatenate([freed_before, freed], axis=-1)
    return StepResult(out, after, freed[None], died[None])


def _visible(at: Array, columns: slice, whole: dict[str, Any], replaced: Array | None, spec: StepSpec) -> Array:
    """[B, P or K, 1 or G, T, N]: the tokens out of these columns that queries at these positions see."""
    held, owner, replaced = jax.tree.map(lambda x: x[:, :, columns], (whole["positions"], whole["owner"], replaced))
    visible = held[:, :, None] <= at[:, None, :, None]
    if spec.window is not None:
        visible &= held[:, :, None] > at[:, None, :, None] - spec.window
    if replaced is not None:  # by the next token, which no longer sees them
        visible &= (held[:, :, None] == at[:, None, :, None]) | ~replaced[:, :, None]
    return visible[:, :, None] & seen_by(held, owner, spec.context.heads[0], spec.context.group)[:, :, :, None]


def _select(everything: KVState, spec: StepSpec) -> tuple[Array, Array]:
    """Which tokens of slots and block stay, [B, P, N], and the rows in which the scores do not decide it, [B]."""
    alive, policy = everything.positions[0], spec.policy
    if not policy.evicts:
        return alive >= 0, jnp.zeros(alive.shape[0], bool)
    stay = stay_in_block(everything, spec)
    stats = jax.tree.map(lambda x: x[0], everything.stats)
    scores = checked_scores(policy, stats, cache_view(everything, 0, spec, stay))
    most = jnp.full(everything.seen.shape, stay)
    if policy.schedule.when == "once":
        most = jnp.where(everything.seen == 0, stay, alive.shape[-1])
    kept = keep_top(scores, alive, most[:, None])
    unclear = unranked(scores, alive) & (kept.sum(-1) < (alive >= 0).sum(-1))
    return kept, unclear.any(-1)


def _fold_by_rule(block: TokenBlock, state: KVState, spec: StepSpec, whole: Any, q: Array) -> tuple[Any, Array] | None:
    """Stats and output computed by a kernel, if the policy has a rule and a kernel supports it; else None."""
    rule, held, positions = rule_of(state, spec), whole["positions"], block.positions
    chosen = choose_kernel(
        "block", call_of(q, whole["keys"], held.shape[1], rule), spec.backend, why_no_rule(rule, spec)
    )
    if chosen is None or rule is None:
        return None
    out, last, total = block_attention(chosen, q, positions, whole["keys"], whole["values"], held, spec.window)
    present = (positions.max(-1) >= 0)[:, None, None]
    mean = lambda x: x.mean((1, 2))[:, None] if held.shape[1] == 1 else x.mean(2)
    observed = lambda x: x + mean(total) if rule.fold == "sum" else jnp.where(present, mean(last), x)
    return jax.tree.map(observed, whole["stats"]), out  # empty stats if the policy observes nothing


def _make_room(state: KVState, spec: StepSpec, valid: Array) -> tuple[KVState, Array]:
    """Evicts before a block, so that slots and block together fill the capacity.

    What is protected stays, even if the block alone fills it: the selection after the block has the last word.
    """
    held, coming, block_length = state.positions[0], valid.sum(-1), valid.shape[1]
    stay = max(state.capacity - block_length, 0)
    scores = checked_scores(spec.policy, jax.tree.map(lambda x: x[0], state.stats), cache_view(state, 0, spec, stay))
    kept = keep_top(scores, held, jnp.maximum(state.capacity - coming, 0)[:, None])
    kept |= (held >= 0) & jnp.isposinf(scores)
    freed = jnp.where((held >= 0) & ~kept, held, -1)
    return replace(state, positions=jnp.where(kept, held, -1)[None]), freed


def _observe(stats: Stats, weights: Array, at: Array, visible: Array, spec: StepSpec) -> Stats:
    """The stats after some queries."""
    counts = visible.sum(-1, dtype=jnp.float32).mean(2)
    return checked_stats(spec.policy, stats, Observation(weights, at, counts, spec.context.group))
