"""Rows of a table, and their gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.models.lookup import look_up


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_frequent_row_has_its_whole_gradient(dtype: str) -> None:
    """1,000 times the same row; in bfloat16 a sum of ones is 256 at most."""
    rows = np.array([[2] * 1000, [0, 1] * 500], np.int32)
    table = jnp.arange(8.0).reshape(4, 2).astype(dtype)
    out, pull = jax.vjp(lambda table: look_up(table, rows), table)
    np.testing.assert_array_equal(out, table[rows])
    (slope,) = pull(jnp.ones_like(out))
    assert (out.dtype, slope.dtype) == (table.dtype, table.dtype)
    np.testing.assert_array_equal(slope[:, 0], [500, 500, 1000, 0])
    _, change = jax.jvp(lambda table: look_up(table, rows), (table,), (table,))
    np.testing.assert_array_equal(change, out)
