"""Mixtures of experts: equal to a loop over tokens, whatever their number and wherever they are sent."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.models.experts import (
    MOST_ROWS,
    ExpertWeights,
    Gate,
    block_height,
    clamped_gate,
    group,
    route,
    run_experts,
)
from jaxcompress.models.experts_config import ClampedGate, ExpertsConfig

X, E, F, CHOSEN = 5, 6, 4, 2
CLAMPED: Gate = partial(clamped_gate, ClampedGate(1.702, 0.5))
SILU: Gate = lambda gate, up: jax.nn.silu(gate) * up
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2, jnp.float32)
WEIGHTS = ExpertWeights(draw(X, E, F), draw(X, E, F), draw(X, F, E), draw(X, F), draw(X, F), draw(X, E))
PLAIN = WEIGHTS._replace(gate_bias=None, up_bias=None, down_bias=None)
run = jax.jit(run_experts, static_argnames="gated")


def definition(x: Any, shares: Any, experts: Any, weights: ExpertWeights, gated: Gate) -> Any:
    """Every token through every expert; those not chosen count zero."""
    biases = [0.0 if bias is None else bias for bias in weights[3:]]
    gate, up = (jnp.einsum("ne,xef->nxf", x, w) + bias for w, bias in zip(weights[:2], biases[:2], strict=True))
    out = jnp.einsum("nxf,xfe->nxe", gated(gate, up), weights.down) + biases[2]
    each = (jax.nn.one_hot(experts, X) * shares[..., None]).sum(1)
    return jnp.einsum("nx,nxe->ne", each, out)


def sent(n: int, *, to: list[int] | None = None, seed: int = 0) -> tuple[Any, Any, Any]:
    """Tokens, shares and experts of n tokens; all to the same ones if `to` says so."""
    random = np.random.default_rng(seed)
    x, logits = random.standard_normal((n, E)), random.standard_normal((n, X))
    if to is not None:
        logits[:, to] += 20.0
    x, logits = jnp.asarray(x, jnp.float32), jnp.asarray(logits, jnp.float32)
    return x, *route(logits, ExpertsConfig(X, CHOSEN))


@pytest.mark.parametrize(("n", "to"), [(1, None), (3, None), (70, None), (70, [1, 4])])
def test_experts_and_their_gradient(n: int, to: list[int] | None) -> None:
    """With few and many tokens, and with all of them sent to the same experts."""
    weights, gated = (WEIGHTS, CLAMPED) if n < 70 or to else (PLAIN, SILU)

    def both(form: Any, x: Any, shares: Any, experts: Any, weights: Any) -> Any:
        def loss(x: Any, shares: Any, weights: Any) -> Any:
            out = form(x, shares, experts, weights, gated)
            return jnp.sin(out).sum(), out

        return jax.grad(loss, range(3), has_aux=True)(x, shares, weights)

    got, want = (jax.jit(partial(both, form))(*sent(n, to=to, seed=n), weights) for form in (run_experts, definition))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


def test_a_token_does_not_depend_on_others() -> None:
    x, shares, experts = sent(33)
    together = run(x, shares, experts, WEIGHTS, gated=CLAMPED)
    for i in (0, 17, 32):
        alone = run(*(one[i : i + 1] for one in (x, shares, experts)), WEIGHTS, gated=CLAMPED)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-5, atol=1e-5)
    # What stands in a padded row is nobody's business.
    strange = run(x.at[5].set(1e30), shares, experts, WEIGHTS, gated=CLAMPED)
    np.testing.assert_array_equal(np.delete(strange, 5, axis=0), np.delete(together, 5, axis=0))


def test_bfloat16_is_rounded_once_per_product() -> None:
    x, shares, experts = sent(9)
    half = jax.tree.map(lambda one: one.astype(jnp.bfloat16), (x, WEIGHTS))
    out = run(half[0], shares, experts, half[1], gated=CLAMPED)
    assert out.dtype == jnp.bfloat16
    exact = jax.tree.map(lambda one: one.astype(jnp.float32), half)
    want = definition(exact[0], shares, experts, exact[1], CLAMPED)
    assert np.abs(np.float32(out) - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("normalised", [True, False])
def test_routing(normalised: bool) -> None:
    logits = draw(7, X)
    shares, experts = route(logits, ExpertsConfig(X, CHOSEN, normalised=normalised))
    every = np.asarray(jax.nn.softmax(logits, axis=-1))
    order = np.argsort(-every, axis=-1)[:, :CHOSEN]
    want = np.take_along_axis(every, order, axis=-1)
    np.testing.assert_array_equal(experts, order)
    np.testing.assert_allclose(shares, want / want.sum(-1, keepdims=True) if normalised else want, rtol=1e-5)


@pytest.mark.parametrize(("n", "count", "to"), [(1, 8, None), (40, 3, None), (40, 8, 2), (300, 2, None), (2, 64, None)])
def test_every_token_has_a_row_of_its_own_in_a_block_of_its_expert(n: int, count: int, to: int | None) -> None:
    random = np.random.default_rng(n)
    experts = np.stack([random.permutation(count)[:2] for _ in range(n)]).astype(np.int32)
    if to is not None:
        experts[:, 0], experts[:, 1] = to, (to + 1) % count
    blocks = group(jnp.asarray(experts), count)
    n_blocks, height = blocks.token.shape
    assert height == block_height(2 * n, count) <= MOST_ROWS
    place = np.asarray(blocks.place)
    assert len(np.unique(place)) == 2 * n
    np.testing.assert_array_equal(np.asarray(blocks.expert)[place // height], experts)
    np.testing.assert_array_equal(np.asarray(blocks.token).ravel()[place], np.arange(n)[:, None].repeat(2, 1))
    assert (np.asarray(blocks.token) < n).sum() == 2 * n  # the other rows are empty


def test_a_token_goes_to_experts_that_there_are() -> None:
    with pytest.raises(ValueError, match="1 to 4 experts, not 5"):
        ExpertsConfig(4, 5)
