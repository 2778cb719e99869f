"""Traces: held positions, logits and death times have to tell one story, and plain attention has to confirm it."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_tokens, tiny_decoder, with_embedding

from jaxcompress.evaluation.tracing import Trace, trace
from jaxcompress.models.decoder import Decoder, last_hidden, read
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import rotate
from jaxcompress.policies import Full
from jaxcompress.policies.names import get_policy
from jaxcompress.recurrence.softmax import masked_softmax

TOTAL, PROMPT, SLOTS = 16, 7, 4
TOKENS = random_tokens(2, TOTAL)
CUTS = {"oneshot": PROMPT, "chunked": 3, "streaming": 1}
CASES = [("tova", "oneshot"), ("tova", "chunked"), ("tova", "streaming"), ("h2o", "oneshot"), ("window+1", "streaming")]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_decoder()


@cache
def traced(policy: str, mode: Any, slots: int | tuple[int, ...] = SLOTS, **config: Any) -> Trace:
    return trace(tiny_decoder(**config), TOKENS, get_policy(policy), slots, prompt=PROMPT, mode=mode, chunk=3)


def held_after(done: Trace, layer: int, step: int) -> np.ndarray:
    """[B, P, T] bool: which tokens the slots hold after a step. No slot is there twice."""
    positions = done.positions[layer, step]
    batch, sets, _ = positions.shape
    held = np.zeros((batch, sets, TOTAL), int)
    for b, p in np.ndindex(batch, sets):
        for position in positions[b, p]:
            held[b, p, position] += position >= 0
    assert held.max() <= 1
    return held.astype(bool)


@pytest.mark.parametrize(("policy", "mode"), CASES)
def test_shapes(policy: str, mode: str) -> None:
    done = traced(policy, mode)
    sets = 4 if policy == "h2o" else 1
    assert done.positions.shape == (2, TOTAL - PROMPT + 1, 2, sets, SLOTS + 1)
    assert done.logits.shape == (TOTAL - PROMPT + 1, 2, 61)
    assert done.death.shape == (2, 2, sets, TOTAL)
    assert (done.positions.dtype, done.logits.dtype, done.death.dtype) == (np.int32, np.float32, np.int32)


@pytest.mark.parametrize(("policy", "mode"), CASES)
def test_deaths_say_what_was_held_after_every_step(policy: str, mode: str) -> None:
    """The token that goes in the step of position p was still seen by p, so its death is p + 1 (or the end)."""
    done = traced(policy, mode)
    token = np.arange(TOTAL)
    for layer in range(2):
        for step in range(TOTAL - PROMPT + 1):
            position = PROMPT - 1 + step
            held = held_after(done, layer, step)
            assert (held.sum(-1) == min(SLOTS, position + 1)).all()
            alive = (token <= position) & (done.death[layer] > position + 1)
            if position + 1 < TOTAL:
                np.testing.assert_array_equal(held, alive)
            else:  # what went in the last step was seen by every query, as was what is still held
                assert (done.death[layer][held] == TOTAL).all()


def test_deaths_of_a_policy_that_makes_room_first() -> None:
    """The token that goes when position p comes is not seen by p any more."""
    done = traced("streaming_llm+1-before", "streaming")
    token = np.arange(TOTAL)
    assert done.positions.shape[-1] == SLOTS
    for layer, step in np.ndindex(2, TOTAL - PROMPT + 1):
        position = PROMPT - 1 + step
        alive = (token <= position) & (done.death[layer] > position)
        np.testing.assert_array_equal(held_after(done, layer, step), alive)


def test_deaths_of_a_window() -> None:
    """One sink, the three newest, and the incoming token."""
    expected = np.minimum(np.arange(TOTAL) + SLOTS, TOTAL)
    expected[0] = TOTAL
    np.testing.assert_array_equal(traced("window+1", "streaming").death, np.broadcast_to(expected, (2, 2, 1, TOTAL)))


@partial(jax.jit, static_argnames="chunk")
def _read(model: Decoder, tokens: Any, state: Any, policy: Any, chunk: int) -> Any:
    done = read(model, tokens, state, policy, chunk=chunk)
    return model.logits(last_hidden(done, None))[:, 0], done.state


@pytest.mark.parametrize(("policy", "mode"), [("tova", "oneshot"), ("tova", "chunked")])
def test_logits_and_positions_are_those_of_reading(model: Decoder, policy: str, mode: str) -> None:
    done = traced(policy, mode)
    state = init_state(model.config, get_policy(policy), SLOTS, batch=2)
    logits, state = _read(model, TOKENS[:, :PROMPT], state, get_policy(policy), CUTS[mode])
    for step in range(TOTAL - PROMPT + 1):
        if step:
            logits, state = _read(model, TOKENS[:, PROMPT + step - 1, None], state, get_policy(policy), 1)
        np.testing.assert_allclose(done.logits[step], logits, atol=1e-4)
        np.testing.assert_array_equal(done.positions[:, step], state[0].positions)


@jax.jit
def _masked(model: Decoder, death: Any) -> Any:
    """Logits of plain attention in which query i sees token j if j <= i < death[j]."""
    at = jnp.arange(TOTAL, dtype=jnp.int32)

    def attend(q: Any, k: Any, v: Any, positions: Any, weights: Any, layer: Any, carry: Any, death: Any) -> Any:
        q, k = (rotate(x, positions[..., None], model.config.rope) for x in (q, k))
        group = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        visible = (at[None, :] <= at[:, None]) & (at[:, None] < death[:, :, None])
        weights = masked_softmax(scores, visible, jnp.ones((1, 1, 1, 1), bool))
        return jnp.einsum("bhij,bjhd->bihd", weights, v), carry, ()

    positions = jnp.broadcast_to(at, TOKENS.shape)
    x, _, _ = model.run_layers(model.embed(jnp.asarray(TOKENS)), positions, attend, (), death)
    return model.logits(model.norm(x))


@pytest.mark.parametrize(("policy", "mode"), CASES)
def test_plain_attention_under_the_death_times_is_the_recurrence(model: Decoder, policy: str, mode: str) -> None:
    done = traced(policy, mode)
    expected = np.asarray(_masked(model, done.death)).swapaxes(0, 1)
    np.testing.assert_allclose(done.logits, expected[PROMPT - 1 :], atol=1e-3)
    forgotten = np.asarray(_masked(model, np.full_like(done.death, TOTAL))).swapaxes(0, 1)
    assert np.abs(forgotten[-1] - done.logits[-1]).max() > 1e-2


def test_full_forgets_nothing(model: Decoder) -> None:
    done = trace(model, TOKENS, Full(), TOTAL, prompt=PROMPT)
    assert (done.death == TOTAL).all()
    np.testing.assert_allclose(
        done.logits, np.asarray(model(jnp.asarray(TOKENS))).swapaxes(0, 1)[PROMPT - 1 :], atol=1e-3
    )


@pytest.mark.slow
def test_layers_with_fewer_slots_are_filled_up() -> None:
    done = traced("tova", "oneshot", (3, 5))
    assert done.positions.shape[-1] == 6
    assert (done.positions[0, ..., 4:] == -1).all()
    assert (done.positions >= 0).sum(-1).max(axis=(1, 2, 3)).tolist() == [3, 5]
    token = np.arange(TOTAL)
    for layer, step in np.ndindex(2, TOTAL - PROMPT):
        alive = (token < PROMPT + step) & (done.death[layer] > PROMPT + step)
        np.testing.assert_array_equal(held_after(done, layer, step), alive)


@pytest.mark.parametrize("mode", ["oneshot", "streaming"])
def test_a_sliding_window_ends_every_life(mode: str) -> None:
    window = 3
    done = traced("tova", mode, SLOTS, sliding=(window, None))
    token = np.arange(TOTAL)
    assert (done.death[0] <= token + window).all()
    assert (done.death[1] > token + window).any()
    for layer, step in np.ndindex(2, TOTAL - PROMPT + 1):
        position = PROMPT - 1 + step
        held = held_after(done, layer, step)
        needed = (token <= position) & (done.death[layer] > position + 1) & (position + 1 < TOTAL)
        assert (held | ~needed).all()  # what a later query sees is there,
        assert ((token <= position) & (done.death[layer] > position) | ~held).all()  # and nothing dead before that
    expected = np.asarray(_masked(tiny_decoder(sliding=(window, None)), done.death)).swapaxes(0, 1)
    np.testing.assert_allclose(done.logits, expected[PROMPT - 1 :], atol=1e-3)


def test_a_prompt_may_be_everything(model: Decoder) -> None:
    done = trace(model, TOKENS, get_policy("tova"), SLOTS, prompt=TOTAL)
    assert done.positions.shape[1] == len(done.logits) == 1
    np.testing.assert_allclose(done.logits[0], np.asarray(model(jnp.asarray(TOKENS)))[:, -1], atol=1e-3)


@pytest.mark.parametrize(
    ("policy", "slots", "how", "says"),
    [
        ("tova", 4, dict(prompt=0), "prompt must be between 1 and the 16 tokens given, not 0"),
        ("tova", 4, dict(prompt=17), "not 17"),
        ("tova", 0, dict(prompt=4), "at least 1 slot per layer"),
        ("window+4", 4, dict(prompt=4), "needs at least 5 slots"),
        ("tova", (4, 4, 4), dict(prompt=4), "slots has 3 entries, the model has 2 layers"),
        ("tova", 4, dict(prompt=4, mode="chunked", chunk=0), "at least 1 token, not chunk=0"),
        ("full", 15, dict(prompt=4), "16 tokens do not fit into the 15 slots"),
    ],
)
def test_what_cannot_be_traced(model: Decoder, policy: str, slots: Any, how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        trace(model, TOKENS, get_policy(policy), slots, **how)


def test_logits_that_are_not_finite_are_an_error(model: Decoder) -> None:
    absent = next(t for t in range(61) if t not in TOKENS)
    tokens = TOKENS.copy()
    tokens[1, 9] = absent
    with pytest.raises(FloatingPointError, match="first in row 1 by position 9"):
        trace(with_embedding(model, absent, np.nan), tokens, get_policy("tova"), SLOTS, prompt=PROMPT)
