"""States in the middle of their life, and policies to step them with."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxcompress import policies
from jaxcompress.policies import Policy
from jaxcompress.policies.protect import protect
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.storage import store_vectors, zeros

D = 128

# What each rule stands for: the library's own policies, in every scope that differs for a kernel.
POLICIES: dict[str, Policy] = {
    "tova": policies.TOVA(),
    "tova-kv_head": policies.TOVA("kv_head"),
    "window+2": policies.Window(2),
    "h2o": policies.H2O(3, "kv_head"),
    "h2o-layer": protect(policies.H2O(1, "layer"), first=2),
}

# The state is not what the next kernel reads: an interpreter that looks for races, in memory that starts as NaN.
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def compiled(function: Any) -> Any:
    """Compiled in little time: what an interpreter makes of a kernel is long."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def some(every: Any, *quick: Any) -> list[Any]:
    """Cases, of which all but the quick ones are slow: each costs seconds of compiling."""
    values = lambda one: one if isinstance(one, tuple) else (one,)
    return [pytest.param(*values(one), marks=() if one in quick else pytest.mark.slow) for one in every]


class Step(NamedTuple):
    """What a decoding step is given, and the rows that matter in it."""

    q: Any
    new: Any
    stored: Any
    layer: Any
    index: Any
    held: Any
    numbers: Any
    present: Any


def a_step(
    seed: int = 0, *, rows: int = 3, heads: int = 2, group: int = 2, slots: int = 17, sets: int = 1,
    dtype: str = "float32", query: str = "float32", layers: int = 2, ties: bool = False,
) -> Step:  # fmt: skip
    """Ragged occupancy: the first row has every slot free but the new token's, the last no token, others some free."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    like = zeros((1, 1, 1, 1, D), dtype)
    stored = tuple(store_vectors(normal(layers, rows, heads, slots, D), like) for _ in range(2))
    new = tuple(store_vectors(normal(rows, heads, D), like) for _ in range(2))
    order = np.argsort(random.random((rows, sets, slots)), -1)
    held = np.where(random.random((rows, sets, slots)) < 0.8, order, -1)
    held[0] = -1
    held[:, :, random.integers(slots)] = -1
    if rows > 2:  # and one that will be full
        held[1] = order[1]
        held[1, :, slots // 2] = -1
    present = np.arange(rows) < max(rows - 1, 1)
    free = held.argmin(-1)
    index = np.where(present[:, None], free, slots)
    held = np.where(np.arange(slots) == index[..., None], slots + 7, held)
    numbers = np.round(random.random((rows, sets, slots)), 1 if ties else 7)
    numbers = np.where((held >= 0) & (held <= slots), numbers, 0)
    return Step(
        normal(rows, heads, group, D).astype(query), new, stored, jnp.int32(layers - 1), jnp.asarray(index, jnp.int32),
        jnp.asarray(held, jnp.int32), jnp.asarray(numbers, jnp.float32), jnp.asarray(present),
    )  # fmt: skip


def close(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    """Leaf by leaf; whole numbers must be equal."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        exact = not jnp.issubdtype(one.dtype, jnp.floating)
        a, b = (np.asarray(x, None if exact else np.float32) for x in (one, other))
        np.testing.assert_allclose(a, b, atol=0 if exact else tolerance, rtol=0)


def no_races() -> None:
    """Fails if the last kernels that were interpreted had any."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    if interpret_pallas_call.races.races_found:
        pytest.fail("a race")


RULES: dict[str, EvictionRule] = {
    "last": EvictionRule("last"),
    "sum": EvictionRule("sum", recent=3),
    "protected": EvictionRule("sum", first=4, recent=2),
    "age": EvictionRule("age", first=2),
}
