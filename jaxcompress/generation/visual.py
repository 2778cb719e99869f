"""Reading pictures among words in a fixed number of slots.

    seen = look(model, [picture, ...])
    state = prefill_visual(model, prompts, seen, init_decode_state(model.decoder, policy, slots, batch=2))
    for tokens in decode_stream(model.decoder, state, max_new_tokens=8): ...

With a method that keeps fewer patches:

    encoded = encode(model, pixels, method)  # or laid_out(seen, method), LLaVA-NeXT's rows and newlines
    state = init_decode_state(model.decoder, policy, slots(method, model.config, room), batch=2)
    state = prefill_encoded(model, prompts, encoded, state, method)

A picture's patches are read like words, so that every policy decides about them; stages drop or merge them between
layers while the prompt is read.
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
from jaxcompress.models.checks import check_mode
from jaxcompress.models.llava import Llava, crops_of, expand_placeholders, picture_index, visual_index
from jaxcompress.models.read_block import HiddenBlock, Stage, read_block
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import State
from jaxcompress.state.placement import Placement
from jaxcompress.vision.encoders import whole as every_patch
from jaxcompress.vision.method import Encoded, Method
from jaxcompress.vision.reading import read_encoded


class Seen(NamedTuple):
    """The visual tokens of a batch.

    Attributes:
      visual: [B, M, E], of all pictures of a row, one after the other; padding at the end.
      counts: for each row, how many belong to each of its pictures.
    """

    visual: Float[Array, "B M E"]
    counts: tuple[tuple[int, ...], ...]


def look(
    model: Llava,
    pixels: Float[np.ndarray, "crops channels height width"] | Array | Sequence[Any],
    sizes: Sequence[Any] | None = None,
) -> Seen:
    """Shows pictures to the model: all their visual tokens. A row may have none, and so may all.

    Args:
      pixels: [crops, channels, side, side], of all pictures of all rows one after the other (see
        `jaxcompress.vision.pictures`).
      sizes: for each row, (height, width) of each of its pictures before processing, [] for a row without pictures; by
        default one in each row, as many rows as crops (LLaVA-1.5).

    Raises:
      ValueError: no rows, sizes that are none, pixels of another shape, another number of crops than pictures of these
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
    sizes = _checked(sizes)
    crops = [[crops_of(config, size) for size in row] for row in sizes]
    total = sum(map(sum, crops))
    if total != len(pixels):
        raise ValueError(f"{len(pixels)} crops were given for pictures that have {total}; give those of every picture")
    rows = [[picture_index(config, size) for size in row] for row in sizes]
    index = visual_index(rows, crops, config.tokens_per_crop)
    if not total:  # the tower has nothing to see; one visual token that nobody reads
        visual = jnp.zeros((*index.shape, config.decoder.hidden_size), model.decoder.embedding[...].dtype)
    else:
        visual = _look(model, pixels, jnp.asarray(index))
    return Seen(visual, tuple(tuple(len(picture) for picture in row) for row in rows))


def _checked(sizes: Sequence[Any]) -> list[list[tuple[int, int]]]:
    if not len(sizes):
        raise ValueError("no rows were given; a row without pictures has the sizes []: look(model, [], [[]])")
    out = []
    for number, row in enumerate(sizes):
        if np.ndim(row) == 0 or any(np.shape(size) != (2,) for size in row):
            raise ValueError(f"row {number} has the sizes {row!r}; give a list with (height, width) of each picture")
        out.append([(whole(size[0], "a height", least=1), whole(size[1], "a width", least=1)) for size in row])
    return out


@jax.jit
def _look(model: Llava, pixels: Array, index: Array) -> Array:
    return model.pack(model.images(pixels), index)


class Prompt(NamedTuple):
    """A batch of prompts, padded at the right.

    Attributes:
      tokens: [B, T], image tokens as often as there are visual tokens; 0 for padding.
      positions: [B, T], -1 for padding.
      patch: [B, T], which visual token of the row each is, -1 for words.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    patch: Int[Array, "B T"]


def prompt(model: Llava, prompts: Sequence[Sequence[int] | np.ndarray], seen: Seen) -> Prompt:
    """Prompts with one image token for each picture, ready to be read with what was seen.

    Raises:
      ValueError: not one image token for each picture, an empty prompt, token ids outside the vocabulary.
    """
    token, vocabulary = model.config.image_token, model.config.decoder.vocab_size
    given = prompt_ids(prompts, vocabulary, also=token)
    if len(given) != len(seen.counts):
        raise ValueError(f"{len(given)} prompts were given for the pictures of {len(seen.counts)} rows")
    rows = [expand_placeholders(ids, token, counts) for ids, counts in zip(given, seen.counts, strict=True)]
    width = max(map(len, rows))
    tokens, positions = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -1, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], positions[row, : len(ids)] = ids, np.arange(len(ids))
    here = (tokens == token) & (positions >= 0)
    patch = np.where(here, here.cumsum(1) - 1, -1).astype(np.int32)
    return Prompt(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(patch))


def prefill_visual(
    model: Llava,
    prompts: Sequence[Sequence[int] | np.ndarray],
    seen: Seen,
    state: DecodeState,
    *,
    stages: tuple[Stage, ...] = (),
    chunk: int | None = None,
) -> DecodeState:
    """Reads a batch of prompts with pictures, each at once unless a chunk is given.

    Args:
      prompts: token ids, one image token for each picture.
      state: fresh, from `jaxcompress.generation.init_decode_state(model.decoder, ...)`; donated.
      stages: what leaves between layers (see `jaxcompress.models.bounded.Stage`).
      chunk: tokens between two selections of the policy.

    Raises:
      ValueError: see `prompt`; a policy that keeps everything and has too few slots.
      FloatingPointError: logits are not finite: also where layers after a stage have too few slots for such a policy.
    """
    _check_fresh(model, state)
    given = prompt(model, prompts, seen)
    check_mode(state.policy, "oneshot" if chunk is None else "chunked")
    if not stages:
        longest = given.tokens.shape[1]
        check_room(model.decoder, state, longest, prompt=longest)
    arrays = _prefill(
        model, given, seen.visual, state.arrays, policy=state.policy, stages=stages, chunk=chunk,
        placement=state.placement,
    )  # fmt: skip
    state = replace(state, **arrays._asdict())
    raise_if_broken(state)
    return state


def _check_fresh(model: Llava, state: DecodeState) -> None:
    """The gate of prompts with pictures: nothing may have been read before.

    Raises:
      ValueError: something has, or see `jaxcompress.generation.decode_state.check_usable`.
    """
    check_usable(model.decoder, state)
    if int(state.kv[0].seen.max()):
        raise ValueError(
            "pictures are read into a fresh state, and this one has read something: give one from "
            "init_decode_state(model.decoder, policy, slots); prefill(model.decoder, ...) reads later turns without "
            "pictures"
        )


@partial(jax.jit, static_argnames=("stages", "chunk", "placement"), donate_argnames="before")
def _prefill(
    model: Llava, given: Prompt, visual: Array, before: DecodeArrays, *, policy: Policy, stages: Any, chunk: int | None,
    placement: Placement | None,
) -> DecodeArrays:  # fmt: skip
    block = HiddenBlock(model.embed(given.tokens, visual), given.positions, given.patch)
    left, state = read_block(model.decoder, block, before.kv, policy, stages=stages, chunk=chunk, placement=placement)
    return _after(model, given, left, state, before)


def laid_out(seen: Seen, method: Method) -> Encoded:
    """Pictures as LLaVA-NeXT lays them out (tiles without the bars beside the picture, a newline after each row of
    patches), for a method that takes nothing in the tower; the end of shorter rows is empty. `place` counts newlines.

    Args:
      seen: from `look`, one picture in each row.

    Raises:
      ValueError: not one picture in each row, or a method that acts in the tower, which goes crop by crop (`encode`).
    """
    if method.encode is not every_patch:
        raise ValueError(
            f"{method.name} acts in the tower, crop by crop and without newlines; use `jaxcompress.vision.encode`"
        )
    if any(len(counts) != 1 for counts in seen.counts):
        raise ValueError(
            "methods choose among the tokens of one picture in each row; use `prefill_visual` for several, or none"
        )
    b, m = seen.visual.shape[:2]
    there = jnp.arange(m, dtype=jnp.int32) < jnp.array([sum(counts) for counts in seen.counts])[:, None]
    place = jnp.where(there, jnp.arange(m, dtype=jnp.int32), -1)
    return Encoded(seen.visual, place, there.astype(jnp.float32), jnp.zeros((b, m), bool))


def prefill_encoded(
    model: Llava,
    prompts: Sequence[Sequence[int] | np.ndarray],
    encoded: Encoded,
    state: DecodeState,
    method: Method,
    *,
    counts: Sequence[int] | None = None,
    chunk: int | None = None,
) -> DecodeState:
    """Reads a batch of prompts, each with one picture, while a method drops visual tokens between layers.

    Args:
      prompts: token ids, one image token in each.
      encoded: from `jaxcompress.vision.encode` with the same method, or `laid_out`.
      state: fresh, from `init_decode_state(model.decoder, policy, jaxcompress.vision.slots(method, ...))`; donated. Its
        policy decides about all tokens, also while words are written: `Full()`, or `method.writing(first, last)`.
      counts: visual tokens of each row, where `laid_out` gives rows of different length; all by default.
      chunk: tokens between two selections of the policy.

    Raises:
      ValueError: not one image token in each prompt, an empty prompt, token ids outside the vocabulary.
      FloatingPointError: logits are not finite: also where layers have too few slots for a policy that keeps all.
    """
    _check_fresh(model, state)
    b, m = encoded.visual.shape[:2]
    check_mode(state.policy, "oneshot" if chunk is None else "chunked")
    given = prompt(model, prompts, Seen(encoded.visual, ((m,),) * b))
    if counts is not None:  # words follow the last token that is there
        after = (given.patch < 0) & (given.positions >= 0) & (jnp.cumsum(given.patch >= 0, axis=1) == m)
        given = given._replace(positions=given.positions - after * (m - jnp.array(counts, jnp.int32))[:, None])
    arrays = _prefill_encoded(model, given, encoded, state.arrays, policy=state.policy, method=method, chunk=chunk)
    state = replace(state, **arrays._asdict())
    raise_if_broken(state)
    return state


@partial(jax.jit, static_argnames=("method", "chunk"), donate_argnames="before")
def _prefill_encoded(
    model: Llava, given: Prompt, encoded: Encoded, before: DecodeArrays, *, policy: Policy, method: Method,
    chunk: int | None,
) -> DecodeArrays:  # fmt: skip
    left, state = read_encoded(model, given.tokens, given.positions, encoded, before.kv, policy, method, chunk=chunk)
    return _after(model, given, left, state, before)


def _after(model: Llava, given: Prompt, left: HiddenBlock, state: State, before: DecodeArrays) -> DecodeArrays:
    """Where the rows stand when a prompt was read, of which this is left after the last layer."""
    last = left.positions.argmax(-1)[:, None, None]
    logits = model.decoder.logits(jnp.take_along_axis(left.hidden, last, axis=1))[:, 0]
    words = (given.positions >= 0) & (given.patch < 0)
    return before._replace(
        kv=state,
        logits=logits,
        appeared=remember(before.appeared, given.tokens, words),
        broken=first_broken(before.broken, logits, state),
    )
