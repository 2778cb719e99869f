"""The soft cap on attention scores, in every path that computes them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.block_attention import causal_attention, forgetful_attention, lifetime_attention
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.recurrence.parallel import parallel_gradient
from jaxcompress.state.attention_traits import AttentionTraits

from .harness import RULES, B, Case, D, H, K, T, fresh

CAP = AttentionTraits(0.5)
rng = np.random.default_rng(0)
Q, KEYS, VALUES = (jnp.asarray(rng.normal(size=(B, T, h, D)) * 2, jnp.float32) for h in (H, K, K))
AT = jnp.broadcast_to(jnp.arange(T), (B, T))


def expected(cap: float) -> np.ndarray:
    """Causal attention, [B, T, H, D]."""
    q, k, v = (np.asarray(x, np.float64) for x in (Q, KEYS, VALUES))
    k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
    scores = cap * np.tanh(np.einsum("bthd,bnhd->bhtn", q, k) / np.sqrt(D) / cap)
    weights = np.where(np.tri(T, dtype=bool), np.exp(scores), 0.0)
    return np.einsum("bhtn,bnhd->bthd", weights / weights.sum(-1, keepdims=True), v)


def advanced(policy: str, chunk: int, **how: Any) -> Any:
    state = fresh(Case(policy))
    return advance(Q, KEYS, VALUES, AT, state, 0, RULES[policy][0], chunk=chunk, **{"traits": CAP, **how})


PATHS = {
    "causal": lambda: causal_attention(Q, KEYS, VALUES, AT, traits=CAP),
    "forgetful": lambda: forgetful_attention(Q, KEYS, VALUES, AT, jnp.zeros((B, K, T)), delay=1, traits=CAP),
    "lifetimes": lambda: lifetime_attention(
        Q.reshape(B, T, K, -1, D), KEYS.swapaxes(1, 2), VALUES.swapaxes(1, 2), AT, AT[:, None],
        jnp.full((B, 1, T), T), alive=T, traits=CAP,
    ).reshape(Q.shape),
    **{f"chunks of {chunk}": lambda chunk=chunk: advanced("full", chunk).out for chunk in (1, 5, T)},
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_all_paths_cap_alike(path: str) -> None:
    np.testing.assert_allclose(PATHS[path](), expected(0.5), atol=1e-5)


def test_probabilities_of_some_queries_are_capped() -> None:
    rows = AttentionInputs(Q, KEYS, jnp.zeros((B, T)), AT, CAP).rows(jnp.full((B, 1), T - 1))
    out = np.einsum("bhn,bnhd->bhd", rows[:, :, 0], np.repeat(np.asarray(VALUES), H // K, axis=2))
    np.testing.assert_allclose(out, expected(0.5)[:, -1], atol=1e-5)


def test_gradient_by_death_times_is_that_of_the_recurrence() -> None:
    def slopes(**how: Any) -> Any:
        state, policy = fresh(Case("tova")), RULES["tova"][0]
        run = lambda *x: jnp.sin(advance(*x, AT, state, 0, policy, traits=CAP, **how).out).sum()
        return jax.jit(jax.grad(run, (0, 1, 2)))(Q, KEYS, VALUES)

    for one, other in zip(slopes(), slopes(recurrence=parallel_gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5])
def test_no_kernel_is_chosen_and_the_reason_is_said(chunk: int, caplog: pytest.LogCaptureFixture) -> None:
    with_name = advanced("tova", chunk, backend="tpu-interpret").out
    assert {message.split(": ")[1] for message in caplog.messages} == {"the layer caps its attention scores"}
    np.testing.assert_allclose(with_name, advanced("tova", chunk).out, atol=1e-6)
