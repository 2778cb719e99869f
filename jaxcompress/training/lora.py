"""LoRA: low-rank adapters beside frozen weights (Hu et al. 2021).

An adapter is a pair of matrices, stacked over layers; adding it is one product for all layers. Adapters are a plain
pytree. `jaxcompress.training.adapted` trains them for any objective. Save the result with
`save(add_lora(model, adapters), folder)`.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxcompress.models.decoder import Decoder
from jaxcompress.models.int8 import check_float

PROJECTIONS = ("query", "key", "value", "out")
"""The projections of attention, which the paper adapts (section 4.2)."""
EVERY = (*PROJECTIONS, "gate", "up", "down")
ALPHA = 16.0
"""The usual scale of adapters: alpha / R."""


class Adapter(NamedTuple):
    """The low-rank update of one kind of matrix, [L, N, M], in all layers.

    Attributes:
      down: [L, N, R].
      up: [L, R, M], zero at first.
    """

    down: Float[Array, "L N R"]
    up: Float[Array, "L R M"]


def init_lora(model: Decoder, key: Array, *, rank: int = 8, to: tuple[str, ...] = PROJECTIONS) -> dict[str, Adapter]:
    """New adapters, which change nothing before training.

    Args:
      to: names of projections from `EVERY`.

    Raises:
      ValueError: a rank below 1, no projection, an unknown one, or one without a matrix (see `kernel_of`).
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter is at least 1, not {rank}")
    if not to:
        raise ValueError(f"adapters are for one projection or more, none is given; known: {', '.join(EVERY)}")
    unknown = [name for name in to if name not in EVERY]
    if unknown:
        raise ValueError(f"unknown projections {', '.join(unknown)}; known: {', '.join(EVERY)}")
    adapters = {}
    for name, one in zip(to, jax.random.split(key, len(to)), strict=True):
        layers, n, m = kernel_of(model, name).shape
        down = jax.random.normal(one, (layers, n, rank)) * n**-0.5
        adapters[name] = Adapter(down, jnp.zeros((layers, rank, m)))
    return adapters


def lora_changes(adapters: dict[str, Adapter], *, alpha: float = ALPHA) -> dict[str, Float[Array, "L N M"]]:
    """The update of each kind of matrix: alpha / R * down @ up, in float32 whatever the adapters' dtype."""
    wide = lambda x: jnp.asarray(x, jnp.float32)
    return {name: alpha / up.shape[1] * jnp.matmul(wide(down), wide(up)) for name, (down, up) in adapters.items()}


def add_lora(model: Decoder, adapters: dict[str, Adapter], *, alpha: float = ALPHA) -> Decoder:
    """The model with adapters added to its weights: W + alpha / R * down @ up. The model given is not changed.

    The sum is computed in float32 and rounded once, to the dtype of W. In bfloat16 most of a small change is lost. So
    add adapters to float32 weights, and convert the result if you need bfloat16.

    If the adapters were not trained, they change nothing, and a warning is logged.

    Raises:
      ValueError: adapters of other matrices than the model has, by name (see `kernel_of`) or shape.
    """
    for name, (down, up) in adapters.items():
        layers, n, m = kernel_of(model, name).shape
        if down.shape[:2] != (layers, n) or up.shape != (layers, down.shape[2], m):
            raise ValueError(
                f"the adapter of {name} is {list(down.shape)} and {list(up.shape)}, the model's matrices are "
                f"{[layers, n, m]}: it was made for another model"
            )
    changes = lora_changes(adapters, alpha=alpha)
    ups = [adapter.up for adapter in adapters.values()]
    if not any(isinstance(up, Tracer) for up in ups) and not any(map(jnp.any, ups)):
        logging.getLogger("jaxcompress").warning(
            "add_lora: the adapters were not trained (`up` is 0 everywhere), so the model is as it was"
        )

    def changed(path: tuple[Any, ...], weight: Array) -> Array:
        steps = [getattr(step, "key", getattr(step, "name", None)) for step in path]
        name = steps[steps.index("kernel") - 1] if "kernel" in steps else None
        if "layers" not in steps or name not in changes:
            return weight
        return (weight.astype(jnp.float32) + changes[name]).astype(weight.dtype)

    return jax.tree_util.tree_map_with_path(changed, model)


def kernel_of(model: Decoder, name: str) -> Float[Array, "L N M"]:
    """The stacked matrices of one kind, given by a name from `EVERY`.

    Raises:
      ValueError: the MLP of the model has none, or one for each expert; the weights are held in int8.
    """
    part = model.layers.attention if name in PROJECTIONS else model.layers.mlp
    if name not in PROJECTIONS and model.config.mlp == "experts":
        raise ValueError(f"{name!r} has a matrix for each expert; adapt the projections {', '.join(PROJECTIONS)}")
    if not hasattr(part, name):
        raise ValueError(f"the MLP of this model has no {name}: it is {model.config.mlp}; known: {', '.join(EVERY)}")
    kernel = getattr(part, name).kernel[...]
    check_float(kernel, "adapted")
    return kernel
