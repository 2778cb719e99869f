"""The exam about drawings: what it measures is what the model does, and what leaves is what is said to leave."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.checkpoints import load_embedded_vision
from jaxcompress.evaluation.dropped import Panel, draw_dropped, draw_heat, greyed
from jaxcompress.evaluation.visual import Exam, Examiner, Outcome, exam, guessing, kv_bytes
from jaxcompress.generation import decode_stream, init_decode_state
from jaxcompress.generation.visual import look, prefill_visual
from jaxcompress.policies.full import Full
from jaxcompress.vision import get_method

PICTURES, EACH, PATCHES = 4, 2, 144


@cache
def embedded() -> tuple[Any, Any]:
    loaded = load_embedded_vision()
    return loaded, loaded.tokenizer


@cache
def asked() -> Exam:
    loaded, tokenizer = embedded()
    return exam(tokenizer, loaded.processor, loaded.model, pictures=PICTURES, each=EACH)


@pytest.fixture(scope="module")
def examiner() -> Examiner:
    return Examiner(embedded()[0].model, asked(), runs=1)


@pytest.fixture(scope="module")
def whole(examiner: Examiner) -> Outcome:
    return examiner(get_method("full"))


def prompts() -> list[list[int]]:
    loaded, _ = embedded()
    questions = zip(asked().words, asked().valid, strict=True)
    return [[asked().bos, loaded.config.image_token, *words[valid].tolist()] for words, valid in questions]


def test_it_is_the_same_exam_at_every_call() -> None:
    loaded, tokenizer = embedded()
    again = exam(tokenizer, loaded.processor, loaded.model, pictures=2, each=EACH)
    np.testing.assert_array_equal(again.pixels, asked().pixels[:2])
    assert again.asked == asked().asked[:2]
    later = exam(tokenizer, loaded.processor, loaded.model, pictures=1, each=EACH, first=1)
    assert later.asked == asked().asked[1:2]
    assert 0 < guessing(asked()) <= 1


def test_answers_are_those_that_the_model_writes(whole: Outcome) -> None:
    """Through the bounded state, one token after the answer: that it is over."""
    loaded, tokenizer = embedded()
    model, policy = loaded.model, Full()
    pixels = np.repeat(asked().pixels, EACH, axis=0)
    seen = look(model, pixels)
    progress = init_decode_state(model.decoder, policy, PATCHES + 16, batch=len(pixels))
    progress = prefill_visual(model, prompts(), seen, progress)
    (written,) = decode_stream(model.decoder, progress, max_new_tokens=2)
    right = written[:, 0] == asked().answers
    assert right.mean() == whole.accuracy
    assert set(written[:, 1]) == set(tokenizer.eos_ids)
    assert sum(part.nbytes for part in progress.kv) > kv_bytes(model, [PATCHES] * 4) * len(pixels)


def test_what_the_state_costs() -> None:
    model = embedded()[0].model
    config = model.config.decoder
    entry = 2 * config.num_kv_heads * config.head_dim * 4 + 4  # keys, values, a position
    per_layer = kv_bytes(model, [9, 9, 9, 9]) - kv_bytes(model, [9, 9, 9, 8])
    assert abs(per_layer - entry) < 64
    assert kv_bytes(model, [16] * 4) < kv_bytes(model, [144] * 4) / 8


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
    counts = method.counts(embedded()[0].config)
    assert got.tokens == PATCHES
    assert got.left == np.mean(counts)
    assert counts[-1] == 16
    assert (got.kept.sum(1) == 16).all()
    share = got.flops / whole.flops
    assert abs(share - (np.mean(counts) + 9) / (PATCHES + 9)) < 0.1


@pytest.mark.slow
def test_a_picture_alone_keeps_what_it_keeps_among_others(examiner: Examiner) -> None:
    only = asked()._replace(pixels=asked().pixels[:1], words=asked().words[:EACH], valid=asked().valid[:EACH],
                            answers=asked().answers[:EACH], asked=asked().asked[:1])  # fmt: skip
    alone = Examiner(embedded()[0].model, only, runs=1)
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


@pytest.mark.slow
def test_logits_that_are_not_finite_are_told() -> None:
    model = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), embedded()[0].model)
    with pytest.raises(FloatingPointError, match="full: logits are not finite"):
        Examiner(model, asked(), runs=1)(get_method("full"))
