"""Measuring heads: spread against its definition, and heads built by hand to look far back or not."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCABULARY, random_tokens, tiny_decoder

from jaxcompress.budgets.allocate import proportional, retrieval_split, total
from jaxcompress.budgets.calibration import RetrievalHeads, attention_spread, retrieval_heads
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.rope import rotate
from jaxcompress.recurrence.block_attention import causal_attention

MODEL = tiny_decoder(qk_norm=True)  # all keys of one length, so that a query that equals a key fits no other better
L, K, H, D = MODEL.config.num_layers, MODEL.config.num_kv_heads, MODEL.config.num_heads, MODEL.config.head_dim


def with_queries(model: Decoder, change: Any) -> Decoder:
    """The model with sharp attention and other query kernels: change(query [L, E, K, G, D], key [L, E, K, 1, D])."""
    key = model.layers.attention.key.kernel[...].reshape(L, -1, K, 1, D)

    def changed(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if "query_norm" in name:
            return x * 300
        if "query" not in name:
            return x
        return change(x.reshape(L, -1, K, H // K, D), key).reshape(x.shape)

    return jax.tree_util.tree_map_with_path(changed, model)


def distinct(rows: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(VOCABULARY)[:tokens] for _ in range(rows)]).astype(np.int32)


def spread(model: Decoder, tokens: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(attention_spread(model, jnp.asarray(tokens), None if valid is None else jnp.asarray(valid)))


uniform = with_queries(MODEL, lambda q, k: q * 0)
to_itself = with_queries(MODEL, lambda q, k: jnp.broadcast_to(k, q.shape))


def test_spread_of_uniform_attention_is_how_many_keys_are_visible() -> None:
    np.testing.assert_allclose(spread(uniform, random_tokens(2, 9)), np.full((L, K), 5.0), 1e-5)  # mean of 1 .. 9
    windowed = with_queries(tiny_decoder(sliding=(3, None), qk_norm=True), lambda q, k: q * 0)
    in_layer = np.array([[(1 + 2 + 3 * 7) / 9] * K, [5.0] * K])
    np.testing.assert_allclose(spread(windowed, random_tokens(2, 9)), in_layer, 1e-5)


def test_spread_of_attention_to_one_token_is_one() -> None:
    np.testing.assert_allclose(spread(to_itself, distinct(2, 20)), np.ones((L, K)), 1e-3)


def test_query_heads_that_look_at_different_tokens_add_up() -> None:
    """One query head of a group is uniform, the other looks at its own token: entropy of their mean."""
    model = with_queries(MODEL, lambda q, k: jnp.concatenate([q[..., :1, :] * 0, k], 3))
    n = np.arange(1, 10)
    own, other = 0.5 + 0.5 / n, 0.5 / n
    mean = np.exp(-own * np.log(own) - (n - 1) * other * np.log(other)).mean()
    np.testing.assert_allclose(spread(model, distinct(1, 9)), np.full((L, K), mean), 1e-3)


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def rotated(model: Decoder, tokens: Any, positions: Any) -> Any:
    def attend(q, k, v, positions, layer, index, carry, xs):
        q, k = (rotate(x, positions[..., None], model.config.rope) for x in (q, k))
        return causal_attention(q, k, v, positions), carry, (q, k)

    return model.run_layers(model.embed(tokens), positions, attend)[2]


def definition(tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Query by query, in float64."""
    positions = np.where(valid, np.cumsum(valid, 1) - 1, -1).astype(np.int32)
    q, k = (np.asarray(x, np.float64) for x in rotated(MODEL, tokens, positions))
    total = np.zeros((L, K))
    for layer, row, i in np.ndindex(L, *tokens.shape):
        if valid[row, i]:
            seen = k[layer, row, : i + 1][valid[row, : i + 1]]
            scores = np.einsum("kgd,nkd->kgn", q[layer, row, i].reshape(K, H // K, D), seen) / D**0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = (weights / weights.sum(-1, keepdims=True)).mean(1)
            total[layer] += np.exp(-(weights * np.log(np.maximum(weights, 1e-300))).sum(-1))
    return total / valid.sum()


def test_spread_is_its_definition_with_padding_anywhere() -> None:
    """More than one block of queries; a row of padding alone."""
    tokens, valid = random_tokens(3, 133), np.ones((3, 133), bool)
    valid[0, 20:24] = valid[1, :40] = valid[1, 130:] = valid[2] = False
    expected = definition(tokens, valid)
    np.testing.assert_allclose(spread(MODEL, tokens, valid), expected, 1e-4)
    tokens[~valid] = 0
    np.testing.assert_allclose(spread(MODEL, tokens, valid), expected, 1e-4)
    assert total(proportional(expected, 10)) == 10 * L * K


def test_streaming_mask() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 21, heads, D)), jnp.float32) for heads in (H, K, K))
    at = jnp.asarray(np.stack([np.arange(21), np.maximum(np.arange(21) - 4, -1)]), jnp.int32)
    ours = np.asarray(causal_attention(q, k, v, at, streaming=(2, 5)))
    for row, i, h in np.ndindex(2, 21, H):
        if (here := int(at[row, i])) >= 0:
            seen = [j for j in range(21) if 0 <= (p := int(at[row, j])) <= here and (p < 2 or p > here - 5)]
            weights = np.exp(np.asarray(k)[row, seen, h // 2] @ np.asarray(q)[row, i, h] / D**0.5)
            np.testing.assert_allclose(
                ours[row, i, h], weights / weights.sum() @ np.asarray(v)[row, seen, h // 2], 1e-4, 1e-5
            )


TEXTS = distinct(3, 48)
ASKED = np.zeros((3, 48), bool)
ASKED[:, 40:] = True


@cache
def found(layer: int, head: int, **how: Any) -> RetrievalHeads:
    """All heads look at their own token, but one at everything."""
    model = with_queries(MODEL, lambda q, k: jnp.broadcast_to(k, q.shape).at[layer, :, head].set(0.0))
    return retrieval_heads(model, TEXTS, ASKED, **(dict(share=0.25, sinks=1, recent=6, steps=25) | how))


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 0)])
def test_a_head_that_looks_far_back_is_found(layer: int, head: int) -> None:
    result = found(layer, head)
    expected = np.zeros((L, K), bool)
    expected[layer, head] = True
    np.testing.assert_array_equal(result.retrieval, expected)
    others = result.gates[~expected]
    assert result.gates[layer, head] > 0.5 > 0.2 > others.max()
    assert result.losses.shape == (25,)
    assert result.losses[0] < 1e-6  # open gates: the model itself
    slots = retrieval_split(result.retrieval, 40, 7)
    assert total(slots) == 40 + 3 * 7


def test_same_seed_same_gates() -> None:
    one = found(0, 1)
    found.cache_clear()
    two = found(0, 1)
    np.testing.assert_array_equal(one.gates, two.gates)
    np.testing.assert_array_equal(one.losses, two.losses)


def test_gates_are_numbers_from_0_to_1_and_ties_are_settled() -> None:
    result = found(0, 1, penalty=10.0, share=0.5, rows=2)
    assert result.gates.max() <= 0.1  # all closed by so great a penalty
    assert result.gates.min() >= 0.0
    assert result.retrieval.sum() == 2
    assert found(0, 1, penalty=10.0, share=0.0, rows=2).retrieval.sum() == 0


def test_progress_is_told() -> None:
    told: list[int] = []
    retrieval_heads(MODEL, TEXTS, ASKED, sinks=1, recent=6, steps=3, progress=told.append)
    assert told == [1, 2, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: attention_spread(MODEL, jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), bool)),
            "every token is padding",
        ),
        (lambda: retrieval_heads(MODEL, TEXTS, ASKED[:, :5]), r"\[3, 48\] and \[3, 5\]"),
        (lambda: retrieval_heads(MODEL, TEXTS, ASKED & False, sinks=1, recent=6), "text 0 has no answer"),
        (lambda: retrieval_heads(MODEL, TEXTS, ASKED, share=1.5, sinks=1, recent=6), "0 to 1, not 1.5"),
        (lambda: retrieval_heads(MODEL, TEXTS, ASKED), "48 tokens lie within the 68"),
    ],
)
def test_errors_say_what_was_given(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
