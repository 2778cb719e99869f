"""Next-token loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(logits: Float[Array, "*B T V"], targets: Int[Array, "*B T"]) -> Float[Array, "*B T"]:
    """Negative log-likelihood of each target in nats, float32."""
    logits = logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target
