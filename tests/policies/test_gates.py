"""Tokens joined to the one before them, against loops in NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrence.harness import FAST_COMPILE, ROPE, B, D, Data, H, K, T, data

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig
from jaxcompress.policies import Policy
from jaxcompress.policies.entry import Gates
from jaxcompress.policies.gates import gated
from jaxcompress.policies.reductions.merge import merge_nearest
from jaxcompress.policies.reductions.reduced import with_reduce
from jaxcompress.policies.reductions.summarise import mean_slots
from jaxcompress.recurrence.advance import advance, death_times
from jaxcompress.state.values import value

from . import reference

CONFIG = DecoderConfig(8, 8, 8, 1, H, K, D, rope=RopeConfig(theta=50.0))
CUTS = {"steps": (1, 1), "streaming": (T, 1), "chunked": (T, 5), "pieces": (5, 5), "one-shot": (T, T)}


@value
class ByKey(Gates):
    """Joins where the first number of a key is positive, with a weight by the second."""

    def __call__(self, incoming: Any, layer: Any, context: Any) -> tuple[jax.Array, jax.Array]:
        return incoming.k[..., 0], jnp.exp(incoming.k[..., 1])


@cache
def policy(of: str) -> Policy:
    if of == "means":
        return with_reduce(policy("knorm"), mean_slots(4))
    return gated(
        {"knorm": policies.KNorm, "window": lambda: policies.protect(policies.KNorm(), recent=2)}[of](), ByKey()
    )


def run(of: str, rows: Data, slots: int, cut: str) -> tuple[np.ndarray, Any, np.ndarray]:
    """out [B, T, H, D], the state, and death times [B, K, T]."""
    return jax.tree.map(np.asarray, _run(of, slots, *CUTS[cut])(rows.q, rows.k, rows.v, rows.positions))


@cache
def _run(of: str, slots: int, piece: int, chunk: int) -> Any:
    pad = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, piece + slots + 2 - x.shape[-1])], constant_values=-1)

    def whole(q: Any, k: Any, v: Any, positions: Any) -> Any:
        state, outs, freed, died = init_state(CONFIG, policy(of), slots, batch=B)[0], [], [], []
        for at in range(0, T, piece):
            part = slice(at, at + piece)
            done = advance(
                q[:, part], k[:, part], v[:, part], positions[:, part], state, 0, policy(of), chunk=chunk, rotate=ROPE
            )
            state = replace(done.state, seen=jnp.maximum(done.state.seen, positions[:, part].max(-1) + 1))
            outs.append(done.out)
            freed.append(pad(done.freed)), died.append(pad(done.died))
        return jnp.concatenate(outs, 1), state, death_times(jnp.concatenate(freed), jnp.concatenate(died), T)

    return jax.jit(whole, compiler_options=FAST_COMPILE)


def runs_of(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of the run that each token ends, [N, K, D], and whether the next token joins it."""
    keys, values, joins = np.zeros_like(k), np.zeros_like(v), k[..., 0] > 0
    for h in range(k.shape[1]):
        weight, key, value = 0.0, np.zeros(D), np.zeros(D)
        for t in range(len(k)):
            if not joins[t, h]:
                weight, key, value = 0.0, np.zeros(D), np.zeros(D)
            w = np.exp(k[t, h, 1])
            weight, key, value = weight + w, key + w * k[t, h], value + w * v[t, h]
            keys[t, h], values[t, h] = key / weight, value / weight
    return keys, values, joins


@st.composite
def layouts(draw: Any) -> Data:
    rows = data(draw(st.integers(0, 2**10)))
    valid = np.array([draw(st.lists(st.booleans(), min_size=T, max_size=T)) for _ in range(B)])
    return rows._replace(valid=valid | (np.arange(B) == 0)[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(rows=layouts())
def test_with_room_for_all_it_is_attention_to_the_runs(cut: str, rows: Data) -> None:
    out, state, death = run("knorm", rows, T, cut)
    for b in range(B):
        q, k, v = rows.row(b)
        if len(q) == 0:
            continue
        at = np.arange(len(q))
        keys, values, joins = runs_of(k, v)
        q, keys = reference.rope(q, at[:, None], 50.0), reference.rope(keys, at[:, None], 50.0)
        for h in range(H):
            g = h // (H // K)
            ended = np.append(~joins[1:, g], True)  # a run ends here
            seen = (at[None] <= at[:, None]) & (ended[None] | (at[None] == at[:, None]))
            weights = np.where(seen, np.exp(q[:, h] @ keys[:, g].T / np.sqrt(D)), 0)
            want = weights / weights.sum(1, keepdims=True) @ values[:, g]
            np.testing.assert_allclose(out[b, rows.valid[b], h], want, 1e-4, 1e-4)
        for g in range(K):
            ended = np.append(~joins[1:, g], True)
            np.testing.assert_array_equal(np.sort(state.positions[0, b, g])[-ended.sum() :], at[ended])
            assert (state.positions[0, b, g] >= 0).sum() == ended.sum()
            np.testing.assert_array_equal(death[b, g, : len(q)], np.where(ended, T, at + 1))


@pytest.mark.slow
@pytest.mark.parametrize("of", ["knorm", "window"])
def test_a_full_state_chooses_among_runs(of: str) -> None:
    rows, slots = data(3), 4
    steps, streaming = run(of, rows, slots, "steps"), run(of, rows, slots, "streaming")
    np.testing.assert_allclose(steps[0], streaming[0], atol=1e-5)
    np.testing.assert_array_equal(steps[1].positions, streaming[1].positions)
    np.testing.assert_array_equal(steps[2], streaming[2])
    assert ((steps[1].positions >= 0).sum(-1) <= slots).all()
    for cut in ("chunked", "one-shot"):
        assert ((run(of, rows, slots, cut)[1].positions >= 0).sum(-1) == slots).all()


def test_what_is_joined_is_not_summarised_too() -> None:
    """With room for all nothing is evicted, so that summaries stay empty, however the tokens are cut."""
    rows = data(3)
    out, state, _ = run("means", rows, T, "streaming")
    for cut in ("streaming", "chunked"):
        other, one, _ = run("means", rows, T, cut)
        assert not one.memory[1].count.any()
        np.testing.assert_allclose(other, out, atol=1e-5)
        np.testing.assert_array_equal(np.sort(one.positions), np.sort(state.positions))


def test_what_gates_come_before() -> None:
    for wrong, says in (
        (policies.TOVA(), "tova with scope layer chooses for several"),
        (with_reduce(policies.KNorm(), merge_nearest()), "merges or summarises"),
        (with_reduce(policies.KNorm(), mean_slots(2)), "merges or summarises"),
        (policy("knorm"), "merges or summarises"),
    ):
        with pytest.raises(ValueError, match=says):
            gated(wrong, ByKey())
