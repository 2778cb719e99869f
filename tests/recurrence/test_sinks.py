"""Attention sinks: a logit per query head that joins the softmax's denominator and stands for no token.

Streaming, chunks and windows with sinks are in `test_recurrence_reference`, gradients in `test_parallel`.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.policies.summary import Summary
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.attention import Extra, slot_attention
from jaxcompress.recurrence.block_attention import causal_attention, forgetful_attention
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.state.attention_traits import AttentionTraits

from .harness import FAST_COMPILE, ROPE, RULES, SINKS, B, Case, D, H, K, T, data, fresh

TRAITS = AttentionTraits(sinks=jnp.asarray(SINKS))
AT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
ROWS = data(3)
Q, KEYS, VALUES = (jnp.asarray(x) for x in (ROWS.q, ROWS.k, ROWS.v))


def probabilities(q: Any, k: Any, sinks: Any, seen: Any, bias: Any = 0.0) -> Any:
    """[B, H, T, N], as the definition has it: a softmax over one more column, which is then left out."""
    scores = jnp.einsum("bthd,bnhd->bhtn", q, jnp.repeat(k, H // K, axis=2)) / np.sqrt(D) + bias
    scores = jnp.where(seen, scores, -jnp.inf)
    column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]


def test_attention_within_a_block_and_its_gradient() -> None:
    """Causal attention under a window, and forgetful attention."""
    age = AT[0][:, None] - AT[0][None]
    fading = -jnp.abs(jnp.asarray(data(4).k[..., 0].swapaxes(1, 2)))  # [B, K, T]
    late = jnp.where(age >= 2, jnp.repeat(fading, H // K, axis=1)[:, :, None], 0.0)

    def definition(sinks: Any, q: Any, k: Any, v: Any) -> Any:
        seen = (age >= 0) & (age < 7)
        values = jnp.repeat(v, H // K, axis=2)
        weights = probabilities(q, k, sinks, seen), probabilities(q, k, sinks, seen, late)
        return [jnp.einsum("bhtn,bnhd->bthd", one, values) for one in weights]

    def ours(sinks: Any, q: Any, k: Any, v: Any) -> Any:
        how: Any = dict(window=jnp.int32(7), traits=AttentionTraits(sinks=sinks))
        return [causal_attention(q, k, v, AT, **how), forgetful_attention(q, k, v, AT, fading, delay=2, **how)]

    def both(attend: Any) -> Any:
        loss = lambda *inputs: sum(
            (out * jnp.sin(jnp.arange(out.size).reshape(out.shape))).sum() for out in attend(*inputs)
        )
        run = lambda *inputs: (attend(*inputs), jax.grad(loss, range(4))(*inputs))
        return jax.jit(run, compiler_options=FAST_COMPILE)(TRAITS.sinks, Q, KEYS, VALUES)

    got, want = both(ours), both(definition)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert np.abs(got[1][0]).min() > 1e-3


def test_stand_ins_and_bias_beside_a_sink() -> None:
    """Half of the tokens in slots, half as stand-ins for one token each."""
    half, q = T // 2, Q[:, -1].reshape(B, K, -1, D)
    turned = lambda x: x.swapaxes(1, 2)
    bias = jnp.linspace(-1.0, 0.0, half)
    more = Summary(turned(KEYS)[:, :, half:], turned(VALUES)[:, :, half:], jnp.zeros((B, K, 1, T - half)))
    there = jnp.ones(B, bool)
    extra = Extra(jnp.broadcast_to(bias, (B, 1, half)), more, TRAITS)
    out, weights = slot_attention(
        q, turned(KEYS)[:, :, :half], turned(VALUES)[:, :, :half], jnp.ones((1, 1, 1, half), bool), there, extra
    )
    added = jnp.concatenate([bias, jnp.zeros(T - half)])
    want = probabilities(Q[:, -1:], KEYS, TRAITS.sinks, True, added)[:, :, 0]
    np.testing.assert_allclose(weights.reshape(B, H, half), want[..., :half], atol=1e-6)
    values = jnp.repeat(turned(VALUES), H // K, axis=1)
    np.testing.assert_allclose(out.reshape(B, H, D), jnp.einsum("bhn,bhnd->bhd", want, values), atol=1e-5)


def test_rows_of_probabilities() -> None:
    index = jnp.broadcast_to(jnp.array([0, 9]), (B, 2))
    rows = AttentionInputs(Q, KEYS, jnp.zeros((B, T)), AT, TRAITS).rows(index)
    seen = AT[0][:, None] >= AT[0][None]
    np.testing.assert_allclose(rows, probabilities(Q, KEYS, TRAITS.sinks, seen)[:, :, index[0]], atol=1e-6)
    assert (rows.sum(-1) < 1).all()


def test_a_query_without_tokens_gives_all_to_its_sink() -> None:
    """A slot that is not visible takes nothing, however low the sink is."""
    q, nothing = Q[:, -1].reshape(B, K, -1, D), jnp.zeros((B, K, 4, D))
    low = AttentionTraits(sinks=jnp.full(H, -80.0))
    out, weights = slot_attention(
        q, nothing, nothing + 1, jnp.zeros((1, 1, 1, 4), bool), jnp.ones(B, bool), Extra(traits=low)
    )
    assert not np.asarray(out).any()
    assert not np.asarray(weights).any()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("chunk", [1, 4])
def test_no_kernel_is_chosen(tokens: int, chunk: int, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel asked for by name knows no sinks: XLA computes the call, and the log says why."""
    caplog.set_level(logging.INFO, logger="jaxcompress")
    from jaxcompress.pallas_kernels import dispatch

    dispatch._say.cache_clear()
    run = lambda backend: advance(
        Q[:, :tokens], KEYS[:, :tokens], VALUES[:, :tokens], AT[:, :tokens], fresh(Case("tova")), 0, RULES["tova"][0],
        rotate=ROPE, chunk=chunk, traits=TRAITS, backend=backend,
    ).out  # fmt: skip
    np.testing.assert_array_equal(run("tpu-interpret"), run("jnp"))
    assert "the layer has attention sinks" in caplog.text
