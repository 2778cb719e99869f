"""LLaVA: PyTorch's numbers, where patches stand, and reading them into a bounded state."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llava import io, loaded, seen, short_prompts

from jaxcompress.generation import decode, init_decode_state
from jaxcompress.generation.visual import batch_prompts, encode_images, prefill_visual
from jaxcompress.models.init_state import init_state
from jaxcompress.models.llava import (
    NEWLINE,
    NOTHING,
    Llava,
    LlavaConfig,
    best_resolution,
    check_placeholders,
    crops_of,
    expand_placeholders,
    picture_index,
    visual_index,
)
from jaxcompress.models.read_block import HiddenBlock, LayerPruning, read_block
from jaxcompress.policies.names import get_policy
from jaxcompress.recurrence.inputs import AttentionInputs

NAMES = ("llava", "llava_siglip", "llava_next")
FULL = get_policy("full")
SLOW = pytest.mark.slow


@jax.jit
def logits_of(model: Llava, tokens: Any, visual: Any, positions: Any) -> jax.Array:
    return model(tokens, visual, positions)


@partial(jax.jit, static_argnames=("prunings", "chunk"))
def read(model: Llava, block: HiddenBlock, state: Any, **how: Any) -> tuple[HiddenBlock, Any, jax.Array]:
    left, state = read_block(model.decoder, block, state, **how)
    return left, state, model.decoder.logits(left.hidden)


@partial(jax.jit, static_argnames="chunk")
def block_of(model: Llava, given: Any, visual: Any, chunk: None = None) -> HiddenBlock:
    return HiddenBlock(model.embed(given.tokens, visual), given.positions, given.patch)


def block(name: str) -> HiddenBlock:
    model = loaded(name).model
    return block_of(model, batch_prompts(model, short_prompts(name), seen(name)), seen(name).visual)


@pytest.mark.parametrize("name", ["llava", "llava_next", pytest.param("llava_siglip", marks=SLOW)])
def test_visual_tokens_are_those_of_pytorch(name: str) -> None:
    for row in range(2):
        expected = io(name)[f"visual_{row}"]
        np.testing.assert_allclose(seen(name).visual[row, : len(expected)], expected, atol=1e-4)
        assert seen(name).counts[row] == (len(expected),)
        assert (np.asarray(seen(name).visual[row, len(expected) :]) == 0).all()


FAST = (("llava", "left"), ("llava_next", "right"))
BATCHES = [case if case in FAST else pytest.param(*case, marks=SLOW) for case in product(NAMES, ("left", "right"))]


@pytest.mark.parametrize(("name", "side"), BATCHES)
def test_logits_of_a_ragged_batch_are_those_of_pytorch(name: str, side: str) -> None:
    given = io(name)
    mask = given[f"{side}_mask"].astype(bool)
    positions = jnp.asarray(np.where(mask, mask.cumsum(1) - 1, -1))
    logits = logits_of(loaded(name).model, jnp.asarray(given[f"{side}_tokens"]), seen(name).visual, positions)
    np.testing.assert_allclose(logits[mask], given[f"{side}_logits"][mask], atol=1e-4)
    alone = np.concatenate([given["logits_0"][0], given["logits_1"][0]])
    np.testing.assert_allclose(logits[mask], alone, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", *(pytest.param(name, marks=SLOW) for name in NAMES[1:])])
def test_it_writes_what_pytorch_writes(name: str) -> None:
    """A batch of two prompts of different lengths, through a state that holds everything."""
    model = loaded(name).model
    ids = short_prompts(name)
    longest = batch_prompts(model, ids, seen(name)).tokens.shape[1]
    progress = init_decode_state(model.decoder, FULL, longest + 8, batch=2)
    progress = prefill_visual(model, ids, seen(name), progress)
    tokens, _ = decode(model.decoder, progress, 8)
    np.testing.assert_array_equal(tokens, np.concatenate([io(name)["written_0"], io(name)["written_1"]]))


@pytest.mark.parametrize(
    ("policy", "slots"),
    [pytest.param("tova", 9, marks=SLOW), pytest.param("snapkv+4", 9, marks=SLOW), pytest.param("h2o", 9, marks=SLOW)],
)
def test_a_policy_decides_about_patches_like_about_words(policy: str, slots: int) -> None:
    """Reading embeddings at once keeps what reading tokens at once keeps, where a picture's are those of words."""
    from jaxcompress.models.decoder import read as read_tokens

    model, mine = loaded("llava").model, get_policy(policy)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 62, (2, 20)))
    valid = jnp.arange(20) < jnp.array([[20], [13]])
    state = init_state(model.decoder.config, mine, slots, batch=2)
    at = jnp.where(valid, jnp.arange(20), -1)
    words = HiddenBlock(model.decoder.embedding[...][tokens], at, jnp.full((2, 20), -1, jnp.int32))
    _, held, _ = read(model, words, state, policy=mine)
    expected = jax.jit(partial(read_tokens, policy=mine, chunk=20))(model.decoder, tokens, state, valid=valid).state
    for part, other in zip(held, expected, strict=True):
        np.testing.assert_array_equal(part.positions, other.positions)
        np.testing.assert_array_equal(part.seen, other.seen)
        np.testing.assert_allclose(part.keys, other.keys, atol=1e-5)


def keep_all(tokens: HiddenBlock, attention: AttentionInputs) -> HiddenBlock:
    return tokens


def keep_half(tokens: HiddenBlock, attention: AttentionInputs) -> HiddenBlock:
    """Every second token of 16, and all words after them."""
    n = tokens.positions.shape[1]
    index = jnp.concatenate([jnp.arange(0, 16, 2), jnp.arange(16, n)])
    return tokens.take(jnp.broadcast_to(index, (tokens.positions.shape[0], len(index))))


def renumber_after(tokens: HiddenBlock, attention: AttentionInputs) -> HiddenBlock:
    left = keep_half(tokens, attention)
    there = left.positions >= 0
    return left._replace(positions=jnp.where(there, jnp.cumsum(there, axis=1) - 1, -1))


def test_a_stage_that_keeps_everything_changes_nothing() -> None:
    model, tokens = loaded("llava").model, block("llava")
    state = init_state(model.decoder.config, FULL, 40, batch=2)
    left, held, logits = read(model, tokens, state, policy=FULL)
    also, same, others = read(
        model, tokens, state, policy=FULL, prunings=(LayerPruning(0, keep_all), LayerPruning(1, keep_all))
    )
    np.testing.assert_allclose(logits, others, atol=1e-5)
    np.testing.assert_array_equal(left.positions, also.positions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), held, same)
    for row in range(2):
        expected = io("llava")[f"logits_{row}"][0]
        np.testing.assert_allclose(logits[row, : len(expected)], expected, atol=1e-4)


@SLOW
def test_layers_after_a_stage_see_what_is_left() -> None:
    """Against running the layers one after the other with plain attention."""
    from jaxcompress.models.rope import rotate
    from jaxcompress.recurrence.block_attention import causal_attention

    model, tokens = loaded("llava").model, block("llava")
    decoder = model.decoder
    state = init_state(decoder.config, FULL, [40, 32], batch=2)
    left, held, logits = read(model, tokens, state, policy=FULL, prunings=(LayerPruning(0, keep_half),))

    def attend(q, k, v, positions, layer, index, carry, xs):
        q, k = (rotate(x, positions[..., None], decoder.config.rope) for x in (q, k))
        return causal_attention(q, k, v, positions), carry, xs

    @jax.jit
    def plain(decoder: Any, tokens: HiddenBlock) -> jax.Array:
        x = decoder.run_layers(tokens.hidden, tokens.positions, attend, layers=range(1))[0]
        half = keep_half(tokens._replace(hidden=x), None)  # pyright: ignore[reportArgumentType]
        x = decoder.run_layers(half.hidden, half.positions, attend, layers=range(1, 2))[0]
        return decoder.logits(decoder.norm(x))

    there = np.asarray(left.positions) >= 0
    np.testing.assert_allclose(logits[there], plain(decoder, tokens)[there], atol=1e-5)
    lengths = (np.asarray(tokens.positions) >= 0).sum(1)
    np.testing.assert_array_equal(held[0].occupancy()[0, :, 0], lengths)
    np.testing.assert_array_equal(held[1].occupancy()[0, :, 0], lengths - 8)
    np.testing.assert_array_equal(held[1].seen, lengths)  # the next token stands after the prompt as it was


@SLOW
def test_where_the_next_token_stands_if_a_stage_numbers_anew() -> None:
    model = loaded("llava").model
    ids, pictures = short_prompts("llava"), seen("llava")
    progress = init_decode_state(model.decoder, FULL, [48, 40], batch=2)
    progress = prefill_visual(model, ids, pictures, progress, prunings=(LayerPruning(0, renumber_after),))
    before = [np.asarray(part.seen) for part in progress.kv]
    np.testing.assert_array_equal(before[0] - before[1], [8, 8])
    _, progress = decode(model.decoder, progress, 3)
    for part, then in zip(progress.kv, before, strict=True):
        np.testing.assert_array_equal(part.seen, then + 3)
        np.testing.assert_array_equal(np.asarray(part.positions[0, :, 0]).max(-1), then + 2)


@SLOW
def test_what_a_stage_is_shown() -> None:
    model, tokens = loaded("llava").model, block("llava")
    rows = []

    def watch(tokens: HiddenBlock, attention: AttentionInputs) -> HiddenBlock:
        rows.append(attention.rows(jnp.array([[2, 20, 29]] * 2)))
        return tokens

    def run(model: Llava, tokens: HiddenBlock, state: Any) -> jax.Array:
        rows.clear()
        read_block(model.decoder, tokens, state, FULL, prunings=(LayerPruning(1, watch),))
        return rows[0]

    state = init_state(model.decoder.config, FULL, 40, batch=2)
    attention = np.asarray(jax.jit(run)(model, tokens, state))  # [B, H, 3, T]
    lengths = (np.asarray(tokens.positions) >= 0).sum(1)
    present = np.array([[2, 20, 29]] * 2) < lengths[:, None]
    np.testing.assert_allclose(attention.sum(-1), np.broadcast_to(present[:, None], attention.shape[:3]), atol=1e-5)
    assert (attention[:, :, 0, 3:] == 0).all()
    assert (attention[:, :, 1, :21] > 0).all()


@SLOW
def test_a_batch_is_its_rows() -> None:
    model, tokens = loaded("llava_next").model, block("llava_next")
    how: dict[str, Any] = dict(policy=get_policy("tova"), prunings=(LayerPruning(0, keep_half),))
    state = lambda batch: init_state(model.decoder.config, how["policy"], 12, batch=batch)
    both, held, _ = read(model, tokens, state(2), **how)
    for row in range(2):
        one, alone, _ = read(model, jax.tree.map(lambda x, row=row: x[row : row + 1], tokens), state(1), **how)
        there = np.asarray(one.positions[0]) >= 0
        np.testing.assert_allclose(one.hidden[0][there], both.hidden[row][there], atol=1e-5)
        for part, other in zip(held, alone, strict=True):
            np.testing.assert_array_equal(part.positions[:, row : row + 1], other.positions)


# Where patches stand


def config(**changes: Any) -> LlavaConfig:
    from dataclasses import replace

    return replace(loaded("llava_next").config, **changes)


@hypothesis.given(st.integers(1, 2000), st.integers(1, 2000))
def test_tiles_are_laid_out_once_each(height: int, width: int) -> None:
    index, n = picture_index(config(), (height, width)), 16
    patches = index[index >= 0]
    assert len(set(patches)) == len(patches)
    assert patches.max() < crops_of(config(), (height, width)) * n
    np.testing.assert_array_equal(index[:n], np.arange(n))
    rest = index[n:]
    rows = (rest == NEWLINE).sum()
    assert not rows or len(rest) % rows == 0
    if rows:
        assert (rest.reshape(rows, -1)[:, -1] == NEWLINE).all()


def test_the_best_resolution() -> None:
    points = ((28, 56), (56, 28), (56, 56))
    assert best_resolution((40, 55), points) == (56, 56)
    assert best_resolution((50, 20), points) == (56, 28)
    assert best_resolution((1, 1), points) == (28, 56)  # all keep it; that wastes least, and comes first
    assert best_resolution((28, 20000), points) == (28, 56)


def test_a_panorama_has_rows_too_thin_to_keep() -> None:
    """20,000 pixels wide and 100 high: no row of the tiles shows more bar than picture; the whole picture is seen."""
    index = picture_index(config(), (100, 20000))
    np.testing.assert_array_equal(index, np.arange(16))


def test_indices_of_a_batch() -> None:
    rows = [[np.array([0, 1, NEWLINE]), np.array([0, 3])], [np.array([2])]]
    index = visual_index(rows, [[2, 1], [1]], 4)
    np.testing.assert_array_equal(index, [[0, 1, NEWLINE, 8, 11], [14, *[NOTHING] * 4]])


@SLOW
def test_pictures_of_a_row_and_rows_without_one() -> None:
    model, given = loaded("llava").model, io("llava")
    pixels = given["pixels"][:, 0].astype(np.float32)
    both = encode_images(model, pixels, [[(28, 28), (28, 28)], []])
    assert both.counts == ((16, 16), ())
    np.testing.assert_allclose(both.visual[0, 16:], given["visual_1"], atol=1e-4)
    made = batch_prompts(model, [[5, 63, 6, 63], [7]], both)
    np.testing.assert_array_equal(made.patch[0], [-1, *range(16), -1, *range(16, 32)])
    np.testing.assert_array_equal(made.patch[1], [-1] * 34)
    np.testing.assert_array_equal(made.positions[1], [0, *[-1] * 33])


def test_placeholders() -> None:
    np.testing.assert_array_equal(expand_placeholders([1, 9, 2, 9], 9, [2, 0]), [1, 9, 9, 2])
    with pytest.raises(ValueError, match=r"2 image tokens \(id 9\) for 1 pictures"):
        expand_placeholders([1, 9, 2, 9], 9, [4])
    check_placeholders([[9, 9, 1], [9, 0, 0]], 9, [2, 1])
    with pytest.raises(ValueError, match=r"row 1 has 1 image tokens \(id 9\), its pictures have 2"):
        check_placeholders([[9, 9, 1], [9, 0, 0]], 9, [2, 2])


def test_wrong_input() -> None:
    model, pictures = loaded("llava").model, seen("llava")
    with pytest.raises(ValueError, match="0 image tokens"):
        batch_prompts(model, [[1, 2], [63]], pictures)
    with pytest.raises(ValueError, match="2 rows"):
        batch_prompts(model, [[63]], pictures)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        batch_prompts(model, [[63], []], pictures)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        batch_prompts(model, [[63, 64], [63]], pictures)
    with pytest.raises(ValueError, match="3 crops were given for pictures that have 2"):
        encode_images(model, np.zeros((3, 3, 28, 28), np.float32), [[(28, 28)], [(28, 28)]])
    with pytest.raises(ValueError, match="give sizes"):
        encode_images(loaded("llava_next").model, np.zeros((3, 3, 28, 28), np.float32))
    with pytest.raises(ValueError, match="nothing to see"):
        picture_index(config(), (0, 20))
    with pytest.raises(ValueError, match="do not fit"):
        prefill_visual(model, short_prompts("llava"), pictures, init_decode_state(model.decoder, FULL, 20, batch=2))
    state, tokens = init_state(model.decoder.config, FULL, 40, batch=2), block("llava")
    for layers in ((1, 0), (2,)):
        prunings = tuple(LayerPruning(layer, keep_all) for layer in layers)
        with pytest.raises(ValueError, match="in order"):
            read_block(model.decoder, tokens, state, FULL, prunings=prunings)
    progress = init_decode_state(model.decoder, FULL, [40, 20], batch=2)
    with pytest.raises(FloatingPointError):  # the second layer has room for fewer tokens than the stage leaves
        prefill_visual(model, short_prompts("llava"), pictures, progress, prunings=(LayerPruning(0, keep_half),))
