"""The policy that every other has to beat."""

from __future__ import annotations

from functools import cache
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcompress.policies.policy import Policy
from jaxcompress.state import KVState, Stats


@cache
def random(seed: int = 0, scope: Literal["layer", "kv_head", "query_head"] = "layer") -> Policy:
    """Keeps a uniformly random subset of all tokens so far (reservoir sampling, Vitter 1985).

    score[n] = a uniform number that depends on seed, layer, head and position only: the same subset results however
    the sequence is cut into chunks, and rows of a batch do not depend on one another.
    """

    def init(incoming: KVState) -> Stats:
        _, _, sets, _ = incoming.positions.shape
        draw = lambda head, position: jax.random.uniform(
            jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, incoming.layer[0]), head), position)
        )
        key = jax.random.key(seed)
        heads = jnp.arange(sets)[None, :, None]
        return jnp.vectorize(draw)(heads, jnp.maximum(incoming.positions[0], 0))

    return Policy("random", score=lambda stats, state: stats, init=init, scope=scope)
