"""Methods of which no program's numbers are at hand, against their definitions in NumPy: one prompt, read at once."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence.harness import FAST_COMPILE
from tiny import candidates

from jaxcompress import policies
from jaxcompress.models.checks import check_mode
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.policies import Policy
from jaxcompress.policies.cache_view import IncomingTokens, Observation, Scope
from jaxcompress.policies.checks import checked_scores
from jaxcompress.policies.draws import per_token
from jaxcompress.policies.names import get_policy
from jaxcompress.recurrence import chunk_attention
from jaxcompress.recurrence.advance import advance
from jaxcompress.state.select import keep_top

from . import reference
from .watched import scored_as

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


def ours(
    policy: Policy, heads: int, kv_heads: int, capacity: int, before: int = 0, after: int = 0
) -> tuple[np.ndarray, list[list[int]]]:
    """Scores [P, T] of the prompt, and what is kept of it; with so many columns of padding before and after it."""
    a, seen = arrays(heads, kv_heads), []
    anything = lambda n, like: np.random.default_rng(n).uniform(1, 30, (n, *like.shape[1:])).astype(np.float32)
    wide = {x: np.concatenate([anything(before, a[x]), a[x], anything(after, a[x])]) for x in "qkv"}
    columns = np.concatenate([np.full(before, -1), np.arange(T), np.full(after, -1)]).astype(np.int32)

    def score(stats: Any, held: Any) -> Any:
        x = policy.score(stats, held)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(q: Any, k: Any, v: Any, wo: Any) -> Any:
        config = DecoderConfig(8, E, 8, 1, heads, kv_heads, D)
        watched = scored_as(policy, score)
        state = init_state(config, watched, capacity)[0]
        done = advance(
            q[None], k[None], v[None], jnp.asarray(columns)[None], state, 0, watched, chunk=len(columns),
            rotate=partial(rotate, rope=RopeConfig()), project=wo.reshape(kv_heads, -1, D, E),
        )  # fmt: skip
        return done.state.positions[0, 0]

    positions = np.asarray(run(**wide, wo=a["wo"]))
    jax.effects_barrier()
    scores = seen[-1][0, :, -len(columns) :][:, before : before + T]
    return scores, [sorted(p[p >= 0].tolist()) for p in positions]


def same(got: np.ndarray, want: np.ndarray, rtol: float = 2e-5) -> None:
    assert (np.isposinf(got) == np.isposinf(want)).all()
    free = np.isfinite(want)
    np.testing.assert_allclose(got[free], want[free], rtol, rtol * np.abs(want[free]).max())


HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])


@HEADS
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_snapkv_per_query_head(heads: int, kv_heads: int, pool: Any) -> None:
    """The authors' way: pooled per query head, which a mean over the group cannot undo for a maximum."""
    got, kept = ours(policies.SnapKV(5, 7, pool, scope="query_head"), heads, kv_heads, 16)
    want = reference.snapkv(turned(heads, kv_heads)[2], heads, 5, 7, pool)
    same(got, want)
    assert kept == reference.top(want, 16).tolist()


@HEADS
def test_scissorhands(heads: int, kv_heads: int) -> None:
    p = reference.over_group(turned(heads, kv_heads)[2], kv_heads)  # a set looks at its heads' mean
    for history, recent in ((7, 3), (16, 0), (33, 1), (400, 10)):
        got, kept = ours(policies.Scissorhands(history, recent), heads, kv_heads, 20)
        want = reference.scissorhands(p, kv_heads, history, recent)
        np.testing.assert_array_equal(got, want)
        assert kept == reference.top(want, 20).tolist()


@HEADS
def test_nacl(heads: int, kv_heads: int) -> None:
    policy = policies.NACL(proxies=6, sinks=2, recent=3, chance=0.4, seed=7)
    got, kept = ours(policy, heads, kv_heads, 20)
    tokens = candidates(np.zeros((1, kv_heads, T, D)), np.zeros((1, kv_heads, T, D)),
                        np.broadcast_to(np.arange(T), (1, kv_heads, T)))  # fmt: skip
    noise = np.asarray(per_token(7, tokens, jax.random.gumbel), np.float64)[0]
    want = reference.nacl(turned(heads, kv_heads)[2], kv_heads, 6, 2, 3, 15 - 6, noise)
    same(got, want)
    assert kept == reference.top(want, 20).tolist()
    assert kept != ours(policies.NACL(6, 2, 3, 0.4, seed=8), heads, kv_heads, 20)[1]


@pytest.mark.parametrize("mix", [0.1, 0.9])
def test_rkv(mix: float) -> None:
    """One query head per kv head, where the maximum over a group is its mean; every key has a look-alike."""
    q, k, _ = turned(4, 4)
    got, kept = ours(policies.RKV(mix, window=6, kernel=5, threshold=-2.0), 4, 4, 18)
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
    same(ours(policies.H2O(5, "kv_head"), heads, kv_heads, 16)[0], reference.h2o(p, kv_heads, 5))
    same(ours(policies.ObservedAttention(), heads, kv_heads, 16)[0], reference.observed_attention(p, kv_heads))


@HEADS
def test_critical(heads: int, kv_heads: int) -> None:
    base = reference.observed_attention(turned(heads, kv_heads)[2], kv_heads)
    a = arrays(heads, kv_heads)
    for share in (0.0, 0.25, 0.5, 1.0):
        got, kept = ours(policies.critical(policies.ObservedAttention(), share), heads, kv_heads, 16)
        want = reference.critical(base, a["v"], a["wo"], 16, share)
        same(got, want)
        assert kept == reference.top(want, 16).tolist()


@pytest.mark.parametrize("scope", ["layer", "kv_head", "query_head", "pool"])
def test_what_a_value_writes(scope: Any) -> None:
    """|W_o v|_1 with the projections of a kv head's own query heads, whoever shares a set."""
    a, group = arrays(6, 3), 2
    write = np.abs(np.einsum("thd,hde->hte", np.repeat(a["v"], group, 1), a["wo"])).sum(-1)  # [H, T]
    each = reference.over_group(write, 3)
    want = {"layer": each.mean(0, keepdims=True), "kv_head": each, "query_head": write, "pool": each.T.reshape(1, -1)}
    v, at = a["v"].swapaxes(0, 1), np.arange(T)
    v = {"query_head": np.repeat(v, group, 0), "pool": a["v"].reshape(1, -1, D)}.get(scope, v)[None]
    pool = scope == "pool"
    held = candidates(v, v, np.repeat(at, 3)[None, None] if pool else np.tile(at, (1, len(want[scope]), 1)), heads=6)
    context = held.context._replace(heads=(6, 3), out=jnp.asarray(a["wo"].reshape(3, group, D, E)))
    owner = jnp.asarray(np.tile(np.arange(3), T)[None, None]) if pool else None
    written = policies.critical(policies.KNorm(scope)).init(held._replace(context=context, owner=owner))[1]
    np.testing.assert_allclose(written[0], want[scope], 1e-5)


def test_random_draws_for_each_query_head() -> None:
    """Several of which read one kv head."""
    scores, kept = ours(policies.Random(3, "query_head"), 4, 2, 16)
    assert len(np.unique(scores)) == 4 * T
    assert kept == reference.top(scores, 16).tolist()


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_pooled(pool: Any) -> None:
    """Over the tokens that may go; beyond both ends the mean counts zeros, and what is protected lends nothing."""
    got, kept = ours(policies.pooled(policies.H2O(6, "kv_head"), 5, pool), 4, 2, 16)
    prefix = reference.over_group(turned(4, 2)[2].sum(1), 2)[:, :-6]
    want = np.pad(reference.pooled(prefix, 5, pool), ((0, 0), (0, 6)), constant_values=np.inf)
    same(got, want)
    assert kept == reference.top(want, 16).tolist()


def test_negative_scores() -> None:
    """What writes much is worth more by any score, and the ends of a text are worth less, not more."""
    draw, n = np.random.default_rng(0), 12
    held = candidates(np.zeros((1, 1, n, D)), np.zeros((1, 1, n, D)), np.arange(n)[None, None])
    scores, size = draw.standard_normal(n), np.array([1.0, 2.0] * (n // 2))
    one_set = lambda x: jnp.asarray(x[None, None], jnp.float32)
    pairs = np.repeat(scores[::2], 2)
    assert pairs.min() < 0 < pairs.max()
    got = policies.critical(policies.TOVA(), 0.0).score((one_set(pairs), one_set(size)), held)[0, 0]
    assert (got[1::2] > got[::2]).all()
    want = reference.pooled(scores - scores.min(), 5, "avg") + scores.min()
    got = policies.pooled(policies.TOVA(), 5).score(one_set(scores), held)
    np.testing.assert_allclose(got[0, 0], want, 1e-5)


def test_then() -> None:
    """The prompt is the first policy's; what comes later is the other's (see test_decoding)."""
    got, _ = ours(policies.then(policies.SnapKV(5, 7), policies.Window(4, "kv_head")), 4, 2, 16)
    same(got, reference.snapkv(turned(4, 2)[2], 2, 5, 7))


@pytest.mark.parametrize("name", [
    "then({0},{1})", "then({0},{1})/every4", "then({0},{1})/protect-first1", "per_layer({1},then({0},{1}))",
    "mix(0.5*{1},0.5*then({0},{1}))", "tova/once4", "tova/once4/merge_nearest",
])  # fmt: skip
def test_what_needs_a_prompt_that_is_read_at_once(name: str) -> None:
    """Token by token there is no prompt to select from: `then` would be its second policy alone."""
    policy = get_policy(name.format("snapkv+5", "window+4-kv_head"))
    check_mode(policy, "oneshot")
    for mode in ("streaming", "chunked"):
        with pytest.raises(ValueError, match=f"needs mode oneshot, not {mode}"):
            check_mode(policy, mode)


@pytest.mark.parametrize("policy", [
    policies.TOVA(), policies.H2O(0, "kv_head"), policies.SnapKV(5, 1), policies.NACL(6, 2, 3),
    policies.Scissorhands(33, 1), policies.sampled(policies.H2O(0, "kv_head"), 3),
    policies.sampled(policies.Scissorhands(7, 1), 3),
    policies.sampled(policies.SnapKV(5, 1), 3),
], ids=lambda policy: policy.name)  # fmt: skip
def test_queries_in_several_blocks(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of more queries than attend at once: what is observed is a fold."""
    want, kept = ours(policy, 4, 2, 16)
    monkeypatch.setattr(chunk_attention, "QUERY_BLOCK", 7)
    got, also = ours(policy, 4, 2, 16)
    same(got, want)
    assert also == kept


@pytest.mark.parametrize("n", [1, 3, 7, 16, 18, 40])
def test_a_sample_of_the_queries(n: int) -> None:
    """One by one, for long: nothing is left of queries that have gone out of the window or the history."""
    steps, window, history = 250, 5, 37
    mass = np.random.default_rng(n).random((steps, 4)).astype(np.float32) * 0.4
    at = np.array([0, 1, 2, steps - 1])
    held = candidates(np.zeros((1, 1, 4, D)), np.zeros((1, 1, 4, D)), at[None, None])
    count, last = (policies.sampled(p, n) for p in (policies.Scissorhands(history, 0), policies.SnapKV(window, 1)))

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(mass: Any) -> Any:
        def step(stats: Any, query: Any) -> Any:
            weights, position = query
            seen = Observation(weights.reshape(1, 1, 1, 1, 4), position.reshape(1, 1), jnp.full((1, 1, 1), 4.0), 1)
            return (count.observe(stats[0], seen), last.observe(stats[1], seen)), None

        stats, _ = jax.lax.scan(step, (count.init(held), last.init(held)), (mass, jnp.arange(steps)))
        return policies.Scissorhands(history, 0).score(stats[0], held), stats[1]

    counts, ring = run(mass)
    watched = np.arange(0, steps, n)
    recent, newest = watched[watched >= steps - history], watched[watched > watched[-1] - window]
    np.testing.assert_array_equal(np.asarray(counts)[0, 0], (mass[recent] * 4 >= 1).sum(0))
    np.testing.assert_allclose(np.asarray(ring)[0, 0].sum(-1), mass[newest].sum(0), 1e-6)


@pytest.mark.parametrize("policy", [
    policies.KeyDiff(), policies.LagKV(4), policies.LagKV(4, cross=True), policies.CUR(4), policies.RKV(window=4),
    policies.ExpectedAttention(4), policies.SnapKV(5, 7), policies.NACL(6, 2, 3), policies.Scissorhands(33, 1),
    policies.by_chunks(policies.TOVA(), 7), policies.within_chunks(policies.KNorm(), 7),
    policies.ranked(policies.H2O(2, "kv_head")),
], ids=lambda policy: policy.name)  # fmt: skip
def test_a_padded_prompt(policy: Policy) -> None:
    """However much padding stands where: the same scores, not only the same tokens."""
    want, kept = ours(policy, 4, 2, 16)
    got, also = ours(policy, 4, 2, 16, before=9, after=4)
    same(got, want)
    assert also == kept


@pytest.mark.parametrize("policy", [
    policies.KNorm(), policies.KeyDiff(), policies.LagKV(4, cross=True), policies.CUR(4), policies.RKV(window=4),
    policies.RKV(window=4, sketch=4), policies.ExpectedAttention(4), policies.critical(policies.CUR(4)),
], ids=lambda policy: policy.name)  # fmt: skip
def test_bfloat16_is_scored_in_float32(policy: Policy) -> None:
    """The same numbers, stored in bfloat16, have the same scores: none is rounded, so that hardly any tie."""
    a = arrays(4, 2)
    q, k, v, out = (jnp.asarray(a[name], jnp.bfloat16) for name in ("q", "k", "v", "wo"))
    out = out.reshape(2, 2, D, E)

    # Otherwise XLA may leave out a rounding that the code asks for.
    @partial(jax.jit, static_argnames="dtype", compiler_options=FAST_COMPILE | {"xla_allow_excess_precision": False})
    def scores(q: Any, k: Any, v: Any, out: Any, dtype: Any) -> Any:
        cast = lambda x: x.astype(dtype)
        at = jnp.arange(T, dtype=jnp.int32)[None]
        keys, values = (cast(x.swapaxes(0, 1)[None]) for x in (k, v))
        held = candidates(keys, values, jnp.tile(at, (1, 2, 1)), heads=4)
        held = held._replace(context=held.context._replace(out=cast(out), rotate=partial(rotate, rope=RopeConfig())))
        incoming = IncomingTokens(*(cast(x)[None] for x in (q, k, v)), at)
        held = held._replace(memory=policy.remember(policy.memory(held), incoming))
        return policy.score(policy.init(held), held)

    got, want = (np.asarray(scores(q, k, v, out, dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_allclose(got, want, 1e-6)
    free = got[np.isfinite(got)]
    assert len(np.unique(free)) > 0.9 * len(free)


@pytest.mark.parametrize(("capacity", "share", "count"), [(100, 0.29, 29), (10, 0.3, 3), (100, 0.57, 57), (3, 0.3, 0)])
def test_shares_of_slots_are_whole_numbers(capacity: int, share: float, count: int) -> None:
    """0.29 * 100 is 28.999999999999996."""
    n, draw = capacity + 1, np.random.default_rng(0)
    one = candidates(np.zeros((1, 1, n, D)), np.zeros((1, 1, n, D)), np.arange(n)[None, None], capacity=capacity)
    mass = jnp.asarray(draw.random((1, 1, n)), jnp.float32)
    pool = one._replace(owner=jnp.zeros((1, 1, n), jnp.int32))
    for policy, stats, held, want in (
        (policies.H2O(share, "layer"), mass, one, count),
        (policies.adaptive(policies.TOVA("pool"), share), mass, pool, count),
        (policies.critical(policies.TOVA(), share), (mass, mass), one, count),
        (policies.NACL(1, 0, 0, share), mass[..., None], one, capacity - count),
    ):
        assert np.isposinf(policy.score(stats, held)).sum() == want, policy.name


@HEADS
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.75, 1.0])
def test_adaptive(heads: int, kv_heads: int, floor: float) -> None:
    """Heads get what their scores ask for, and the floor for sure."""
    policy = policies.adaptive(policies.ObservedAttention("pool"), floor)
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
    before = ours(policies.SnapKV(5, 1), 4, 2, 16)[0]
    a["k"][-1] += 10.0  # seen by the last query alone
    try:
        after = ours(policies.SnapKV(5, 1), 4, 2, 16)[0]
        q, k, p = turned(4, 2)
    finally:
        a["k"][-1] -= 10.0
    assert np.abs(after[:, :-5] - before[:, :-5]).max() > 0
    same(after, reference.snapkv(p, 2, 5, 1))


@pytest.mark.parametrize("policy", [
    policies.protect(policies.TOVA()), policies.NACL(2, 0, 0), policies.Scissorhands(4, 0), policies.LagKV(2, 0),
    policies.CUR(4, 0), policies.ExpectedAttention(4, 0), policies.H2O(0, "kv_head"), policies.Window(0),
], ids=lambda policy: policy.name)  # fmt: skip
def test_zero_protected_is_none_protected(policy: Policy) -> None:
    """x[-0:] is everything in NumPy; here no score is infinite where nothing is to be protected."""
    got, kept = ours(policy, 4, 2, 16)
    assert not np.isposinf(got).all(-1).any()
    if not policy.name.startswith(("lagkv", "nacl")):
        assert np.isfinite(got).all()
    assert all(len(k) == 16 for k in kept)


@policies.policy
class Oldest(Policy):
    """What a state of 4 would keep: the first tokens."""

    scope: Scope = "kv_head"

    def score(self, stats: Any, held: Any) -> Any:
        return -held.positions.astype(jnp.float32)


@pytest.mark.parametrize(("one", "stats"), [
    (policies.protect(policies.critical(Oldest(), 1.0), recent=2), ((), jnp.ones((1, 1, 6)))),
    (policies.sampled(policies.critical(Oldest(), 0.75), 2), ((), jnp.ones((1, 1, 6)))),
    (policies.protect(policies.adaptive(Oldest("pool"), 1.0), recent=2), ()),
    (policies.protect(policies.NACL(1, 0, 0, 0.0), recent=2), -jnp.arange(6.0)[None, None, :, None]),
    (policies.by_chunks(policies.protect(Oldest(), recent=2), 6), ()),
    (policies.mix((1.0, policies.critical(Oldest(), 1.0)), (1.0, policies.protect(Oldest(), recent=2))),
     (((), jnp.ones((1, 1, 6))), ())),
], ids=lambda x: getattr(x, "name", ""))  # fmt: skip
def test_what_is_protected_goes_before_what_is_only_chosen_for_sure(one: Policy, stats: Any) -> None:
    """A share, or a chunk, that fills the room leaves the newest tokens their place."""
    at = jnp.arange(6)[None, None]
    owner = jnp.zeros_like(at) if one.scope == "pool" else None
    held = candidates(np.zeros((1, 1, 6, D)), np.zeros((1, 1, 6, D)), at, capacity=4, owner=owner)
    kept = keep_top(checked_scores(one, stats, held), at, 4)[0, 0]
    assert np.flatnonzero(kept).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("cross", [False, True])
def test_lagkv_of_repeated_tokens(cross: bool) -> None:
    """A chunk of equal values has no range to measure the one before it by; scores are numbers all the same."""
    keys = np.random.default_rng(0).standard_normal((1, 1, 9, D)).astype(np.float32)
    values = keys.copy()
    values[:, :, 5:] = 1.0
    one = policies.LagKV(2, sinks=1, cross=cross)
    scores = np.asarray(one.score((), candidates(keys, values, np.arange(9)[None, None], capacity=6)))[0, 0]
    assert not np.isnan(scores).any()
    assert cross or sorted(scores[3:5]) == [0.0, 0.5]


def test_repeated_tokens_tie_and_the_older_stay() -> None:
    """RoPE keeps norms: in the first layer the same token has the same score wherever it stands."""
    keys = np.tile(np.random.default_rng(0).standard_normal((1, 1, 1, D)), (1, 1, T, 1)).astype(np.float32)
    turned_keys = rotate(jnp.asarray(keys), jnp.arange(T), RopeConfig())
    held = candidates(turned_keys, turned_keys, np.arange(T)[None, None])
    policy = policies.KNorm()
    scores = policy.score(policy.init(held), held)
    np.testing.assert_allclose(scores, scores[..., :1] * np.ones(T), rtol=1e-6)


@pytest.mark.parametrize(("name", "least"), [
    ("tova", 1), ("window+4", 5), ("h2o", 1), ("h2o-recent1.0", 1), ("h2o-recent6", 7), ("lagkv+8", 20), ("nacl", 13),
    ("snapkv+32/protect-first4", 37), ("snapkv+32/protect-first4-recent8", 37), ("window+4/sampled8", 13),
    ("h2o/protect-first64", 127), ("h2o-recent1.0/protect-recent2", 3), ("tova/every16/protect-first4-recent8", 28),
    ("h2o/protect-first64/every16", 142), ("mix(0.5*window+4,0.5*h2o-recent6-layer)", 11),
    ("tova/once32/protect-first4-recent8", 33), ("then(snapkv+32,window+4-kv_head)", 33),
])  # fmt: skip
def test_the_least_capacity_has_room_for_all_that_is_protected(name: str, least: int) -> None:
    """By whatever part of a policy; a share of what stays may fill it, a number of tokens leaves one more."""
    policy = get_policy(name)
    assert policy.needs == least
    with pytest.raises(ValueError, match=f"at least {least} slots" if least > 1 else "at least 1 slot"):
        init_state(DecoderConfig(8, 8, 8, 1, 4, 2, D), policy, least - 1)


@policies.policy
class Sized(Policy):
    """Its hints are not checked by the tests, as those of the library are."""

    count: int = 1
    width: int | None = None
    share: float | int = 0.5
    flag: bool = False


class TestErrors:
    """Said before anything is compiled, with what was given and what would do."""

    @pytest.mark.parametrize(("make", "says"), [
        (lambda: policies.SnapKV(0), "at least 1 query"),
        (lambda: policies.SnapKV(4, 4), "odd"),
        (lambda: policies.every(policies.TOVA(), True), "n of every must be a whole number, not True"),
        (lambda: policies.RKV(threshold=float("nan")), "threshold of RKV must be a number, not nan"),
        (lambda: Sized(count=2.5), "count of Sized must be a whole number, not 2.5"),
        (lambda: Sized(count="4"), "count of Sized must be a whole number, not '4'"),
        (lambda: Sized(width=np.float32("nan")), "width of Sized must be a whole number or None, not"),
        (lambda: Sized(share=True), "share of Sized must be a number, not True"),
        (lambda: Sized(flag=1), "flag of Sized must be True or False, not 1"),
        (lambda: policies.critical(policies.TOVA(), epsilon=-1), "epsilon must be 0 or more"),
        (lambda: policies.ExpectedAttention(epsilon=float("inf")), "epsilon must be 0 or more"),
        (lambda: policies.mix((float("inf"), policies.TOVA()), (1.0, policies.Window())), "a positive weight"),
        (lambda: policies.every(policies.TOVA(), 0), "1 step or more"),
        (lambda: policies.every(policies.Full(), 2), "never evicts"),
        (lambda: policies.every(policies.StreamingLLM(4, "before"), 2), "before"),
        (lambda: policies.once(policies.SnapKV(8), 4), "at least 9"),
        (lambda: policies.adaptive(policies.SnapKV()), "pool"),
        (lambda: policies.LagKV(8, scope="pool"), "pool"),
        (lambda: policies.mix((1.0, policies.TOVA())), "two parts"),
        (lambda: policies.mix((1.0, policies.TOVA()), (1.0, policies.KNorm())), "scope"),
        (lambda: policies.mix((1.0, policies.TOVA()), (1.0, policies.StreamingLLM())), "placement"),
        (lambda: policies.mix((1.0, policies.every(policies.TOVA(), 2)), (1.0, policies.H2O(0, "layer"))),
        "to the mix"),
        (lambda: policies.by_chunks(policies.TOVA("pool"), 4), "layer or head"),
        (lambda: policies.protect(policies.TOVA(), first=-1), "0 or more"),
        (lambda: get_policy("tova/once8/protect-recent16"), "0 first .* 16 newest ones, and keeps 8 of a prompt"),
        (lambda: get_policy("tova/once8/sampled8"), "8 newest ones, and keeps 8 of a prompt"),
        (lambda: get_policy("h2o/once64/protect-first40"), "40 first tokens and 32 newest ones, and keeps 64"),
        (lambda: get_policy("h2o-recent1.0/protect-first4"), "more tokens than any state holds"),
        (lambda: get_policy("mix(0.5*window+4,0.5*h2o-recent1.0-layer)"), "more tokens than any state holds"),
        (lambda: policies.per_layer(), "each layer"),
        (lambda: policies.every(policies.per_layer(policies.TOVA()), 2), "inside per_layer"),
        (lambda: get_policy("tova/nonsense3"), "unknown modifier"),
        (lambda: get_policy("nonsense"), "unknown policy"),
    ])  # fmt: skip
    def test_of_construction(self, make: Any, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            make()

    def test_a_state_that_is_too_small(self) -> None:
        config = DecoderConfig(8, 8, 8, 2, 4, 2, D)
        with pytest.raises(ValueError, match="at least 9 slots"):
            init_state(config, policies.SnapKV(8), 8)
        with pytest.raises(ValueError, match="at least 12 slots"):
            init_state(config, policies.every(policies.SnapKV(8), 4), 8)
        with pytest.raises(ValueError, match="scope kv_head"):
            init_state(config, policies.TOVA(), ((8, 4), (8, 4)))
        with pytest.raises(ValueError, match="3 policies, the model has 2"):
            init_state(config, policies.per_layer(*[policies.TOVA()] * 3), 8)

    def test_without_a_model(self) -> None:
        held = candidates(np.zeros((1, 2, 4, D)), np.zeros((1, 2, 4, D)), np.zeros((1, 2, 4), int))
        with pytest.raises(ValueError, match="project="):
            policies.critical(policies.KNorm()).init(held)
