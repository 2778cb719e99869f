"""What holds for every policy, mode and placement, whatever is read."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.policies.checks import check_placed
from jaxcompress.recurrence.advance import advance
from jaxcompress.state.kv_state import KVState

from .harness import (
    ROPE,
    RULES,
    B,
    C,
    Case,
    D,
    Data,
    H,
    K,
    T,
    data,
    deaths,
    fresh,
    held,
    name_of,
    one_row_kept,
    permuted,
    ragged,
    run,
)
from .reference import rope

# Most of these functions are compiled for the comparison with the reference already.
HISTORIES = [
    *(Case(name, "steps") for name in ("tova", "h2o", "h2o-layer", "window+2", "streaming-before", "full", "random")),
    *(Case(name, "pieces") for name in ("tova", "h2o", "streaming-before")),
    *(Case(name, "steps", "slot") for name in ("streaming-after", "streaming-before")),
    *(Case(name, "steps", window=6) for name in ("tova", "full", "streaming-before")),
]
WHOLE = [
    *(Case(name) for name in ("tova-kv_head", "tova-query_head", "h2o-kv_head", "window", "streaming-after")),
    *(Case(name, "chunked") for name in ("tova", "h2o", "h2o-layer", "window+2", "streaming-before", "random", "full")),
    *(Case("tova", "one-shot"), Case("h2o", "one-shot"), Case("tova", "chunked", window=6)),
    *(Case("h2o-kv_head", "streaming", "compact"), Case("streaming-before", "chunked", "slot")),
]
few = settings(max_examples=5)  # of three rows each
every = pytest.mark.parametrize("case", HISTORIES + WHOLE, ids=name_of)


def same_tokens(a: KVState, b: KVState, exactly: bool = True) -> None:
    """Two states of one layer hold the same tokens, with the same keys, values and numbers, in whatever slots."""
    assert a.positions.shape == b.positions.shape
    close = np.testing.assert_array_equal if exactly else lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-4)
    rows, sets = a.positions.shape[1:3]
    for row, head in np.ndindex(rows, a.keys.shape[2]):
        s = min(head, sets - 1)
        one, two = (np.argsort(x.positions[0, row, s], kind="stable") for x in (a, b))
        there = a.positions[0, row, s][one] >= 0
        assert a.positions[0, row, s][one].tolist() == b.positions[0, row, s][two].tolist()
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            close(x[0, row, head][one][there], y[0, row, head][two][there])
        for x, y in zip(jax.tree.leaves(a.stats), jax.tree.leaves(b.stats), strict=True):
            close(x[0, row, s][one][there], y[0, row, s][two][there])


SPARE = [Case("tova"), Case("streaming-before", "chunked"), Case("every-tova"), Case("full"), Case("tova-pool")]
MORE_SPARE = [Case("h2o", "one-shot"), Case("every"), Case("window+2", "chunked"), Case("then"), Case("h2o", window=6)]


@pytest.mark.parametrize(
    "case", [*SPARE, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_SPARE)], ids=name_of
)
def test_slots_that_stay_free(case: Case) -> None:
    """Slots allocated in multiples, as on a TPU: the same tokens stay."""
    rows = data(3)._replace(valid=np.array([[True] * T, [False, True] * (T // 2) + [True] * (T % 2), [False] * T]))
    config = DecoderConfig(8, 8, 8, 1, H, case.kv_heads, D)
    wide = init_state(config, RULES[case.policy][0], case.bound, batch=B, slot_multiple=32)[0]
    assert wide.positions.shape[-1] % 32 == 0
    many, exact = run(case, rows, wide), run(case, rows)
    np.testing.assert_array_equal(deaths(many), deaths(exact))
    np.testing.assert_allclose(many.out, exact.out, 1e-5, 1e-5)
    assert (many.states.positions >= 0).sum(-1).max() == (exact.states.positions >= 0).sum(-1).max()


def test_slots_that_stay_free_are_no_room_for_more() -> None:
    """A full cache that was told 8 does not take 9, though more slots were allocated."""
    wide = init_state(DecoderConfig(8, 8, 8, 1, H, K, D), policies.Full(), C, batch=B, slot_multiple=32)[0]
    out = run(Case("full", window=None), data(3), wide).out
    assert np.isfinite(out[:, :C]).all()
    assert np.isnan(out[:, C:]).all()


@every
@few
@given(rows=ragged())
def test_capacity_and_content(case: Case, rows: Data) -> None:
    """1: at most `capacity` slots are occupied. Each holds a token that was read, no token twice, and what it was."""
    trace = run(case, rows)
    states = trace.states
    assert ((states.positions >= 0).sum(-1) <= case.bound).all()
    assert states.positions.shape[-1] == RULES[case.policy][0].slots(case.bound)
    for b in range(B):
        q, k, v = rows.row(b)
        k = np.repeat(k, states.keys.shape[3] // K, 1)
        v = np.repeat(v, states.keys.shape[3] // K, 1)
        keys = k if case.placement != "absolute" else rope(k, np.arange(len(k))[:, None])
        for s, positions in enumerate(states.positions[-1, 0, b]):
            tokens = held(positions)
            assert len(set(tokens)) == len(tokens)
            assert len(tokens) == min(len(q), case.bound)
            slots = np.flatnonzero(positions >= 0)
            for head in range(states.keys.shape[3]) if len(states.positions[-1, 0, b]) == 1 else [s]:
                at = positions[slots]
                np.testing.assert_allclose(states.keys[-1, 0, b, head, slots], keys[at, head], 1e-5, 1e-5)
                np.testing.assert_array_equal(states.values[-1, 0, b, head, slots], v[at, head])


@pytest.mark.parametrize("case", HISTORIES, ids=name_of)
@few
@given(rows=ragged())
def test_slots_never_move(case: Case, rows: Data) -> None:
    """2, 3: from one call to the next, a token that is still held has its slot, key and value."""
    states = run(case, rows).states
    n = 0
    for before, after in zip(range(len(states.positions) - 1), range(1, len(states.positions)), strict=True):
        old, new = states.positions[before, 0], states.positions[after, 0]  # [B, P, S]
        stays = (old >= 0) & (old == new)
        n += stays.sum()
        for b, s in np.ndindex(old.shape[:2]):
            assert set(held(old[b, s])) & set(held(new[b, s])) == set(old[b, s][stays[b, s]].tolist())
        stays = np.broadcast_to(stays, states.keys.shape[2:5])
        np.testing.assert_array_equal(states.keys[before, 0][stays], states.keys[after, 0][stays])
        np.testing.assert_array_equal(states.values[before, 0][stays], states.values[after, 0][stays])
    assert n > 0 or rows.valid.sum(1).max() < 2 or case.mode == "pieces"


@every
@few
@given(rows=ragged(), other=ragged(), nobody=st.booleans())
def test_rows_are_independent(case: Case, rows: Data, other: Data, nobody: bool) -> None:
    """4: what stands in the other rows changes nothing; nothing at all may stand there."""
    together = run(case, rows)
    for b, mixed in one_row_kept(rows, other, nobody):
        alone = run(case, mixed)
        np.testing.assert_allclose(alone.out[b], together.out[b], 1e-5, 1e-5)
        np.testing.assert_array_equal(alone.states.positions[:, :, b], together.states.positions[:, :, b])
        for x, y in zip(jax.tree.leaves(alone.states.stats), jax.tree.leaves(together.states.stats), strict=True):
            np.testing.assert_allclose(x[:, :, b], y[:, :, b], 1e-5, 1e-5)


@pytest.mark.parametrize("case", [Case("tova"), Case("h2o", "chunked")], ids=name_of)
@few
@given(rows=ragged())
def test_a_batch_equals_batches_of_one(case: Case, rows: Data) -> None:
    together = run(case, rows)
    for b in range(B):
        alone = run(case, Data(*(x[b : b + 1] for x in rows)))
        np.testing.assert_allclose(alone.out[0], together.out[b], 1e-5, 1e-5)
        row = jax.tree.map(lambda x, b=b: x[:, b : b + 1], together.last.layered())
        same_tokens(alone.last, replace(together.last, **row), exactly=False)


@every
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_padding_changes_nothing(case: Case, rows: Data, seed: int) -> None:
    """4: reading nothing leaves every token, number and slot as it is."""
    before = run(case, rows).last
    after = run(case, data(seed)._replace(valid=np.zeros((B, T), bool)), before)
    np.testing.assert_array_equal(after.last.positions, before.positions)
    same_tokens(after.last, before)
    assert not after.out.any()
    assert (after.freed == -1).all()


@every
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_the_order_of_slots_has_no_meaning(case: Case, rows: Data, seed: int) -> None:
    """5."""
    if case.policy == "full" and case.window is None:
        rows.valid[:, 5:] = False  # a second reading must fit
    start, more = run(case, rows).last, data(seed, scale=0.5)._replace(valid=rows.valid)
    shuffled = permuted(start, np.random.default_rng(seed))
    one, two = (run(case, more, state, first=T) for state in (start, shuffled))
    np.testing.assert_allclose(one.out, two.out, 1e-4, 1e-4)
    same_tokens(one.last, two.last, exactly=False)


@every
@pytest.mark.parametrize("n", [1, C - 1, C, C + 1, C + 2, T])
def test_nothing_goes_before_the_state_is_full(case: Case, n: int) -> None:
    """The first token goes when there is no room for it, and then exactly one."""
    rows = data(n)
    rows = rows._replace(valid=np.broadcast_to(np.arange(T) < n, (B, T)))
    trace = run(case, rows)
    freed = (trace.freed >= 0).sum((0, 3))
    expires = 0 if case.window is None else max(n - case.window, 0)
    np.testing.assert_array_equal(freed, max(n - case.bound - expires, 0))
    assert ((trace.last.positions >= 0).sum(-1) == min(n, case.bound)).all()


@pytest.mark.parametrize("case", [c for c in HISTORIES + WHOLE if c.policy.startswith("tova")], ids=name_of)
def test_of_equals_the_older_stay(case: Case) -> None:
    """6: all keys score alike, so that each new token is the youngest of the worst."""
    rows = data(0)
    rows = rows._replace(q=np.zeros_like(rows.q))
    for positions in run(case, rows).last.positions[0].reshape(-1, C + 1):
        first = 0 if case.window is None else T - case.window
        assert held(positions) == list(range(first, first + C))


@pytest.mark.parametrize("name", ["tova", "h2o", "streaming-before", "full", "random"])
def test_a_scan_equals_steps(name: str) -> None:
    """7: a segment read in one call is what single tokens give."""
    for seed in range(5):
        rows = data(seed)
        steps, scan = run(Case(name, "steps"), rows), run(Case(name), rows)
        np.testing.assert_allclose(steps.out, scan.out, 1e-5, 1e-5)
        np.testing.assert_array_equal(steps.freed, scan.freed)
        np.testing.assert_array_equal(steps.died, scan.died)
        np.testing.assert_array_equal(steps.last.positions, scan.last.positions)
        same_tokens(steps.last, scan.last, exactly=False)


@pytest.mark.parametrize("name", ["tova", "h2o", "h2o-layer", "window+2", "streaming-before", "random"])
@given(columns=st.lists(st.integers(0, 4), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_block_of_one_token_is_a_step(name: str, columns: list[int], seed: int) -> None:
    """7: the code for blocks, given one token per block wherever in it, does what the code for tokens does."""
    start = run(Case(name, "chunked"), data(seed + 1)).last
    at = [5 * chunk + column for chunk, column in enumerate(columns)]  # one in each of three chunks of 5
    rows = data(seed)
    rows = rows._replace(valid=np.broadcast_to(np.isin(np.arange(T), at), (B, T)))
    steps, blocks = (run(Case(name, mode), rows, start, first=T) for mode in ("steps", "chunked"))
    np.testing.assert_allclose(steps.out, blocks.out, 1e-5, 1e-5)
    same_tokens(steps.last, blocks.last, exactly=False)


@pytest.mark.parametrize("name", ["window+2", "random"])
@given(rows=ragged())
def test_chunks_hold_what_streaming_holds(name: str, rows: Data) -> None:
    """7: where scores do not depend on attention, how the sequence is cut does not matter, nor where padding stands."""
    want = run(Case(name, "steps"), rows).last.positions[0]
    packed = Data(*(np.zeros_like(x) for x in rows))
    for b in range(B):
        for to, x in zip(packed, rows, strict=True):
            to[b, : rows.valid[b].sum()] = x[b, rows.valid[b]]
    for mode, read in (("chunked", rows), ("chunked", packed), ("steps", packed)):
        trace = run(Case(name, mode), read)
        for x, y in zip(trace.last.positions[0].reshape(-1, C + 1), want.reshape(-1, C + 1), strict=True):
            assert held(x) == held(y)


def test_random_is_uniform_and_differs_between_layers_and_heads() -> None:
    counts = np.zeros(T)
    seen = set()
    for layer in range(40):
        start = replace(fresh(Case("random")), layer=jnp.array([layer]))
        for positions in run(Case("random"), data(0), start).last.positions[0, 0]:
            counts[held(positions)] += 1
            seen.add(tuple(held(positions)))
    assert len(seen) > 70  # of 80 sets
    assert 10 < counts.min() <= counts.max() < 50  # 30 expected, standard deviation 4.3


ABSOLUTE = [c for c in HISTORIES + WHOLE if c.placement == "absolute"]


@pytest.mark.parametrize("case", ABSOLUTE, ids=name_of)
@few
@given(rows=ragged())
def test_death_times_as_a_mask(case: Case, rows: Data) -> None:
    """Plain attention under `j <= i < death[j]` is the recurrence."""
    trace = run(case, rows)
    death = deaths(trace)
    if case.window is not None:
        death = np.minimum(death, np.arange(T) + case.window)
    for b in range(B):
        q, k, v = rows.row(b)
        i = np.arange(len(q))
        q, k = rope(q, i[:, None]), rope(k, i[:, None])
        for h in range(H):
            s = {1: 0, K: h // (H // K), H: h}[death.shape[1]]
            alive = (i[None] <= i[:, None]) & (i[:, None] < death[b, s, None, : len(i)])
            assert alive.sum(1).max(initial=0) <= case.bound + T * (case.mode in ("chunked", "one-shot", "pieces")) + 1
            weights = np.where(alive, np.exp(q[:, h] @ k[:, h // (H // K)].T / np.sqrt(D)), 0)
            want = weights / weights.sum(1, keepdims=True) @ v[:, h // (H // K)]
            np.testing.assert_allclose(trace.out[b, rows.valid[b], h], want, 1e-4, 1e-4)


@pytest.mark.parametrize("mode", ["steps", "chunked"])
def test_a_full_cache_never_overflows_silently(mode: str) -> None:
    """Under jit nothing can be raised: what a token gets that found no room is NaN, in its row only."""
    case, rows = Case("full", mode), data(0)
    start = run(case, rows._replace(valid=rows.valid & (np.arange(T) < 4))).last
    more = np.arange(T) < np.array([T, T - 4, 0])[:, None]  # 4 too many, just enough, none
    out = run(case, rows._replace(valid=more), start, first=4).out
    assert np.isnan(out[0, T - 4 :]).all()
    assert np.isfinite(out[0, : T - 6]).all()  # the chunk before the one that is too much
    assert np.isfinite(out[1:]).all()


@pytest.mark.parametrize("case", [Case("window+2", "steps"), Case("streaming-before", "steps")], ids=name_of)
def test_windows_far_into_a_sequence(case: Case) -> None:
    """Beyond 2**24 float32 does not tell neighbouring positions apart."""
    first = 2**24 - 3
    trace = run(case, data(0), first=first)
    for i, positions in enumerate(trace.states.positions[:, 0, 0, 0]):
        assert held(positions) == list(range(first + max(i + 1 - C, 0), first + i + 1))


def test_sinks_stay_beside_a_block_that_fills_the_state() -> None:
    """As in the authors' chat demo, where a turn is a block: the first tokens, and what is newest."""
    rows, n = data(0), C + 1
    begun = run(Case("streaming-before", "steps"), rows._replace(valid=rows.valid & (np.arange(T) < n))).last
    more = rows._replace(valid=rows.valid & (np.arange(T) < T - n))
    after = run(Case("streaming-before", "one-shot"), more, begun, first=n).last
    assert T - n > C
    for row in after.positions[0, :, 0]:
        assert held(row) == [0, 1, *range(T - C + 2, T)]


@pytest.mark.parametrize("name", ["tova", "h2o", "window+2", "streaming-before"])
@pytest.mark.parametrize("mode", ["steps", "chunked"])
def test_bfloat16_state(name: str, mode: str) -> None:
    """Half the bytes; scores, statistics and what comes out stay as precise as what comes in."""
    case, rows = Case(name, mode), data(0, scale=0.5)
    trace, exact = run(case, rows, fresh(case, dtype=jnp.bfloat16)), run(case, rows)
    assert trace.last.keys.dtype == trace.last.values.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(trace.last.stats))
    assert trace.out.dtype == np.float32
    n = C if name in ("tova", "h2o") else T  # as long as both hold the same tokens
    np.testing.assert_allclose(trace.out[:, :n], exact.out[:, :n], atol=0.03)
    assert ((trace.last.positions >= 0).sum(-1) == C).all()


@pytest.mark.parametrize("chunk", [1, 300])
def test_masses_of_a_bfloat16_model_are_summed_in_float32(chunk: int) -> None:
    """In bfloat16 what receives 0.9 at every step would stop at 256, and many tokens would tie."""
    n, policy, rng = 600, policies.H2O(0, "layer"), np.random.default_rng(0)
    draw = lambda heads: rng.standard_normal((1, n, heads, D)) * (np.arange(n) > 0)[:, None, None]
    q, k, v = np.ones((1, n, H, D)), draw(K), draw(K)
    k[:, 0] = 2.0
    positions = np.arange(n, dtype=np.int32)[None]

    @partial(jax.jit, static_argnames="dtype")
    def read(q: jax.Array, k: jax.Array, v: jax.Array, dtype: str) -> KVState:
        q, k, v = (x.astype(jnp.bfloat16).astype(dtype) for x in (q, k, v))
        state = init_state(DecoderConfig(8, 8, 8, 1, H, K, D), policy, C, dtype=dtype)[0]
        return advance(q, k, v, jnp.asarray(positions), state, 0, policy, chunk=chunk).state

    wide, narrow = (read(q, k, v, dtype) for dtype in ("float32", "bfloat16"))
    assert narrow.stats.dtype == jnp.float32
    assert narrow.stats.max() > 300
    np.testing.assert_array_equal(narrow.positions, wide.positions)
    np.testing.assert_allclose(narrow.stats, wide.stats, 1e-4)


def test_gradients() -> None:
    """They reach the tokens that are held, and those only; the choice of what to forget has none."""
    rows, policy = data(1), RULES["tova"][0]

    @jax.jit
    def gradients(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        def at(k: jax.Array, v: jax.Array) -> jax.Array:
            q, positions = jnp.asarray(rows.q), jnp.asarray(rows.positions)
            out = advance(q, k, v, positions, fresh(Case("tova")), 0, policy, rotate=ROPE).out
            return (out * (jnp.arange(T) == t)[:, None, None] * jnp.asarray(data(2).q)).sum()

        return jax.grad(at, (0, 1))(jnp.asarray(rows.k), jnp.asarray(rows.v))

    trace = run(Case("tova"), rows)
    death = deaths(trace)[:, 0]
    for t in (3, C, C + 4, T - 1):
        seen = (np.arange(T) <= t) & (t < death)  # [B, T]
        assert seen.sum() == B * min(t + 1, C + 1)
        for gradient in gradients(jnp.asarray(t)):
            assert np.isfinite(gradient).all()
            np.testing.assert_array_equal(np.abs(gradient).max((2, 3)) > 0, seen)


@pytest.mark.parametrize(("wrong", "says"), [
    (dict(layer=1), "0 to 0, not 1"),
    (dict(layer=-1), "0 to 0, not -1"),  # its keys went nowhere
    (dict(chunk=0), "chunk must be a whole number, at least 1, not 0"),
    (dict(window=0), "at least 1 token, not 0"),
    (dict(kv_heads=1), "has 3 rows, 2 heads in 1 sets, no pool; .* needs 3 rows, 1 heads"),
    (dict(rows=1), "has 1 rows, .* needs 3 rows"),
    (dict(policy=policies.TOVA("pool")), "no pool; .* a pool"),
    (dict(policy=policies.TOVA("kv_head")), "in 1 sets, .* in 2 sets"),
    (dict(v=jnp.zeros((B, 1, 1, D))), "keys and values"),
])  # fmt: skip
def test_what_does_not_fit_is_told(wrong: dict[str, Any], says: str) -> None:
    """Before anything is computed; some of it gave numbers."""
    wrong = dict(wrong)
    rows = data(0, wrong.pop("kv_heads", K))
    token = {name: jnp.asarray(getattr(rows, name)[:, :1]) for name in ("q", "k", "v", "positions")}
    usual = dict(token, state=fresh(Case("tova"), wrong.pop("rows", B)), layer=0, policy=RULES["tova"][0])
    with pytest.raises(ValueError, match=says):
        inspect.unwrap(advance)(**(usual | wrong))


def test_a_placement_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="absolute, slot, compact, not 'nowhere'"):
        inspect.unwrap(check_placed)(policies.TOVA(), "nowhere")


@pytest.mark.parametrize(("made", "given"), [("tova", "window"), ("window", "tova"), ("tova", "snapkv+4-layer")])
def test_a_state_of_another_policy_of_the_same_shape_is_told(made: str, given: str) -> None:
    config = DecoderConfig(8, 8, 8, 1, 2, 2, 4)
    mine, other = policies.get_policy(made), policies.get_policy(given)
    (state,) = init_state(config, mine, 4)
    q, at = jnp.ones((1, 1, 2, 4)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="the state was not made for policy"):
        advance(q, q, q, at, state, 0, other)
    advance(q, q, q, at, state, 0, mine)
