"""A whole segment in one launch on a GPU: the kernel, interpreted, against the recurrence; and lowered."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import policies
from jaxcompress.pallas_kernels import gpu_limits
from jaxcompress.pallas_kernels.gpu_segment import segment
from jaxcompress.pallas_kernels.types import KernelCall
from jaxcompress.policies import Policy
from jaxcompress.recurrence.advance import Advanced, advance
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import KVState, empty, with_numbers

from .gpu import compiled, exported, interpreted, normal, races_found

B, K, D = 2, 2, 64

CASES: dict[str, tuple[Policy, dict[str, Any]]] = {
    "h2o": (policies.H2O(), dict(g=1, sets=K)),
    "tova per kv head in a sliding window, bfloat16": (
        policies.TOVA("kv_head"), dict(g=2, sets=K, window=4, dtype="bfloat16"),
    ),
    "window and sinks, int8, shared": (policies.Window(2), dict(g=2, sets=1, dtype="int8")),
    "tova per kv head": (policies.TOVA("kv_head"), dict(g=3, sets=K, t=19)),
    "h2o per kv head, float8, protected": (
        policies.protect(policies.H2O(1, "kv_head"), first=1), dict(g=2, sets=K, dtype="float8_e4m3fn"),
    ),
}  # fmt: skip


def read(policy: Policy, backend: Any, *, g: int, sets: int, dtype: str = "float32", window: int | None = None,
         t: int = 11, slots: int = 5) -> tuple[Advanced, KVState]:  # fmt: skip
    """Two segments, the second of which finds the state full. Row 1 begins with padding."""
    state = empty(
        layers=range(2), batch=B, heads=K, sets=sets, capacity=slots, slots=slots + 1, head_dim=D, dtype=dtype
    )
    numbered = policy.rule(slots).fold != "age"  # pyright: ignore
    state = with_numbers(state, jax.ShapeDtypeStruct((B, sets, 1), jnp.float32) if numbered else (), ())
    draw = lambda seed, heads: jax.random.normal(jax.random.key(seed), (B, 2 * t, heads, D))
    q, k, v = draw(0, K * g), draw(1, K), draw(2, K)
    positions = jnp.stack([jnp.arange(2 * t), jnp.arange(2 * t) - 3]).clip(-1)
    step = compiled(lambda q, k, v, at, state: advance(q, k, v, at, state, 1, policy, window=window, backend=backend))
    _, state, *_ = step(q[:, :t], k[:, :t], v[:, :t], positions[:, :t], state)
    state = replace(state, seen=(positions[:, :t] >= 0).sum(-1))
    return step(q[:, t:], k[:, t:], v[:, t:], positions[:, t:], state), state


@interpreted
@pytest.mark.parametrize(
    "name", [name if i < 3 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(CASES)]
)
def test_equals_the_recurrence(name: str) -> None:
    policy, case = CASES[name]
    found, before = read(policy, "gpu-interpret", **case)
    expected, then = read(policy, "jnp", **case)
    for ours, theirs in ((before, then), (found.state, expected.state)):
        jax.tree.map(np.testing.assert_array_equal, (ours.keys, ours.values), (theirs.keys, theirs.values))
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), ours.stats, theirs.stats)
    np.testing.assert_array_equal(found.freed, expected.freed)
    np.testing.assert_array_equal(found.died, expected.died)
    np.testing.assert_allclose(found.out, expected.out, atol=2e-2 if case.get("dtype") == "bfloat16" else 1e-5)


def arguments(dtype: str, *, b=B, t=11, k=K, g=2, s=9, d=D, sets=K, numbered=True) -> tuple[Any, ...]:
    draw = lambda seed, *shape: normal(seed, shape, dtype)
    q = jax.random.normal(jax.random.key(0), (b, t, k, g, d)).astype("bfloat16")
    stored = draw(3, 2, b, k, s, d), draw(4, 2, b, k, s, d)
    new = draw(5, b, t, k, d), draw(6, b, t, k, d)
    positions = jnp.broadcast_to(jnp.arange(20, 20 + t), (b, t)).at[0, :3].set(-1)
    held = jnp.broadcast_to(jnp.arange(s), (b, sets, s)).at[..., -1].set(-1)
    numbers = jax.random.uniform(jax.random.key(7), held.shape) if numbered else None
    return q, new, stored, jnp.int32(1), positions, held, numbers


@interpreted
@pytest.mark.slow
def test_no_races() -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpreter = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    call = partial(segment, window=None, rule=EvictionRule("last"), interpret=interpreter)
    out, _, held, numbers, freed = compiled(call)(*arguments("bfloat16"))
    assert not races_found()
    assert np.isfinite(out.astype(jnp.float32)).all()
    assert np.isfinite(numbers).all()
    assert ((held >= 0).sum(-1) == 8).all()
    assert (freed[0, :, :3] == -1).all()


@interpreted
def test_equal_keys_free_the_youngest() -> None:
    """All masses equal: on a tie the older token stays."""
    q, (key, value), (keys, values), *rest = arguments("float32")
    new, stored = (jnp.ones_like(key), value), (jnp.ones_like(keys), values)
    _, _, held, _, freed = compiled(partial(segment, window=None, rule=EvictionRule("last"), interpret=True))(
        q, new, stored, *rest
    )
    assert (freed[1] == jnp.arange(20, 31)).all()
    assert (held[1] == jnp.array([0, 1, 2, 3, 4, 5, 6, 7, -1])).all()


@pytest.mark.parametrize(
    ("dtype", "rule", "sets"),
    [("bfloat16", EvictionRule("last"), K), ("float32", EvictionRule("sum", recent=3), K),
     ("int8", EvictionRule("age", first=1), 1),
     ("float8_e4m3fn", EvictionRule("last", first=2), K)],
)  # fmt: skip
def test_lowers_for_nvidia(dtype: str, rule: EvictionRule, sets: int) -> None:
    args = arguments(dtype, s=129, d=128, g=4, sets=sets, numbered=rule.fold != "age")
    text = exported(partial(segment, window=jnp.int32(100), rule=rule), *args)
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1  # one launch
    assert "output_operand_aliases = [#stablehlo.output_operand_alias" in text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(sets=1), "heads share a set"),
        (dict(slots=1025), "1025 slots take"),
        (dict(head_dim=80), "heads of 80 numbers"),
        (dict(dtype="int4"), "a state of int4"),
    ],
)
def test_declines(change: dict[str, Any], why: str) -> None:
    call = KernelCall(2, 8, 4, 257, 128, 8, 100, "bfloat16", "bfloat16", EvictionRule("last"))
    assert gpu_limits.declines("segment", call) is None
    assert why in (gpu_limits.declines("segment", call._replace(**change)) or "")


def test_a_window_shared_by_heads_is_followed() -> None:
    call = KernelCall(2, 8, 4, 257, 128, 1, 100, "bfloat16", "bfloat16", EvictionRule("age"))
    assert gpu_limits.declines("segment", call) is None
    assert gpu_limits.declines("segment", call._replace(dtype="int8", slots=600)) is None
