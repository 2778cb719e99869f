"""The library's recurrence with TPU kernels, interpreted: what is forgotten, and when, equals jnp exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.pallas_kernels import tpu_segment
from jaxcompress.policies import Policy
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.parallel import parallel_gradient
from jaxcompress.state.kv_state import KVState

from .examples import POLICIES, RACES, D, close, compiled, no_races, some

B, K, G, C = 3, 2, 2, 15
ROPE = partial(rotate, rope=RopeConfig(theta=100.0))


def tokens(t: int, seed: int = 0, padded: bool = True) -> tuple[Any, ...]:
    """q, k, v and positions; the second row has padding on both sides and in between, the third no token."""
    random = np.random.default_rng(seed)
    normal = lambda heads: jnp.asarray(random.normal(size=(B, t, heads, D)), jnp.float32)
    valid = np.ones((B, t), bool)
    if padded:
        valid[1, [0, t // 2, t - 1]] = False
        valid[2] = False
    positions = np.where(valid, valid.cumsum(1) - 1, -1)
    return normal(K * G), normal(K), normal(K), jnp.asarray(positions, jnp.int32)


def fresh(policy: Policy, dtype: str = "float32", capacity: int = C) -> KVState:
    config = DecoderConfig(7, 16, 16, 2, K * G, K, D)
    return init_state(config, policy, capacity, batch=B, dtype=dtype, slot_multiple=8)[0]


def streamed(
    policy: Policy, backend: str, window: int | None = None, dtype: str = "float32", t: int = 26, capacity: int = C
) -> Any:
    """Two reads, so that the second starts from a state that is full."""

    def run(state: KVState, first: Any, second: Any) -> Any:
        how: dict[str, Any] = dict(rotate=ROPE, window=window, backend=backend)
        one = advance(*first, state, 1, policy, **how)
        middle = replace(one.state, seen=jnp.maximum(state.seen, first[3].max(-1) + 1))
        later = jnp.where(second[3] >= 0, second[3] + middle.seen[:, None], -1)
        two = advance(*second[:3], later, middle, 1, policy, **how)
        return one, two

    return compiled(run)(fresh(policy, dtype, capacity), tokens(t), tokens(t, seed=1))


def same(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.freed, other.freed)
        np.testing.assert_array_equal(one.died, other.died)
        np.testing.assert_array_equal(one.state.positions, other.state.positions)
        close(one.out, other.out, tolerance)
        close(one.state, other.state, tolerance)


@pytest.fixture
def blocks_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a segment is several blocks, the last with padding."""
    monkeypatch.setattr(tpu_segment, "segment_sizes", lambda call: dict(tokens=8))


@pytest.mark.usefixtures("blocks_of_eight")
@pytest.mark.parametrize("name", some(POLICIES, "tova", "h2o"))
def test_a_segment_in_one_launch(name: str) -> None:
    """Padding, rows without a token, a state that fills up, one that is full: the same tokens die at the same time."""
    window = 20 if name == "tova" else None
    got = streamed(POLICIES[name], "tpu-interpret", window)
    same(got, streamed(POLICIES[name], "jnp", window))
    assert (np.asarray(got[1].freed) >= 0).any()


@pytest.mark.parametrize("name", some(["tova", "window+2"], "tova"))
def test_slots_that_stay_free(name: str) -> None:
    """A capacity for which more slots are allocated, since rows of 8 lie together."""
    got = streamed(POLICIES[name], "tpu-interpret", capacity=12)
    same(got, streamed(POLICIES[name], "jnp", capacity=12))
    assert (np.asarray(got[1].state.positions) >= 0).sum(-1).max() == 12


@pytest.mark.parametrize(("name", "capacity"), some([("tova", C), ("h2o", C), ("tova", 12)], ("tova", 12)))
def test_decoding(name: str, capacity: int) -> None:
    """Step by step, with the eviction in the kernel."""
    policy = POLICIES[name]
    step = {
        backend: compiled(partial(advance, layer=1, policy=policy, rotate=ROPE, backend=backend))
        for backend in ("jnp", "tpu-interpret")
    }
    states = dict.fromkeys(step, fresh(policy, capacity=capacity))
    q, k, v, positions = tokens(16)
    for i in range(16):
        here = slice(i, i + 1)
        done = {
            name: run(q[:, here], k[:, here], v[:, here], positions[:, here], states[name])
            for name, run in step.items()
        }
        same([done["tpu-interpret"]], [done["jnp"]])
        seen = jnp.maximum(states["jnp"].seen, positions[:, i] + 1)
        states = {name: replace(one.state, seen=seen) for name, one in done.items()}


@pytest.mark.slow
def test_bfloat16() -> None:
    """In bfloat16 what is written is equal, and what is forgotten by age; masses differ by rounding."""
    got, want = (streamed(POLICIES["window+2"], backend, dtype="bfloat16") for backend in ("tpu-interpret", "jnp"))
    same(got, want, 2e-2)


@pytest.mark.slow
def test_the_smallest_state() -> None:
    """The smallest state that a kernel takes: 8 slots, one of them free after each token."""
    policy = POLICIES["tova-kv_head"]
    run = lambda backend: compiled(
        lambda state, block: advance(*block, state, 0, policy, rotate=ROPE, backend=backend)
    )(fresh(policy, capacity=7), tokens(12, seed=3))
    same([run("tpu-interpret")], [run("jnp")])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tova", "h2o"])
def test_no_races(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = POLICIES[name]
    monkeypatch.setattr(tpu_segment, "segment_sizes", lambda call: dict(tokens=8))
    monkeypatch.setattr("jaxcompress.pallas_kernels.tpu.segment", lambda *args, interpret, rule: tpu_segment.segment(
        *args, rule, interpret=RACES))  # fmt: skip
    run = lambda backend: advance(*tokens(20), fresh(policy), 1, policy, rotate=ROPE, backend=backend)
    same([run("tpu-interpret")], [run("jnp")])
    no_races()


def test_gradient_by_death_times_that_the_kernel_found() -> None:
    policy = POLICIES["tova"]
    q, k, v, positions = tokens(20, padded=False)
    state = fresh(policy)

    def loss(inputs: Any, backend: str) -> Any:
        done = advance(*inputs, positions, state, 1, policy, rotate=ROPE, backend=backend, recurrence=parallel_gradient)
        return jnp.square(done.out).sum() + jnp.square(done.state.values).sum()

    got, want = (
        compiled(jax.value_and_grad(partial(loss, backend=name)))((q, k, v)) for name in ("tpu-interpret", "jnp")
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for one, other in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_gradient_through_a_streamed_segment_says_what_to_do() -> None:
    policy = POLICIES["tova"]
    q, k, v, positions = tokens(12)
    loss = lambda q: advance(q, k, v, positions, fresh(policy), 0, policy, backend="tpu-interpret").out.sum()
    with pytest.raises(ValueError, match="parallel_gradient"):
        jax.grad(loss)(q)
