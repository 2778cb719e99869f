"""Ways to have fewer visual tokens, by name and number of tokens, for the table and the pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxcompress.attention import Shown
from jaxcompress.evaluation.visual import Visual, Way, visual_of
from jaxcompress.models.bounded import Block, Stage
from jaxcompress.models.llava import Llava
from jaxcompress.models.vit import Patches

Choice = Callable[[Patches, Shown, int], Int[Array, "B n"]]
"""(the tower's tokens, what its last layer compared, grid) -> which patches stay."""


def _in_tower(name: str, choose: Choice) -> Way:
    def encode(model: Llava, pixels: Array) -> Visual:
        tower = model.config.tower
        patches, shown = model.tower.run_layers(model.tower.embed(pixels), range(model.config.feature_layers))
        return visual_of(model, patches.take(choose(patches, shown, tower.grid) + tower.special))

    return Way(name, encode)


@cache
def at_random(n: int, seed: int = 0) -> Way:
    """n patches drawn anew for each picture: what every method has to beat."""

    def choose(patches: Patches, shown: Shown, grid: int) -> Array:
        draw = lambda row: jax.random.permutation(jax.random.fold_in(jax.random.key(seed), row), grid**2)[:n]
        return jax.vmap(draw)(jnp.arange(patches.size.shape[0]))

    return _in_tower("random", choose)


@cache
def on_a_lattice(n: int) -> Way:
    """n patches as evenly as rows of equal number allow, the same of every picture."""

    def choose(patches: Patches, shown: Shown, grid: int) -> Array:
        index = lattice(n, grid)
        return jnp.broadcast_to(jnp.asarray(index), (patches.size.shape[0], n))

    return _in_tower("lattice", choose)


def lattice(n: int, grid: int) -> Int[np.ndarray, " n"]:
    """n of grid x grid places: about sqrt(n) rows, among which they are shared out, each spread over the columns."""
    rows = min(max(round(n**0.5), 1), grid)
    shares = np.diff(np.round(np.linspace(0, n, rows + 1)).astype(int))
    spread = lambda m: np.floor((np.arange(m) + 0.5) * grid / m).astype(int)
    lines = [row * grid + spread(m) for row, m in zip(spread(rows), shares, strict=True)]
    return np.concatenate(lines)


@cache
def by_class_attention(n: int) -> Way:
    """The n patches that the class token attends to most in the layer that gives the features (FasterVLM)."""

    def choose(patches: Patches, shown: Shown, grid: int) -> Array:
        first = jnp.zeros((patches.size.shape[0], 1), jnp.int32)
        attention = shown.rows(first)[:, :, 0, -(grid**2) :].mean(1)
        return jax.lax.top_k(attention, n)[1]

    return _in_tower("class attention", choose)


@cache
def by_last_word(n: int, patches: int, layer: int = 1) -> Way:
    """The n patches that the last word attends to most in a layer of the decoder; they leave after it (FastV)."""

    def reduce(block: Block, shown: Shown) -> Block:
        last = block.positions.argmax(-1)[:, None]
        attention = shown.rows(last)[:, :, 0].mean(1)
        score = jnp.where(block.patch >= 0, attention, 2.0)  # words stay
        stays = block.patch.shape[1] - (patches - n)
        return block.take(jnp.sort(jax.lax.top_k(score, stays)[1], axis=1))

    return Way("last word's attention", stages=(Stage(layer, reduce),))
