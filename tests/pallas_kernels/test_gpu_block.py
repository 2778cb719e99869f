"""A block of queries on a GPU, with its mass: the kernels, interpreted, against the reference; and lowered."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxcompress import policies
from jaxcompress.pallas_kernels import devices, gpu_limits
from jaxcompress.pallas_kernels.gpu_block import _ends, block
from jaxcompress.pallas_kernels.types import KernelCall
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.softmax import masked_softmax
from jaxcompress.state.kv_state import empty, with_numbers
from jaxcompress.state.storage import load_vectors

from .gpu import compiled, exported, interpreted, normal

D = 64
CASES = {
    "several tiles": dict(n=150, t=70),
    "a window, int8, a set per head": dict(n=70, t=9, window=60, dtype="int8", p=2),
    "float16, wide": dict(n=70, t=5, d=128, dtype="float16", g=1),
    "float8": dict(n=80, t=65, dtype="float8_e4m3fn"),
}


def arguments(*, b=2, k=2, g=2, n=40, t=9, d=D, p=1, dtype="bfloat16", **_: Any) -> tuple[Any, ...]:
    """Slots in any order, some of them free, then the queries' own keys. Row 1 begins with padding."""
    slots = n - t
    q = jax.random.normal(jax.random.key(0), (b, t, k, g, d)).astype("float16" if dtype == "float16" else "bfloat16")
    at = jnp.stack([jnp.arange(t) + 100, jnp.where(jnp.arange(t) < 3, -1, jnp.arange(t) + 90)])
    order = jax.random.permutation(jax.random.key(1), slots)
    held = jnp.where(jnp.arange(slots) % 7 == 0, -1, order)
    held = jnp.concatenate([jnp.broadcast_to(held, (b, slots)), at], axis=1)
    held = jnp.broadcast_to(held[:, None], (b, p, n)).at[:, -1, slots // 2].set(-1)
    return q, at, normal(2, (b, k, n, d), dtype), normal(3, (b, k, n, d), dtype), held


def reference(q, at, keys, values, held, window):
    keys, values, q = (x.astype(jnp.float32) for x in (load_vectors(keys), load_vectors(values), q))
    scores = jnp.einsum("btkgd,bknd->bkgtn", q, keys) * q.shape[-1] ** -0.5
    key, query = held[:, :, None], at[:, None, :, None]
    visible = (key >= 0) & (key <= query) & (key > query - (window or 1000))
    weights = masked_softmax(scores, visible[:, :, None], (at >= 0)[:, None, None, :, None])
    last = jnp.take_along_axis(weights, at.argmax(-1)[:, None, None, None, None], axis=3)[:, :, :, 0]
    return jnp.einsum("bkgtn,bknd->btkgd", weights, values), last, weights.sum(3)


@interpreted
@pytest.mark.parametrize(
    "name", [name if i == 1 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(CASES)]
)
def test_equals_the_reference(name: str) -> None:
    case = CASES[name]
    args, window = arguments(**case), case.get("window")
    call = partial(block, window=None if window is None else jnp.int32(window), interpret=True)
    out, last, total = compiled(call)(*args)
    expected, last_then, total_then = reference(*args, window)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)
    np.testing.assert_allclose(last, last_then, atol=1e-6)
    np.testing.assert_allclose(total, total_then, atol=1e-5)
    assert not out[1, :3].any()


@interpreted
@pytest.mark.slow
def test_reading_in_chunks_through_the_door() -> None:
    """An H2O state read in chunks by the kernel holds the tokens that it holds by the reference."""
    b, t, k, g, slots = 2, 20, 2, 2, 6
    policy = policies.H2O(2, "kv_head")
    draw = lambda seed, heads: jax.random.normal(jax.random.key(seed), (b, t, heads, D), jnp.bfloat16)
    positions = jnp.stack([jnp.arange(t), jnp.arange(t) - 3]).clip(-1)

    def read(backend: Any) -> Any:
        state = empty(
            layers=range(1), batch=b, heads=k, sets=k, capacity=slots, slots=slots + 1, head_dim=D, dtype="bfloat16"
        )
        state = with_numbers(state, jax.ShapeDtypeStruct((b, k, 1), jnp.float32), ())
        call = lambda *args: advance(*args, state, 0, policy, chunk=10, backend=backend)[:3]
        return compiled(call)(draw(0, k * g), draw(1, k), draw(2, k), positions)

    (out, state, freed), (expected, then, freed_then) = read("gpu-interpret"), read("jnp")
    np.testing.assert_array_equal(state.positions, then.positions)
    np.testing.assert_array_equal(freed, freed_then)
    real = positions >= 0
    np.testing.assert_allclose(out[real].astype(jnp.float32), expected[real].astype(jnp.float32), atol=3e-2)


def test_tiles_that_nobody_sees_are_passed_over() -> None:
    at = jnp.arange(192)[None]
    assert (_ends(jnp.arange(192)[None, None], at) == jnp.array([1, 2, 3])).all()  # causal: up to the diagonal
    held = jnp.full((1, 1, 128), -1).at[0, 0, 70].set(100)
    assert (_ends(held, at) == jnp.array([0, 2, 2])).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_lowers_for_nvidia(dtype: str) -> None:
    text = exported(partial(block, window=jnp.int32(50)), *arguments(n=150, t=70, d=128, dtype=dtype))
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 2  # two launches, whatever the length


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(query="float32"), "queries in float32"),
        (dict(dtype="float32"), "a state of float32"),
        (dict(head_dim=256), "heads of 256 numbers"),
    ],
)
def test_declines(change: dict[str, Any], why: str) -> None:
    call = KernelCall(2, 8, 4, 500, 128, 8, 100, "bfloat16", "bfloat16")
    assert gpu_limits.declines("block", call) is None
    assert gpu_limits.declines("block", call._replace(dtype="int8", group=16)) is None
    assert why in (gpu_limits.declines("block", call._replace(**change)) or "")


def test_declines_where_there_is_no_wgmma() -> None:
    call = KernelCall(2, 8, 4, 500, 128, 8, 100, "bfloat16", "bfloat16")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA B200", 148, "gpu"))):
        assert gpu_limits.runs_on(*devices.device())
        assert "wgmma" in (gpu_limits.declines("block", call) or "")
        assert gpu_limits.declines("step", call) is None
