"""keep: one rule for who stays, against a plain sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import candidates

from jaxcompress import policies
from jaxcompress.policies import Policy
from jaxcompress.state.select import best_first, keep_top, rank, worst

B, P, N = 2, 2, 6
SPECIAL = [-np.inf, np.inf, np.nan, 0.0, -0.0, 1.0, -1.0, 1.0000001, 3e38, -3e38]
scores_of = lambda: st.lists(st.sampled_from(SPECIAL), min_size=B * P * N, max_size=B * P * N)
keep_jit, worst_jit, rank_jit = jax.jit(keep_top), jax.jit(worst), jax.jit(rank)


def by_sorting(scores: np.ndarray, positions: np.ndarray) -> list[int]:
    """Occupied slots by score, NaN lowest, the older first on a tie."""
    value = [-np.inf if np.isnan(x) else x for x in scores.astype(np.float32)]
    return sorted(np.flatnonzero(positions >= 0).tolist(), key=lambda i: (-value[i], positions[i]))


@given(scores=scores_of(), seed=st.integers(0, 999), free=st.sampled_from([0.0, 0.3, 1.0]), n=st.integers(0, N + 1))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keep_top_and_worst(dtype: jnp.dtype, scores: list[float], seed: int, free: float, n: int) -> None:
    rng = np.random.default_rng(seed)
    positions = rng.permuted(np.tile(np.arange(N) * 3, (B, P, 1)), axis=-1).astype(np.int32)
    positions[rng.random(positions.shape) < free] = -1
    s = jnp.asarray(np.array(scores).reshape(B, P, N), dtype)
    kept, gone = keep_jit(s, positions, n), worst_jit(s, positions)
    for b, p in np.ndindex(B, P):
        order = by_sorting(np.asarray(s[b, p], np.float32), positions[b, p])
        assert set(np.flatnonzero(kept[b, p]).tolist()) == set(order[:n])
        if len(order) == N:
            assert gone[b, p] == order[-1]
            rest = keep_jit(s, positions, N - 1)[b, p]
            assert np.flatnonzero(~rest).tolist() == [gone[b, p]]
        else:
            assert positions[b, p, gone[b, p]] == -1


@given(
    scores=st.lists(
        st.floats(width=32, allow_subnormal=False) | st.sampled_from(SPECIAL), min_size=B * P * N, max_size=B * P * N
    ),
    seed=st.integers(0, 999),
    free=st.sampled_from([0.0, 0.3]),
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_host_follows_the_same_rule(dtype: type, scores: list[float], seed: int, free: float) -> None:
    """Words of a prompt are ordered by numpy, slots of a state by jax.numpy; scores of any width count in float32."""
    rng = np.random.default_rng(seed)
    positions = rng.permuted(np.tile(np.arange(N) * 3, (B, P, 1)), axis=-1).astype(np.int32)
    positions[rng.random(positions.shape) < free] = -1
    s = np.array(scores, dtype).reshape(B, P, N)
    order = np.asarray(best_first(s, positions, np))
    ranks = np.asarray(rank_jit(jnp.asarray(s, jnp.float32), positions))
    np.testing.assert_array_equal(np.argsort(ranks, axis=-1), order)
    for b, p in np.ndindex(B, P):
        occupied = int((positions[b, p] >= 0).sum())
        assert order[b, p, :occupied].tolist() == by_sorting(s[b, p], positions[b, p])


@given(ties=st.lists(st.integers(0, 2), min_size=B * P * N, max_size=B * P * N), n=st.integers(1, N))
def test_one_number_per_set(ties: list[int], n: int) -> None:
    s = jnp.asarray(ties, jnp.float32).reshape(B, P, N)
    positions = jnp.broadcast_to(jnp.arange(N), (B, P, N))
    each = jnp.array([[0, n], [n, N]])
    kept = np.asarray(keep_jit(s, positions, each))
    assert (kept.sum(-1) == each).all()
    for b, p in np.ndindex(B, P):
        assert (kept[b, p] == np.asarray(keep_jit(s, positions, int(each[b, p])))[b, p]).all()


def test_scores_are_compared_in_float32() -> None:
    """Scores that only bfloat16 confuses are told apart."""
    s = jnp.array([[[1.0, 1.001, 1.002]]])
    positions = jnp.array([[[0, 1, 2]]])
    assert keep_top(s, positions, 1).tolist() == [[[False, False, True]]]
    assert keep_top(s.astype(jnp.bfloat16), positions, 1).tolist() == [[[True, False, False]]]
    assert worst(s, positions).item() == 0
    assert worst(s.astype(jnp.bfloat16), positions).item() == 2


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (policies.Window(), [5, 6, 7]),
        (policies.Window(2), [0, 1, 7]),
        (policies.H2O(0, "layer"), [0, 1, 2]),  # -0: none is protected, not all
        (policies.H2O(2, "layer"), [0, 6, 7]),
        (policies.H2O(0.5, "layer"), [0, 1, 7]),  # half of 3, rounded down
        (policies.H2O(1.0, "layer"), [5, 6, 7]),
        (policies.TOVA(), [0, 1, 2]),
        (policies.within_chunks(policies.Window(3), 4), [0, 1, 2]),  # not the best of each chunk
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_protection(policy: Policy, kept: list[int]) -> None:
    """All statistics are equal, as large as they may get: what is protected stays all the same."""
    positions = jnp.array([[[[3, 0, 7, 5, 1, 6, 2, 4]]]], jnp.int32)
    kv = jnp.zeros((1, 1, 8, 2))
    scores = policy.score(jnp.full((1, 1, 8), 3e38), candidates(kv, kv, positions[0], capacity=3))
    stays = np.asarray(keep_top(scores, positions[0], 3))[0, 0]
    assert sorted(np.asarray(positions)[0, 0, 0][stays].tolist()) == kept
