"""Losses and the optimizer: against their definitions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import random_tokens, tiny_decoder

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.experts_config import ExpertsConfig
from jaxcompress.state.attention_traits import AttentionTraits
from jaxcompress.training.foresight import foresight_loss
from jaxcompress.training.loss import token_losses
from jaxcompress.training.optimizer import muon_for_decoder, warmup_stable_decay

T, D = 8, 16
foresight = jax.jit(foresight_loss, static_argnames=("strong", "floor", "among"))


def test_token_losses_are_negative_log_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 5, 11)).astype(np.float32) * 20
    targets = rng.integers(0, 11, (2, 5), np.int32)
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_losses(jnp.asarray(logits), jnp.asarray(targets)), expected, atol=1e-5)


def test_token_losses_stay_finite_and_are_float32() -> None:
    logits = jnp.array([[[3e4, -3e4, 0.0]]], jnp.bfloat16)
    losses = token_losses(logits, jnp.array([[1]], jnp.int32))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, [[2 * float(logits[0, 0, 0])]])


def shortfall(q: np.ndarray, k: np.ndarray, positions: np.ndarray, sample: np.ndarray, strong: float, floor: float,
              among: int | None = None):  # fmt: skip
    """The definition, pair by pair, in float64."""
    total, pairs = 0.0, 0
    group = q.shape[2] // k.shape[2]
    for b in range(len(q)):
        rows = []
        for i in sample[b]:
            seen = (positions[b] <= positions[b, i]) & (positions[b] >= 0)
            scores = np.stack([k[b, :, h // group].astype(np.float64) @ q[b, i, h] for h in range(q.shape[2])])
            weights = np.where(seen, np.exp(scores / D**0.5 - (scores / D**0.5)[:, seen].max()), 0)
            rows.append((seen, weights / weights.sum(-1, keepdims=True)))
        for r, (seen, weights) in enumerate(rows):
            least = floor if among is None else max(floor, np.sort(weights.mean(0))[-among])
            for j in np.flatnonzero(seen):
                if any(later[:, j].max() > strong for _, later in rows[r + 1 :]):
                    total += max(0.0, np.log(least) - np.log(weights[:, j].mean() + 1e-9))
                    pairs += 1
    return total / max(pairs, 1)


@pytest.mark.parametrize("among", [None, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_foresight_is_its_definition(seed: int, among: int | None) -> None:
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((2, T, heads, D)).astype(np.float32) * 3 for heads in (4, 2))
    positions = np.stack([np.arange(T), np.maximum(np.arange(T) - 3, -1)]).astype(np.int32)
    sample = np.array([[0, 2, 5, 7], [3, 4, 6, 7]], np.int32)
    floor = 0.2 if among is None else 1e-3
    expected = shortfall(q, k, positions, sample, 0.1, floor, among)
    result = foresight(*map(jnp.asarray, (q, k, positions, sample)), strong=0.1, floor=floor, among=among)
    assert expected > 0
    assert float(result) == pytest.approx(expected, rel=1e-4)


def test_foresight_counts_what_a_sink_takes() -> None:
    """A sink that takes as much as all tokens together halves their attention."""
    q, k = jnp.zeros((1, T, 2, D)), jnp.zeros((1, T, 1, D))
    last = everything()[0], jnp.array([[T - 2, T - 1]])
    halved = AttentionTraits(sinks=jnp.full(2, np.log(T - 1.0), jnp.float32))
    how: Any = dict(strong=1 / (2 * T), floor=1.0)
    more = foresight(q, k, *last, traits=halved, **how) - foresight(q, k, *last, **how)
    assert float(more) == pytest.approx(np.log(2), rel=1e-4)


def everything() -> tuple[jax.Array, jax.Array]:
    """Positions and a sample of all queries."""
    at = jnp.arange(T, dtype=jnp.int32)[None]
    return at, at


def test_foresight_is_content_with_attention_above_the_floor() -> None:
    q = jnp.zeros((1, T, 2, D))
    k = jax.random.normal(jax.random.key(0), (1, T, 2, D))
    assert foresight(q, k, *everything()) == 0  # uniform: every token gets an eighth or more
    assert foresight(q, k, *everything(), floor=0.2) > 0


def looks_back() -> tuple[jax.Array, jax.Array]:
    """Every query attends to itself alone, but the last one to the first token."""
    k = 12 * jnp.eye(T, D)[None, :, None]
    return k.at[0, T - 1, 0].set(k[0, 0, 0]), k


def test_foresight_asks_for_attention_to_what_is_needed_later() -> None:
    q, k = looks_back()
    asked = foresight(q, k, *everything())
    assert asked > 0
    # Queries 1 to 6 ignore token 0, which query 7 needs; query 0 sees itself.
    weight = np.exp(-144 / D**0.5)
    assert float(asked) == pytest.approx(6 / 7 * (np.log(1 / 512) - np.log(weight + 1e-9)), rel=1e-3)
    early = jnp.arange(T - 1, dtype=jnp.int32)[None]
    assert foresight(q, k, everything()[0], early) == 0  # no sampled query needs it


def test_foresight_moves_what_is_attended_to_now_and_not_what_is_needed_later() -> None:
    q, k = looks_back()
    q = q * 0.3  # gently, so that weights and their gradients are not zero
    dq, dk = jax.grad(lambda q, k: foresight(q, k, *everything(), floor=0.2), argnums=(0, 1))(q, k)
    assert np.isfinite(dq).all()
    assert np.isfinite(dk).all()
    assert (np.abs(dq[0, 1 : T - 1]).max((-2, -1)) > 0).all()
    assert (dq[0, T - 1] == 0).all()


def test_foresight_of_extreme_scores_has_a_finite_gradient() -> None:
    q, k = looks_back()
    gradient = jax.grad(lambda q: foresight(q * 100, k, *everything()))(q)
    assert np.isfinite(gradient).all()


def test_warmup_stable_decay() -> None:
    schedule = warmup_stable_decay(2.0, 1000, warmup=100, decay=0.3)
    points = {0: 0.0, 50: 1.0, 100: 2.0, 400: 2.0, 699: 2.0, 700: 2.0, 850: 1.0, 1000: 0.0, 2000: 0.0}
    for step, rate in points.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-5)
    rates = np.array([float(schedule(step)) for step in range(0, 1001, 20)])
    assert (np.diff(rates[:6]) > 0).all()
    assert (np.diff(rates[35:]) < 0).all()


class TestMuon:
    """On the tiny decoder."""

    optimizer = muon_for_decoder(optax.constant_schedule(0.01), clip=1e9, weight_decay=0.0)

    @pytest.fixture(scope="class")
    def gradients(self) -> tuple[Any, Any, Any, Any]:
        """Weights, their gradient, one update, and the loss."""
        model = tiny_decoder()
        (graph, state), tokens = nnx.split(model, nnx.Param), jnp.asarray(random_tokens(4, 17))
        weights = nnx.to_pure_dict(state)

        @jax.jit
        def loss(weights: Any) -> Any:
            return token_losses(nnx.merge(graph, weights)(tokens[:, :-1]), tokens[:, 1:]).mean()

        gradient = jax.jit(jax.grad(loss))(weights)
        return weights, gradient, self.update(gradient, weights), loss

    def update(self, gradient: Any, weights: Any) -> Any:
        return jax.jit(lambda g, w: self.optimizer.update(g, self.optimizer.init(w), w)[0])(gradient, weights)

    def test_one_step_lowers_the_loss(self, gradients: tuple[Any, Any, Any, Any]) -> None:
        weights, _, update, loss = gradients
        assert loss(optax.apply_updates(weights, update)) < loss(weights)

    def test_the_matrix_of_each_expert_is_orthogonalised(self) -> None:
        experts = ExpertsConfig(3, 2, bias=True)
        config = DecoderConfig(7, 8, 6, 2, 2, 1, 4, mlp="experts", experts=experts, sinks=True)
        abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        weights = nnx.to_pure_dict(nnx.split(abstract, nnx.Param)[1])
        draw = np.random.default_rng(0).standard_normal
        random = jax.tree.map(lambda x: jnp.asarray(draw(x.shape), x.dtype), weights)
        update = self.update(random, random)["layers"]
        assert update["mlp"]["gate"].shape == (2, 3, 8, 6)
        for matrix in np.asarray(update["mlp"]["gate"]).reshape(-1, 8, 6):
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.min() > 0.4 * values.max()
        for plain in (update["mlp"]["gate_bias"], update["attention"]["sinks"]):  # Adam's first step
            np.testing.assert_allclose(np.abs(plain), np.abs(plain).mean(), rtol=0.3)

    def test_matrices_are_orthogonalised_and_nothing_else(self, gradients: tuple[Any, Any, Any, Any]) -> None:
        _, gradient, update, _ = gradients
        stacked = update["layers"]["mlp"]["gate"]["kernel"]
        assert stacked.shape == (2, 32, 48)
        for matrix in np.asarray(stacked):
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.min() > 0.4 * values.max()
        spread = np.linalg.svd(np.asarray(gradient["layers"]["mlp"]["gate"]["kernel"][0]), compute_uv=False)
        assert spread.min() < 0.1 * spread.max()
        for plain in (
            update["norm"]["scale"],
            update["embedding"],
        ):  # Adam's first step: one size, whatever the gradient
            sizes = np.abs(np.asarray(plain))
            sizes = sizes[sizes > 0.5 * sizes.max()]
            assert len(sizes) > 0.5 * plain.size
            np.testing.assert_allclose(sizes, sizes.mean(), rtol=0.05)

    def test_layers_do_not_depend_on_one_another(self, gradients: tuple[Any, Any, Any, Any]) -> None:
        weights, gradient, update, _ = gradients
        other = jax.tree.map(lambda x: x, gradient)
        other["layers"] = jax.tree.map(lambda x: x.at[1].multiply(-3.0).at[1].add(0.01), gradient["layers"])
        changed = self.update(other, weights)
        for before, after in zip(*map(jax.tree.leaves, (update["layers"], changed["layers"])), strict=True):
            np.testing.assert_allclose(before[0], after[0], atol=1e-6)
            assert np.abs(before[1] - after[1]).max() > 1e-3

    def test_updates_are_clipped_by_their_global_norm(self) -> None:
        weights = {"norm": {"scale": jnp.ones(4)}}
        optimizer = muon_for_decoder(optax.constant_schedule(1.0), clip=1.0)
        state = optimizer.init(weights)
        _, state = optimizer.update({"norm": {"scale": jnp.full(4, 1e6)}}, state, weights)
        moments = [np.asarray(x) for x in jax.tree.leaves(state) if x.shape == (4,)]
        assert moments
        assert max(np.abs(x).max() for x in moments) <= 1.0
