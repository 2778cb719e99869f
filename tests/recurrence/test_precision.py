"""Attention in bfloat16 against the same numbers in float64: nothing is rounded more than once or twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.policies.summary import Summary
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.attention import Extra, slot_attention
from jaxcompress.recurrence.block_attention import (
    causal_attention,
    forgetful_attention,
    lifetime_attention,
    whole_attention,
)
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.state.storage import load_vectors, store_vectors, zeros
from jaxcompress.vision.prumerge import single_head_attention
from jaxcompress.vision.sparsevlm import rater_mass

from .harness import FAST_COMPILE

# As it is written: XLA may else leave out roundings, and which depends on what it fuses.
STRICT = {**FAST_COMPILE, "xla_allow_excess_precision": False}
T, K, G, D = 260, 2, 2, 24  # three blocks of queries; the root of the width is no power of two
ROUNDING = 2.0**-8  # of a bfloat16 number, at most, by its size
MOST = 1.3  # roundings of the largest number: of the weights, and of the result


@cache
def inputs() -> tuple[jax.Array, ...]:
    """q and a cotangent [1, T, K, G, D]; k and v [1, T, K, D], the values all of one sign."""
    random = np.random.default_rng(0)
    some = lambda *shape, scale=1.0, context=0.0: jnp.asarray(random.normal(size=shape) * scale + context, jnp.bfloat16)
    return some(1, T, K, G, D, scale=3), some(1, T, K, D), some(1, T, K, D, context=2), some(1, T, K, G, D)


def exact(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def expected(seen: np.ndarray, q: Any, k: Any, v: Any, g: Any) -> tuple[np.ndarray, ...]:
    """Output and gradients of attention in float64; seen [T or 1, N]."""
    q, k, v, g = map(exact, (q, k, v, g))
    scores = np.einsum("btkgd,bnkd->bkgtn", q, k) * D**-0.5
    w = softmax(np.where(seen, scores, -np.inf))
    of_weights = np.einsum("btkgd,bnkd->bkgtn", g, v)
    of_scores = w * (of_weights - (w * of_weights).sum(-1, keepdims=True)) * D**-0.5
    return (
        np.einsum("bkgtn,bnkd->btkgd", w, v), np.einsum("bkgtn,bnkd->btkgd", of_scores, k),
        np.einsum("bkgtn,btkgd->bnkd", of_scores, q), np.einsum("bkgtn,btkgd->bnkd", w, g),
    )  # fmt: skip


def error(got: Any, want: np.ndarray) -> float:
    """In roundings of the largest number."""
    return float(np.abs(exact(got).reshape(want.shape) - want).max() / np.abs(want).max() / ROUNDING)


AT = jnp.arange(T, dtype=jnp.int32)[None]
CAUSAL, ALL = np.tril(np.ones((T, T), bool)), np.ones((T, T), bool)
flat = lambda q: q.reshape(1, -1, K * G, D)
turned = lambda x: x.swapaxes(1, 2)


def lifetime(q: Any, k: Any, v: Any) -> Any:
    born = jnp.broadcast_to(AT[:, None], (1, K, T))
    return lifetime_attention(q, turned(k), turned(v), AT, born, jnp.full_like(born, 2**30), alive=T)


def at_once(q: Any, k: Any, v: Any) -> Any:
    config = DecoderConfig(8, 8, 8, 1, num_heads=K * G, num_kv_heads=K, head_dim=D)
    state = init_state(config, policies.Full(), T, dtype="bfloat16")[0]
    return advance(flat(q), k, v, AT, state, 0, policies.Full(), chunk=T).out


def decoded(q: Any, k: Any, v: Any) -> Any:
    visible = jnp.ones((1, 1, 1, T), bool)
    return slot_attention(q[:, -1], turned(k), turned(v), visible, jnp.ones(1, bool))[0][:, None]


PATHS: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
    "causal": (lambda q, k, v: causal_attention(flat(q), k, v, AT), CAUSAL),
    "forgetful": (
        lambda q, k, v: forgetful_attention(flat(q), k, v, AT, jnp.zeros((1, K, T)), delay=3), CAUSAL
    ),
    "lifetime": (lifetime, CAUSAL),
    "whole": (lambda q, k, v: whole_attention(flat(q), k, v, jnp.zeros((1, T))), ALL),
    "at once": (at_once, CAUSAL),
    "decoded": (decoded, ALL[-1:]),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_path_and_its_gradient(name: str) -> None:
    path, seen = PATHS[name]
    q, k, v, g = inputs()
    some = slice(T - len(seen), None)

    def both(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(path, q, k, v)
        return out, pull(g[:, some].reshape(out.shape))

    out, (dq, dk, dv) = jax.jit(both, compiler_options=STRICT)(q, k, v)
    assert [x.dtype for x in (out, dq, dk, dv)] == [jnp.bfloat16] * 4
    want = expected(seen, q[:, some], k, v, g[:, some])
    errors = [error(x, y) for x, y in zip((out, dq[:, some], dk, dv), want, strict=True)]
    assert max(errors) < MOST, errors


@pytest.mark.parametrize("name", ["lifetime", "at once", "decoded"])
def test_queries_in_float32_get_what_was_not_rounded(name: str) -> None:
    """A state in bfloat16 under a model in float32: only the weights are rounded."""
    path, seen = PATHS[name]
    q, k, v, g = inputs()
    out = jax.jit(path, compiler_options=STRICT)(q.astype(jnp.float32), k, v)
    assert out.dtype == jnp.float32
    some = slice(T - len(seen), None)
    assert error(out, expected(seen, q[:, some], k, v, g[:, some])[0]) < MOST / 2


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_slots(dtype: str) -> None:
    """Codes are multiplied exactly, and scales are applied in float32."""
    q, k, v, g = inputs()
    visible = jnp.ones((1, 1, 1, T), bool)

    @partial(jax.jit, compiler_options=STRICT)
    def run(q: Any, k: Any, v: Any) -> Any:
        keys, values = (store_vectors(turned(x), zeros((1, 1, 1, D), dtype)) for x in (k, v))
        out = slot_attention(q, keys, values, visible, jnp.ones(1, bool))[0]
        return out[:, None], turned(load_vectors(keys)), turned(load_vectors(values))

    out, keys, values = run(q[:, -1], k, v)
    assert error(out, expected(ALL[-1:], q[:, -1:], keys, values, g[:, -1:])[0]) < MOST


def test_stand_ins_are_added_before_rounding() -> None:
    """Half of the tokens in slots, half as stand-ins for one token each."""
    q, k, v, g = inputs()
    half, there = T // 2, jnp.ones(1, bool)
    stand_ins = Summary(turned(k)[:, :, half:], turned(v)[:, :, half:], jnp.zeros((1, K, 1, T - half)))
    visible = jnp.ones((1, 1, 1, half), bool)
    run = lambda q, k, v: slot_attention(q, k, v, visible, there, Extra(None, stand_ins))[0]
    out = jax.jit(run, compiler_options=STRICT)(q[:, -1], turned(k)[:, :, :half], turned(v)[:, :, :half])
    assert error(out[:, None], expected(ALL[-1:], q[:, -1:], k, v, g[:, -1:])[0]) < MOST


def test_probabilities_that_are_shown() -> None:
    q, k, *_ = inputs()
    index = jnp.array([[0, 7, T - 1]])
    run = jax.jit(lambda q, k: AttentionInputs(flat(q), k, jnp.zeros((1, T)), AT).rows(index), compiler_options=STRICT)
    rows = run(q, k)
    scores = np.einsum("btkgd,bnkd->bkgtn", exact(q[:, index[0]]), exact(k)) * D**-0.5
    want = softmax(np.where(CAUSAL[index[0]], scores, -np.inf)).reshape(1, K * G, 3, T)
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, want, atol=1e-6)


def test_what_rates_patches_is_not_rounded() -> None:
    q, k, *_ = inputs()
    x, y = q.reshape(1, T, -1), jnp.concatenate([k, k], -1).reshape(1, T, -1)
    there = jnp.ones((1, T), bool)
    run = jax.jit(lambda x, y: (rater_mass(x, y, there, there), single_head_attention(x, y)), compiler_options=STRICT)
    mass, attention = run(x, y)
    scores = np.einsum("bve,bre->bvr", exact(x), exact(y))
    np.testing.assert_allclose(mass, softmax(scores).mean(1), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(attention, softmax(scores[:, 0] * (2 * K * D) ** -0.5)[:, 1:], rtol=1e-4)


TURN = jax.jit(partial(rotate, rope=RopeConfig()), compiler_options=STRICT)


@pytest.mark.parametrize("position", [1000, 65_537, 1_000_003])
def test_angles_are_float32_however_far(position: int) -> None:
    """bfloat16 has no 257, float16 ends at 65,504."""
    x = inputs()[0][0, :9, 0, 0]
    frequencies = RopeConfig().frequencies(D)[0].astype(np.float32)
    angles = np.float64(np.float32(position) * frequencies)
    a, b = np.split(exact(x), 2, axis=-1)
    want = np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)
    got = TURN(x, jnp.full(9, position, jnp.int32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(got), want, rtol=ROUNDING, atol=1e-4)
