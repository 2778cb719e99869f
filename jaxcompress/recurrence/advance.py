"""The one recurrence: attend over the slots and the incoming tokens, observe, evict back to capacity.

    advance(q, k, v, positions, state, layer, policy, chunk=m) -> out, state, ...

Only this is sequential in a transformer with a bounded state: projections and MLPs of a whole segment run at once, and
the recurrence scans over the segment's tokens inside one layer's attention. How the segment is cut is the mode, and
modes keep different tokens where scores depend on attention:

  streaming   chunk = 1: one token at a time, exactly as in decoding
  chunked     chunk = m: m tokens attend to the slots and to each other, then one selection among all
  one-shot    chunk = T: the whole prompt attends to itself, then one selection (official TOVA, H2O, SnapKV, ...)
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.inputs.scalars import whole
from jaxcompress.pallas_kernels.types import Backend
from jaxcompress.policies.cache_view import LayerContext
from jaxcompress.policies.checks import check_policy
from jaxcompress.policies.numbers import check_numbers, numbers_of
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.chunk_step import chunk_steps
from jaxcompress.recurrence.decode_step import decode_step
from jaxcompress.recurrence.step import Step, StepResult, StepSpec, TokenBlock, enter
from jaxcompress.recurrence.stream import stream
from jaxcompress.state.attention_traits import PLAIN, AttentionTraits
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.placement import Placement, Rotate
from jaxcompress.state.shapes import AttentionOut, Keys, Positions, Queries, Values


class Advanced(NamedTuple):
    """Result of `advance`.

    Attributes:
      out: [B, T, H, D], in the dtype of the queries, not of the state.
      state: the stack with this layer advanced; `seen` is left to the caller, since all layers share it.
      freed: [n, B, P, F] int32, positions of the tokens that each of the n chunks freed, -1 for none. In a pool P is
        the number of kv heads that share it.
      died: [n, B, P, F] int32, the first position whose query no longer sees each of them.
    """

    out: AttentionOut
    state: KVState
    freed: Int[Array, "n B P F"]
    died: Int[Array, "n B P F"]


def advance(  # fifteen parameters: callers with arrays but no model pass every property of the layer by name
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    state: KVState,
    layer: Int[Array, ""] | int,
    policy: Policy,
    *,
    chunk: int = 1,
    rotate: Rotate = lambda x, positions: x,
    placement: Placement | None = None,
    window: Int[Array, ""] | int | None = None,
    project: Float[Array, "K G D E"] | None = None,
    traits: AttentionTraits = PLAIN,
    backend: Backend = "auto",
    recurrence: Step | None = None,
) -> Advanced:
    """Advances one layer of a state over a block of T tokens.

    Args:
      q, k, v: queries, keys and values of the incoming tokens, not rotated.
      positions: [B, T], growing along T; -1 where a row has no token (padding, at any side).
      state: a stack of layers.
      layer: index into the stack.
      policy: the eviction policy.
      chunk: tokens between two selections (see above). T is padded up to a multiple of it.
      rotate, placement: position embedding, and the positions that it uses (None: the policy's placement). The same in
        every call on a state: keys are cached rotated for `absolute` only, and a state does not tell which.
      window: width of a sliding-window layer; tokens that no later query can see free their slot.
      project: the layer's output projection, for policies that weigh values by it.
      traits: what the layer's attention does beyond scaled products and a softmax.
      backend: `auto`, `jnp`, or a kernel backend by name (see `jaxcompress.pallas_kernels.types`). For `read`, pass
        `recurrence=on(backend)`.
      recurrence: another implementation with the same result (see `jaxcompress.recurrence.parallel`).

    Raises:
      ValueError: `policy` is no policy, or not the one that the state was made for, as far as heads, sets and its
        numbers tell; arrays whose shapes do not fit together or to the state; positions that are no integers; a layer
        outside the stack, a chunk or window below 1 token, an unknown placement; a pool that is to stand at re-indexed
        positions; or this device cannot run the kernels requested by name.
    """
    check_policy(policy)
    _check_arrays(q, k, v, positions, state, policy)
    _check_numbers(layer, state, window)
    b, t, h, d = q.shape
    heads = state.heads or tuple(range(state.kv_heads))
    context = LayerContext(rotate, placement or policy.placement, project, (h, k.shape[2]), heads, traits)
    if not policy.layers:
        of: dict[str, Any] = dict(batch=b, head_dim=d, capacity=state.capacity, pooled=state.owner is not None)
        check_numbers(policy, state, *numbers_of(policy, context, **of))
    spec = StepSpec(policy, context, chunk, window, backend)
    block, state = enter(q, k, v, positions, state, layer, spec)
    done = (recurrence or step_for(t, chunk))(block, state, layer, spec)
    return Advanced(done.out.reshape(b, t, h, d).astype(block.q.dtype), done.state, done.freed, done.died)


def _check_arrays(q: Any, k: Any, v: Any, positions: Any, state: KVState, policy: Policy) -> None:
    b, t, h, d = q.shape
    kv = k.shape[2]
    if k.shape != (b, t, kv, d) or v.shape != k.shape or h % kv or positions.shape != (b, t):
        raise ValueError(
            "queries [B, T, H, D], keys and values [B, T, K, D] and positions [B, T] are expected, H a multiple of K, "
            f"not {list(q.shape)}, {list(k.shape)}, {list(v.shape)} and {list(positions.shape)}"
        )
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions are integers, -1 for padding, not {positions.dtype}")
    heads = policy.heads(h, kv)
    has = state.positions.shape[1], state.kv_heads, state.sets, state.owner is not None
    needs = b, heads, policy.sets(heads), policy.scope == "pool"
    if has != needs:
        told = "{} rows, {} heads in {} sets, {} pool"
        raise ValueError(
            f"the state has {told.format(*has[:3], 'a' if has[3] else 'no')}; for {b} rows of {h} query and {kv} kv "
            f"heads policy {policy.name} needs {told.format(*needs[:3], 'a' if needs[3] else 'no')}: give a state and "
            "a policy that belong together"
        )


def _check_numbers(layer: Any, state: KVState, window: Any) -> None:
    layers = state.layer.shape[0]
    if isinstance(layer, int) and not 0 <= layer < layers:
        raise ValueError(f"layer is an index into a stack of {layers} layers, 0 to {layers - 1}, not {layer}")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"a sliding window has at least 1 token, not {window}; None for no window")


def step_for(tokens: int, chunk: int) -> Step:
    """The step function that reads `tokens` tokens with a selection after each chunk.

    Raises:
      ValueError: a chunk is no whole number of 1 or more.
    """
    whole(chunk, "chunk", least=1)
    if tokens == 1:
        return decode_step
    return stream if chunk == 1 else chunk_steps


def steps(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
    """The recurrence over a block of any length, in chunks of `spec.chunk` tokens."""
    return step_for(block.positions.shape[1], spec.chunk)(block, state, layer, spec)


@cache
def on(backend: Backend, recurrence: Step = steps) -> Step:
    """A recurrence computed by a backend: `read(..., recurrence=on("tpu"))`. Equal arguments return the same function,
    so that JAX reuses the compiled program."""

    def step(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
        return recurrence(block, state, layer, spec._replace(backend=backend))

    return step


def death_times(freed: Int[Array, "n B P F"], died: Int[Array, "n B P F"], total: int) -> Int[Array, "B P total"]:
    """The first position whose query no longer sees each token; `total` for tokens still held.

    With these times the mask `j <= i < death[j]` makes plain attention equal to the recurrence.
    """
    n, b, sets, f = freed.shape
    flat = lambda x: x.transpose(1, 2, 0, 3).reshape(b, sets, n * f)
    token = jnp.where(flat(freed) >= 0, flat(freed), total)  # out of bounds: dropped
    rows, heads = jnp.indices((b, sets, 1), sparse=True)[:2]
    return jnp.full((b, sets, total), total, jnp.int32).at[rows, heads, token].set(flat(died), mode="drop")
