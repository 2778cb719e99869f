"""Reading prompts with pictures in a fixed number of slots.

    features = encode_images(model, pixels)
    state = prefill_visual(model, prompts, features, init_decode_state(model.decoder, policy, slots, batch=2))
    for tokens in decode_stream(model.decoder, state, max_new_tokens=8): ...

With a method that keeps fewer visual tokens:

    encoded = encode(model, pixels, method)  # or as_encoded(features, method), with LLaVA-NeXT's rows and newlines
    state = init_decode_state(model.decoder, policy, slots_per_layer(model.config, method, room), batch=2)
    state = prefill_encoded(model, prompts, encoded, state, method)

Visual tokens are read like words, so that every policy decides about them. Prunings drop or merge them between layers
while the prompt is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcompress.generation.decode_state import (
    DecodeArrays,
    DecodeState,
    check_room,
    check_usable,
    first_broken,
    raise_if_broken,
)
from jaxcompress.generation.sampling import remember
from jaxcompress.inputs.scalars import whole
from jaxcompress.inputs.token_ids import prompt_ids
from jaxcompress.models.checks import check_mode, warn_of_positions
from jaxcompress.models.llava import Llava, crops_of, expand_placeholders, picture_index, visual_index
from jaxcompress.models.read_block import HiddenBlock, LayerPruning, read_block
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import State
from jaxcompress.state.placement import Placement
from jaxcompress.vision.encoders import all_patches
from jaxcompress.vision.method import Encoded, Method
from jaxcompress.vision.reading import check_asks, read_encoded


class ImageFeatures(NamedTuple):
    """All visual tokens of a batch.

    Attributes:
      visual: [B, M, E], of all pictures of a row, one after the other; padding at the end.
      counts: for each row, how many tokens each of its pictures has.
    """

    visual: Float[Array, "B M E"]
    counts: tuple[tuple[int, ...], ...]


def encode_images(
    model: Llava,
    pixels: Float[np.ndarray, "crops channels height width"] | Array | Sequence[Any],
    sizes: Sequence[Any] | None = None,
) -> ImageFeatures:
    """Runs pictures through tower and projector, and keeps all their visual tokens. A row may have no picture.

    Args:
      pixels: [crops, channels, side, side], of all pictures of all rows one after the other (see
        `jaxcompress.generation.pictures`).
      sizes: for each row, (height, width) of each of its pictures before processing, [] for a row without pictures. By
        default each crop is the one picture of its row (LLaVA-1.5).

    Raises:
      ValueError: no rows, malformed sizes, pixels of another shape, or another number of crops than pictures of these
        sizes have.
    """
    config = model.config
    side, channels = config.tower.image_size, config.tower.channels
    pixels = jnp.asarray(pixels, jnp.float32)
    if not len(pixels):
        pixels = pixels.reshape(0, channels, side, side)
    if pixels.shape[1:] != (channels, side, side):
        raise ValueError(f"pixels must be [crops, {channels}, {side}, {side}], not {list(pixels.shape)}")
    if sizes is None:
        if config.pinpoints:
            raise ValueError("LLaVA-NeXT lays tiles out by the size of the picture; give sizes")
        sizes = [[(side, side)]] * len(pixels)
    sizes = _checked_sizes(sizes)
    crops = [[crops_of(config, size) for size in row] for row in sizes]
    total = sum(map(sum, crops))
    if total != len(pixels):
        raise ValueError(f"{len(pixels)} crops were given for pictures that have {total}; give those of every picture")
    rows = [[picture_index(config, size) for size in row] for row in sizes]
    index = visual_index(rows, crops, config.tokens_per_crop)
    if not total:  # the tower has nothing to encode; one visual token that nothing reads keeps the shape
        visual = jnp.zeros((*index.shape, config.decoder.hidden_size), model.decoder.dtype)
    else:
        visual = _packed_features(model, pixels, jnp.asarray(index))
    return ImageFeatures(visual, tuple(tuple(len(picture) for picture in row) for row in rows))


def _checked_sizes(sizes: Sequence[Any]) -> list[list[tuple[int, int]]]:
    if not len(sizes):
        raise ValueError("no rows were given; a row without pictures has the sizes []: encode_images(model, [], [[]])")
    out = []
    for number, row in enumerate(sizes):
        if np.ndim(row) == 0 or any(np.shape(size) != (2,) for size in row):
            raise ValueError(f"row {number} has the sizes {row!r}; give a list with (height, width) of each picture")
        out.append([(whole(size[0], "a height", least=1), whole(size[1], "a width", least=1)) for size in row])
    return out


@jax.jit
def _packed_features(model: Llava, pixels: Array, index: Array) -> Array:
    return model.pack(model.image_features(pixels), index)


def as_encoded(features: ImageFeatures, method: Method) -> Encoded:
    """The visual tokens of LLaVA-NeXT's layout (tiles without padding, a newline after each row of patches), for a
    method that drops nothing in the tower. Shorter rows end with empty places. `place` counts newlines too.

    Args:
      features: from `encode_images`, one picture in each row.

    Raises:
      ValueError: not one picture in each row, or a method that acts in the tower, which goes crop by crop (`encode`).
    """
    if method.encode is not all_patches:
        raise ValueError(
            f"{method.name} acts in the tower, crop by crop and without newlines; use `jaxcompress.vision.encode`"
        )
    if any(len(counts) != 1 for counts in features.counts):
        raise ValueError(
            "methods choose among the tokens of one picture in each row; use `prefill_visual` for several, or none"
        )
    b, m = features.visual.shape[:2]
    present = jnp.arange(m, dtype=jnp.int32) < jnp.array([sum(counts) for counts in features.counts])[:, None]
    place = jnp.where(present, jnp.arange(m, dtype=jnp.int32), -1)
    return Encoded(features.visual, place, present.astype(jnp.float32), jnp.zeros((b, m), bool))


class PromptBatch(NamedTuple):
    """A batch of prompts, padded at the right.

    Attributes:
      tokens: [B, T], as many image tokens as there are visual tokens; 0 for padding.
      positions: [B, T], -1 for padding.
      patch: [B, T], which visual token of its row each token is, -1 for words.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    patch: Int[Array, "B T"]


def batch_prompts(model: Llava, prompts: Sequence[Sequence[int] | np.ndarray], features: ImageFeatures) -> PromptBatch:
    """Pads prompts, and repeats the image token of each picture as often as it has visual tokens.

    Args:
      prompts: token ids, one image token for each picture.

    Raises:
      ValueError: not one image token for each picture, an empty prompt, token ids outside the vocabulary.
    """
    token, vocabulary = model.config.image_token, model.config.decoder.vocab_size
    given = prompt_ids(prompts, vocabulary, also=token)
    if len(given) != len(features.counts):
        raise ValueError(f"{len(given)} prompts were given for the pictures of {len(features.counts)} rows")
    rows = [expand_placeholders(ids, token, counts) for ids, counts in zip(given, features.counts, strict=True)]
    width = max(map(len, rows))
    tokens, positions = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -1, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], positions[row, : len(ids)] = ids, np.arange(len(ids))
    is_image = (tokens == token) & (positions >= 0)
    patch = np.where(is_image, is_image.cumsum(1) - 1, -1).astype(np.int32)
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(patch))


def prefill_visual(
    model: Llava,
    prompts: Sequence[Sequence[int] | np.ndarray],
    features: ImageFeatures,
    state: DecodeState,
    *,
    prunings: tuple[LayerPruning, ...] = (),
    chunk: int | None = None,
) -> DecodeState:
    """Reads a batch of prompts with pictures.

    Args:
      prompts: token ids, one image token for each picture.
      state: fresh, from `jaxcompress.generation.init_decode_state(model.decoder, ...)`; donated.
      prunings: what leaves between layers.
      chunk: tokens between two selections of the policy; each prompt is read at once by default.

    Raises:
      ValueError: see `batch_prompts`; a policy that keeps everything and has too few slots.
      FloatingPointError: logits are not finite. Layers after a pruning that have too few slots for a policy that keeps
        everything are a cause.
    """
    _check_fresh(model, state)
    batch = batch_prompts(model, prompts, features)
    check_mode(state.policy, "oneshot" if chunk is None else "chunked")
    if not prunings:
        longest = batch.tokens.shape[1]
        check_room(model.decoder, state, longest, prompt=longest)
    _warn_of_positions(model, state, batch)
    arrays = _prefill_visual(
        model, batch, features.visual, state.arrays, policy=state.policy, prunings=prunings, chunk=chunk,
        placement=state.placement,
    )  # fmt: skip
    state = replace(state, **arrays._asdict())
    raise_if_broken(state)
    return state


def _check_fresh(model: Llava, state: DecodeState) -> None:
    """Raises ValueError if something was read into the state before, and see `check_usable`."""
    check_usable(model.decoder, state)
    if int(state.kv[0].seen.max()):
        raise ValueError(
            "pictures are read into a fresh state, and this one has read something: give one from "
            "init_decode_state(model.decoder, policy, slots); prefill(model.decoder, ...) reads later turns without "
            "pictures"
        )


def _warn_of_positions(model: Llava, state: DecodeState, batch: PromptBatch) -> None:
    """Warns if a prompt leaves the positions that the decoder was trained for."""
    end = int(batch.positions.max()) + 1
    warn_of_positions(model.decoder.config, state.policy, state.placement, end)


@partial(jax.jit, static_argnames=("prunings", "chunk", "placement"), donate_argnames="before")
def _prefill_visual(
    model: Llava, batch: PromptBatch, visual: Array, before: DecodeArrays, *, policy: Policy, prunings: Any,
    chunk: int | None, placement: Placement | None,
) -> DecodeArrays:  # fmt: skip
    block = HiddenBlock(model.embed(batch.tokens, visual), batch.positions, batch.patch)
    left, state = read_block(
        model.decoder, block, before.kv, policy, prunings=prunings, chunk=chunk, placement=placement
    )
    return _arrays_after(model, batch, left, state, before)


def prefill_encoded(
    model: Llava,
    prompts: Sequence[Sequence[int] | np.ndarray],
    encoded: Encoded,
    state: DecodeState,
    method: Method,
    *,
    counts: Sequence[int] | None = None,
    patches: int | None = None,
    chunk: int | None = None,
) -> DecodeState:
    """Reads a batch of prompts with one picture each, while a method drops visual tokens between layers.

    Args:
      prompts: token ids, one image token in each.
      encoded: from `jaxcompress.vision.encode` with the same method, or from `as_encoded`.
      state: fresh, from `init_decode_state(model.decoder, policy, jaxcompress.vision.slots_per_layer(...))`; donated.
        Its policy decides about all tokens, also while the answer is written: `Full()`, or
        `method.decode_policy(first, last)`.
      counts: visual tokens of each row, where `as_encoded` gives rows of different length; all by default.
      patches: of the whole picture. If given, visual tokens stand at the positions that their patches have in the whole
        prompt, and words after all patches; `encoded` must be `in_raster_order`. By default positions have no gaps.
      chunk: tokens between two selections of the policy; each prompt is read at once by default.

    Raises:
      ValueError: not one image token in each prompt, an empty prompt, token ids outside the vocabulary; counts that do
        not fit `encoded`, visual tokens that are not in the order of `patches`, or both given; a prompt that ends with
        the picture, for a method that goes by the words after it.
      FloatingPointError: logits are not finite. Layers with too few slots for a policy that keeps everything are a
        cause.
    """
    return trace_prefill(model, prompts, encoded, state, method, counts=counts, patches=patches, chunk=chunk)[0]


class TokensLeft(NamedTuple):
    """The tokens of prompts that reached the last layer.

    Attributes:
      positions: [B, T], -1 for padding and empty places.
      patch: [B, T], which visual token of its row each token is, -1 for words.
    """

    positions: Int[Array, "B T"]
    patch: Int[Array, "B T"]


def trace_prefill(
    model: Llava,
    prompts: Sequence[Sequence[int] | np.ndarray],
    encoded: Encoded,
    state: DecodeState,
    method: Method,
    *,
    counts: Sequence[int] | None = None,
    patches: int | None = None,
    chunk: int | None = None,
) -> tuple[DecodeState, TokensLeft]:
    """As `prefill_encoded`, and also returns which tokens reached the last layer."""
    _check_fresh(model, state)
    b, m = encoded.visual.shape[:2]
    check_mode(state.policy, "oneshot" if chunk is None else "chunked")
    batch = batch_prompts(model, prompts, ImageFeatures(encoded.visual, ((m,),) * b))
    if counts is not None and patches is not None:
        raise ValueError("counts and patches both say where words stand; give counts= or patches=, not both")
    if counts is not None:
        batch = _shifted(batch, m, jnp.asarray(_checked_counts(counts, encoded))[:, None] - m)
    if patches is not None:
        _check_places(patches, encoded)
        batch = at_patch_positions(batch, encoded, patches)
    check_asks(method, batch.positions, batch.patch)
    _warn_of_positions(model, state, batch)
    # What a method does elsewhere is no part of this program, so that methods which differ there share it.
    reading = Method("", all_patches, prune_steps=method.prune_steps, raters=method.raters)
    arrays, left = _prefill_encoded(
        model, batch, encoded, state.arrays, policy=state.policy, method=reading, chunk=chunk,
        placement=state.placement,
    )  # fmt: skip
    state = replace(state, **arrays._asdict())
    raise_if_broken(state)
    return state, left


def _checked_counts(counts: Sequence[int], encoded: Encoded) -> Int[np.ndarray, " B"]:
    """Raises ValueError if they are not one number for each row, behind whose visual tokens no more follow."""
    b, m = encoded.size.shape
    if len(counts) != b:
        raise ValueError(f"counts are visual tokens of each of {b} rows, not {list(counts)}")
    given = np.array([whole(count, f"counts of row {row}") for row, count in enumerate(counts)], np.int32)
    last = np.where(np.asarray(encoded.size) > 0, np.arange(1, m + 1), 0).max(1)
    for row, (count, least) in enumerate(zip(given, last, strict=True)):
        if not least <= count <= m:
            raise ValueError(
                f"counts has {count} visual tokens for row {row}, whose last one is number {least} of {m}; give as "
                "many as the picture has: sum(features.counts[row])"
            )
    return given


def _check_places(patches: int, encoded: Encoded) -> None:
    """Raises ValueError if visual tokens are not in the order of their places, or stand outside of the picture."""
    whole(patches, "patches", least=1)
    place = np.asarray(encoded.place)
    if place.min(initial=0) < 0 or (np.diff(place) < 0).any():
        raise ValueError(
            f"with patches={patches} visual tokens stand at the places of their patches, and these are not in raster "
            f"order: give encoded.in_raster_order({patches})"
        )
    if (most := int(place.max(initial=0)) + 1) > patches:
        raise ValueError(f"a visual token stands at patch number {most}, of patches={patches}; give those of all crops")


def at_patch_positions(batch: PromptBatch, encoded: Encoded, patches: int) -> PromptBatch:
    """Positions as in the prompt with the whole picture: visual tokens at their patches, words after all of them."""
    m = encoded.place.shape[1]
    place = jnp.take_along_axis(encoded.place, jnp.clip(batch.patch, 0, m - 1), axis=1)
    return _shifted(batch, m, patches - m, jnp.where(batch.patch >= 0, place - batch.patch, 0))


def _shifted(
    batch: PromptBatch, visual: int, by: Int[Array, "B 1"] | int, patches_by: Int[Array, "B T"] | int = 0
) -> PromptBatch:
    """Words after all `visual` tokens of their row stand `by` later, and visual tokens `patches_by` later."""
    word = (batch.patch < 0) & (batch.positions >= 0)
    after = word & (jnp.cumsum(batch.patch >= 0, axis=1) == visual)
    return batch._replace(positions=batch.positions + after * by + patches_by)


@partial(jax.jit, static_argnames=("method", "chunk", "placement"), donate_argnames="before")
def _prefill_encoded(
    model: Llava, batch: PromptBatch, encoded: Encoded, before: DecodeArrays, *, policy: Policy, method: Method,
    chunk: int | None, placement: Placement | None,
) -> tuple[DecodeArrays, TokensLeft]:  # fmt: skip
    left, state = read_encoded(
        model, batch.tokens, batch.positions, encoded, before.kv, policy, method, chunk=chunk, placement=placement
    )
    return _arrays_after(model, batch, left, state, before), TokensLeft(left.positions, left.patch)


def _arrays_after(
    model: Llava, batch: PromptBatch, left: HiddenBlock, state: State, before: DecodeArrays
) -> DecodeArrays:
    """The arrays of a `DecodeState` after a prompt, of which `left` is what reached the last layer."""
    last = left.positions.argmax(-1)[:, None, None]
    logits = model.decoder.logits(jnp.take_along_axis(left.hidden, last, axis=1))[:, 0]
    words = (batch.positions >= 0) & (batch.patch < 0)
    return before._replace(
        kv=state,
        logits=logits,
        appeared=remember(before.appeared, batch.tokens, words),
        broken=first_broken(before.broken, logits, state),
    )
