"""Losses that teach what to forget: against T x T definitions, and that they teach it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_tokens, tiny_decoder

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import ForgetHead, Policy
from jaxcompress.policies.forget_head import token_numbers
from jaxcompress.policies.learned import EPSILON, LIKE_TOVA
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.block_attention import causal_attention, forgetful_attention
from jaxcompress.training.data import Batch
from jaxcompress.training.delayed_eviction import (
    dms_loss,
    init_dms,
    keep_logits,
    kept_share,
    read_with_soft_eviction,
    share_schedule,
    temperature_schedule,
)
from jaxcompress.training.objectives import bounded, joint_retention
from jaxcompress.training.policy_objectives import policy_objective
from jaxcompress.training.retention_heads import init_retention, retention_loss, watched_attention

FAST_COMPILE = {"xla_backend_optimization_level": 0}
MODEL = tiny_decoder()
TOKENS = jnp.asarray(random_tokens(2, 24))
jitted = partial(jax.jit, compiler_options=FAST_COMPILE)


def noisy(head: ForgetHead, size: float = 1.0) -> ForgetHead:
    """Weights of which none is zero."""
    rng = np.random.default_rng(0)
    return ForgetHead(*(x + size * rng.standard_normal(x.shape).astype(np.float32) for x in head))


def constant(head: ForgetHead, number: float) -> ForgetHead:
    return head._replace(outer_bias=jnp.zeros_like(head.outer_bias).at[..., 0].set(number))


@pytest.mark.parametrize("window", [None, 40])
def test_forgetful_attention_and_its_gradient(window: int | None) -> None:
    """Over several blocks and padding, against one T x T product."""
    rng = np.random.default_rng(0)
    t, delay = 270, 7
    q, k, v, bias = (
        jnp.asarray(rng.standard_normal((2, t, *rest)).astype(np.float32)) for rest in ((4, 8), (2, 8), (2, 8), (2,))
    )
    bias = -jnp.abs(bias.swapaxes(1, 2)) * 3
    there = np.stack([np.arange(t) >= 9, rng.random(t) < 0.7])
    positions = jnp.asarray(np.where(there, np.cumsum(there, 1) - 1, -1).astype(np.int32))
    limit = None if window is None else jnp.int32(window)

    def plain(q: Any, k: Any, v: Any, bias: Any) -> Any:
        at = positions[:, :, None] - positions[:, None]
        seen = (at >= 0) & (positions[:, None] >= 0) & (at < (window or t))
        scores = jnp.einsum("btkgd,bnkd->bkgtn", q.reshape(2, t, 2, 2, 8), k) * 8**-0.5
        scores += jnp.where((at >= delay)[:, None], bias[:, :, None], 0.0)[:, :, None]
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), -1)
        return jnp.einsum("bkgtn,bnkd->btkgd", weights, v).reshape(2, t, 4, 8)

    def loss(attend: Any, *arrays: Any) -> Any:
        out = jnp.where(there[..., None, None], attend(*arrays), 0.0)
        return jnp.sin(out).sum(), out

    mine = lambda q, k, v, bias: forgetful_attention(q, k, v, positions, bias, delay=delay, window=limit)
    both = [
        jitted(jax.value_and_grad(partial(loss, attend), argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, bias)
        for attend in (mine, plain)
    ]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)
    np.testing.assert_array_equal(
        forgetful_attention(q, k, v, positions, jnp.zeros_like(bias), delay=0),
        causal_attention(q, k, v, positions),
    )


def test_soft_eviction_from_one_end_to_the_other() -> None:
    """A network that keeps everything changes nothing; one that evicts everything leaves a sliding window."""
    head = init_dms(MODEL.config, jax.random.key(0), hidden=4)
    read = jitted(partial(read_with_soft_eviction, window=3, temperature=0.01), static_argnames="window")
    valid = jnp.asarray(np.arange(24) >= np.array([[0], [5]]))
    whole, nothing = (read(MODEL, TOKENS, constant(head, x), valid=valid) for x in (5.0, -5.0))
    np.testing.assert_array_equal(whole.kept, [1, 1])
    np.testing.assert_array_equal(nothing.kept, [0, 0])
    near = tiny_decoder(sliding=(4, 4))
    positions = jnp.where(valid, jnp.cumsum(valid, 1) - 1, -1)
    for model, got in ((MODEL, whole), (near, nothing)):
        want = model.norm(jitted(lambda m: m.hidden(TOKENS, positions))(model))
        np.testing.assert_allclose(got.hidden[valid], want[valid], 1e-3, 1e-3)


def test_the_parts_of_the_loss_and_where_its_gradient_goes() -> None:
    head = noisy(init_dms(MODEL.config, jax.random.key(0), hidden=4), 0.3)
    head = head._replace(outer_bias=head.outer_bias - jnp.array([5.0, 0.0]))
    weights = jnp.ones((2, 23))
    teacher = jax.tree.map(lambda x: x * 0.9, MODEL)

    @jitted
    def run(share: Any, pressure: Any, key: Any) -> Any:
        loss = lambda model, head: dms_loss(
            model, TOKENS, head, weights=weights, window=3, share=share, temperature=0.7, teacher=teacher,
            pressure=pressure, key=key,
        )  # fmt: skip
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(MODEL, head)

    key = jax.random.key(0)
    (loss, parts), (model_slope, slope) = run(0.2, 2.0, key)
    assert 0.2 < float(parts["kept"]) < 0.9
    assert float(loss) == pytest.approx(float(parts["prediction"] + 2 * (parts["kept"] - 0.2)), rel=1e-5)
    for x in jax.tree.leaves((model_slope, slope)):
        assert np.isfinite(x).all()
    assert all(np.asarray(x).any() for x in slope)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(model_slope))
    # Up to the share allowed nothing presses; above it, the pressure is a straight line.
    (below, _), (_, free) = run(1.0, 2.0, key)
    assert float(below) == float(parts["prediction"])
    (_, _), (_, more) = run(0.2, 4.0, key)
    for one, two, none in zip(slope, more, free, strict=True):
        np.testing.assert_allclose(two - none, 2 * (one - none), 1e-3, 1e-5)
        assert np.asarray(one - none).any()
    assert float(run(0.2, 2.0, jax.random.key(1))[0][1]["kept"]) != float(parts["kept"])


def test_without_a_teacher_it_is_the_loss_of_language() -> None:
    head = init_dms(MODEL.config, jax.random.key(0), hidden=4)
    weights = jnp.asarray(np.random.default_rng(0).random((2, 23)).astype(np.float32))
    run = jitted(partial(dms_loss, window=3, share=1.0, temperature=0.01), static_argnames="window")
    loss, _ = run(MODEL, TOKENS, head, weights=weights)
    logits = np.asarray(MODEL(TOKENS[:, :-1]), np.float64)
    each = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    each -= np.take_along_axis(logits, np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    assert float(loss) == pytest.approx(float((each * weights).sum() / weights.sum()), rel=1e-3)
    loss, _ = run(MODEL, TOKENS, head, weights=weights, teacher=MODEL)
    assert float(loss) == pytest.approx(0, abs=1e-3)


def foresight(
    numbers: Any, q: Any, k: Any, positions: Any, block: int, window: int | None, horizon: float | None, recent: int
) -> float:
    """The definition in float64, with T x T arrays."""
    b, t, h, d = q.shape
    kv, sets = k.shape[2], numbers.shape[1]
    total, count = 0.0, 0
    for row in range(b):
        at = positions[row]
        p = np.zeros((sets, t, t))
        for i in np.flatnonzero(at >= 0):
            seen = (at <= at[i]) & (at >= 0) & (at > at[i] - (window or t))
            for head in range(h):
                s = np.where(seen, k[row, :, head // (h // kv)].astype(np.float64) @ q[row, i, head] / d**0.5, -np.inf)
                w = np.exp(s - s.max())
                p[head // (h // kv) if sets > 1 else 0, i] += w / w.sum() / (h // sets)
        for end in range(block, t + block, block):
            now = at[:end].max()
            if at[end - block : end].max() < 0 or now == at.max():
                continue
            here, i = (at >= 0) & (at <= now - recent), int(np.flatnonzero(at == now)[0])
            if not here.any():
                continue
            age = now - at[here] + 1
            for s in range(sets):
                worth = np.exp(-(at[at > now] - now) / (horizon or np.inf))
                future = worth @ p[s][at > now][:, here]
                past = p[s][(at >= 0) & (at <= now)][:, here].sum(0)
                a, b1, b2, b3 = numbers[row, s, here].T
                scores = a + b1 * np.log(p[s, i, here] + EPSILON) + b2 * np.log(past / age + EPSILON) + b3 * np.log(age)
                scores = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
                total -= (future / future.sum() * scores).sum()
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("sets", "window", "horizon", "recent"), [(1, None, None, 0), (2, None, 3.0, 0), (2, 9, 50.0, 5)]
)
def test_foreseen_attention_is_its_definition(
    sets: int, window: int | None, horizon: float | None, recent: int
) -> None:
    """With padding before, between and after; a block of padding only; the gradient against a difference."""
    rng = np.random.default_rng(sets)
    t, block = 22, 4
    q, k = (rng.standard_normal((3, t, heads, 8)).astype(np.float32) * 1.5 for heads in (4, 2))
    there = np.stack([np.ones(t, bool), np.arange(t) >= 6, (rng.random(t) < 0.7) & (np.arange(t) < 17)])
    there[0, 8:12] = False
    positions = np.where(there, np.cumsum(there, 1) - 1, -1).astype(np.int32)
    numbers = np.array(LIKE_TOVA) + 0.5 * rng.standard_normal((3, sets, t, 4))
    limit = None if window is None else jnp.int32(window)
    v = rng.standard_normal(k.shape).astype(np.float32)

    def run(n: Any, q: Any, k: Any) -> Any:
        out, loss = watched_attention(
            n, q, k, jnp.asarray(v), jnp.asarray(positions), block=block, horizon=horizon, recent=recent, window=limit
        )
        return loss, out

    (value, out), slopes = jitted(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(
        jnp.asarray(numbers.astype(np.float32)), jnp.asarray(q), jnp.asarray(k)
    )
    want = causal_attention(*map(jnp.asarray, (q, k, v, positions)), window=limit)
    np.testing.assert_allclose(np.asarray(out)[there], np.asarray(want)[there], 1e-4, 1e-5)
    assert float(value) == pytest.approx(foresight(numbers, q, k, positions, block, window, horizon, recent), rel=1e-4)
    assert not np.asarray(slopes[1]).any()
    assert not np.asarray(slopes[2]).any()
    for _ in range(3):
        way = rng.standard_normal(numbers.shape)
        one, two = (
            foresight(numbers + s * 1e-5 * way, q, k, positions, block, window, horizon, recent) for s in (1, -1)
        )
        assert float((way * slopes[0]).sum()) == pytest.approx((one - two) / 2e-5, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_only_the_network_learns_from_foresight(scope: Any) -> None:
    head = noisy(init_retention(MODEL.config, jax.random.key(0), hidden=4), 0.3)
    loss = lambda model, head, tokens, valid: retention_loss(model, tokens, head, scope=scope, valid=valid, block=8)
    run = jitted(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (model_slope, slope) = run(MODEL, head, TOKENS, None)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(model_slope))
    assert all(np.asarray(x).any() for x in slope)
    padded = jnp.pad(TOKENS, [(0, 0), (8, 0)])
    assert float(run(MODEL, head, padded, jnp.arange(32)[None] >= jnp.array([[8], [8]]))[0]) == pytest.approx(
        float(value), rel=1e-4
    )


@pytest.mark.slow
def test_a_head_beside_its_model() -> None:
    """Each learns what it would learn alone, while the other stands still."""
    head = noisy(init_retention(MODEL.config, jax.random.key(0), hidden=4), 0.3)
    batch = Batch(TOKENS, jnp.ones((2, 23)))
    how: dict[str, Any] = dict(slots=8, segment=8)
    both = joint_retention(partial(bounded, **how), scope="layer", block=8, watched=1)
    metrics, (model_slope, slope) = jitted(lambda *params: both(params, batch, 0, None))(MODEL, head)
    alone = jitted(lambda model: bounded(policies.Retention(head, "layer"), **how)(model, batch, 0, None))
    told, expected = alone(MODEL)
    assert float(metrics["loss"]) == pytest.approx(float(told["loss"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), model_slope, expected)
    watch = lambda head: retention_loss(MODEL, TOKENS[:1, :-1], head, scope="layer", block=8)
    apart, expected = jitted(jax.value_and_grad(watch))(head)
    assert float(metrics["retention"]) == pytest.approx(float(apart), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), slope, expected)


@pytest.mark.parametrize("name", ["retention", "retention and model", "dms", "dmc"])
def test_rows_that_fill_a_batch_do_not_count(name: str) -> None:
    """As the trainer has it: a batch's metrics are those of its rows with weights, and 0 if there are none."""
    model_objective = partial(bounded, slots=8, segment=8) if name == "retention and model" else None
    kind = name.split()[0]
    learned = policy_objective(MODEL, kind, jax.random.key(0), steps=9, hidden=4, model_objective=model_objective)
    model, head = learned.parts(learned.params)
    params: Any = noisy(head, 4.0) if isinstance(learned.params, ForgetHead) else (model, noisy(head, 4.0))
    run = jitted(lambda batch: learned.objective(params, batch, 3, None)[0])
    full = Batch(jnp.concatenate([TOKENS[:1]] * 2), jnp.ones((2, 23)))
    filled = Batch(full.tokens.at[1].set(0), full.weights.at[1].set(0))
    told, expected = run(filled), run(full)
    for metric in expected:
        assert float(told[metric]) == pytest.approx(float(expected[metric]), rel=1e-5), metric
    nothing = run(filled._replace(weights=jnp.zeros((2, 23))))
    assert {float(value) for value in nothing.values()} == {0.0}


T, K, H, D, MARKED = 96, 2, 4, 8, 3
CONFIG = DecoderConfig(8, 8, 8, 1, H, K, D)


def texts(seed: int, rows: int) -> tuple[jax.Array, ...]:
    """Queries, keys and values: three early keys have a mark that only every sixteenth query looks for; the others look
    at the first token."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((rows, T, heads, D)).astype(np.float32) for heads in (H, K, K))
    marked = np.zeros((rows, T), bool)
    for row in marked:
        row[rng.choice(np.arange(4, 40), MARKED, replace=False)] = True
    asks = np.arange(T) % 16 == 15
    k[..., 0] = np.where(marked, 4.0, 0.0)[..., None]
    q[..., 0] = np.where(asks, 6.0, -3.0)[:, None]
    k[..., 1] = np.where(np.arange(T) == 0, 8.0, 0.0)[:, None]
    q[..., 1] = np.where(asks, 0.0, 3.0)[:, None]
    return tuple(map(jnp.asarray, (q, k, v, marked)))


def remembered(policy: Policy, slots: int = 10) -> float:
    """The share of marked tokens that is held at the end of texts that were not learned from."""
    q, k, v, marked = texts(99, 4)
    positions = jnp.broadcast_to(jnp.arange(T), marked.shape)
    state = init_state(CONFIG, policy, slots, batch=len(q))[0]
    read = partial(advance, layer=0, policy=policy)
    held = np.asarray(jitted(read)(q, k, v, positions, state).state.positions[0])
    found = [np.isin(np.flatnonzero(marked[b]), held[b, s]).mean() for b, s in np.ndindex(*held.shape[:2])]
    return float(np.mean(found))


def learn(loss: Any, head: ForgetHead, steps: int, rate: float) -> ForgetHead:
    optimizer = optax.adam(rate)

    @jitted
    def train(head: ForgetHead) -> ForgetHead:
        def step(carry: Any, i: Any) -> Any:
            head, moments = carry
            updates, moments = optimizer.update(jax.grad(loss)(head, i), moments)
            return (optax.apply_updates(head, updates), moments), None

        return jax.lax.scan(step, (head, optimizer.init(head)), jnp.arange(steps))[0][0]

    return train(head)


def one_layer(head: ForgetHead, k: Any, v: Any) -> Any:
    return token_numbers(jax.tree.map(lambda x: x[0], head), k.swapaxes(1, 2), v.swapaxes(1, 2))


@pytest.mark.slow
def test_retention_learns_what_is_asked_for_later() -> None:
    q, k, v, marked = texts(0, 16)
    positions = jnp.broadcast_to(jnp.arange(T), marked.shape)
    loss = lambda head, step: watched_attention(one_layer(head, k, v), q, k, v, positions, block=5)[1]
    start = init_retention(CONFIG, jax.random.key(0), hidden=8)
    head = learn(loss, start, 100, 0.03)
    assert float(loss(head, 0)) < float(loss(start, 0)) - 1
    assert remembered(policies.TOVA("kv_head")) == remembered(policies.Retention(start)) < 0.1
    assert remembered(policies.Retention(head)) > 0.95


@pytest.mark.slow
def test_dms_learns_what_is_asked_for_later() -> None:
    """Through attention alone: its output is to stay what it was, while ever fewer tokens may be kept."""
    q, k, v, marked = texts(0, 16)
    positions = jnp.broadcast_to(jnp.arange(T), marked.shape)
    steps, window = 80, 4
    share, warmth = share_schedule(16, steps * 3 // 4), temperature_schedule(1.0, 0.3, steps)
    want = causal_attention(q, k, v, positions)

    def loss(head: ForgetHead, step: Any) -> jax.Array:
        logits, t = keep_logits(one_layer(head, k, v)), warmth(step)
        logits += jax.random.logistic(jax.random.fold_in(jax.random.key(0), step), logits.shape)
        out = forgetful_attention(q, k, v, positions, jax.nn.log_sigmoid(logits / t), delay=window + 1)
        return jnp.square(out - want).mean() + jnp.maximum(kept_share(logits, t).mean() - share(step), 0.0)

    head = learn(loss, init_dms(CONFIG, jax.random.key(0), hidden=8), steps, 0.05)
    assert float((keep_logits(one_layer(head, k, v)) > 0).mean()) < 0.1
    assert remembered(policies.DMS(head, window)) > 0.95


def test_schedules() -> None:
    share = share_schedule(4, 100)
    np.testing.assert_allclose([share(0), share(50), share(100), share(200)], [1, 0.625, 0.25, 0.25])
    warmth = temperature_schedule(1.0, 0.2, 10)
    np.testing.assert_allclose([warmth(0), warmth(10)], [1, 0.2])
    for wrong in (dict(ratio=0.5, steps=3), dict(ratio=2, steps=0)):
        with pytest.raises(ValueError, match="a ratio is 1 or more"):
            share_schedule(**wrong)
    for wrong in ((0, 1), (1, -0.5)):
        with pytest.raises(ValueError, match="a temperature is positive"):
            temperature_schedule(*wrong, 3)
    with pytest.raises(ValueError, match="has steps, not 0"):
        temperature_schedule(1, 1, 0)


def test_what_does_not_fit() -> None:
    config = DecoderConfig(61, 32, 48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
    one, four = (make(MODEL.config, jax.random.key(0), hidden=4) for make in (init_dms, init_retention))
    for call in (
        lambda head: read_with_soft_eviction(MODEL, TOKENS, head, window=3, temperature=1.0),
        lambda head: retention_loss(MODEL, TOKENS, head),
    ):
        with pytest.raises(ValueError, match="3 layers of 2 kv heads of width 8, the model has 2 layers of 2 kv heads"):
            call(init_dms(config, jax.random.key(0)))
    with pytest.raises(ValueError, match="needs 4 numbers per token, the weights give 2"):
        retention_loss(MODEL, TOKENS, one)
    with pytest.raises(ValueError, match="needs 2 numbers per token, the weights give 4"):
        read_with_soft_eviction(MODEL, TOKENS, four, window=3, temperature=1.0)
    with pytest.raises(ValueError, match="a temperature is positive, not 0"):
        read_with_soft_eviction(MODEL, TOKENS, one, window=3, temperature=0.0)
    with pytest.raises(ValueError, match="a window of 0 tokens: give 1 or more"):
        read_with_soft_eviction(MODEL, TOKENS, one, window=0, temperature=1.0)
    with pytest.raises(ValueError, match="cannot be learned per query head"):
        retention_loss(MODEL, TOKENS, four, scope="query_head")
    with pytest.raises(ValueError, match="blocks of 24 tokens in texts of 24"):
        retention_loss(MODEL, TOKENS, four, block=24)
    with pytest.raises(ValueError, match="a horizon is a positive number of tokens, not 0"):
        retention_loss(MODEL, TOKENS, four, block=8, horizon=0)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        retention_loss(MODEL, TOKENS, four, block=8, recent=-1)
    learned = partial(retention_loss, MODEL, TOKENS, four, block=8)
    with pytest.raises(
        ValueError, match="texts of 24 tokens: the 16 newest .* a block of 8 .* is at position 15; give"
    ):
        jax.eval_shape(lambda: learned(recent=16))
    jax.eval_shape(lambda: learned(recent=15))


@pytest.mark.parametrize(
    ("name", "how", "told"),
    [
        ("dms", dict(window=0), "a window of 0 tokens: give 1 or more"),
        ("dms", dict(pressure=-1.0), "pressure is the weight of a penalty, 0 or more, not -1.0"),
        ("dmc", dict(ratio=0.5), "a ratio is 1 or more"),
        ("retention", dict(horizon=0.0), "a horizon is a positive number of tokens, not 0.0"),
        ("retention", dict(recent=-1), "recent is a number of tokens, 0 or more, not -1"),
        ("retention", dict(hidden=0), "hidden, the width of the network, must be a whole number, at least 1, not 0"),
        ("retention", dict(network=init_dms(MODEL.config, jax.random.key(0))), "retention needs weights"),
    ],
)
def test_impossible_numbers_are_told_when_the_objective_is_made(name: str, how: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        policy_objective(MODEL, name, jax.random.key(0), steps=9, **how)
