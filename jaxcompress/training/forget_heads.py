"""The networks of learned policies: functions that create them, check them and prepare their inputs."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.models.config import DecoderConfig
from jaxcompress.policies.forget_head import ForgetHead, check_head, init_forget_head
from jaxcompress.state.shapes import Positions, Tokens, Valid


def network(config: DecoderConfig, key: Array, hidden: int, start: tuple[float, ...]) -> ForgetHead:
    """A new network for a model. It returns the numbers `start` for every token."""
    shape: dict[str, int] = dict(layers=config.num_layers, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    return init_forget_head(key, **shape, hidden=hidden, start=start)


def check_network(head: ForgetHead, outputs: int, config: DecoderConfig) -> None:
    """Raises ValueError if a network is for a model of another shape, or has another number of outputs."""
    check_head(head, layers=config.num_layers, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    if head.outer_bias.shape[-1] != outputs:
        raise ValueError(f"this loss needs {outputs} numbers per token, the weights give {head.outer_bias.shape[-1]}")


def check_temperature(temperature: float | int | Array) -> None:
    """Raises ValueError if a temperature is known (not traced) and not positive and finite."""
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise ValueError(f"a temperature is positive, not {temperature}")


def positions_of(tokens: Tokens, valid: Valid | None) -> Positions:
    """The position of each token in its row, -1 for padding."""
    valid = jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid)
    return jnp.where(valid, jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, -1)


def counted(weights: Float[Array, "B T"]) -> Valid:
    """[B, T], False for the tokens of rows without any weight: they only fill a batch."""
    return jnp.broadcast_to((jnp.asarray(weights) != 0).any(1, keepdims=True), weights.shape)
