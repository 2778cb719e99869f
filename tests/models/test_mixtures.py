"""Mixtral, Qwen3-MoE and GPT-OSS with a bounded state: what holds for every decoder holds for experts and sinks."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import policies
from jaxcompress.checkpoints import load
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import init_state
from jaxcompress.policies.names import NAMES, get_policy
from jaxcompress.recurrence.parallel import parallel_gradient
from jaxcompress.training.recurrent import rematerialised

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
T = 24
step = jax.jit(read, static_argnames="chunk")


@cache
def model(name: str) -> Decoder:
    return load(PARITY / name).model


def tokens(name: str) -> jax.Array:
    with np.load(PARITY / name / "io.npz") as file:
        return jnp.asarray(file["tokens"])


def logits(name: str) -> np.ndarray:
    with np.load(PARITY / name / "io.npz") as file:
        return file["logits"]


@pytest.mark.parametrize("chunk", [1, 5, T])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_full_state_gives_the_logits_of_pytorch(name: str, chunk: int) -> None:
    """Streamed, in chunks, and at once."""
    decoder, policy = model(name), policies.Full()
    state = init_state(decoder.config, policy, T, batch=2)
    done = step(decoder, tokens(name), state, policy, chunk=chunk)
    np.testing.assert_allclose(decoder.logits(done.hidden), logits(name), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_a_row_is_read_as_if_it_were_alone(name: str) -> None:
    """Streamed with TOVA, one row padded at the left and one at the right; then one step of decoding."""
    decoder, policy, ids = model(name), policies.TOVA(), tokens(name)
    length = 19
    valid = np.zeros((2, T), bool)
    valid[0, T - length :] = valid[1, :length] = True
    padded = jnp.zeros_like(ids).at[0, T - length :].set(ids[0, :length]).at[1, :length].set(ids[1, :length])
    start = lambda rows: init_state(decoder.config, policy, 5, batch=rows)
    together = step(decoder, padded, start(2), policy, valid=jnp.asarray(valid))
    more = step(decoder, ids[:, -1:], together.state, policy)
    for row in range(2):
        alone = step(decoder, ids[row : row + 1, :length], start(1), policy)
        np.testing.assert_allclose(together.hidden[row, valid[row]], alone.hidden[0], atol=1e-5)
        last = step(decoder, ids[row : row + 1, -1:], alone.state, policy)
        np.testing.assert_allclose(more.hidden[row], last.hidden[0], atol=1e-5)
        for a, b in zip(more.state, last.state, strict=True):
            np.testing.assert_array_equal(np.sort(a.positions[:, row]), np.sort(b.positions[:, 0]))


@pytest.mark.parametrize(
    "name", [pytest.param(name.replace("N", "4"), marks=() if name == "tova" else pytest.mark.slow) for name in NAMES]
)
def test_every_policy_runs_with_sinks_windows_and_experts(name: str) -> None:
    """Token by token: within the capacity, and within the window of layers that have one."""
    decoder, policy, ids = model("gpt_oss"), get_policy(name), tokens("gpt_oss")
    slots = T if name == "full" else max(6, policy.needs)
    state = init_state(decoder.config, policy, slots, batch=2)
    done = step(decoder, ids, state, policy)
    assert np.isfinite(done.hidden).all()
    for part in done.state:
        for layer, positions in zip(np.asarray(part.layer), np.asarray(part.positions), strict=True):
            window = decoder.config.sliding[layer]
            assert ((positions >= 0).sum(-1) <= min(slots, window or slots)).all()
            if window:
                assert positions[positions >= 0].min() > T - 1 - window


def test_a_window_bounds_the_state() -> None:
    """Layers with a window hold no more than it, however many slots are given."""
    state = init_state(model("gpt_oss").config, policies.Full(), 100)
    assert [part.capacity for part in state] == [7, 100, 7]


@pytest.mark.slow
def test_heads_of_different_capacity_have_their_own_sinks() -> None:
    decoder, policy = model("gpt_oss"), policies.TOVA("kv_head")
    state = init_state(decoder.config, policy, [[T, T + 1]] * 3, batch=2)
    assert [part.heads for part in state] == [(), (0,), (1,), ()]
    done = step(decoder, tokens("gpt_oss"), state, policy, chunk=5)
    np.testing.assert_allclose(decoder.logits(done.hidden), logits("gpt_oss"), atol=1e-4)


@pytest.mark.slow
def test_the_gradient_through_a_bounded_state() -> None:
    """By death times and through the scan; every weight has one, sinks and experts included."""
    decoder, policy, ids = model("gpt_oss"), policies.TOVA(), tokens("gpt_oss")[:, :14]
    state = init_state(decoder.config, policy, 5, batch=2)

    def loss(recurrence: Any, decoder: Decoder) -> jax.Array:
        done = read(decoder, ids, state, policy, recurrence=recurrence)
        return jnp.sin(decoder.logits(done.hidden)).sum()

    by_death_times, by_scan = (
        jax.jit(jax.grad(partial(loss, form)))(decoder) for form in (parallel_gradient, rematerialised)
    )
    pairs = zip(jax.tree.leaves_with_path(by_death_times), jax.tree.leaves(by_scan), strict=True)
    for (path, a), b in pairs:
        assert np.isfinite(a).all()
        assert np.abs(a).max() > 1e-3, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=jax.tree_util.keystr(path))
