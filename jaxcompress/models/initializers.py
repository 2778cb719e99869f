"""How the weights of a decoder begin."""

from __future__ import annotations

from typing import Any

import jax

from jaxcompress.models.config import DecoderConfig


def initializers(config: DecoderConfig) -> tuple[Any, Any]:
    """Normal(0.02), and the same scaled by depth for projections that add to the residual stream (GPT-2)."""
    return jax.nn.initializers.normal(0.02), jax.nn.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
