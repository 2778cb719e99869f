"""A picture through a method: encoded in the tower, and read among the words of a prompt.

    method = get_method("mustdrop", keep=64)
    encoded = encode(model, pixels, method)
    state = init_state(config.decoder, Full(), slots_per_layer(config, method, words + 20), batch=B)
    block, state = read_encoded(model, tokens, positions, encoded, state, Full(), method)

All functions are pure; jit them with `method` static.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxcompress.models.llava import Llava, LlavaConfig, check_placeholders
from jaxcompress.models.read_block import HiddenBlock, LayerPruning, read_block
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import State
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import Positions, Tokens
from jaxcompress.vision.layer_view import PruneContext
from jaxcompress.vision.method import Encoded, Method, PruneStep


def encode(model: Llava, pixels: Float[Array, "B *crops C W W"], method: Method) -> Encoded:
    """The visual tokens of one picture for each row, its crops one after the other.

    Raises:
      ValueError: pixels of another size, or a number of tokens that the method cannot leave of a crop.
    """
    if pixels.ndim == 4:
        pixels = pixels[:, None]
    b, crops = pixels.shape[:2]
    one = method.encode(model, pixels.reshape(b * crops, *pixels.shape[2:]))
    place = jnp.where(
        one.place >= 0, one.place + (jnp.arange(b * crops) % crops * model.config.tokens_per_crop)[:, None], -1
    )
    join = lambda x: x.reshape(b, crops * x.shape[1], *x.shape[2:])
    return Encoded(*(join(x) for x in one._replace(place=place)))


def slots_per_layer(
    config: LlavaConfig, method: Method, room: int, crops: int = 1, *, tokens: int | None = None
) -> tuple[int, ...]:
    """How many slots each layer needs to hold the visual tokens and `room` words, read and written.

    Args:
      tokens: visual tokens before the first layer, where they do not follow from the crops
        (`jaxcompress.generation.visual.as_encoded`).
    """
    return tuple(count + room for count in method.tokens_per_layer(config, crops, tokens=tokens))


def read_encoded(  # nine parameters: a prompt, its picture, the state with its policy and placement, and the method
    model: Llava,
    tokens: Tokens,
    positions: Positions,
    encoded: Encoded,
    state: State,
    policy: Policy,
    method: Method,
    *,
    chunk: int | None = None,
    placement: Placement | None = None,
) -> tuple[HiddenBlock, State]:
    """Reads prompts with one picture each. Returns the tokens left after the last layer, normed, and the state.

    Args:
      tokens: [B, T], with as many image tokens in each row as `encoded` has visual tokens.
      positions: [B, T], growing along T; -1 for padding.
      state: for a policy that keeps everything, with the slots of `slots_per_layer`.
      chunk: tokens between two selections of the policy; one selection at the end by default.
      placement: the positions that RoPE uses; by default those of the policy.

    Raises:
      ValueError: as `embed_prompt`, prune steps that do not fit the number of visual tokens, or, unless under jit, a
        prompt without the words that the method asks (see `check_asks`).
    """
    block = embed_prompt(model, tokens, positions, encoded)
    check_asks(method, block.positions, block.patch)
    words = tokens.shape[1] - encoded.visual.shape[1]
    steps = method.prune_steps(model.config.decoder, encoded.visual.shape[1])
    raters = jnp.ones((tokens.shape[0], words), bool) if method.raters is None else method.raters(block, words)
    context = PruneContext(raters, encoded.key, model.config.decoder.rope, model.config.tower.num_patches)
    prunings = layer_prunings(context, steps)
    return read_block(model.decoder, block, state, policy, prunings=prunings, chunk=chunk, placement=placement)


def embed_prompt(model: Llava, tokens: Tokens, positions: Positions, encoded: Encoded) -> HiddenBlock:
    """The prompt as the first layer gets it. An empty visual token becomes padding; the words after it keep their
    positions.

    Raises:
      ValueError: fewer tokens than there are visual tokens, or a row with another number of image tokens (these are not
        counted under jit).
    """
    m = encoded.visual.shape[1]
    if tokens.shape[1] < m:
        raise ValueError(f"{tokens.shape[1]} tokens have no place for {m} visual tokens; expand the image token first")
    if not any(isinstance(x, Tracer) for x in (tokens, positions)):
        there = np.where(np.asarray(positions) >= 0, np.asarray(tokens), -1)
        check_placeholders(there, model.config.image_token, [m] * len(there))
    is_image = (tokens == model.config.image_token) & (positions >= 0)
    patch = jnp.where(is_image, jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1, -1)
    present = jnp.take_along_axis(encoded.size > 0, jnp.clip(patch, 0, m - 1), axis=1)
    return HiddenBlock(model.embed(tokens, encoded.visual), jnp.where(is_image & ~present, -1, positions), patch)


def check_asks(method: Method, positions: Positions, patch: Int[Array, "B T"]) -> None:
    """Raises ValueError if a method goes by the words after the picture and a row has none; not under jit.

    Args:
      positions, patch: as in `jaxcompress.models.read_block.HiddenBlock`.
    """
    if not method.asks or any(isinstance(x, Tracer) for x in (positions, patch)):
        return
    there, is_patch = np.asarray(positions) >= 0, np.asarray(patch) >= 0
    last = lambda mask: np.where(mask, np.arange(mask.shape[1]), -1).max(1)
    for row in np.flatnonzero(last(there & ~is_patch) < last(there & is_patch)):
        raise ValueError(
            f"{method.name} keeps what the words after the picture attend to, and the prompt of row {row} ends with "
            "the picture: put the question or instruction behind it, or use a method that goes by no words, such as "
            "visionzip"
        )


def layer_prunings(context: PruneContext, steps: tuple[PruneStep, ...]) -> tuple[LayerPruning, ...]:
    """Prune steps as `read_block` takes them."""

    def pruning(step: PruneStep) -> LayerPruning:
        return LayerPruning(step.layer, lambda block, attention: step.rule(context, block, attention, step.keep))

    return tuple(map(pruning, steps))
