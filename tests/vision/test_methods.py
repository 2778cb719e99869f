"""Whole methods on a tiny LLaVA."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import read
from jaxcompress.models.init_state import init_state
from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.read_block import HiddenBlock
from jaxcompress.models.tower_config import TowerConfig
from jaxcompress.policies import Full
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.recurrence.softmax import MASKED
from jaxcompress.vision import (
    NAMES,
    Method,
    encode,
    encoders,
    get_method,
    get_method_for_mean,
    mustdrop,
    prune_rules,
    read_encoded,
    slots_per_layer,
)
from jaxcompress.vision.encoders import all_patches, tome_counts, zip_split
from jaxcompress.vision.layer_view import LayerView, PruneContext
from jaxcompress.vision.method import Encoded, PruneStep
from jaxcompress.vision.reading import check_asks, embed_prompt

TOWER = TowerConfig(16, 24, 3, 2, 36, 6, activation="quick_gelu", pre_norm=True)  # 6 x 6 patches
DECODER = DecoderConfig(64, 16, 24, 4, 2, 1, 8)
CONFIG = LlavaConfig(TOWER, DECODER, image_token=63, feature_layers=2)
PATCHES, BEFORE, AFTER, ROOM = 36, 3, 5, 3
ALL = ("full", "mustdrop-decode", "mustdrop-thresholds")
QUICK = ("grid", "pool", "fastv", "mustdrop")


@cache
def model() -> Llava:
    return Llava(CONFIG, rngs=nnx.Rngs(0))


def pixels(rows: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (rows, 3, 36, 36))


@partial(jax.jit, static_argnames=("method", "crops", "left"))
def run(model: Llava, pixels: Any, method: Method, crops: int = 1, left: int = 0) -> Any:
    """`left`: tokens of padding at the left."""
    rows = pixels.shape[0]
    encoded = encode(model, pixels if crops == 1 else pixels[:, None].repeat(crops, 1), method)
    m = encoded.visual.shape[1]
    words = jnp.arange(1, 1 + BEFORE + AFTER)
    line = jnp.concatenate([words[:BEFORE], jnp.full(m, 63), words[BEFORE:]])
    tokens = jnp.broadcast_to(jnp.concatenate([jnp.zeros(left, line.dtype), line]), (rows, left + line.shape[0]))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]) - left, tokens.shape)
    positions = jnp.maximum(positions, -1)
    room = BEFORE + AFTER + ROOM
    state = init_state(DECODER, Full(), slots_per_layer(CONFIG, method, room, crops), batch=rows)
    block, state = read_encoded(model, tokens, positions, encoded, state, Full(), method)
    return encoded, block, state


def budget(name: str, keep: int = 9) -> Method:
    return get_method(name) if name in ALL else get_method(name, keep)


named_methods = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)


@named_methods
def test_exactly_as_many_stay_and_rows_are_independent(name: str) -> None:
    method = budget(name)
    encoded, block, state = run(model(), pixels(), method)
    counts = method.tokens_per_layer(CONFIG)
    held = np.concatenate([np.asarray(part.occupancy()) for part in state])[:, :, 0]
    if name != "mustdrop-thresholds":
        np.testing.assert_array_equal(held, np.asarray(counts)[:, None] + BEFORE + AFTER + np.zeros((1, 2)))
        assert int((block.patch >= 0).sum()) == 2 * counts[-1]
    if name not in (*ALL, "mustdrop-encode"):
        assert counts[-1] == 9
    assert encoded.visual.shape[1] == method.tokens_per_crop(CONFIG)
    np.testing.assert_allclose(encoded.size.sum(1), PATCHES if name in MERGING else encoded.size.sum(1), rtol=1e-6)
    assert bool(jnp.isfinite(block.hidden).all())
    for row in range(2):
        _, alone, _ = run(model(), pixels()[row : row + 1], method)
        np.testing.assert_array_equal(alone.positions[0], block.positions[row])
        there = np.asarray(block.positions)[row] >= 0
        np.testing.assert_allclose(alone.hidden[0][there], block.hidden[row][there], atol=2e-5)


def test_key_tokens_that_are_too_many_go_by_their_scores() -> None:
    """Of more key tokens than may stay, those stay that are most attended to, not those that stand first."""
    scores = jax.random.normal(jax.random.key(0), (2, PATCHES))
    key = jax.random.bernoulli(jax.random.key(1), 0.5, (2, PATCHES))

    def rule(context: Any, block: Any, attention: Any, n: int) -> Any:
        return LayerView.at(context, block, attention).keep_top(scores, n, key)

    best = np.argsort(-np.asarray(scores + 100 * key), axis=1)
    for n in (4, 30):
        steps = lambda config, tokens, n=n: (PruneStep(1, n, rule),)
        _, block, _ = run(model(), pixels(), Method("m", all_patches, prune_steps=steps))
        for row, patches in enumerate(np.asarray(block.patch)):
            assert patches[patches >= 0].tolist() == sorted(best[row, :n].tolist())


@pytest.mark.slow
@named_methods
def test_towers_without_a_class_token(name: str) -> None:
    """Where the class token would be asked, all patches are, so that no patch counts for more than another."""
    config = replace(CONFIG, tower=replace(TOWER, special=0, pooling="mean"))
    siglip = Llava(config, rngs=nnx.Rngs(0))
    method = budget(name, 9)
    encoded = encode(siglip, pixels(), method)
    assert np.isfinite(np.asarray(encoded.visual)).all()
    if name == "prumerge":
        last = encoders.last_layer_attention(siglip, *encoders.see(siglip, pixels()))
        flat = lambda x: np.asarray(x).reshape(2, PATCHES, -1)
        rows = np.einsum("bme,bne->bmn", flat(last.queries), flat(last.keys)) / np.sqrt(TOWER.hidden_size)
        asked = np.asarray(jax.nn.softmax(rows, axis=-1)).mean(1)
        np.testing.assert_array_equal(encoded.place[:, :8], np.argsort(-asked, axis=1)[:, :8])


MERGING = ("full", "pool", "tome", "visionzip", "prumerge", "prumerge+", "mustdrop", "mustdrop-encode")


@named_methods
def test_keeping_everything_is_the_model_itself(name: str) -> None:
    if name in ("prumerge", "prumerge+", "mustdrop-thresholds", "visionzip"):
        pytest.skip("adds to what it keeps, or has no number")
    _, expected, _ = run(model(), pixels(), get_method("full"))
    _, block, _ = run(model(), pixels(), budget(name, PATCHES))
    np.testing.assert_allclose(block.hidden, expected.hidden, atol=1e-5)
    # ... which is the plain forward pass of the decoder.
    tokens = jnp.concatenate([jnp.arange(1, 4), jnp.full(PATCHES, 63), jnp.arange(4, 9)])[None].repeat(2, 0)
    plain = model()(tokens, model().image_features(pixels()))
    np.testing.assert_allclose(model().decoder.logits(block.hidden), plain, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastv", "dart", "sparsevlm", "sparsevlm+", "fitprune", "mustdrop"])
def test_padding_at_the_left_changes_nothing(name: str) -> None:
    _, block, _ = run(model(), pixels(), get_method(name, 9))
    _, padded, _ = run(model(), pixels(), get_method(name, 9), left=4)
    np.testing.assert_array_equal(padded.positions[:, 4:], block.positions)
    np.testing.assert_allclose(padded.hidden[:, 4:], block.hidden, atol=2e-5)


def test_an_emptied_place_is_a_token_that_is_not_there() -> None:
    gather = Method("a", all_patches, prune_steps=lambda config, tokens: (PruneStep(1, 9, prune_rules.fastv),))
    mask = Method("b", all_patches, prune_steps=lambda config, tokens: (PruneStep(1, 9, prune_rules.fastv_in_place),))
    _, short, few = run(model(), pixels(), gather)
    _, long, many = run(model(), pixels(), mask)
    there = np.asarray(long.positions) >= 0
    np.testing.assert_array_equal(np.asarray(long.positions)[there].reshape(2, -1), short.positions)
    np.testing.assert_allclose(np.asarray(long.hidden)[there].reshape(short.hidden.shape), short.hidden, atol=1e-5)
    occupied = lambda state: np.concatenate([np.asarray(part.occupancy()) for part in state])
    np.testing.assert_array_equal(occupied(few), occupied(many))


def test_tokens_stay_where_they_stood_or_are_numbered_anew() -> None:
    _, block, state = run(model(), pixels(), get_method("mustdrop", 9))
    m = get_method("mustdrop", 9).tokens_per_crop(CONFIG)
    np.testing.assert_array_equal(
        block.positions[:, -AFTER:], np.arange(BEFORE + m, BEFORE + m + AFTER)[None].repeat(2, 0)
    )
    np.testing.assert_array_equal(state[-1].seen, [BEFORE + m + AFTER] * 2)
    patch = np.asarray(block.patch)
    np.testing.assert_array_equal(np.asarray(block.positions)[patch >= 0], patch[patch >= 0] + BEFORE)


@pytest.mark.slow
def test_numbered_anew_as_released() -> None:
    _, block, state = run(model(), pixels(), get_method("mustdrop-compact", 9))
    np.testing.assert_array_equal(block.positions, np.arange(BEFORE + 9 + AFTER)[None].repeat(2, 0))
    left = dict.fromkeys(get_method("mustdrop-compact", 9).tokens_per_layer(CONFIG))
    assert [int(part.seen[0]) for part in state] == [n + BEFORE + AFTER for n in left]


def test_words_written_after_a_method_continue_the_prompt() -> None:
    _, block, state = run(model(), pixels(), get_method("fastv", 9))
    tokens = model().decoder.logits(block.hidden)[:, -1].argmax(-1)[:, None]
    done = read(model().decoder, tokens, state, Full())
    assert bool(jnp.isfinite(done.hidden).all())
    np.testing.assert_array_equal(done.state[0].seen, [BEFORE + PATCHES + AFTER + 1] * 2)


@pytest.mark.slow
def test_the_third_stage_evicts_patches_while_words_are_written() -> None:
    method = get_method("mustdrop", 9)
    m = method.tokens_per_crop(CONFIG)
    policy = method.decode_policy(BEFORE, BEFORE + m)
    room = BEFORE + AFTER  # nothing for what is written: patches make place
    encoded = jax.jit(encode, static_argnames="method")(model(), pixels(), method=method)
    line = jnp.concatenate([jnp.arange(1, 1 + BEFORE), jnp.full(m, 63), jnp.arange(4, 4 + AFTER)])
    tokens, positions = line[None].repeat(2, 0), jnp.arange(line.shape[0])[None].repeat(2, 0)
    state = init_state(DECODER, policy, slots_per_layer(CONFIG, method, room), batch=2)
    reading = jax.jit(read_encoded, static_argnames="method")
    block, state = reading(model(), tokens, positions, encoded, state, policy=policy, method=method)
    step = jax.jit(read)
    token = model().decoder.logits(block.hidden)[:, -1].argmax(-1)[:, None]
    for written in range(1, 8):
        done = step(model().decoder, token, state, policy=policy)
        state, token = done.state, model().decoder.logits(done.hidden)[:, -1].argmax(-1)[:, None]
        for part in state:
            held = np.asarray(part.positions)
            patches = ((held >= BEFORE) & (held < BEFORE + m)).sum(-1)
            words = ((held >= 0).sum(-1) - patches)[:, :, 0]
            assert (words == BEFORE + AFTER + written).all()  # no word ever goes
            assert ((held >= 0).sum(-1) <= part.capacity).all()


def test_budgets_that_papers_report() -> None:
    """192, 128 and 64 tokens of 576 and 320 and 160 of 2,880, the mean over layers, in LLaVA's shape."""
    tower = TowerConfig(1024, 4096, 24, 16, 336, 14, activation="quick_gelu", pre_norm=True)
    config = LlavaConfig(tower, DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128), image_token=1, feature_layers=23)
    for average, crops in ((192, 1), (128, 1), (64, 1), (320, 5), (160, 5)):
        method = mustdrop_for(config, average, crops)
        counts = method.tokens_per_layer(config, crops)
        assert average - 2 < method.mean_tokens(config, crops) <= average
        assert counts[0] == counts[2] > counts[3] > counts[7] > counts[11] > counts[15] == counts[31]
    with pytest.raises(ValueError, match="no final number of visual tokens has a mean of 3"):
        mustdrop_for(config, 3, 1)
    with pytest.raises(ValueError, match="mustdrop-thresholds leaves no number of visual tokens to choose"):
        get_method_for_mean(config, "mustdrop-thresholds", 192)
    assert get_method("sparsevlm", 64).tokens_per_layer(config)[-1] == 64
    assert get_method("fitprune", 64).tokens_per_layer(config)[-1] == 64
    assert get_method("fastv", 64).tokens_per_layer(config)[:3] == (576, 576, 64)
    assert get_method("tome", 64).tokens_per_layer(config)[0] == 64


def mustdrop_for(config: LlavaConfig, average: float, crops: int) -> Method:
    return get_method_for_mean(config, "mustdrop", average, crops)


def test_crops_of_one_picture_come_one_after_the_other() -> None:
    encoded, block, _ = run(model(), pixels(), get_method("grid", 9), crops=2)
    assert encoded.visual.shape[1] == 18
    np.testing.assert_array_equal(encoded.place[:, 9:], encoded.place[:, :9] + PATCHES)
    np.testing.assert_allclose(encoded.visual[:, 9:], encoded.visual[:, :9], atol=1e-6)
    assert int((block.patch >= 0).sum()) == 36


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="unknown method 'fastw'; known: full, random"):
        get_method("fastw", 3)
    with pytest.raises(ValueError, match="fastv needs to know how many visual tokens stay"):
        get_method("fastv")
    with pytest.raises(ValueError, match="fastv needs to know"):
        get_method("fastv", 0)
    with pytest.raises(ValueError, match="full keeps every visual token of the prompt; leave keep out"):
        get_method("full", 3)
    with pytest.raises(ValueError, match="thresholds were published for"):
        get_method("mustdrop-thresholds", 100)
    for name in ("random", "fastv", "tome", "mustdrop-prefill", "visionzip", "sparsevlm", "cdpruner", "prumerge"):
        with pytest.raises(ValueError, match="37"):
            run(model(), pixels(), get_method(name, 37))
    with pytest.raises(ValueError, match="7 cells do not lie in a grid inside 6 x 6 patches; the nearest numbers"):
        run(model(), pixels(), get_method("grid", 7))
    with pytest.raises(ValueError, match="2 layers cannot merge 36 patches into 3; keep 9 or more"):
        tome_counts(36, 3, 2)
    for name in ("fitprune", "mustdrop-encode", "random", "tome"):  # also where only shapes are asked for
        with pytest.raises(ValueError, match="cannot keep 37 of 36"):
            get_method(name, 37).tokens_per_layer(CONFIG)
    shallow = replace(CONFIG, decoder=replace(DECODER, num_layers=1))
    for name in ("fitprune", "fastv", "mustdrop"):
        with pytest.raises(ValueError, match="9 of .* visual tokens cannot be left between the layers of a decoder"):
            get_method(name, 9).tokens_per_layer(shallow)
        assert get_method(name, PATCHES).tokens_per_layer(shallow) == (PATCHES,)
    assert tome_counts(36, 9, 2) == (18, 9)
    assert tome_counts(36, 24, 3) == (4, 4, 4)


def test_windows_follow_the_grid() -> None:
    assert [mustdrop.window_of(side) for side in (24, 14, 27, 16, 7, 1)] == [3, 2, 3, 2, 7, 1]
    assert zip_split(64) == (54, 10)
    assert sum(zip_split(40)) == 40


def test_means_of_methods_in_the_tower_keep_no_more_than_there_is() -> None:
    method = get_method_for_mean(CONFIG, "random", 1000, crops=2)
    assert method.tokens_per_layer(CONFIG, 2) == (2 * PATCHES,) * 4


def test_special_tokens_that_the_decoder_gets_are_counted() -> None:
    config, full = replace(CONFIG, keep_special=True), get_method("full")
    encoded = encode(Llava(config, rngs=nnx.Rngs(0)), pixels(1)[:, None].repeat(2, 1), full)
    assert encoded.visual.shape[1] == full.tokens_per_layer(config, 2)[0] == 2 * (PATCHES + 1)
    np.testing.assert_array_equal(encoded.place[0], np.arange(2 * (PATCHES + 1)))


def left_by(rule: Any, n: int, *, empty: Any = (), filler: float = 0.0, patches: int | None = None) -> HiddenBlock:
    """What a rule leaves of 144 random patches and three words after them, some of the patches being empty places.

    Args:
      filler: what lies in empty places.
      patches: of a crop.
    """
    m, words = 144, 3
    t = m + words
    patch = jnp.where(jnp.arange(t) < m, jnp.arange(t), -1)[None]
    gone = jnp.zeros((1, t), bool).at[:, jnp.array(empty, int)].set(True)
    random = lambda i, *size: jax.random.normal(jax.random.key(i), (1, t, *size))
    block = HiddenBlock(jnp.where(gone[..., None], filler, random(0, 16)), jnp.where(gone, -1, jnp.arange(t)), patch)
    attention = AttentionInputs(random(1, 2, 8), random(2, 1, 8), jnp.zeros((1, t)), block.positions)
    context = PruneContext(jnp.ones((1, words), bool), jnp.zeros((1, m), bool), DECODER.rope, patches)
    return jax.jit(lambda block, attention: rule(context, block, attention, n))(block, attention)


def test_every_crop_has_windows_of_its_own() -> None:
    """Four crops of 6 x 6 have as many patches as a picture of 12 x 12."""
    left = np.asarray(left_by(prune_rules.window_fastv, 16, patches=PATCHES).patch)
    crop, place = np.divmod(left[left >= 0], PATCHES)
    windows = list(zip(crop.tolist(), (place // 18 * 2 + place % 6 // 3).tolist(), strict=True))
    assert sorted(windows) == [(crop, window) for crop in range(4) for window in range(4)]
    with pytest.raises(
        ValueError, match="windows lie in whole crops of 35 patches, and 144 visual tokens are no whole"
    ):
        left_by(prune_rules.window_fastv, 16, patches=35)


def test_what_lies_in_empty_places_is_not_recycled() -> None:
    empty = [i for i in range(144) if i % 9]
    left, other = (left_by(prune_rules.sparsevlm_recycling, 24, empty=empty, filler=x) for x in (0.0, 9.0))
    np.testing.assert_array_equal(left.positions, other.positions)
    there = np.asarray(left.positions)[..., None] >= 0
    np.testing.assert_allclose(np.where(there, left.hidden, 0), np.where(there, other.hidden, 0), atol=1e-6)
    assert not set(np.asarray(left.patch)[np.asarray(left.positions) >= 0].tolist()) & set(empty)


def test_a_prompt_has_a_place_for_every_visual_token() -> None:
    encoded = Encoded(jnp.zeros((1, 4, 16)), jnp.arange(4)[None], jnp.ones((1, 4)), jnp.zeros((1, 4), bool))
    tokens = jnp.array([[1, 63, 63, 63, 2, 3]])
    with pytest.raises(ValueError, match="row 0 has 3 image tokens"):
        embed_prompt(model(), tokens, jnp.arange(6)[None], encoded)
    with pytest.raises(ValueError, match="row 0 has 3 image tokens"):  # the fourth is padding
        embed_prompt(model(), tokens.at[0, 0].set(63), jnp.arange(-1, 5)[None], encoded)


def test_empty_places_attend_to_nothing_where_there_is_no_class_token() -> None:
    random = lambda i: jax.random.normal(jax.random.key(i), (1, 6, 2, 8))
    bias = jnp.where(jnp.arange(6) < 4, 0.0, MASKED)[None]
    whole = encoders.class_token_attention(AttentionInputs(random(0), random(1), bias), 0)
    alone = AttentionInputs(random(0)[:, :4], random(1)[:, :4], bias[:, :4])
    np.testing.assert_allclose(whole[..., :4], encoders.class_token_attention(alone, 0), atol=1e-6)


@pytest.mark.parametrize("name", ["grid", "pool", "tome", "sparsevlm"])
def test_a_method_for_a_mean_leaves_what_it_can(name: str) -> None:
    """The greatest number that can be reached, not above the mean."""
    for mean in range(13, PATCHES + 1):
        method = get_method_for_mean(CONFIG, name, mean)
        reached = method.mean_tokens(CONFIG)
        assert reached <= mean
        if name == "sparsevlm":
            continue
        left = jax.eval_shape(partial(encode, method=method), model(), pixels()).visual.shape[1]
        assert left == reached
        able = [n for n in range(1, mean + 1) if _reaches(name, n)]
        assert left == max(able)


def _reaches(name: str, n: int) -> bool:
    try:
        get_method(name, n).tokens_per_layer(CONFIG)
    except ValueError:
        return False
    return True


def test_a_mean_below_what_can_be_left_names_the_fewest() -> None:
    config = replace(CONFIG, feature_layers=1)
    fewest = PATCHES - PATCHES // 2
    with pytest.raises(ValueError, match=rf"with {fewest} at the end, the fewest that can be left, it is {fewest}.0"):
        get_method_for_mean(config, "tome", fewest - 1)


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm+", "fitprune", "mustdrop", "mustdrop-prefill"])
def test_a_prompt_that_ends_with_the_picture_asks_nothing(name: str) -> None:
    positions, method = jnp.arange(6)[None], get_method(name, 2)
    check_asks(method, positions, jnp.array([[-1, 0, 1, 2, 3, -1]]))
    check_asks(get_method("fastv", 2), positions, jnp.array([[-1, -1, 0, 1, 2, 3]]))
    for patch, at in (([-1, -1, 0, 1, 2, 3], positions), ([-1, 0, 1, 2, 3, -1], positions.at[0, -1].set(-1))):
        with pytest.raises(ValueError, match="the prompt of row 0 ends with the picture: put the question"):
            check_asks(method, at, jnp.array([patch]))
