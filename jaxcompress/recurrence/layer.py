"""One layer of a state while it is read into: what a policy sees of it, and what all ways to read share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.pallas_kernels.by_device import by_device
from jaxcompress.pallas_kernels.dispatch import choose_kernel
from jaxcompress.pallas_kernels.types import Backend, Chosen
from jaxcompress.policies.cache_view import CacheView, Evicted, IncomingTokens, LayerContext, Observation
from jaxcompress.policies.checks import checked_stats
from jaxcompress.policies.gates import join_tokens
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.reductions.reduced import absorb, slot_bias, stand_ins
from jaxcompress.policies.schedule import Schedule
from jaxcompress.recurrence.attention import Extra, call_of
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.shapes import Keys, Positions, Queries, SlotPositions, Values
from jaxcompress.state.storage import Stored, load_vectors, store_vectors


class StepSpec(NamedTuple):
    """What does not change while a layer is read into.

    Attributes:
      policy: what to forget.
      context: what the policy may know of the layer.
      chunk: tokens between two selections.
      window: width of a sliding-window layer, None for a full one.
      backend: what computes.
    """

    policy: Policy
    context: LayerContext
    chunk: int = 1
    window: Int[Array, ""] | int | None = None
    backend: Backend = "auto"


Step = Callable[["TokenBlock", KVState, Int[Array, ""] | int, StepSpec], "StepResult"]
"""(tokens, a stack of layers, index of the layer, context) -> the result of reading the tokens into that layer."""


def settled(step: Step) -> Step:
    """Makes a step that is given any backend; the step itself is given one for the device that computes."""

    @wraps(step)
    def on_device(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
        run = lambda backend: step(block, state, layer, spec._replace(backend=backend))
        return by_device(run, spec.backend, (block, state))

    return on_device


def rule_of(state: KVState, spec: StepSpec) -> EvictionRule | None:
    """What a kernel may follow on its own, where all else is as kernels know it."""
    policy = spec.policy
    plain = policy.schedule == Schedule() and policy.scope != "pool" and not policy.gates and not policy.reduction
    rule = policy.rule(state.capacity) if plain and spec.context.placement == "absolute" else None
    return rule and rule._replace(spare=spare_slots(state, spec))


def why_no_rule(rule: EvictionRule | None, spec: StepSpec) -> str | None:
    """Why a kernel that sees more than one token cannot do it."""
    return None if rule else f"policy {spec.policy.name}, or where it places tokens, follows no rule that kernels know"


def rule_kernel(block: TokenBlock, state: KVState, spec: StepSpec) -> tuple[Chosen, EvictionRule] | None:
    """The kernel that does a whole decoding step of this policy, and its rule; None where there is none that will."""
    rule = rule_of(state, spec)
    if rule is None:
        return None
    chosen = choose_kernel("step_evict", call_of(block.grouped(state), state.keys, state.sets, rule), spec.backend)
    return chosen and (chosen, rule)


class TokenBlock(NamedTuple):
    """T tokens: q [B, T, H, D], k and v [B, T, K, D] as the cache stores them, and `bare`, all three before RoPE;
    `replaces` as in `Entering`, or None."""

    q: Array
    k: Stored
    v: Stored
    positions: Array
    bare: IncomingTokens
    replaces: Array | None

    def grouped(self, state: KVState) -> Array:
        """Queries as [B, T, K, G, D] for the heads of a state."""
        return self.q.reshape(*self.q.shape[:2], state.kv_heads, -1, self.q.shape[-1])


def enter(
    q: Queries, k: Keys, v: Values, positions: Positions, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec
) -> tuple[TokenBlock, KVState]:
    """Tokens as the state stores them, all at once: changed by the policy, rotated, in the state's dtype.

    Args:
      q, k, v: [B, T, H, D] and [B, T, K, D], not rotated.
    """
    policy, context, bare, replaces = spec.policy, spec.context, IncomingTokens(q, k, v, positions), None
    if policy.gates:
        memory = jax.tree.map(lambda x: x[layer], state.memory)
        entering = join_tokens(policy, memory, bare, state.layer[layer], context)
        k, v, replaces = entering.k, entering.v, entering.replaces
        state = replace(state, memory=with_layer(state.memory, layer, jax.lax.stop_gradient(entering.memory)))
    if policy.scope == "query_head":
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    if context.placement == "absolute":
        at = positions[..., None]
        q, k = context.rotate(q, at), context.rotate(k, at)
    keys, values = store_vectors(k, state.keys), store_vectors(v, state.values)
    return TokenBlock(q, keys, values, positions, bare, replaces), state


def cut_block(block: TokenBlock, size: int) -> TokenBlock:
    """A block as n chunks of so many tokens, [n, B, size, ...] each; the last is filled up with padding."""
    t = block.positions.shape[1]
    n = -(-t // size)

    def cut(x: Array, fill: int = 0) -> Array:
        x = jnp.pad(x, [(0, 0), (0, n * size - t), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        return x.reshape(x.shape[0], n, size, *x.shape[2:]).swapaxes(0, 1)

    positions = cut(block.positions, -1)
    chunks = jax.tree.map(cut, block)
    return chunks._replace(positions=positions, bare=chunks.bare._replace(positions=positions))


def join_chunks(out: Float[Array, "n B size K G D"], block: TokenBlock) -> Float[Array, "B T K G D"]:
    """The outputs of the chunks of a block, without padding."""
    whole = out.swapaxes(0, 1).reshape(out.shape[1], -1, *out.shape[3:])
    return whole[:, : block.positions.shape[1]]


class Entries(NamedTuple):
    """What goes into slots: one entry per token, or in a pool one per token and kv head. Keys and values are stored."""

    keys: Any  # [B, K, M, D]
    values: Any
    positions: Array  # [B, P, M]
    owner: Array | None  # [B, 1, M]


class StepResult(NamedTuple):
    """What reading T tokens into one layer gives.

    Attributes:
      out: [B, T, K, G, D], in the dtype of the queries.
      state: the stack with this layer advanced; `seen` is left to the caller, since all layers share it.
      freed: [n, B, P, F] int32, positions of the tokens that each of n selections freed, -1 for none. In a pool P is
        the number of kv heads that share it.
      died: [n, B, P, F] int32, the first position whose query no longer sees each of them.
    """

    out: Float[Array, "B T K G D"]
    state: KVState
    freed: Int[Array, "n B P F"]
    died: Int[Array, "n B P F"]


def entries_of(block: TokenBlock, state: KVState) -> Entries:
    b, t, heads = jax.tree.leaves(block.k)[0].shape[:3]
    if state.owner is None:
        held = jnp.broadcast_to(block.positions[:, None], (b, state.sets, t))
        owner, turn = None, lambda x: x.swapaxes(1, 2)
    else:
        held = jnp.repeat(block.positions, heads, axis=1)[:, None]
        turn = lambda x: x.reshape(b, 1, t * heads, *x.shape[3:])
        owner = jnp.broadcast_to(jnp.tile(jnp.arange(heads), t), held.shape)
    return Entries(jax.tree.map(turn, block.k), jax.tree.map(turn, block.v), held, owner)


def cache_view(
    state: KVState, layer: Any, spec: StepSpec, stay: int | None = None, entries: Entries | None = None
) -> CacheView:
    """One layer as a policy sees it: its slots, or entries that come in.

    Args:
      stay: how many of a set stay when these are selected from; by default as many as in a step (see `stay_in_step`).
    """
    at = lambda x: jax.tree.map(lambda y: y[layer], x)
    if entries is None:
        entries = Entries(at(state.keys), at(state.values), state.positions[layer], at(state.owner))
    return CacheView(
        load_vectors(entries.keys), load_vectors(entries.values), entries.positions, entries.owner, state.seen,
        state.layer[layer], at(state.memory), stay_in_step(state, spec) if stay is None else stay, spec.context,
    )  # fmt: skip


def remembered(state: KVState, layer: Any, policy: Policy, bare: IncomingTokens) -> KVState:
    old = jax.tree.map(lambda x: x[layer], state.memory)
    new = policy.remember(old, jax.lax.stop_gradient(bare))
    return replace(state, memory=with_layer(state.memory, layer, new))


def with_layer(stack: Any, layer: Any, one: Any) -> Any:
    return jax.tree.map(lambda x, y: x.at[layer].set(y), stack, one)


def seen_by(held: Array, owner: Array | None, heads: int, group: int) -> Array:
    """[B, P or K, 1 or G, N]: the slots in which a head's tokens may be."""
    occupied = (held >= 0)[:, :, None]
    if owner is None:
        return occupied
    return occupied & (owner[:, :, None] == (jnp.arange(heads) // group)[:, None])


def replaced_by_next(held: SlotPositions, block: TokenBlock, seen: Int[Array, " B"]) -> Array:
    """[B, P, N] bool: which tokens have a next one, in the block, that takes their slot."""
    assert block.replaces is not None
    b, t = block.positions.shape
    nth = jnp.where(block.positions >= 0, block.positions - seen[:, None], t)
    table = jnp.zeros((b, held.shape[1], t), bool)
    rows, sets = jnp.indices((b, held.shape[1], 1), sparse=True)[:2]
    table = table.at[rows, sets, nth[:, None]].set(block.replaces.swapaxes(1, 2), mode="drop")
    following = held + 1 - seen[:, None, None]
    found = jnp.take_along_axis(table, following.clip(0, t - 1), axis=-1)
    return found & (held >= 0) & (following >= 0) & (following < t)


def extra_of(state: KVState, layer: Any, spec: StepSpec) -> Extra:
    """What a policy adds to attention: a bias on the slots, stand-ins for what was evicted."""
    policy, at = spec.policy, lambda x: jax.tree.map(lambda y: y[layer], x)
    return Extra(slot_bias(policy, at(state.stats)), stand_ins(policy, at(state.memory), spec.context))


def with_stored(state: KVState, stored: tuple[Stored, Stored]) -> KVState:
    return replace(state, keys=stored[0], values=stored[1])


def rule_numbers(state: KVState, layer: Any) -> Array | None:
    """The one number per slot of a policy that a kernel follows, [B, P, S], if it has any."""
    numbers = jax.tree.leaves(state.stats)
    return numbers[0][layer] if numbers else None


def with_rule_numbers(state: KVState, layer: Any, numbers: Array | None) -> KVState:
    if numbers is None:
        return state
    return replace(state, stats=jax.tree.map(lambda x: x.at[layer].set(numbers), state.stats))


def observed(state: KVState, layer: Any, policy: Policy, seen: Observation) -> KVState:
    old = jax.tree.map(lambda x: x[layer], state.stats)
    return replace(state, stats=with_layer(state.stats, layer, checked_stats(policy, old, seen)))


def spare_slots(state: KVState, spec: StepSpec) -> int:
    """Slots that are allocated and stay free (see `init_state`)."""
    return state.positions.shape[-1] - spec.policy.slots(state.capacity, entries_per_token(state, spec))


def stay_in_step(state: KVState, spec: StepSpec) -> int:
    """How many tokens of a set stay when a full state takes a token; after `once`, how many stayed of the prompt."""
    entries, schedule = entries_per_token(state, spec), spec.policy.schedule
    if schedule.when == "once":
        return schedule.keep * entries
    return max(state.capacity - entries * (schedule.frees - (schedule.when == "after")), 0)


def entries_per_token(state: KVState, spec: StepSpec) -> int:
    return 1 if state.owner is None else spec.context.heads[1]


def by_owner(freed: Array, index: Array, owner: Array | None, spec: StepSpec) -> Array:
    """Freed entries of a pool [B, 1, M] -> of each kv head [B, K, M]."""
    if owner is None:
        return freed
    whose = jnp.take_along_axis(owner, index, axis=-1)
    return jnp.where(whose == jnp.arange(spec.context.heads[1])[:, None], freed, -1)


def evicted_at(state: KVState, layer: Any, index: Array, freed: Array) -> Evicted:
    """The tokens at these slots."""

    def at(x: Array) -> Array:
        x = x[layer]
        where = jnp.broadcast_to(index, (*x.shape[:2], index.shape[-1]))
        return jnp.take_along_axis(x, where.reshape(*where.shape, *[1] * (x.ndim - 3)), axis=2)

    pick = lambda x: jax.tree.map(at, x)
    return Evicted(
        load_vectors(pick(state.keys)), load_vectors(pick(state.values)), freed, pick(state.stats), pick(state.owner)
    )


def absorbed(state: KVState, layer: Any, spec: StepSpec, gone: Evicted) -> KVState:
    """Merges evicted tokens into what stays; only slots that change are stored anew."""
    stats = jax.tree.map(lambda x: x[layer], state.stats)
    done = absorb(spec.policy, stats, cache_view(state, layer, spec), gone)
    fresh = store_vectors(done.values, jax.tree.map(lambda x: x[layer], state.values))

    def put(old: Array, new: Array) -> Array:
        changed = done.changed.reshape(*done.changed.shape, *[1] * (new.ndim - 3))
        return old.at[layer].set(jnp.where(changed, new, old[layer]))

    return replace(
        state,
        values=jax.tree.map(put, state.values, fresh),
        stats=with_layer(state.stats, layer, done.stats),
        memory=with_layer(state.memory, layer, done.memory),
    )


def within_window(held: SlotPositions, now: Int[Array, " B"], window: Any) -> SlotPositions:
    """Without the tokens that have left a sliding window for good."""
    if window is None:
        return held
    return jnp.where(held > (now - window)[:, None, None], held, -1)
