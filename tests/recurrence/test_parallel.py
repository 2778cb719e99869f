"""The gradient from death times is the gradient through the recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import Policy
from jaxcompress.policies.reductions.merge import merge_nearest, merge_weighted
from jaxcompress.policies.reductions.reduced import with_reduce
from jaxcompress.policies.reductions.summarise import mean_slots
from jaxcompress.recurrence.advance import Step, advance
from jaxcompress.recurrence.block_attention import lifetime_attention
from jaxcompress.recurrence.parallel import FOREVER, parallel_gradient
from jaxcompress.state.attention_traits import AttentionTraits
from jaxcompress.training.recurrent import exact_gradient, rematerialised

from .harness import FAST_COMPILE, ROPE, RULES, SINKS, B, C, Case, D, H, K, T, data, deaths, fresh, run

by_death_times, by_scan = (partial(advance, recurrence=step) for step in (parallel_gradient, rematerialised))
MASKED = sorted(
    name for name, (policy, _) in RULES.items() if exact_gradient(policy) is parallel_gradient and name != "full"
)
FEW = {("tova", 1), ("h2o", 1), ("snapkv", 1), ("tova", 5)}


@cache
def blocks() -> tuple[Any, Any]:
    """Two blocks of queries, keys and values; the first with padding in front and between, none in row 0."""
    first = data(1)
    valid = first.valid.copy()
    valid[1, :5] = valid[2, [2, 3, 9]] = False
    return first._replace(valid=valid), data(2)


def losses(
    recurrence: Step, state: Callable[[], Any], policy: Policy, **how: Any
) -> Callable[..., tuple[jax.Array, Any]]:
    """A number that depends on what two blocks give, the second read after the first, and what is held then."""
    first, second = blocks()
    present, positions = jnp.asarray(first.valid)[:, :, None, None], jnp.asarray(first.positions)

    def loss(q: Any, k: Any, v: Any, later: Any, k2: Any, v2: Any) -> tuple[jax.Array, Any]:
        one = recurrence(q, k, v, positions, state(), 0, policy, rotate=ROPE, **how)
        middle = replace(one.state, seen=jnp.asarray(first.valid.sum(1, dtype=np.int32)))
        after = jnp.arange(T, dtype=jnp.int32) + middle.seen[:, None]
        two = recurrence(later, k2, v2, after, middle, 0, policy, rotate=ROPE, **how)
        outs = jnp.where(present, one.out, 0), two.out
        weighted = sum((out * by).sum() for out, by in zip(outs, (second.q, first.q), strict=True))
        return jnp.asarray(weighted), (outs, two.state)

    return loss


def of_both(recurrence: Step, state: Callable[[], Any], policy: Policy, **how: Any) -> tuple[Any, Any]:
    first, second = blocks()
    inputs = first.q, first.k, first.v, second.q, second.k, second.v
    run = jax.value_and_grad(losses(recurrence, state, policy, **how), range(6), has_aux=True)
    return jax.jit(run, compiler_options=FAST_COMPILE)(*inputs)


def compare(got: Any, want: Any) -> None:
    """Losses, outputs, gradients, and states where there is something in them."""
    ((loss, (outs, state)), gradients), ((loss_, (outs_, state_)), gradients_) = got, want
    np.testing.assert_allclose(loss, loss_, 1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), outs, outs_)
    np.testing.assert_array_equal(state.positions, state_.positions)
    occupied = np.asarray(state.positions[0] >= 0)[..., None]
    for a, b in ((state.keys, state_.keys), (state.values, state_.values)):
        np.testing.assert_allclose(np.where(occupied, a[0], 0), np.where(occupied, b[0], 0), atol=1e-6)
    for a, b in zip(gradients, gradients_, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert min(np.abs(g).max() for g in gradients) > 0.1


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        pytest.param(name, chunk, marks=() if (name, chunk) in FEW else pytest.mark.slow)
        for name in MASKED
        for chunk in (1, 5, T)
    ],
)
def test_gradient_of_death_times(name: str, chunk: int) -> None:
    state = lambda: fresh(Case(name))
    policy = RULES[name][0]
    compare(*(of_both(form, state, policy, chunk=chunk) for form in (by_death_times, by_scan)))


@pytest.mark.slow
@pytest.mark.parametrize("window", [3, 9])
def test_sliding_windows(window: int) -> None:
    state, policy = (lambda: fresh(Case("tova"))), policies.TOVA()
    compare(*(of_both(form, state, policy, window=window) for form in (by_death_times, by_scan)))


@pytest.mark.parametrize(("name", "chunk", "window"), [("tova", 1, 5), ("h2o", 5, None)])
def test_sinks_have_a_gradient(name: str, chunk: int, window: int | None) -> None:
    first, _ = blocks()
    by, present = jnp.asarray(data(2).q), jnp.asarray(first.valid)[:, :, None, None]

    def loss(form: Any, sinks: Any, q: Any, k: Any, v: Any) -> jax.Array:
        done = form(
            q, k, v, jnp.asarray(first.positions), fresh(Case(name)), 0, RULES[name][0],
            rotate=ROPE, chunk=chunk, window=window, traits=AttentionTraits(sinks=sinks),
        )  # fmt: skip
        return (jnp.where(present, done.out, 0) * by).sum()

    grad = lambda form: jax.jit(jax.grad(partial(loss, form), range(4)), compiler_options=FAST_COMPILE)
    inputs = tuple(map(jnp.asarray, (SINKS, first.q, first.k, first.v)))
    for a, b in zip(*(grad(form)(*inputs) for form in (by_death_times, by_scan)), strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a).min() > 1e-3 or a.ndim > 1
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "name"), [(1, "tova"), (H, "h2o-kv_head")])
def test_other_groups(heads: int, name: str) -> None:
    case = Case(name, kv_heads=heads)
    q, kv = data(3, heads), data(4, heads)

    def loss(recurrence: Any, q: Any, k: Any, v: Any) -> jax.Array:
        done = recurrence(q, k, v, jnp.asarray(kv.positions), fresh(case), 0, RULES[name][0], rotate=ROPE)
        return (done.out * data(5).q).sum()

    grad = lambda form: jax.jit(jax.grad(partial(loss, form), (0, 1, 2)), compiler_options=FAST_COMPILE)(
        *map(jnp.asarray, (q.q, kv.k, kv.v))
    )
    for a, b in zip(grad(by_death_times), grad(advance), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_gradient_to_what_was_forgotten() -> None:
    """Of a query's output, to the tokens that its state held, and no others."""
    rows, policy = data(1), RULES["tova"][0]
    positions, by = jnp.asarray(rows.positions), jnp.asarray(data(2).q)

    @jax.jit
    def gradients(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        def at(k: jax.Array, v: jax.Array) -> jax.Array:
            out = by_death_times(jnp.asarray(rows.q), k, v, positions, fresh(Case("tova")), 0, policy, rotate=ROPE).out
            return (out * (jnp.arange(T) == t)[:, None, None] * by).sum()

        return jax.grad(at, (0, 1))(jnp.asarray(rows.k), jnp.asarray(rows.v))

    death = deaths(run(Case("tova"), rows))[:, 0]
    for t in (3, C, C + 4, T - 1):
        seen = (np.arange(T) <= t) & (t < death)  # [B, T]
        assert seen.sum() == B * min(t + 1, C + 1)
        for gradient in gradients(jnp.asarray(t)):
            assert np.isfinite(gradient).all()
            np.testing.assert_array_equal(np.abs(gradient).max((2, 3)) > 0, seen)


@pytest.mark.parametrize("block", [1, 3, 4, 16, 128])
def test_blocks_of_queries_change_nothing(block: int) -> None:
    """Lifetimes drawn at random, at most `alive` at a time in the slots; against one product with a mask."""
    rng, past, group = np.random.default_rng(7), 5, H // K
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, keys, values = draw(B, T, K, group, D), draw(B, K, past + T, D), draw(B, K, past + T, D)
    at = np.tile(np.arange(past, past + T), (B, 1))
    at[1, 4:9] = -1
    born = np.concatenate([np.tile(np.arange(past), (B, 1)), at], axis=1)[:, None]
    dies = np.where(born < 0, -1, born + rng.integers(1, 9, born.shape))
    out = lifetime_attention(
        q, keys, values, *(jnp.asarray(x, jnp.int32) for x in (at, born, dies)), alive=8, block=block
    )
    seen = (
        (born[:, :, None] >= 0) & (born[:, :, None] <= at[:, None, :, None]) & (at[:, None, :, None] < dies[:, :, None])
    )
    scores = np.einsum("btkgd,bknd->bkgtn", q, keys) / np.sqrt(D)
    weights = np.where(seen[:, :, None], np.exp(scores), 0)
    want = np.einsum("bkgtn,bknd->btkgd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30), values)
    present = (at >= 0)[:, :, None, None, None]
    np.testing.assert_allclose(np.where(present, out, 0), np.where(present, want, 0), atol=1e-5)
    assert np.isfinite(out).all()


@pytest.mark.slow
def test_bfloat16() -> None:
    config = DecoderConfig(8, 8, 8, 1, H, K, D)
    half = lambda form: losses(
        form, lambda: init_state(config, policies.TOVA(), C, batch=B, dtype=jnp.bfloat16)[0], policies.TOVA()
    )
    first, second = blocks()
    inputs = tuple(jnp.asarray(x, jnp.bfloat16) for x in (first.q, first.k, first.v, second.q, second.k, second.v))
    got, want = (
        jax.jit(jax.grad(half(form), range(6), has_aux=True))(*inputs)[0] for form in (by_death_times, advance)
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.15)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (policies.StreamingLLM(2), "moves tokens to other positions"),
        (with_reduce(policies.TOVA(), merge_nearest()), "merges or summarises"),
        (with_reduce(policies.TOVA(), merge_weighted()), "merges or summarises"),
        (with_reduce(policies.TOVA(), mean_slots(2)), "merges or summarises"),
        (policies.per_layer(policies.TOVA(), with_reduce(policies.TOVA(), merge_nearest())), "merges or summarises"),
    ],
)
def test_policies_that_do_more_than_evict_say_so(policy: Policy, says: str) -> None:
    rows = data(1)
    config = DecoderConfig(8, 8, 8, max(len(policy.layers), 1), H, K, D)
    state, *_ = init_state(config, policy, C, batch=B)
    with pytest.raises(ValueError, match=says):
        by_death_times(*map(jnp.asarray, (rows.q, rows.k, rows.v, rows.positions)), state, 0, policy)
    assert exact_gradient(policy) is rematerialised
    assert exact_gradient(policies.TOVA()) is parallel_gradient
    assert exact_gradient(policies.TOVA(), "slot") is rematerialised


def test_codes_have_no_gradient() -> None:
    rows = data(1)
    state = fresh(Case("tova"), dtype="int8")
    with pytest.raises(ValueError, match="keys stored as int8"):
        by_death_times(*map(jnp.asarray, (rows.q, rows.k, rows.v, rows.positions)), state, 0, policies.TOVA())


def test_a_token_that_lives_long_has_its_whole_gradient_in_bfloat16() -> None:
    """600 blocks see the first token, by half each; a bfloat16 sum of halves is 128 at most."""
    t = 600
    at = jnp.arange(t, dtype=jnp.int32)[None]
    q, k = jnp.zeros((1, t, 1, 1, 2), jnp.bfloat16), jnp.zeros((1, 1, t, 2), jnp.bfloat16)
    dies = jnp.where(at == 0, FOREVER, at + 1)[:, None]
    attend = lambda v: lifetime_attention(q, k, v, at, at[:, None], dies, alive=2, block=1)
    slope = jax.jit(jax.grad(lambda v: attend(v).astype(jnp.float32).sum()))(k)
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(slope[0, 0, :3], np.float32), [[300, 300], [0.5, 0.5], [0.5, 0.5]], 0.01)
