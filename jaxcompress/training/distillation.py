"""Distillation: a bounded state learns to predict what the full cache predicts.

The teacher is a decoder with its full cache, the student a decoder with a bounded state. They may share their weights,
which are then stored once. A frozen teacher may be the weights that the student started from, or those below its
adapters (see `jaxcompress.training.lora`); nothing is copied. `make_step` passes a teacher by reference. In a `jax.jit`
of your own, make it an argument of the jitted function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.inputs.token_ids import check_read
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.advance import Step
from jaxcompress.state.kv_state import State
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import Hidden, Logits, Tokens
from jaxcompress.training.forget_heads import check_temperature
from jaxcompress.training.loss import token_losses
from jaxcompress.training.recurrent import Params, check_text, cut_segments, exact_gradient, through_time


def divergence(student: Logits, teacher: Logits, temperature: float = 1.0) -> Float[Array, "B T"]:
    """KL(teacher || student) of the next token in nats, times temperature squared (Hinton et al. 2015, section 2).

    The square keeps the size of gradients independent of the temperature.
    """
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature, axis=-1) for x in (teacher, student))
    return (jnp.exp(p) * (p - q)).sum(-1) * temperature**2


def full_cache_hidden(model: Decoder, tokens: Tokens) -> Hidden:
    """Normed hidden states with the full cache, [B, T, E]."""
    return model.norm(model.hidden(tokens))


def _itself(params: Any) -> Any:
    return params


def distilled_value_and_grad(  # fifteen parameters: those of `bounded_value_and_grad`, and of the loss
    params: Params,
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
    student: Callable[[Params], Decoder] = _itself,
    teacher: Decoder | None = None,
    language: float = 0.0,
    hidden: float = 0.0,
    temperature: float = 1.0,
) -> tuple[dict[str, Float[Array, ""]], Params]:
    """Losses of a student with a bounded state, and the gradient of their weighted sum. Pure; jit it.

    Nothing is donated. The arguments that are not described here are those of
    `jaxcompress.training.recurrent.bounded_value_and_grad`.

    Args:
      params: the trained parameters; by default a decoder.
      student: (params) -> the decoder that reads.
      teacher: reads with the full cache; it gets no gradient. None: the student itself, with its current weights.
      language: weight of the student's own language-model loss beside the divergence.
      hidden: weight of the mean squared difference of the last normed hidden states.
      temperature: of the divergence.

    Returns:
      `loss`, which is minimised, and its unweighted parts `divergence`, `language`, `hidden`. The gradient has the
      structure of `params`, in float32 where these are narrower.

    Raises:
      ValueError: as for `bounded_value_and_grad`; a teacher of another vocabulary or, for `hidden`, another width; a
        temperature that is not positive.
    """
    check_temperature(temperature)
    start = student(params)
    above = start if teacher is None else teacher
    mine, theirs = start.config, above.config
    if mine.vocab_size != theirs.vocab_size:
        raise ValueError(f"the teacher predicts {theirs.vocab_size} tokens, the student {mine.vocab_size}")
    if hidden and mine.hidden_size != theirs.hidden_size:
        raise ValueError(
            f"hidden states cannot be compared: their width is {theirs.hidden_size} in the teacher, "
            f"{mine.hidden_size} in the student"
        )
    check_read(tokens, start.config.vocab_size)
    check_text(start.config, policy, slots, tokens.shape, segment, chunk)
    weights = jnp.ones(tokens[:, 1:].shape) if weights is None else weights
    above = jax.lax.stop_gradient(above)
    teacher_hidden = full_cache_hidden(above, tokens[:, :-1])
    state = init_state(start.config, policy, slots, batch=tokens.shape[0], dtype=start.dtype)
    how: dict[str, Any] = dict(
        chunk=chunk, placement=placement, recurrence=recurrence or exact_gradient(policy, placement)
    )

    def loss(params: Any, carry: tuple[State, Array], piece: Any) -> tuple[Array, tuple[State, Array]]:
        tokens, targets, weights, valid, teacher_hidden = piece
        model, (state, parts) = student(params), carry
        done = read(model, tokens, state, policy, valid=valid, **how)
        logits = model.logits(done.hidden)
        apart = (
            jnp.square(done.hidden.astype(jnp.float32) - teacher_hidden.astype(jnp.float32)).mean(-1) if hidden else 0.0
        )
        each = jnp.stack([
            (divergence(logits, above.logits(teacher_hidden), temperature) * weights).sum(),
            (token_losses(logits, targets) * weights).sum(),
            (apart * weights).sum(),
        ])  # fmt: skip
        return each @ jnp.array([1.0, language, hidden]), (done.state, parts + jax.lax.stop_gradient(each))

    whole = jnp.maximum(weights.sum(), 1e-9)
    pieces = cut_segments(tokens, weights, segment, teacher_hidden)
    value, gradient, (_, parts) = through_time(loss, params, (state, jnp.zeros(3)), pieces, bptt_segments=bptt_segments)
    metrics = dict(zip(("divergence", "language", "hidden"), parts / whole, strict=True))
    return {"loss": value / whole, **metrics}, jax.tree.map(lambda g: g / whole, gradient)
