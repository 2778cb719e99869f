"""What the scripts share that plan or compile a decoding step of Llama 3 over a mesh, from shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcompress.distributed import ShardingRules
from jaxcompress.distributed.mesh import AXES, mesh_sizes
from jaxcompress.generation import GenerationConfig, init_decode_state
from jaxcompress.generation.decode_state import DecodeState
from jaxcompress.generation.generate import _decode_loop
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.policy import Policy

LLAMA = {
    "Llama 3 8B": DecoderConfig(128_256, 4096, 14_336, 32, 32, 8, 128),
    "Llama 3 70B": DecoderConfig(128_256, 8192, 28_672, 80, 64, 8, 128),
}
"""Grattafiori et al. 2024, The Llama 3 Herd of Models (arXiv 2407.21783), table 3."""


def shape_of(mesh: str) -> tuple[int, ...]:
    """The sizes of all axes of a mesh that is written data=2,tensor=4."""
    sizes = mesh_sizes(mesh)
    return tuple(sizes.get(axis, 1) for axis in AXES)


def model_shapes(rules: ShardingRules, config: DecoderConfig, dtype: str = "bfloat16") -> Decoder:
    """A decoder's shapes and places."""
    return rules.abstract(lambda: Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))


def state_shapes(rules: ShardingRules, model: Decoder, policy: Policy, slots: int, batch: int) -> DecodeState:
    """The same of the state of so many rows, in bfloat16."""
    return rules.abstract(lambda: init_decode_state(model, policy, slots, batch=batch, dtype="bfloat16"))


def decode_step(model: Decoder, state: DecodeState, policy: Policy) -> Any:
    """The loop that `decode` runs, traced: each turn writes a token per row."""
    how: dict[str, Any] = dict(buffer=8, config=GenerationConfig(), placement=None)
    return _decode_loop.trace(model, state.arrays, jax.ShapeDtypeStruct((), jnp.int32), policy, **how)
