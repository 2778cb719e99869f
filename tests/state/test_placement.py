"""Where tokens stand once some between them are gone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.state import placement


def test_ranks_by_comparison_are_those_of_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """With free slots, and with tokens of several heads at one position."""
    held = jnp.asarray(np.random.default_rng(0).integers(-1, 12, (3, 2, 17)), jnp.int32)
    compared = placement.place(held, "slot")
    monkeypatch.setattr(placement, "MOST_COMPARED", 0)
    np.testing.assert_array_equal(compared, placement.place(held, "slot"))
    assert sorted(np.asarray(compared)[0, 0].tolist()) == list(range(17))


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig(kind="yarn", factor=4.0, original_context=64, partial=0.5)])
def test_rotation_by_rank_is_rotation_by_position(rope: RopeConfig) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 9, 8)).astype(np.float32)
    ranks = jnp.asarray(np.random.default_rng(1).integers(0, 9, (2, 1, 9)))
    by_rank = rope.rotary(8).by_rank(jnp.asarray(x), ranks, 9)
    np.testing.assert_allclose(by_rank, rotate(jnp.asarray(x), ranks, rope), atol=1e-6)
