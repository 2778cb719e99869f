"""Fingerprints of a model's weights, by which files know the model that they belong to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxcompress.models.decoder import Decoder

MOST_NUMBERS = 2**16
"""Numbers of one array that count; of a larger array so many, evenly spread."""


def fingerprint(model: Decoder) -> str:
    """64 hexadecimal digits that stand for the names and shapes of all weights, and for their numbers.

    It costs milliseconds, whatever the size of the model: up to `MOST_NUMBERS` numbers of each array count, spread over
    all its rows and columns. Training changes some of them; an edit of a few numbers in a large array may not.
    Numbers are rounded to bfloat16, so a float32 checkpoint that is loaded as bfloat16 keeps its fingerprint.
    """
    weights = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    sharding = getattr(next(iter(weights.values())), "sharding", None)  # arrays of numpy have none
    pick = _picked(sharding.mesh if isinstance(sharding, NamedSharding) else None)
    numbers = pick(weights, {name: _places(x.shape) for name, x in weights.items()})
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)}\n".encode() + np.asarray(numbers[name]).tobytes())
    return digest.hexdigest()


def norms_fingerprint(model: Decoder) -> str:
    """64 hexadecimal digits that stand for a checkpoint in any precision: for the model's shape and its norms' numbers.

    Files of quantised weights, GGUF among them, keep the norms as they were. So a model has this fingerprint whether it
    comes from the published checkpoint, from a quantised file or from a folder that was made of one. Training all
    weights changes it; adapters (LoRA) leave the norms alone and do not. Numbers are rounded to bfloat16.
    """
    config = model.config
    shape = (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size)
    digest = hashlib.sha256(f"{shape}\n".encode())
    weights = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    for name in sorted(name for name in weights if "norm" in name):
        digest.update(f"{name}\n".encode() + np.asarray(weights[name]).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


@lru_cache
def _picked(mesh: Mesh | AbstractMesh | None) -> Callable[[Mapping[str, Array], Mapping[str, Any]], dict[str, Array]]:
    """A function from weights and places to the bits of these numbers, as bfloat16, on every process of the mesh."""
    bits = lambda x: jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    pick = lambda weights, places: {name: bits(x[places[name]]) for name, x in weights.items()}
    return jax.jit(pick, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Indices of the numbers that count, by axis. The step shares no factor with the shape, so no axis is skipped."""
    size = math.prod(shape)
    step = -(-size // MOST_NUMBERS)
    while math.gcd(step, size) > 1:
        step += 1
    return tuple(axis.astype(np.int32) for axis in np.unravel_index(np.arange(0, size, step), shape))
