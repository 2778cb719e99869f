"""Delayed eviction: networks that decide what is evicted, for `jaxcompress.policies.DMS` (Łańcucki et al. 2025).

The model reads with soft eviction: the network decides how much the attention to each token is reduced. The network is
trained through the model, whose predictions should stay the same while the share of tokens kept falls. The trained
network serves as a policy with a fixed number of slots.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress._extras import extra
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.forget_head import KEEP_EVERYTHING, ForgetHead, token_numbers
from jaxcompress.recurrence.block_attention import forgetful_attention
from jaxcompress.state.shapes import Hidden, Tokens, Valid
from jaxcompress.training.distillation import divergence
from jaxcompress.training.forget_heads import check_network, check_temperature, counted, network, positions_of
from jaxcompress.training.loss import check_weights, token_losses

with extra("train"):
    import optax


def init_dms(config: DecoderConfig, key: Array, *, hidden: int = 64) -> ForgetHead:
    """A network for `jaxcompress.policies.DMS` that keeps every token."""
    return network(config, key, hidden, KEEP_EVERYTHING)


def share_schedule(ratio: float | int, steps: int) -> optax.Schedule:
    """The share of tokens that may be kept: linear from 1 down to 1 / ratio over `steps` steps.

    In the published code the ratio grows linearly, so the share falls fast at first, which takes more steps.

    Raises:
      ValueError: a ratio below 1, or no steps.
    """
    if not 1 <= ratio < math.inf or steps < 1:
        raise ValueError(f"a ratio is 1 or more and a schedule has steps, not ratio={ratio}, steps={steps}")
    return optax.linear_schedule(1.0, 1 / ratio, steps)


def temperature_schedule(start: float | int, end: float | int, steps: int) -> optax.Schedule:
    """The temperature of decisions: linear from `start` to `end` over `steps` steps.

    Start near 1: at a low temperature, firm decisions have no gradient.

    Raises:
      ValueError: a temperature that is not positive, or no steps.
    """
    check_temperature(start)
    check_temperature(end)
    if steps < 1:
        raise ValueError(f"a schedule has steps, not {steps}")
    return optax.linear_schedule(start, end, steps)


def kept_share(logits: Float[Array, "B K T"], temperature: float | Float[Array, ""]) -> Float[Array, "B T"]:
    """The share of kv heads that keep each token, 0 to 1. A head keeps a token if its logit is above zero.

    Straight-through: the gradient is that of the mean of sigmoid(logits / temperature).
    """
    soft = jax.nn.sigmoid(logits / temperature)
    return (soft + jax.lax.stop_gradient((logits > 0) - soft)).mean(1)


def keep_logits(numbers: Float[Array, "B K T 2"]) -> Float[Array, "B K T"]:
    """The logit that decides about each token: its first number, and the second of the token after it, if any."""
    return numbers[..., 0] + jnp.pad(numbers[..., 1:, 1], [(0, 0), (0, 0), (0, 1)])


class SoftRead(NamedTuple):
    """Result of `read_with_soft_eviction`.

    Attributes:
      hidden: [B, T, E], normed; `model.logits(hidden)` returns the logits of next tokens.
      kept: [L], the share of tokens kept, averaged over kv heads; its gradient is that of the soft share.
    """

    hidden: Hidden
    kept: Float[Array, " L"]


def read_with_soft_eviction(
    model: Decoder,
    tokens: Tokens,
    head: ForgetHead,
    *,
    window: int,
    temperature: float | Float[Array, ""],
    valid: Valid | None = None,
    key: Array | None = None,
) -> SoftRead:
    """Reads with soft eviction (Łańcucki et al. 2025, section 3.1, with the timing of the published code).

    A query more than `window` tokens after key j has log sigmoid(logit[j] / temperature) added to its score, where the
    logit is the first number of token j and the second of the token after it (see `jaxcompress.policies.DMS`).

    Args:
      tokens: [B, T].
      head: network with two numbers per token and kv head; the token is kept if the logit is above 0.
      window: number of tokens before a decision takes effect, at least 1.
      temperature: the lower, the closer the decisions are to 0 and 1.
      valid: [B, T], False for padding.
      key: adds noise to the logits, so that decisions are samples (Gumbel-sigmoid); None for no noise.

    Raises:
      ValueError: a network for a model of another shape, a window below 1, a temperature that is not positive.
    """
    check_network(head, len(KEEP_EVERYTHING), model.config)
    check_temperature(temperature)
    if window < 1:
        raise ValueError(f"a window of {window} tokens: give 1 or more, for a token's successor to come")
    keys = None if key is None else jax.random.split(key, model.config.num_layers)
    there = positions_of(tokens, valid) >= 0

    def attend(q, k, v, positions, layer, index, carry, xs):
        mine, key = xs
        logits = keep_logits(token_numbers(mine, k.swapaxes(1, 2), v.swapaxes(1, 2)))
        if key is not None:
            logits += jax.random.logistic(key, logits.shape)
        here = layer.attention.constants(model.config, index)
        q, k = here.placed(q, k, positions)
        bias = jax.nn.log_sigmoid(logits / temperature)
        out = forgetful_attention(q, k, v, positions, bias, delay=window + 1, window=here.window, traits=here.traits)
        kept = (kept_share(logits, temperature) * there).sum() / jnp.maximum(there.sum(), 1)
        return out, carry, kept

    x, _, kept = model.run_layers(model.embed(tokens), positions_of(tokens, valid), attend, xs=(head, keys))
    return SoftRead(model.norm(x), kept)


def dms_loss(  # ten parameters: the inputs, and the settings of the loss
    model: Decoder,
    tokens: Int[Array, "B _"],
    head: ForgetHead,
    *,
    weights: Float[Array, "B T"],
    window: int,
    share: float | Float[Array, ""],
    temperature: float | Float[Array, ""],
    teacher: Decoder | None = None,
    pressure: float | int | Float[Array, ""] = 1.0,
    key: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of delayed eviction: the prediction loss, and a penalty for keeping more tokens than allowed.

        loss = prediction + pressure * max(share kept - share allowed, 0)

    The second term is the one-sided loss of the paper (section 3.1). The share is the mean over all layers, kv heads
    and tokens, so training decides which layers and heads keep more. Rows without any weight do not count.
    Differentiate by `head`, or by the model as well.

    Args:
      tokens: [B, T + 1].
      weights: [B, T], the weight of predicting each token but the first.
      window, temperature, key: see `read_with_soft_eviction`; take the temperature from a schedule.
      share: the share of tokens that may be kept at this step, from `share_schedule`.
      teacher: a model with full attention whose prediction is the target (divergence, as in the paper). It gets no
        gradient and may be the model itself. None: the target is the next token.

    Returns:
      The loss, and its parts `prediction` and `kept`.

    Raises:
      ValueError: see `read_with_soft_eviction`; weights of another shape.
    """
    read = read_with_soft_eviction(
        model, tokens[:, :-1], head, window=window, temperature=temperature, valid=counted(weights), key=key
    )
    return prediction_and_share(model, tokens, read, weights=weights, share=share, teacher=teacher, pressure=pressure)


def prediction_and_share(
    model: Decoder,
    tokens: Int[Array, "B _"],
    read: SoftRead,
    *,
    weights: Float[Array, "B T"],
    share: float | Float[Array, ""],
    teacher: Decoder | None,
    pressure: float | int | Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a text that was read with forgetting; see `dms_loss`."""
    check_weights(weights, tokens)
    logits = model.logits(read.hidden)
    if teacher is None:
        losses = token_losses(logits, tokens[:, 1:])
    else:
        losses = divergence(logits, jax.lax.stop_gradient(teacher)(tokens[:, :-1]))
    prediction = (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-9)
    kept = read.kept.mean()
    return prediction + pressure * jnp.maximum(kept - share, 0.0), {"prediction": prediction, "kept": kept}
