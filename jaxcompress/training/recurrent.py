"""The recurrence in the loss: language modelling through a bounded state, with backpropagation through time.

A text is cut into segments, and the state is carried from segment to segment. The gradient goes back over
`bptt_segments` segments, or over the whole text. The gradient of one window of segments is taken before the next window
is read, so memory does not grow with the text.

The gradient of a layer's recurrence is computed in one of two exact ways:

  parallel       attention under a mask of the death times that the forward pass found (see
                 `jaxcompress.recurrence.parallel`), for policies that only evict
  rematerialised the scan is run again and differentiated, for any policy
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.inputs.scalars import whole
from jaxcompress.inputs.token_ids import check_read
from jaxcompress.models.checks import check_fits
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.policies.checks import check_policy
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.advance import Step, steps
from jaxcompress.recurrence.parallel import check_parallel, parallel_gradient
from jaxcompress.recurrence.step import StepResult, StepSpec, TokenBlock
from jaxcompress.state.kv_state import KVState, State
from jaxcompress.state.placement import Placement
from jaxcompress.training.loss import check_weights, token_losses

Params = TypeVar("Params")
Carry = TypeVar("Carry")


def rematerialised(block: TokenBlock, state: KVState, layer: Int[Array, ""] | int, spec: StepSpec) -> StepResult:
    """The recurrence. For the gradient, a layer's scan is run again.

    So only one layer's steps are in memory at a time: T times its slots. The gradient goes back from token to token in
    the state's dtype. If that is narrower than float32, a token's gradient is rounded at each step while it is held.
    """
    run = jax.checkpoint(lambda block, one: steps(block, one, 0, spec))
    done = run(block, state.take(layer))
    return done._replace(state=state.put(layer, done.state))


def exact_gradient(policy: Policy, placement: Placement | None = None) -> Step:
    """The cheaper recurrence whose gradient is exact for a policy: `parallel_gradient` if it only evicts."""
    try:
        check_parallel(policy, placement)
    except ValueError:
        return rematerialised
    return parallel_gradient


def through_time(
    loss: Callable[[Params, Carry, Any], tuple[Float[Array, ""], Carry]],
    params: Params,
    carry: Carry,
    segments: Any,
    *,
    bptt_segments: int | None = None,
) -> tuple[Float[Array, ""], Params, Carry]:
    """Sum of the losses of all segments, its gradient, and the carry after the last segment. Pure; jit it.

    Truncated backpropagation through time (Williams & Peng 1990): the gradient goes back to the beginning of a window
    of `bptt_segments` segments, and is taken window by window inside one scan. Within a window, segments are
    rematerialised, so memory holds the activations of one segment and `bptt_segments` carries.

    The gradients of segments and windows are summed and returned in float32, whatever the dtype of `params`: in
    bfloat16 a sum stops growing once it is 256 times as large as its summands.

    Args:
      loss: (params, carry, segment) -> loss of the segment and the next carry.
      carry: the carry before the first segment; it gets no gradient.
      segments: pytree, [n, ...] each.
      bptt_segments: None: over all segments.

    Raises:
      ValueError: n is not a multiple of `bptt_segments`.
    """
    n = jax.tree.leaves(segments)[0].shape[0]
    size = n if bptt_segments is None else whole(bptt_segments, "bptt_segments")
    if size < 1 or n % size:
        raise ValueError(f"{n} segments cannot be cut into windows of {size}: give bptt_segments that divide them")
    dtypes = jax.tree.map(jnp.result_type, params)
    wide = jax.tree.map(_at_least_float32, params)

    def as_given(wide: Params, carry: Carry, segment: Any) -> tuple[Array, Carry]:
        return loss(jax.tree.map(lambda x, dtype: x.astype(dtype), wide, dtypes), carry, segment)

    one = jax.checkpoint(as_given) if size > 1 else as_given

    def window(wide: Params, carry: Carry, segments: Any) -> tuple[Array, Carry]:
        def body(loop: tuple[Carry, Array], segment: Any) -> tuple[tuple[Carry, Array], None]:
            more, carry = one(wide, loop[0], segment)
            return (carry, loop[1] + more), None

        (carry, total), _ = jax.lax.scan(body, (carry, jnp.zeros(())), segments)
        return total, carry

    def step(loop: tuple[Carry, Params, Array], segments: Any) -> tuple[tuple[Carry, Params, Array], None]:
        carry, gradient, total = loop
        (more, carry), new = jax.value_and_grad(window, has_aux=True)(wide, jax.lax.stop_gradient(carry), segments)
        return (carry, jax.tree.map(jnp.add, gradient, new), total + more), None

    windows = jax.tree.map(lambda x: x.reshape(n // size, size, *x.shape[1:]), segments)
    start = carry, jax.tree.map(jnp.zeros_like, wide), jnp.zeros(())
    (carry, gradient, total), _ = jax.lax.scan(step, start, windows)
    return total, gradient, carry


def _at_least_float32(x: Any) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else x


def bounded_value_and_grad(  # ten parameters: the first four as everywhere, the rest keywords
    model: Decoder,
    tokens: Int[Array, "B _"],
    policy: Policy,
    slots: Slots,
    *,
    segment: int,
    weights: Float[Array, "B T"] | None = None,
    bptt_segments: int | None = None,
    chunk: int = 1,
    placement: Placement | None = None,
    recurrence: Step | None = None,
) -> tuple[Float[Array, ""], Decoder]:
    """Mean loss of predicting tokens from a bounded state, in nats, and its gradient. Pure; jit it.

    Nothing is donated. The gradient is float32 where the model's dtype is narrower (see `through_time`).

    Args:
      tokens: [B, T + 1].
      slots: as for `init_state`; the state has the model's dtype.
      segment: tokens per segment, a multiple of `chunk` unless it is the whole text. The last segment may be shorter.
      weights: [B, T], the weight of predicting each token but the first; the loss is the weighted mean. All count
        alike if not given.
      bptt_segments: over how many segments the gradient goes back; None: to the beginning.
      chunk: tokens between two selections; 1 is exactly as in decoding.
      recurrence: the recurrence whose gradient is taken; the cheapest exact one by default.

    Raises:
      ValueError: tokens that are not integers [B, T + 1], ids outside the vocabulary (not checked under jit), a text
        shorter than a segment, segments that cut chunks, bptt_segments that do not divide the number of segments, slots
        that the policy cannot work with, a policy that needs a whole prompt, or weights of another shape.
    """
    check_read(tokens, model.config.vocab_size)
    check_text(model.config, policy, slots, tokens.shape, segment, chunk)
    weights = jnp.ones(tokens[:, 1:].shape) if weights is None else weights
    state = init_state(model.config, policy, slots, batch=tokens.shape[0], dtype=model.dtype)
    recurrence = recurrence or exact_gradient(policy, placement)

    def loss(model: Decoder, state: State, piece: tuple[Array, ...]) -> tuple[Array, State]:
        tokens, targets, weights, valid = piece
        done = read(model, tokens, state, policy, valid=valid, chunk=chunk, placement=placement, recurrence=recurrence)
        return (token_losses(model.logits(done.hidden), targets) * weights).sum(), done.state

    whole = jnp.maximum(weights.sum(), 1e-9)
    value, gradient, _ = through_time(
        loss, model, state, cut_segments(tokens, weights, segment), bptt_segments=bptt_segments
    )
    return value / whole, jax.tree.map(lambda g: g / whole, gradient)


def check_text(
    config: DecoderConfig, policy: Policy, slots: Slots, shape: tuple[int, ...], segment: int, chunk: int
) -> None:
    """Raises ValueError if texts [B, T + 1] cannot be trained on through such a state in such segments."""
    check_policy(policy)
    segment, chunk = whole(segment, "segment"), whole(chunk, "chunk", least=1)
    total = shape[1] - 1
    if not 1 <= segment <= total:
        raise ValueError(f"a segment of {segment} tokens does not fit into texts of {total}")
    if segment < total and segment % chunk:  # each segment ends with a selection
        raise ValueError(
            f"segments of {segment} tokens cut chunks of {chunk}, and tokens would be selected at the end of each "
            f"segment too: give a segment of {-(-segment // chunk) * chunk} or another multiple of the chunk"
        )
    if policy.oneshot_only:
        raise ValueError(f"policy {policy.name} selects from whole prompts; training streams")
    state = jax.eval_shape(lambda: init_state(config, policy, slots))
    check_fits(config, policy, state, total)


def cut_segments(
    tokens: Int[Array, "B _"], weights: Float[Array, "B T"], segment: int, *more: Float[Array, "B T E"]
) -> tuple[Array, ...]:
    """Tokens, next tokens, weights, a mask of valid tokens, and more: [n, B, segment, ...] each.

    The last segment is padded.

    Raises:
      ValueError: weights of another shape.
    """
    check_weights(weights, tokens)
    batch, total = weights.shape
    n = -(-total // segment)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, n * segment - total), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(batch, n, segment, *x.shape[2:]).swapaxes(0, 1)

    return cut(tokens[:, :-1]), cut(tokens[:, 1:]), cut(weights), cut(jnp.ones((batch, total), bool)), *map(cut, more)
