"""Activations of decoders, encoders and towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import jax
from jaxtyping import Array, Float

Activation = Literal["silu", "gelu", "gelu_tanh"]
"""Those of decoders. silu: x sigmoid(x). gelu: exact GELU. gelu_tanh: GELU approximated with tanh."""

TowerActivation = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""Those of vision towers. quick_gelu: x sigmoid(1.702 x)."""

EncoderActivation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
"""Those of encoders, by their Hugging Face names; the second and third are gelu_tanh."""


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU (Hendrycks & Gimpel 2016), computed as in torch. JAX's GELU uses 1 - erf, twice as slow on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


_gelu_tanh = partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""The functions of all three, by name."""


def check_encoder_activation(name: str) -> None:
    """Raises ValueError if encoders have no activation of this name."""
    if name not in get_args(EncoderActivation):
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(get_args(EncoderActivation))}")
