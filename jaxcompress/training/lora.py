"""LoRA: low-rank adapters beside frozen weights (Hu et al. 2021).

Layers are stacked, so that an adapter is a pair of stacked matrices, and adding it is one product for all layers;
adapters are a plain pytree to train and to save.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.models.decoder import Decoder

PROJECTIONS = ("query", "key", "value", "out")
"""Of attention: what the paper adapts, section 4.2."""
EVERY = (*PROJECTIONS, "gate", "up", "down")


class Adapter(NamedTuple):
    """What is added to one kind of matrix, [L, N, M], in all layers.

    Attributes:
      down: [L, N, R].
      up: [L, R, M], zero at first.
    """

    down: Float[Array, "L N R"]
    up: Float[Array, "L R M"]


def init_lora(model: Decoder, key: Array, *, rank: int = 8, to: tuple[str, ...] = PROJECTIONS) -> dict[str, Adapter]:
    """Fresh adapters, which change nothing yet.

    Args:
      to: names of projections, of `EVERY`.

    Raises:
      ValueError: a rank below 1, or an unknown projection.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter is at least 1, not {rank}")
    unknown = [name for name in to if name not in EVERY]
    if unknown:
        raise ValueError(f"unknown projections {', '.join(unknown)}; known: {', '.join(EVERY)}")
    adapters = {}
    for name, one in zip(to, jax.random.split(key, len(to)), strict=True):
        layers, n, m = _kernel(model, name).shape
        down = jax.random.normal(one, (layers, n, rank)) * n**-0.5
        adapters[name] = Adapter(down, jnp.zeros((layers, rank, m)))
    return adapters


def add_lora(model: Decoder, adapters: dict[str, Adapter], *, alpha: float = 16.0) -> Decoder:
    """The model with adapters added to its weights: W + alpha / R * down @ up. The model given is not changed."""

    def changed(path: tuple[Any, ...], weight: Array) -> Array:
        steps = [getattr(step, "key", getattr(step, "name", None)) for step in path]
        name = steps[steps.index("kernel") - 1] if "kernel" in steps else None
        if "layers" not in steps or name not in adapters:
            return weight
        down, up = adapters[name]
        return weight + (alpha / down.shape[-1] * jnp.matmul(down, up)).astype(weight.dtype)

    return jax.tree_util.tree_map_with_path(changed, model)


def _kernel(model: Decoder, name: str) -> Array:
    part = model.layers.attention if name in PROJECTIONS else model.layers.mlp
    return getattr(part, name).kernel[...]
