"""Methods of which no program's numbers are at hand, against their definitions in NumPy: one prompt, read at once."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core.harness import FAST_COMPILE
from tiny import candidates

from jaxcompress import policies
from jaxcompress.models.bounded import init_state
from jaxcompress.models.decoder import DecoderConfig
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.naming import named
from jaxcompress.policies import Policy
from jaxcompress.policies.draws import per_token
from jaxcompress.recurrence import advance

from . import reference

T, D, E = 40, 8, 12
rng = np.random.default_rng(5)


@cache
def arrays(heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return dict(q=draw(T, heads, D) * 1.5, k=draw(T, kv_heads, D), v=draw(T, kv_heads, D), wo=draw(heads, D, E))


def turned(heads: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q and k rotated, and causal attention [H, T, T]."""
    a, at = arrays(heads, kv_heads), np.arange(T)[:, None]
    q, k = reference.rope(a["q"], at), reference.rope(a["k"], at)
    logits = np.einsum("thd,shd->hts", q, np.repeat(k, heads // kv_heads, 1)) / np.sqrt(D)
    return q, k, reference.softmax(np.where(np.tri(T, dtype=bool), logits, -np.inf))


def ours(policy: Policy, heads: int, kv_heads: int, capacity: int) -> tuple[np.ndarray, list[list[int]]]:
    """Scores [P, T] of the prompt, and what is kept of it."""
    a, seen = arrays(heads, kv_heads), []

    def score(stats: Any, held: Any) -> Any:
        assert policy.score is not None
        x = policy.score(stats, held)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(q: Any, k: Any, v: Any, wo: Any) -> Any:
        config = DecoderConfig(8, E, 8, 1, heads, kv_heads, D)
        watched = policy._replace(score=score)
        state = init_state(config, watched, capacity)[0]
        done = advance(
            q[None], k[None], v[None], jnp.arange(T)[None], state, 0, watched, chunk=T,
            rotate=partial(rotate, rope=RopeConfig()), project=wo.reshape(kv_heads, -1, D, E),
        )  # fmt: skip
        return done.state.positions[0, 0]

    positions = np.asarray(run(**a))
    jax.effects_barrier()
    return seen[-1][0, :, -T:], [sorted(p[p >= 0].tolist()) for p in positions]


def same(got: np.ndarray, want: np.ndarray, rtol: float = 2e-5) -> None:
    assert (np.isposinf(got) == np.isposinf(want)).all()
    free = np.isfinite(want)
    np.testing.assert_allclose(got[free], want[free], rtol, rtol * np.abs(want[free]).max())


HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])


@HEADS
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_snapkv_per_query_head(heads: int, kv_heads: int, pool: Any) -> None:
    """The authors' way: pooled per query head, which a mean over the group cannot undo for a maximum."""
    got, kept = ours(policies.snapkv(5, 7, pool, scope="query_head"), heads, kv_heads, 16)
    want = reference.snapkv(turned(heads, kv_heads)[2], heads, 5, 7, pool)
    same(got, want)
    assert kept == reference.top(want, 16).tolist()


@HEADS
def test_scissorhands(heads: int, kv_heads: int) -> None:
    p = reference.over_group(turned(heads, kv_heads)[2], kv_heads)  # a set looks at its heads' mean
    for history, recent in ((7, 3), (16, 0), (33, 1), (400, 10)):
        got, kept = ours(policies.scissorhands(history, recent), heads, kv_heads, 20)
        want = reference.scissorhands(p, kv_heads, history, recent)
        np.testing.assert_array_equal(got, want)
        assert kept == reference.top(want, 20).tolist()


@HEADS
def test_nacl(heads: int, kv_heads: int) -> None:
    policy = policies.nacl(proxies=6, sinks=2, recent=3, chance=0.4, seed=7)
    got, kept = ours(policy, heads, kv_heads, 20)
    tokens = candidates(np.zeros((1, kv_heads, T, D)), np.zeros((1, kv_heads, T, D)),
                        np.broadcast_to(np.arange(T), (1, kv_heads, T)))  # fmt: skip
    noise = np.asarray(per_token(7, tokens, jax.random.gumbel), np.float64)[0]
    want = reference.nacl(turned(heads, kv_heads)[2], kv_heads, 6, 2, 3, 15 - 6, noise)
    same(got, want)
    assert kept == reference.top(want, 20).tolist()
    assert kept != ours(policies.nacl(6, 2, 3, 0.4, seed=8), heads, kv_heads, 20)[1]


@pytest.mark.parametrize("mix", [0.1, 0.9])
def test_rkv(mix: float) -> None:
    """One query head per kv head, where the maximum over a group is its mean; every key has a look-alike."""
    q, k, _ = turned(4, 4)
    got, kept = ours(policies.rkv(mix, window=6, kernel=5, threshold=-2.0), 4, 4, 18)
    want = reference.rkv(q, k, window=6, kernel=5, mix=mix, threshold=-2.0)
    same(got, want)
    assert kept == reference.top(want, 18).tolist()


def test_a_sketch_errs_by_its_width() -> None:
    """Cosines of random projections to r channels are off by about 1/sqrt(r), means over many keys by less."""
    from jaxcompress.policies.rkv import _sketched, similarity

    keys = np.random.default_rng(0).standard_normal((1, 2, 200, 64)).astype(np.float32)
    held = candidates(keys, keys, np.broadcast_to(np.arange(200), (1, 2, 200)))
    exact = similarity(jnp.asarray(keys), held, 0.5)
    error = [float(jnp.abs(similarity(_sketched(jnp.asarray(keys), r), held, 0.5) - exact).std()) for r in (4, 16, 64)]
    assert error[0] > error[1] > error[2]
    assert error[1] < 0.05


@HEADS
def test_h2o_and_observed(heads: int, kv_heads: int) -> None:
    p = turned(heads, kv_heads)[2]
    same(ours(policies.h2o(5, "kv_head"), heads, kv_heads, 16)[0], reference.h2o(p, kv_heads, 5))
    same(ours(policies.observed_attention(), heads, kv_heads, 16)[0], reference.observed_attention(p, kv_heads))


@HEADS
def test_critical(heads: int, kv_heads: int) -> None:
    base = reference.observed_attention(turned(heads, kv_heads)[2], kv_heads)
    a = arrays(heads, kv_heads)
    for share in (0.0, 0.25, 0.5, 1.0):
        got, kept = ours(policies.critical(policies.observed_attention(), share), heads, kv_heads, 16)
        want = reference.critical(base, a["v"], a["wo"], 16, share)
        same(got, want)
        assert kept == reference.top(want, 16).tolist()


@HEADS
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.75, 1.0])
def test_adaptive(heads: int, kv_heads: int, floor: float) -> None:
    """Heads get what their scores ask for, and the floor for sure."""
    policy = policies.adaptive(policies.observed_attention("pool"), floor)
    a = arrays(heads, kv_heads)

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(q: Any, k: Any, v: Any, wo: Any) -> Any:
        state = init_state(DecoderConfig(8, E, 8, 1, heads, kv_heads, D), policy, 16)[0]
        done = advance(q[None], k[None], v[None], jnp.arange(T)[None], state, 0, policy, chunk=T,
                       rotate=partial(rotate, rope=RopeConfig()))  # fmt: skip
        return done.state.positions[0, 0, 0], done.state.owner

    positions, owner = run(**a)
    positions, owner = np.asarray(positions), np.asarray(owner)[0, 0, 0]
    mask = np.zeros((kv_heads, T), bool)
    held = positions >= 0
    mask[owner[held], positions[held]] = True
    score = reference.observed_attention(turned(heads, kv_heads)[2], kv_heads)
    np.testing.assert_array_equal(mask, reference.adakv_keep(score, 16, floor))
    assert mask.sum() == 16 * kv_heads
    assert (mask.sum(1) >= int(16 * floor)).all()


def test_the_window_of_recent_queries_is_causal() -> None:
    """What a later key is cannot change what an earlier query gave the tokens before it."""
    a = arrays(4, 2)
    before = ours(policies.snapkv(5, 1), 4, 2, 16)[0]
    a["k"][-1] += 10.0  # seen by the last query alone
    try:
        after = ours(policies.snapkv(5, 1), 4, 2, 16)[0]
        q, k, p = turned(4, 2)
    finally:
        a["k"][-1] -= 10.0
    assert np.abs(after[:, :-5] - before[:, :-5]).max() > 0
    same(after, reference.snapkv(p, 2, 5, 1))


@pytest.mark.parametrize("policy", [
    policies.protect(policies.tova()), policies.nacl(2, 0, 0), policies.scissorhands(4, 0), policies.lagkv(2, 0),
    policies.cur(4, 0), policies.expected_attention(4, 0), policies.h2o(0, "kv_head"), policies.window(0),
], ids=lambda policy: policy.name)  # fmt: skip
def test_zero_protected_is_none_protected(policy: Policy) -> None:
    """x[-0:] is everything in NumPy; here no score is infinite where nothing is to be protected."""
    got, kept = ours(policy, 4, 2, 16)
    assert not np.isposinf(got).all(-1).any()
    if not policy.name.startswith(("lagkv", "nacl")):
        assert np.isfinite(got).all()
    assert all(len(k) == 16 for k in kept)


def test_repeated_tokens_tie_and_the_older_stay() -> None:
    """RoPE keeps norms: in the first layer the same token has the same score wherever it stands."""
    keys = np.tile(np.random.default_rng(0).standard_normal((1, 1, 1, D)), (1, 1, T, 1)).astype(np.float32)
    turned_keys = rotate(jnp.asarray(keys), jnp.arange(T), RopeConfig())
    held = candidates(turned_keys, turned_keys, np.arange(T)[None, None])
    policy = policies.knorm()
    assert policy.score is not None
    scores = policy.score(policy.init(held), held)
    np.testing.assert_allclose(scores, scores[..., :1] * np.ones(T), rtol=1e-6)


class TestErrors:
    """Said before anything is compiled, with what was given and what would do."""

    @pytest.mark.parametrize(("make", "says"), [
        (lambda: policies.snapkv(0), "at least 1 query"),
        (lambda: policies.snapkv(4, 4), "odd"),
        (lambda: policies.every(0, policies.tova()), "1 step or more"),
        (lambda: policies.every(2, policies.full()), "never evicts"),
        (lambda: policies.every(2, policies.streaming_llm(4, "before")), "before"),
        (lambda: policies.once(policies.snapkv(8), 4), "at least 9"),
        (lambda: policies.adaptive(policies.snapkv()), "pool"),
        (lambda: policies.lagkv(8, scope="pool"), "pool"),
        (lambda: policies.mix((1.0, policies.tova())), "two parts"),
        (lambda: policies.mix((1.0, policies.tova()), (1.0, policies.knorm())), "scope"),
        (lambda: policies.mix((1.0, policies.tova()), (1.0, policies.streaming_llm())), "placement"),
        (lambda: policies.mix((1.0, policies.every(2, policies.tova())), (1.0, policies.h2o(0, "layer"))),
        "to the mix"),
        (lambda: policies.by_chunks(policies.tova("pool"), 4), "layer or head"),
        (lambda: policies.protect(policies.tova(), first=-1), "0 or more"),
        (lambda: policies.per_layer(), "each layer"),
        (lambda: policies.every(2, policies.per_layer(policies.tova())), "inside per_layer"),
        (lambda: named("tova/nonsense3"), "unknown modifier"),
        (lambda: named("nonsense"), "unknown policy"),
    ])  # fmt: skip
    def test_of_construction(self, make: Any, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            make()

    def test_a_state_that_is_too_small(self) -> None:
        config = DecoderConfig(8, 8, 8, 2, 4, 2, D)
        with pytest.raises(ValueError, match="at least 9 slots"):
            init_state(config, policies.snapkv(8), 8)
        with pytest.raises(ValueError, match="at least 12 slots"):
            init_state(config, policies.every(4, policies.snapkv(8)), 8)
        with pytest.raises(ValueError, match="scope kv_head"):
            init_state(config, policies.tova(), ((8, 4), (8, 4)))
        with pytest.raises(ValueError, match="3 policies, the model has 2"):
            init_state(config, policies.per_layer(*[policies.tova()] * 3), 8)

    def test_without_a_model(self) -> None:
        held = candidates(np.zeros((1, 2, 4, D)), np.zeros((1, 2, 4, D)), np.zeros((1, 2, 4), int))
        with pytest.raises(ValueError, match="project="):
            policies.critical(policies.knorm()).init(held)


@pytest.mark.parametrize("name", [
    "tova/first2/recent3/every4", "snapkv+32/critical/every16", "ada-h2o", "ada-snapkv+8", "h2o-layer/chunks20",
    "streaming_llm+4-before", "rkv-sketch16", "lagkv+16-cross", "snapkv+16-query_head", "tova/merge_nearest/every4",
    "h2o-layer/mean_slots4", "tova/cam32", "h2o-layer/d2o", "knorm/within64", "tova/sampled4",
])  # fmt: skip
def test_names(name: str) -> None:
    assert named(name) == named(name)  # one object per name: one compiled program
    assert named(name).score is not None
