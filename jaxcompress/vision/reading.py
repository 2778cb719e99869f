"""Pictures through a method: seen by the tower, read among the words, written about.

    method = get_method("mustdrop", keep=64)
    encoded = encode(model, pixels, method)
    state = init_state(model.config.decoder, Full(), slots(method, model.config, words + 20), batch=B)
    block, state = read_encoded(model, tokens, positions, encoded, state, Full(), method)

All of it is pure; jit it with `method` and `policy` static.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.read_block import HiddenBlock, Stage, read_block
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import State
from jaxcompress.state.shapes import Positions, Tokens
from jaxcompress.vision.method import Cut, Encoded, Given, Method


def encode(model: Llava, pixels: Float[Array, "B *crops C W W"], method: Method) -> Encoded:
    """The visual tokens of one picture for each row, its crops one after the other.

    Raises:
      ValueError: pixels of another size, a number of tokens that the method cannot leave of a crop.
    """
    if pixels.ndim == 4:
        pixels = pixels[:, None]
    b, crops = pixels.shape[:2]
    one = method.encode(model, pixels.reshape(b * crops, *pixels.shape[2:]))
    place = jnp.where(
        one.place >= 0, one.place + (jnp.arange(b * crops) % crops * model.config.tower.num_patches)[:, None], -1
    )
    join = lambda x: x.reshape(b, crops * x.shape[1], *x.shape[2:])
    return Encoded(*(join(x) for x in one._replace(place=place)))


def slots(
    method: Method, config: LlavaConfig, room: int, crops: int = 1, *, tokens: int | None = None
) -> tuple[int, ...]:
    """How many slots each layer needs for the visual tokens, and for `room` words, read and written.

    Args:
      tokens: visual tokens before the first layer, where they do not follow from the crops
        (`jaxcompress.generation.visual.laid_out`).
    """
    counts = method.counts(config, crops) if tokens is None else method.held(config.decoder, tokens)
    return tuple(count + room for count in counts)


def read_encoded(
    model: Llava,
    tokens: Tokens,
    positions: Positions,
    encoded: Encoded,
    state: State,
    policy: Policy,
    method: Method,
    *,
    chunk: int | None = None,
) -> tuple[HiddenBlock, State]:
    """Reads prompts with a picture each: tokens that are left after the last layer, normed, and the state.

    Args:
      tokens: [B, T], with as many image tokens in each row as `encoded` has visual tokens.
      positions: [B, T], -1 for padding.
      state: with `slots(method, ...)` for a policy that keeps everything.

    Raises:
      ValueError: fewer tokens than there are visual ones, or cuts that do not fit the number of visual tokens.
    """
    block = place(model, tokens, positions, encoded)
    words = tokens.shape[1] - encoded.visual.shape[1]
    cuts = method.cuts(model.config.decoder, encoded.visual.shape[1])
    rates = jnp.ones((tokens.shape[0], words), bool) if method.rates is None else method.rates(block, words)
    given = Given(rates, encoded.key, model.config.decoder.rope)
    return read_block(model.decoder, block, state, policy, stages=stages(given, cuts), chunk=chunk)


def place(model: Llava, tokens: Tokens, positions: Positions, encoded: Encoded) -> HiddenBlock:
    """The prompt as the first layer gets it. An empty visual token is padding, and words after it keep their place.

    Raises:
      ValueError: fewer tokens than there are visual ones.
    """
    m = encoded.visual.shape[1]
    if tokens.shape[1] < m:
        raise ValueError(f"{tokens.shape[1]} tokens have no place for {m} visual tokens; expand the image token first")
    here = (tokens == model.config.image_token) & (positions >= 0)
    patch = jnp.where(here, jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1, -1)
    there = jnp.take_along_axis(encoded.size > 0, jnp.clip(patch, 0, m - 1), axis=1)
    return HiddenBlock(model.embed(tokens, encoded.visual), jnp.where(here & ~there, -1, positions), patch)


def stages(given: Given, cuts: tuple[Cut, ...]) -> tuple[Stage, ...]:
    """Cuts as `read_block` takes them."""

    def stage(cut: Cut) -> Stage:
        return Stage(cut.layer, lambda block, shown: cut.rule(given, block, shown, cut.keep))

    return tuple(stage(cut) for cut in cuts)
