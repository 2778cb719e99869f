"""A bounded state in a decoder that is not this library's: its attention calls `advance`, and nothing else changes.

python examples/own_decoder.py
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import jaxcompress as jc
from jaxcompress.models import DecoderConfig

LAYERS, HEADS, KV_HEADS, WIDTH, VOCABULARY = 2, 4, 2, 16, 64


def rotate(x, positions):
    """Rotary positions of this decoder: vectors [..., D], positions [...]."""
    angles = positions[..., None] * 1e4 ** -jnp.linspace(0, 1, WIDTH // 2, endpoint=False)
    one, other = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        embed = HEADS * WIDTH
        self.q = nnx.LinearGeneral(embed, (HEADS, WIDTH), use_bias=False, rngs=rngs)
        self.kv = nnx.LinearGeneral(embed, (2, KV_HEADS, WIDTH), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, WIDTH), embed, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.up, self.down = nnx.Linear(embed, 4 * embed, rngs=rngs), nnx.Linear(4 * embed, embed, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(embed, rngs=rngs) for _ in range(2)])

    def __call__(self, x, positions, state, index, policy):
        h = self.norms[0](x)
        k, v = jnp.moveaxis(self.kv(h), -3, 0)
        # In place of the cache and of attention over it. q, k and v are not rotated yet.
        done = jc.advance(self.q(h), k, v, positions, state, index, policy, rotate=rotate)
        x = x + self.out(done.out)
        return x + self.down(nnx.silu(self.up(self.norms[1](x)))), done.state


class OwnDecoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, HEADS * WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(HEADS * WIDTH, rngs=rngs)

    def __call__(self, tokens, state, policy):
        """Logits [B, T, V] of tokens [B, T], and the state after them. The state is an argument, not a variable."""
        positions = state.seen[:, None] + jnp.arange(tokens.shape[1])
        x = self.embed(tokens)
        for index, layer in enumerate(self.layers):
            x, state = layer(x, positions, state, index, policy)
        return self.embed.attend(self.norm(x)), dataclasses.replace(state, seen=state.seen + tokens.shape[1])


@functools.partial(jax.jit, donate_argnames="state")
def step(weights, tokens, state, policy):
    """The program for any number of tokens: a prompt, or the one just written. The state is changed in place."""
    return nnx.merge(GRAPH, weights)(tokens, state, policy)


GRAPH, WEIGHTS = nnx.split(OwnDecoder(nnx.Rngs(0)))
SHAPE = DecoderConfig(VOCABULARY, HEADS * WIDTH, 4 * HEADS * WIDTH, LAYERS, HEADS, KV_HEADS, WIDTH)


def main(slots: int = 64, tokens: int = 512) -> None:
    """Reads a prompt and writes tokens, in a state of so many slots."""
    policy, prompt = jc.get_policy("tova"), np.random.default_rng(0).integers(0, VOCABULARY, (1, slots), np.int32)
    (wide,) = jc.init_state(SHAPE, policy, 2 * slots)  # layers of one size are one part of the state
    expected, _ = step(WEIGHTS, prompt, wide, policy)
    (state,) = jc.init_state(SHAPE, policy, slots)
    size = state.nbytes
    logits, state = step(WEIGHTS, prompt, state, policy)
    print(f"as with all tokens kept: {np.allclose(logits, expected, atol=1e-5)}")
    for _ in range(tokens):
        logits, state = step(WEIGHTS, logits[:, -1:].argmax(-1), state, policy)
    print(f"{int(state.seen[0])} tokens in {state.nbytes} bytes, {size} before the first")


if __name__ == "__main__":
    tyro.cli(main)
