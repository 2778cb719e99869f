"""Sorting by several keys and ranks within groups, against NumPy's sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.state import order as module
from jaxcompress.state.order import first_by, oldest_first, order_by, rank_of, rank_within

B, P, N = 2, 2, 7
order_jit, rank_jit, within_jit, oldest_jit = map(jax.jit, (order_by, rank_of, rank_within, oldest_first))


@given(seed=st.integers(0, 999), groups=st.integers(1, N), values=st.integers(1, N))
def test_orders_and_ranks(seed: int, groups: int, values: int) -> None:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, (B, P, N), np.int32)
    key = rng.integers(0, values, (B, P, N)).astype(np.float32)
    order, within = order_jit(group, key), within_jit(group, key)
    assert (np.take_along_axis(np.asarray(rank_jit(order)), np.asarray(order), -1) == np.arange(N)).all()
    for b, p in np.ndindex(B, P):
        wanted = sorted(range(N), key=lambda i: (group[b, p, i], key[b, p, i], i))
        assert order[b, p].tolist() == wanted
        for i in range(N):
            mine = [j for j in wanted if group[b, p, j] == group[b, p, i]]
            assert within[b, p, i] == mine.index(i)


def test_free_slots_come_last() -> None:
    positions = np.array([[[5, -1, 0, 9, -1, 3]]], np.int32)
    assert oldest_jit(positions)[0, 0].tolist() == [2, 5, 0, 3, 1, 4]


def test_the_first_is_found_although_the_keys_round_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled code does that computes the keys again for the comparison: none then equals the minimum."""
    key, then = jnp.array([[3.0, 1.0, 2.0, 1.0]]), jnp.array([[0, 5, 2, 4]])
    assert first_by(key, then).tolist() == [3] == order_by(key, then)[:, 0].tolist()
    monkeypatch.setattr(module.jnp, "take_along_axis", lambda x, index, axis: jnp.full((1, 1), 0.99))
    assert first_by(key, then).tolist() == [1]
