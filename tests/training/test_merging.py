"""Gates in training are the gates of the policy, when they are firm."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_tokens, tiny_decoder

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import read
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import H2O, TOVA, KNorm
from jaxcompress.policies.forget_head import ForgetHead
from jaxcompress.policies.gates import dmc
from jaxcompress.training.merging import init_gates, merging_loss, read_merging

T = 20
TOKENS = jnp.asarray(random_tokens(2, T))
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def random_head(config: DecoderConfig, seed: int = 0, scale: float = 8.0) -> ForgetHead:
    """Gates of which about half are open, and weights that differ."""
    head = init_gates(config, jax.random.key(seed), hidden=6)
    outer = scale * jax.random.normal(jax.random.key(seed + 1), head.outer.shape) * jnp.array([1.0, 0.1])
    return head._replace(outer=outer, outer_bias=jnp.zeros_like(head.outer_bias))


@pytest.mark.parametrize("chunk", [1, 7, T])
@pytest.mark.parametrize("model", [{}, dict(sliding=(None, 5), qk_norm=True)], ids=["plain", "sliding"])
def test_firm_gates_are_the_policy(chunk: int, model: dict[str, Any]) -> None:
    """With room for all, whatever the mode; rows with padding in front and between."""
    decoder = tiny_decoder(**model)
    head, valid = random_head(decoder.config), np.ones((2, T), bool)
    valid[1, [0, 1, 6, 11, 12]] = False
    soft = read_merging(decoder, TOKENS, head, temperature=1e-4, valid=jnp.asarray(valid))
    policy = dmc(head, KNorm())
    state = init_state(decoder.config, policy, T, batch=2)
    done = read(decoder, TOKENS, state, policy, valid=jnp.asarray(valid), chunk=chunk)
    np.testing.assert_allclose(soft.hidden[valid], done.hidden[valid], atol=1e-4)
    if not model:
        held = np.mean([(part.positions >= 0).sum() for part in done.state]) / (2 * 2 * valid.sum())
        np.testing.assert_allclose(soft.kept.mean(), held, atol=1e-6)
        assert 0.2 < held < 0.8


def test_gates_that_join_nothing_are_plain_attention() -> None:
    decoder = tiny_decoder()
    head = init_gates(decoder.config, jax.random.key(0), hidden=4)
    soft = read_merging(decoder, TOKENS, head, temperature=0.1)
    np.testing.assert_allclose(soft.hidden, decoder.norm(decoder.hidden(TOKENS)), atol=1e-4)
    np.testing.assert_array_equal(soft.kept, 1.0)


def test_a_full_state_evicts_runs() -> None:
    decoder = tiny_decoder()
    for base in (None, H2O(2, "kv_head")):
        policy = dmc(random_head(decoder.config), base)
        state = init_state(decoder.config, policy, 4, batch=2)
        done = read(decoder, TOKENS, state, policy)
        assert np.isfinite(done.hidden).all()
        assert (done.state[0].occupancy() == 4).all()
    assert policy.name == "h2o-recent2-kv_head/dmc"


@pytest.mark.slow
def test_gates_learn_to_join() -> None:
    """As many as they are asked to, at once through noise and temperature."""
    decoder = tiny_decoder()
    head: Any = init_gates(decoder.config, jax.random.key(0), hidden=6)
    tokens = jnp.asarray(random_tokens(4, T + 1))
    optimizer = optax.adam(0.05)
    state = optimizer.init(head)
    loss = partial(merging_loss, decoder, tokens=tokens, weights=jnp.ones((4, T)), share=0.6, pressure=5.0)

    @jax.jit
    def step(head: Any, state: Any, key: Any) -> Any:
        (_, parts), gradient = jax.value_and_grad(
            lambda head: loss(head=head, temperature=0.5, key=key, teacher=decoder), has_aux=True
        )(head)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(head, updates), state, parts

    for key in jax.random.split(jax.random.key(1), 60):
        head, state, parts = step(head, state, key)
    assert float(parts["kept"]) < 0.75
    assert all(float(jnp.abs(x).max()) > 0 for x in head)
    assert np.isfinite(float(parts["prediction"]))


@pytest.mark.slow
def test_gradients_are_right() -> None:
    """Against differences of the loss, for soft gates, of network and model."""
    decoder = tiny_decoder()
    head = random_head(decoder.config, scale=1.0)
    inputs = jnp.asarray(random_tokens(1, 9))

    def loss(by: jax.Array) -> jax.Array:
        moved = head._replace(outer=head.outer + by * jnp.sign(head.outer))
        return merging_loss(decoder, inputs, moved, weights=jnp.ones((1, 8)), share=1.0, temperature=2.0)[0]

    small = 1e-2
    slope = (loss(jnp.asarray(small)) - loss(jnp.asarray(-small))) / (2 * small)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(0.0)), slope, rtol=0.05, atol=1e-3)


def test_errors_say_what_was_given() -> None:
    decoder = tiny_decoder()
    head = random_head(decoder.config)
    with pytest.raises(ValueError, match="temperature is positive, not 0"):
        read_merging(decoder, TOKENS, head, temperature=0.0)
    with pytest.raises(ValueError, match="gates need 2 numbers per token, the weights give 1"):
        dmc(head._replace(outer_bias=head.outer_bias[..., :1]))
    with pytest.raises(ValueError, match="needs 2 numbers per token"):
        read_merging(decoder, TOKENS, head._replace(outer_bias=head.outer_bias[..., :1]), temperature=1.0)
    with pytest.raises(ValueError, match="scope layer chooses for several"):
        dmc(head, TOVA())
