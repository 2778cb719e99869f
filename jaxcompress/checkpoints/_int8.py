"""Converts weights to int8 while a checkpoint is read."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._extras import extra

MATRICES = ("kernel", "head", "gate", "up", "down")
"""Last names of arrays [..., in, out]; `embedding` is [V, E]."""


def in_int8(name: str, array: jax.Array) -> Any:
    """The array as a `qwix.QArray`, with a scale for each layer and output channel, if it is a matrix.

    Norms, biases, sinks and the routers of experts stay as they are: they are small, and rounding them costs most.

    Args:
      name: its dotted path in the module.
    """
    path = name.split(".")
    if path[-1] not in (*MATRICES, "embedding") or "router" in path:
        return array
    return _quantized(array, summed=1 if path[-1] == "embedding" else array.ndim - 2)


@partial(jax.jit, static_argnames="summed")
def _quantized(array: jax.Array, *, summed: int) -> Any:
    with extra("int8"):
        import qwix
    return qwix.quantize(array, jnp.int8, channelwise_axes=[axis for axis in range(array.ndim) if axis != summed])


def check_extra() -> None:
    """Raises MissingExtra if qwix is not installed."""
    with extra("int8"):
        import qwix  # noqa: F401
