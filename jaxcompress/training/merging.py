"""Merging gates: a loss for the networks behind `jaxcompress.policies.gates`.

This is dynamic memory compression (Nawrot et al. 2024, section 3.2). In training, a gate lies between 0 and 1. Every
token stands for the running mean of the run that it ends. The more the next token joins the same run, the less later
queries attend to this token. With gates of 0 and 1 this equals the policy, computed in parallel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.cache_view import IncomingTokens
from jaxcompress.policies.forget_head import ForgetHead
from jaxcompress.policies.gates import APART, gate_numbers, means, running_sums
from jaxcompress.recurrence.block_attention import forgetful_attention
from jaxcompress.state.shapes import Tokens, Valid
from jaxcompress.training.delayed_eviction import SoftRead, kept_share, prediction_and_share
from jaxcompress.training.forget_heads import check_network, check_temperature, counted, network, positions_of


def init_gates(config: DecoderConfig, key: Array, *, hidden: int = 64) -> ForgetHead:
    """A network for `jaxcompress.policies.dmc` that joins nothing."""
    return network(config, key, hidden, APART)


def read_merging(
    model: Decoder,
    tokens: Tokens,
    head: ForgetHead,
    *,
    temperature: float | Float[Array, ""],
    valid: Valid | None = None,
    key: Array | None = None,
) -> SoftRead:
    """Reads with attention to the running means of tokens that join.

    A token joins the one before it by sigmoid(logit / temperature). `kept` is the share of tokens that do not join,
    with decisions as the policy makes them and the gradient of the soft ones.

    Args:
      temperature: the lower, the closer the decisions are to 0 and 1.
      valid: [B, T], False for padding.
      key: adds noise to the logits (Gumbel-sigmoid); None for no noise.

    Raises:
      ValueError: a network for a model of another shape, or a temperature that is not positive.
    """
    check_network(head, len(APART), model.config)
    check_temperature(temperature)
    keys = None if key is None else jax.random.split(key, model.config.num_layers)
    there = positions_of(tokens, valid) >= 0

    def attend(q, k, v, positions, layer, index, carry, xs):
        mine, key = xs
        incoming = IncomingTokens(q, k, v, positions)
        logits, weights = gate_numbers(mine, incoming)
        if key is not None:
            logits += jax.random.logistic(key, logits.shape)
        joins = jax.nn.sigmoid(logits / temperature)
        nothing = jnp.zeros((k.shape[0], k.shape[2], 1 + 2 * k.shape[3]))
        k, v = means(running_sums(nothing, incoming, joins, weights), incoming)
        # The weight that a token keeps after the next one was read. Padding continues no run.
        left = jnp.where(there[..., None], jax.nn.log_sigmoid(-logits / temperature), 0.0)
        bias = _of_the_next(left, there).swapaxes(1, 2)
        here = layer.attention.constants(model.config, index)
        q, k = here.placed(q, k, positions)
        out = forgetful_attention(q, k, v, positions, bias, delay=1, window=here.window, traits=here.traits)
        begins = jnp.where((positions == 0)[..., None], 1e3, -logits)  # no token precedes the first
        apart = kept_share(begins.swapaxes(1, 2), temperature)
        return out, carry, (apart * there).sum() / jnp.maximum(there.sum(), 1)

    x, _, kept = model.run_layers(model.embed(tokens), positions_of(tokens, valid), attend, xs=(head, keys))
    return SoftRead(model.norm(x), kept)


def _of_the_next(x: Float[Array, "B T K"], there: Array) -> Float[Array, "B T K"]:
    """For each token, the value of the next one; 0 for the last."""
    columns = jnp.where(there, jnp.arange(x.shape[1]), x.shape[1])
    following = jax.lax.cummin(columns, axis=1, reverse=True)
    following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=x.shape[1])
    return jnp.take_along_axis(x, following[..., None], axis=1, mode="fill", fill_value=0.0)


def merging_loss(  # nine parameters: those of `dms_loss` without `window`
    model: Decoder,
    tokens: Int[Array, "B _"],
    head: ForgetHead,
    *,
    weights: Float[Array, "B T"],
    share: float | Float[Array, ""],
    temperature: float | Float[Array, ""],
    teacher: Decoder | None = None,
    pressure: float | int | Float[Array, ""] = 1.0,
    key: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of merging: the prediction loss, and a penalty for more runs than allowed.

    As `jaxcompress.training.delayed_eviction.dms_loss`, where `share` is the number of runs over that of tokens.
    """
    read = read_merging(model, tokens[:, :-1], head, temperature=temperature, valid=counted(weights), key=key)
    return prediction_and_share(model, tokens, read, weights=weights, share=share, teacher=teacher, pressure=pressure)
