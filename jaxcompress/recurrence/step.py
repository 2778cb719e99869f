"""A step of the recurrence: its inputs, its result, and tokens as the state stores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.pallas_kernels.by_device import by_device
from jaxcompress.pallas_kernels.types import Backend
from jaxcompress.policies.cache_view import IncomingTokens, LayerContext
from jaxcompress.policies.checks import check_placed
from jaxcompress.policies.gates import join_tokens
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.shapes import Keys, Positions, Queries, Values
from jaxcompress.state.slots import with_layer
from jaxcompress.state.storage import Stored, store_vectors


class StepSpec(NamedTuple):
    """The settings that stay fixed while tokens are read into a layer.

    Attributes:
      policy: the eviction policy.
      context: the properties of the layer that the policy may use.
      chunk: tokens between two selections.
      window: width of a sliding-window layer, None for a full one.
      backend: the implementation.
    """

    policy: Policy
    context: LayerContext
    chunk: int = 1
    window: Int[Array, ""] | int | None = None
    backend: Backend = "auto"


Step = Callable[["TokenBlock", KVState, Int[Array, ""] | int, StepSpec], "StepResult"]
"""(tokens, a stack of layers, index of the layer, context) -> the result of reading the tokens into that layer."""


def settled(step: Step) -> Step:
    """Wraps a step so that it takes any backend; the step itself gets the backend resolved for the computing device."""

    @wraps(step)
    def on_device(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
        run = lambda backend: step(block, state, layer, spec._replace(backend=backend))
        return by_device(run, spec.backend, (block, state))

    return on_device


class TokenBlock(NamedTuple):
    """T tokens: q [B, T, H, D], k and v [B, T, K, D] as the cache stores them, and `bare`, all three before RoPE;
    `replaces` is as in `Entering`, or None."""

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
    """All tokens as the state stores them: changed by the policy, rotated, in the state's dtype.

    Args:
      q, k, v: [B, T, H, D] and [B, T, K, D], not rotated.

    Raises:
      ValueError: a pool whose tokens are to stand at re-indexed positions.
    """
    policy, context, bare, replaces = spec.policy, spec.context, IncomingTokens(q, k, v, positions), None
    check_placed(policy, context.placement)
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
    """A block as n chunks of `size` tokens, [n, B, size, ...]; the last chunk is filled up with padding."""
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


class StepResult(NamedTuple):
    """The result of reading T tokens into one layer.

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
