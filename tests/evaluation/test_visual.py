"""The exam about drawings: what it measures is what the model does, and what leaves is what is said to leave."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.checkpoints import Loaded, load_embedded_vision
from jaxcompress.evaluation.dropped import Panel, draw_dropped, draw_heat, greyed
from jaxcompress.evaluation.visual import ANSWER, Exam, Examiner, Outcome, exam, guessing
from jaxcompress.generation import decode_stream, init_decode_state
from jaxcompress.generation.visual import encode_images, prefill_visual
from jaxcompress.models.llava import Llava
from jaxcompress.models.rope import rotate
from jaxcompress.policies.full import Full
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision import Encoded, Method, encode, get_method
from jaxcompress.vision.layer_view import PruneContext
from jaxcompress.vision.reading import embed_prompt

PICTURES, EACH, PATCHES = 4, 2, 144


@cache
def embedded() -> Loaded:
    return load_embedded_vision()


@cache
def asked() -> Exam:
    loaded = embedded()
    return exam(loaded.model, loaded.tokenizer, loaded.processor, pictures=PICTURES, each=EACH)


@pytest.fixture(scope="module")
def examiner() -> Examiner:
    return Examiner(embedded().model, asked(), runs=1)


@pytest.fixture(scope="module")
def whole(examiner: Examiner) -> Outcome:
    return examiner(get_method("full"))


def test_it_is_the_same_exam_at_every_call() -> None:
    loaded = embedded()
    again = exam(loaded.model, loaded.tokenizer, loaded.processor, pictures=2, each=EACH)
    np.testing.assert_array_equal(again.pixels, asked().pixels[:2])
    assert again.asked == asked().asked[:2]
    later = exam(loaded.model, loaded.tokenizer, loaded.processor, pictures=1, each=EACH, first=1)
    assert later.asked == asked().asked[1:2]
    assert 0 < guessing(asked()) <= 1


@pytest.mark.slow
def test_answers_are_those_that_the_model_writes(whole: Outcome) -> None:
    """Through prompts with all visual tokens, read without any method."""
    model = embedded().model
    pixels = np.repeat(asked().pixels, EACH, axis=0)
    longest = max(map(len, asked().prompts)) - 1
    state = init_decode_state(model.decoder, Full(), PATCHES + longest + ANSWER, batch=len(pixels))
    state = prefill_visual(model, asked().prompts, encode_images(model, pixels), state)
    (written,) = decode_stream(model.decoder, state, max_new_tokens=ANSWER)
    assert (written[:, 0] == asked().answers).mean() == whole.word_accuracy
    assert set(written[:, 1]) == set(asked().stop)
    assert whole.kv_bytes == sum(part.nbytes for part in state.kv) // len(pixels)
    config = model.config.decoder
    entry = 2 * config.num_kv_heads * config.head_dim * 4 + 4  # keys, values, a position
    assert abs(whole.kv_bytes / (config.num_layers * (PATCHES + longest + ANSWER + 1)) - entry) < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastervlm", "fastv"])
def test_without_a_decoding_stage_the_first_token_is_that_of_plain_attention(name: str, examiner: Examiner) -> None:
    """Layer after layer without a state, and the prune steps between them, at the positions of the whole prompt."""
    model, method = embedded().model, get_method(name, 16)
    encoded = encode(model, jnp.asarray(np.repeat(asked().pixels, EACH, axis=0)), method).in_raster_order(PATCHES)
    m, longest = encoded.place.shape[1], max(map(len, asked().prompts))
    words = np.array([[*row[2:], *[0] * (longest - len(row))] for row in asked().prompts])
    exists = np.arange(longest - 2) < np.array([[len(row) - 2] for row in asked().prompts])
    bos, image = (np.full((len(words), n), asked().prompts[0][i]) for i, n in ((0, 1), (1, m)))
    after = np.where(exists, 1 + PATCHES + np.arange(longest - 2), -1)
    positions = np.concatenate([np.zeros((len(words), 1), int), 1 + np.asarray(encoded.place), after], axis=1)
    logits = plain(model, np.concatenate([bos, image, words], axis=1), positions, encoded, method)
    assert (np.asarray(logits.argmax(-1)) == asked().answers).mean() == examiner(method).word_accuracy


@partial(jax.jit, static_argnames="method")
def plain(model: Llava, tokens: Any, positions: Any, encoded: Encoded, method: Method) -> jax.Array:
    decoder, rope = model.decoder, model.config.decoder.rope

    def attend(q, k, v, positions, layer, index, carry, xs):
        q, k = (rotate(x, positions[..., None], rope) for x in (q, k))
        attention = AttentionInputs(q, k, jnp.zeros(positions.shape, jnp.float32), positions)
        return causal_attention(q, k, v, positions), attention, xs

    block = embed_prompt(model, tokens, positions, encoded)
    m = encoded.place.shape[1]
    context = PruneContext(jnp.ones((tokens.shape[0], tokens.shape[1] - m), bool), encoded.key, rope)
    steps = {step.layer: step for step in method.prune_steps(model.config.decoder, m)}
    for layer in range(model.config.decoder.num_layers):
        heads = lambda n, width=block.positions.shape[1]: jnp.zeros(
            (tokens.shape[0], width, n, model.config.decoder.head_dim)
        )
        config = model.config.decoder
        empty = AttentionInputs(
            heads(config.num_heads), heads(config.num_kv_heads), jnp.zeros(block.positions.shape), block.positions
        )
        piece = range(layer, layer + 1)
        x, attention, _ = decoder.run_layers(block.hidden, block.positions, attend, empty, layers=piece)
        block = block._replace(hidden=x)
        if layer in steps:
            block = steps[layer].rule(context, block, attention, steps[layer].keep)
    last = block.positions.argmax(-1)[:, None, None]
    return decoder.logits(decoder.norm(jnp.take_along_axis(block.hidden, last, axis=1)))[:, 0]


def test_the_decoding_stage_is_measured(examiner: Examiner, whole: Outcome) -> None:
    """Patches make room for the answer, so that the state does not grow and later holds fewer of them."""
    got = examiner(get_method("mustdrop-decode"))
    assert got.kv_bytes < whole.kv_bytes + 4 * 4 * (PATCHES + 16)  # the policy's statistics, less two slots a layer
    assert whole.kept.all()
    assert (got.kept.sum(1) < PATCHES).any()
    assert (got.kept.sum(1) >= PATCHES - ANSWER).all()


@pytest.mark.slow
def test_keeping_everything_is_keeping_everything(examiner: Examiner, whole: Outcome) -> None:
    for name in ("grid", "fastervlm"):
        got = examiner(get_method(name, PATCHES))
        assert got.kept.all()
        assert got.accuracy == whole.accuracy
        assert got.flops == whole.flops
    assert whole.tokens == whole.left == PATCHES


@pytest.mark.parametrize("name", [pytest.param("random", marks=pytest.mark.slow), "fastervlm"])
def test_so_many_stay_in_the_tower_and_the_decoder_saves(name: str, examiner: Examiner, whole: Outcome) -> None:
    """At a ninth of the tokens (64 of 576) at least 80 % fewer FLOPs in the decoder."""
    got = examiner(get_method(name, 16))
    assert got.tokens == got.left == 16
    assert (got.kept.sum(1) == 16).all()
    assert got.flops < 0.2 * whole.flops
    assert got.kv_bytes < 0.2 * whole.kv_bytes
    pictures = got.kept.reshape(PICTURES, EACH, -1)
    assert (pictures == pictures[:, :1]).all()  # what leaves in the tower does not depend on the question


@pytest.mark.slow
def test_so_many_stay_in_the_decoder(examiner: Examiner, whole: Outcome) -> None:
    method = get_method("fastv", 16)
    got = examiner(method)
    counts = method.tokens_per_layer(embedded().config)
    assert got.tokens == PATCHES
    assert got.left == np.mean(counts)
    assert counts[-1] == 16
    assert (got.kept.sum(1) == 16).all()
    share = got.flops / whole.flops
    assert abs(share - (np.mean(counts) + 9) / (PATCHES + 9)) < 0.1


@pytest.mark.slow
def test_a_picture_alone_keeps_what_it_keeps_among_others(examiner: Examiner) -> None:
    only = asked()._replace(pixels=asked().pixels[:1], prompts=asked().prompts[:EACH],
                            answers=asked().answers[:EACH], asked=asked().asked[:1])  # fmt: skip
    alone = Examiner(embedded().model, only, runs=1)
    for name in ("random", "fastervlm"):
        np.testing.assert_array_equal(alone(get_method(name, 16)).kept, examiner(get_method(name, 16)).kept[:EACH])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tome", "pool", "visionzip", "prumerge+", "sparsevlm", "sparsevlm+", "dart", "mustdrop"]
)
def test_other_methods(name: str, examiner: Examiner, whole: Outcome) -> None:
    got = examiner(get_method(name, 18))  # the least that ToMe reaches in three layers
    assert got.flops < whole.flops
    assert got.kept.any(1).all()


def test_dropped_patches_are_grey(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 3), (200, 10, 10), np.uint8)
    out = greyed(pixels, np.array([True, False, False, True]))
    np.testing.assert_array_equal(out[:4, :4], pixels[:4, :4])
    assert (out[:4, 4:] == out[0, 7, 0]).all()
    with pytest.raises(ValueError, match="3 patches are no square grid of a picture of 8 x 8"):
        greyed(pixels, np.ones(3, bool))
    draw_dropped(
        pixels, [[Panel("all"), None], [None, Panel("half", np.array([True, False] * 2), "yes")]], tmp_path / "a.png"
    )
    draw_heat({"one": np.eye(3), "two": np.ones((2, 2))}, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [dict(pictures=0), dict(each=0)])
def test_an_exam_has_pictures_and_questions(wrong: dict[str, int]) -> None:
    loaded = embedded()
    with pytest.raises(ValueError, match="must be a whole number, at least 1, not 0"):
        exam(loaded.model, loaded.tokenizer, loaded.processor, **wrong)
    with pytest.raises(ValueError, match="runs must be a whole number, at least 1, not 0"):
        Examiner(loaded.model, asked(), runs=0)


@pytest.mark.slow
def test_logits_that_are_not_finite_are_told() -> None:
    model = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), embedded().model)
    with pytest.raises(FloatingPointError, match="full: logits are not finite"):
        Examiner(model, asked(), runs=1)(get_method("full"))
