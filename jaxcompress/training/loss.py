"""Next-token loss, and its weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(logits: Float[Array, "*B T V"], targets: Int[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Negative log-likelihood of each target in nats, float32."""
    logits = logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def check_weights(weights: Any, tokens: Any) -> None:
    """Raises ValueError if weights are not one for each prediction: [B, T] for tokens [B, T + 1]."""
    wanted = (tokens.shape[0], tokens.shape[1] - 1)
    if jnp.shape(weights) != wanted:
        raise ValueError(
            f"weights are one for each token but the first, {list(wanted)} for tokens {list(tokens.shape)}, not "
            f"{list(jnp.shape(weights))}"
        )
