"""A decoding step on a GPU: the kernel, interpreted, against the reference; and lowered for the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import policies
from jaxcompress.pallas_kernels import gpu_limits
from jaxcompress.pallas_kernels.gpu_step import step, step_evict
from jaxcompress.pallas_kernels.types import KernelCall
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.attention import slot_step
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import empty, with_numbers

from .gpu import compiled, exported, interpreted, normal, races_found

CASES = {
    "bfloat16": dict(dtype="bfloat16", s=50, sizes=dict(rows=16, stages=2, splits=2)),
    "float32, a set per head": dict(dtype="float32", d=64, p=2, s=37, sizes=dict(rows=8, stages=3, splits=1)),
    "int8, a set per head": dict(dtype="int8", p=2, g=1, s=33),
    "float8": dict(dtype="float8_e4m3fn", s=40, sizes=dict(rows=32, stages=1, splits=2)),
    "float16, one slot": dict(dtype="float16", s=1, k=1, g=3),
    "eight queries": dict(dtype="bfloat16", s=64, d=64, k=1, g=8),
}


def arguments(dtype: str, *, b=3, k=2, g=2, s=16, d=128, p=1, layers=2, **_: Any) -> tuple[Any, ...]:
    """Row 0 has free slots, row 1 none but the new token's, row 2 no token."""
    draw = lambda seed, *shape: normal(seed, shape, dtype)
    q = jax.random.normal(jax.random.key(0), (b, k, g, d)).astype("float32" if dtype == "float32" else "bfloat16")
    index = jax.random.randint(jax.random.key(1), (b, p), 0, s).at[2].set(s)
    new_here = jnp.arange(s) == index[..., None]
    visible = (jax.random.bernoulli(jax.random.key(2), 0.7, (b, p, s)) & (jnp.arange(b) != 1)[:, None, None]) | new_here
    stored = draw(3, layers, b, k, s, d), draw(4, layers, b, k, s, d)
    return q, (draw(5, b, k, d), draw(6, b, k, d)), stored, jnp.int32(1), index, visible, jnp.arange(b) != 2


def reference(q, new, stored, layer, index, visible, present):
    new = jax.tree.map(lambda x: x[:, :, None], new)
    return slot_step(
        q.astype(jnp.float32), new, stored, layer, index[..., None], visible[:, :, None], present, backend="jnp"
    )


def same(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    case = CASES[name]
    args = arguments(**case)
    kernel = partial(step, sizes=case.get("sizes"), interpret=True)
    out, weights, stored = compiled(kernel)(*args)
    expected, probabilities, then = reference(*args)
    exact = case["dtype"] == "float32"
    # The reference rounds weights to the state's dtype before they meet the values; the kernel does not.
    error = 1e-5 if exact else 2e-2
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=error, rtol=error)
    np.testing.assert_allclose(weights, probabilities, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1)[:2], 1, rtol=1e-5)
    assert not out[2].any()
    assert not weights[2].any()
    same(stored, then)
    assert out.dtype == args[0].dtype


@interpreted
def test_no_races() -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    args = arguments("bfloat16", s=50)
    interpreter = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    out, weights, _ = compiled(partial(step, sizes=dict(rows=8, stages=2, splits=3), interpret=interpreter))(*args)
    assert not races_found()
    np.testing.assert_allclose(weights, reference(*args)[1], atol=1e-6)
    assert np.isfinite(out.astype(jnp.float32)).all()


@interpreted
def test_equal_masses_stay_equal() -> None:
    """A tie in the reference is one in the kernel: equal keys get equal mass, whichever threads had them."""
    q, new, (keys, values), layer, index, visible, present = arguments("bfloat16", s=50)
    keys = jnp.broadcast_to(keys[:, :, :, :1], keys.shape)
    args = q, new, (keys, values), layer, index, jnp.ones_like(visible), present
    _, weights, _ = compiled(partial(step, sizes=dict(rows=8, stages=2, splits=3), interpret=True))(*args)
    others = jnp.arange(50) != index[..., None]
    for row in range(2):
        assert (np.ptp(weights[row][..., others[row, 0]], axis=-1) == 0).all()


@interpreted
@pytest.mark.parametrize(
    "rule", [EvictionRule("last"), EvictionRule("sum", recent=2), EvictionRule("age", first=1)], ids=lambda x: x.fold
)
def test_follows_a_rule(rule: EvictionRule) -> None:
    q, new, stored, layer, _, _, present = arguments("bfloat16", s=12, k=2, p=2)
    held = jax.random.uniform(jax.random.key(7), (3, 2, 12)).argsort(-1).astype(jnp.int32)
    held = held.at[1, 0, 3].set(-1)
    index = held.argmax(-1)
    numbers = None if rule.fold == "age" else jax.random.uniform(jax.random.key(9), held.shape)
    call = partial(step_evict, rule=rule, interpret=True)
    out, after, goes, _ = compiled(call)(q, new, stored, layer, index, held, numbers, present)
    expected, weights, _ = reference(q, new, stored, layer, index, held >= 0, present)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2, rtol=2e-2)
    assert goes[1, 0] == 3  # a free slot, so that nothing goes
    mass = weights.mean(2)
    if rule.fold == "age":
        assert after is None
        assert (np.take_along_axis(held, goes[..., None], -1)[0] == 1).all()  # the oldest but the first
    else:
        then = numbers + mass if rule.fold == "sum" else jnp.where(present[:, None, None], mass, numbers)
        np.testing.assert_allclose(after, then, atol=1e-6)
        protected = jnp.where(held > 11 - rule.recent, jnp.inf, then)
        assert (goes[0] == protected[0].argmin(-1)).all()


@interpreted
def test_decoding_through_the_door() -> None:
    """A TOVA state that decodes by the kernel holds what it holds by the reference."""
    b, t, k, g, d, slots = 2, 7, 2, 2, 64, 4
    q = jax.random.normal(jax.random.key(0), (b, t, k * g, d))
    key, value = (jax.random.normal(jax.random.key(i), (b, t, k, d)) for i in (1, 2))
    positions = jnp.stack([jnp.arange(t), jnp.arange(t) - 2]).clip(-1)
    policy = policies.TOVA()

    def read(backend):
        state = empty(
            layers=range(2), batch=b, heads=k, sets=1, capacity=slots, slots=slots + 1, head_dim=d, dtype="float32"
        )
        state = with_numbers(state, jax.ShapeDtypeStruct((b, 1, 1), jnp.float32), ())
        one = compiled(lambda q, k, v, at, state: advance(q, k, v, at, state, 1, policy, backend=backend)[:2])
        outs = []
        for i in range(t):
            at = slice(i, i + 1)
            out, state = one(q[:, at], key[:, at], value[:, at], positions[:, at], state)
            outs.append(out)
        return jnp.stack(outs), state

    out, state = read("gpu-interpret")
    expected, then = read("jnp")
    np.testing.assert_allclose(out[:, 0], expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(out[2:], expected[2:], atol=1e-5)
    same(state.positions, then.positions)
    same((state.keys, state.values), (then.keys, then.values))
    assert (state.occupancy()[1] == slots).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "int8", "float8_e4m3fn"])
def test_lowers_for_nvidia(dtype: str) -> None:
    text = exported(step, *arguments(dtype, s=129, g=4))
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1  # one launch
    assert "output_operand_aliases = [#stablehlo.output_operand_alias" in text


def test_where_there_is_no_interpreter_it_says_so() -> None:
    if jax.__version_info__ >= (0, 11):
        pytest.skip("here there is one")
    with pytest.raises(ValueError, match=r"JAX 0\.11 or later"):
        compiled(partial(step, interpret=True))(*arguments("bfloat16", s=8))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(head_dim=80), "heads of 80 numbers"),
        (dict(dtype="int4"), "a state of int4"),
        (dict(group=16), "16 query heads share"),
    ],
)
def test_declines(change: dict[str, Any], why: str) -> None:
    call = KernelCall(2, 8, 4, 129, 128, 1, 1, "bfloat16", "bfloat16")
    assert gpu_limits.declines("step", call) is None
    assert why in (gpu_limits.declines("step", call._replace(**change)) or "")


def test_runs_on_hopper_and_later() -> None:
    assert all(
        gpu_limits.runs_on("gpu", kind)
        for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200", "NVIDIA GB200")
    )
    assert not any(
        gpu_limits.runs_on(*x)
        for x in [("gpu", "NVIDIA A100-SXM4-80GB"), ("gpu", "NVIDIA L4"), ("tpu", "TPU v5e"), ("cpu", "cpu")]
    )


def test_sizes_fit_the_device() -> None:
    """Few rows are shared by many blocks of threads, and sizes from the disk that are none are left."""
    some = KernelCall(1, 8, 4, 1025, 128, 1, 1, "bfloat16", "bfloat16")
    for batch in (1, 8, 256):
        for slots in (1, 17, 129, 1025, 8193):
            for width, dtype in ((64, "float16"), (128, "int8"), (128, "bfloat16"), (256, "float32")):
                call = some._replace(batch=batch, slots=slots, head_dim=width, dtype=dtype)
                size = gpu_limits.step_sizes("step", call, measured=False)
                assert gpu_limits._step_fits(call, size)
                assert 2 * size["stages"] * size["rows"] * width * gpu_limits._itemsize(call) <= 100 * 1024
    assert gpu_limits.step_sizes("step", some, measured=False)["splits"] == 16
    assert gpu_limits.step_sizes("step", some._replace(batch=256), measured=False)["splits"] == 1
    assert gpu_limits.step_sizes("step", some, measured=False) in gpu_limits.candidates("step", some)
    assert not gpu_limits._step_fits(some, dict(rows=12, stages=1, splits=1))
    assert not gpu_limits._step_fits(some, dict(rows=32, stages=1, splits=40))
    assert not gpu_limits._step_fits(some, dict(rows=64, stages=9, splits=1))
