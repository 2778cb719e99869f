"""What holds for every policy beyond those of `tests/recurrence`, whatever is read and however it is cut."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence.harness import (
    MORE,
    RULES,
    B,
    C,
    Case,
    Data,
    H,
    K,
    T,
    data,
    fresh,
    name_of,
    one_row_kept,
    permuted,
    ragged,
    run,
    tokens_of,
)  # fmt: skip
from recurrence.reference import rope

from jaxcompress.state.kv_state import KVState

few = settings(max_examples=4)  # of three rows each
CASES = [
    pytest.param(Case(name, mode), marks=[pytest.mark.slow] * (mode == "chunked"), id=name_of(Case(name, mode)))
    for name in MORE
    for mode in ("streaming", "chunked")
]
every = pytest.mark.parametrize("case", CASES)


def entries(case: Case) -> int:
    """Slots that one token takes in a set."""
    return case.kv_heads if RULES[case.policy][0].scope == "pool" else 1


def same_tokens(a: KVState, b: KVState) -> None:
    """Two states of one layer hold the same tokens with the same numbers, in whatever slots."""
    for row, s in np.ndindex(*a.positions.shape[1:3]):
        one, two = tokens_of(a, row, s), tokens_of(b, row, s)
        assert one.keys() == two.keys()
        i, j = list(one.values()), [two[token] for token in one]
        for x, y in zip(jax.tree.leaves(a.slotted()), jax.tree.leaves(b.slotted()), strict=True):
            head = s if x.shape[2] > 1 else 0
            np.testing.assert_allclose(x[0, row, head][i], y[0, row, head][j], 1e-4, 1e-4)
    for x, y in zip(jax.tree.leaves(a.memory), jax.tree.leaves(b.memory), strict=True):
        np.testing.assert_allclose(x, y, 1e-3, 1e-3)


@every
@few
@given(rows=ragged())
def test_capacity_and_content(case: Case, rows: Data) -> None:
    """At most `capacity` slots are occupied, by tokens that were read, each with what it was."""
    policy = MORE[case.policy]
    state = run(case, rows).last
    most = C * entries(case)
    for b, s in np.ndindex(*state.positions.shape[1:3]):
        n = int(rows.valid[b].sum())
        held = tokens_of(state, b, s)
        assert len(held) == (state.positions[0, b, s] >= 0).sum()
        assert min(n * entries(case), most - (policy.schedule.frees - 1) * entries(case)) <= len(held) <= most
        _, k, v = rows.row(b)
        for (owner, position), slot in held.items():
            assert position < n
            for head in range(state.keys.shape[2]) if state.positions.shape[2] == 1 else [s]:
                kv = owner if policy.scope == "pool" else head * K // state.keys.shape[2]
                np.testing.assert_allclose(state.keys[0, b, head, slot], rope(k[position, kv], position), 1e-4, 1e-4)
                np.testing.assert_array_equal(state.values[0, b, head, slot], v[position, kv])


@every
@few
@given(rows=ragged(), other=ragged(), nobody=st.booleans())
def test_rows_are_independent(case: Case, rows: Data, other: Data, nobody: bool) -> None:
    """A batch of N is N batches of 1: what stands in the other rows changes nothing."""
    together = run(case, rows)
    for b, mixed in one_row_kept(rows, other, nobody):
        alone = run(case, mixed)
        np.testing.assert_allclose(alone.out[b], together.out[b], 1e-5, 1e-5)
        np.testing.assert_array_equal(alone.states.positions[:, :, b], together.states.positions[:, :, b])


@every
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_padding_on_any_side_changes_nothing(case: Case, rows: Data, seed: int) -> None:
    """Packed to the left, to the right, or torn apart: the same tokens stay. Reading nothing leaves all as it is."""
    before = run(case, rows).last
    after = run(case, data(seed)._replace(valid=np.zeros((B, T), bool)), before)
    same_tokens(after.last, before)
    assert not after.out.any()
    width = {"streaming": T, "chunked": 5}[case.mode]  # what is read together must stay together
    for side in (slice(None), slice(None, None, -1)):
        packed = Data(*(np.zeros_like(x) for x in rows))
        for b, start in np.ndindex(B, -(-T // width)):
            columns = np.arange(T)[start * width : (start + 1) * width]
            mine = columns[rows.valid[b, columns]]
            where = np.sort(columns[side][: len(mine)])
            for to, x in zip(packed, rows, strict=True):
                to[b, where] = x[b, mine]
        same_tokens(run(case, packed).last, before)


@every
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_padding_and_free_slots_may_hold_anything(case: Case, rows: Data, seed: int) -> None:
    """They count in no mean, range, covariance or rank, and nothing is left of a token that had the slot before."""
    rng = np.random.default_rng(seed)
    anything = lambda where, x: np.where(where, rng.uniform(1, 30, x.shape).astype(x.dtype), x)
    clean, at = run(case, rows).last, rows.valid.sum(1, keepdims=True)
    clean = replace(clean, seen=at[:, 0].astype(np.int32))
    free = clean.positions < 0

    def filled(x: np.ndarray) -> np.ndarray:
        where = np.broadcast_to(free, x.shape[:4])
        return anything(where.reshape(*where.shape, *[1] * (x.ndim - 4)), x)

    keys, values, stats = jax.tree.map(filled, (clean.keys, clean.values, clean.stats))
    owner = None if clean.owner is None else np.where(free, K - 1, clean.owner)
    dirty = replace(clean, keys=keys, values=values, stats=stats, owner=owner)
    more = data(seed, scale=0.5)._replace(valid=rows.valid)
    padded = more._replace(**{x: anything(~rows.valid[..., None, None], getattr(more, x)) for x in "qkv"})
    one, two = run(case, more, clean, first=at), run(case, padded, dirty, first=at)
    np.testing.assert_allclose(one.out, two.out, 1e-5, 1e-5)
    same_tokens(one.last, two.last)


@every
def test_nothing_is_left_of_the_text_before(case: Case) -> None:
    """One compiled function, another text in between: bit for bit the same."""
    first, _, again = run(case, data(1)), run(case, data(2)), run(case, data(1))
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


@every
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_heads_may_stand_in_any_order(case: Case, rows: Data, seed: int) -> None:
    """Kv heads with their query heads, and the query heads of each: the same happens, in that order."""
    rng, group = np.random.default_rng(seed), H // K
    heads = np.arange(K) if case.policy == "nacl" else rng.permutation(K)  # which draws for each head
    queries = np.concatenate([head * group + rng.permutation(group) for head in heads])
    moved = rows._replace(q=rows.q[:, :, queries], k=rows.k[:, :, heads], v=rows.v[:, :, heads])
    one, two = run(case, rows), run(case, moved)
    np.testing.assert_allclose(one.out[:, :, queries], two.out, 1e-4, 1e-4)
    order = {"kv_head": heads, "query_head": queries}.get(MORE[case.policy].scope, [0])
    for b, s in np.ndindex(B, len(order)):
        was, now = tokens_of(one.last, b, order[s]), tokens_of(two.last, b, s)
        pool = one.last.owner is not None
        assert was.keys() == {(int(heads[owner]) if pool else 0, position) for owner, position in now}


@every
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_the_order_of_slots_has_no_meaning(case: Case, rows: Data, seed: int) -> None:
    start, more = run(case, rows).last, data(seed, scale=0.5)._replace(valid=rows.valid)
    shuffled = permuted(start, np.random.default_rng(seed))
    at = rows.valid.sum(1, keepdims=True)
    one, two = (run(case, more, replace(state, seen=at[:, 0]), first=at) for state in (start, shuffled))
    np.testing.assert_allclose(one.out, two.out, 1e-3, 1e-3)
    same_tokens(one.last, two.last)


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("n", [1, C - 1, C, C + 1, C + 2])
def test_nothing_goes_before_the_state_is_full(name: str, n: int) -> None:
    case = Case(name)
    rows = data(n)
    rows = rows._replace(valid=np.broadcast_to(np.arange(T) < n, (B, T)))
    freed = (run(case, rows).freed >= 0).sum((0, 2, 3))
    sets = run(case, rows).last.positions.shape[2]
    at_once = MORE[name].schedule.frees
    expected = -(-max(n - C, 0) // at_once) * at_once
    np.testing.assert_array_equal(freed, expected * (K if MORE[name].scope == "pool" else sets))


BLOCKS = [name for name in MORE if not name.startswith("every")]


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=6)
@given(columns=st.lists(st.integers(0, 4), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_block_of_one_token_is_a_step(name: str, columns: list[int], seed: int) -> None:
    """The code for blocks, given one token per block wherever in it, does what the code for tokens does."""
    start = run(Case(name, "chunked"), data(seed + 1)).last
    start = replace(start, seen=np.full(B, T, np.int32))
    at = [5 * chunk + column for chunk, column in enumerate(columns)]  # one in each of three chunks of 5
    rows = data(seed)._replace(valid=np.broadcast_to(np.isin(np.arange(T), at), (B, T)))
    steps, blocks = (run(Case(name, mode), rows, start, first=T) for mode in ("streaming", "chunked"))
    np.testing.assert_allclose(steps.out, blocks.out, 1e-4, 1e-4)
    same_tokens(steps.last, blocks.last)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_degenerate_tokens(name: str) -> None:
    """All keys are zero and attention is even: nothing divides by zero, protection holds, of equals the older stay."""
    rows = data(0)
    flat = rows._replace(q=np.zeros_like(rows.q), k=np.zeros_like(rows.k), v=np.ones_like(rows.v))
    trace = run(Case(name, "chunked"), flat)
    assert np.isfinite(trace.out).all()
    state = trace.last
    for b, s in np.ndindex(*state.positions.shape[1:3]):
        held = sorted({position for _, position in tokens_of(state, b, s)})
        assert len(held) >= C - MORE[name].schedule.frees + 1 or MORE[name].scope == "pool"
        if name in ("knorm", "keydiff", "keydiff-layer"):
            assert held == list(range(C))
        if name == "protect":
            assert held == [0, 1, 2, 3, T - 2, T - 1]


@pytest.mark.parametrize("name", ["snapkv", "keydiff", "expected_attention", "ada-snapkv", "rkv", "every"])
def test_bfloat16_state(name: str) -> None:
    case, rows = Case(name), data(0, scale=0.5)
    trace, exact = run(case, rows, fresh(case, dtype=jnp.bfloat16)), run(case, rows)
    assert trace.last.keys.dtype == trace.last.values.dtype == jnp.bfloat16
    assert trace.out.dtype == np.float32
    np.testing.assert_allclose(trace.out[:, :C], exact.out[:, :C], atol=0.03)


GROUPS = [Case(name, "chunked", kv_heads=(1, 4)[i % 2]) for i, name in enumerate(RULES)]


@pytest.mark.parametrize("case", GROUPS, ids=name_of)
@few
@given(draws=st.data())
def test_groups_ties_and_bfloat16(case: Case, draws: st.DataObject) -> None:
    """One kv head for all query heads, or one for each (two is everywhere else); texts of few different tokens, about
    as long as there is room; a state in bfloat16."""
    policy = RULES[case.policy][0]
    lengths = draws.draw(st.lists(st.sampled_from([0, 1, C - 1, C, C + 1, C + 2, T]), min_size=B, max_size=B))
    words = draws.draw(st.lists(st.integers(0, draws.draw(st.integers(0, T - 1))), min_size=T, max_size=T))
    rows = Data(*(x[:, words] for x in data(draws.draw(st.integers(0, 99)), case.kv_heads)))
    short = np.arange(T) < np.array(lengths)[:, None]
    rows = rows._replace(valid=short[:, ::-1] if draws.draw(st.booleans()) else short)
    read = lambda rows: run(case, rows, fresh(case, dtype=jnp.bfloat16))
    together = read(rows)
    assert np.isfinite(together.out).all()
    assert together.last.keys.dtype == jnp.bfloat16
    most = case.bound * entries(case)
    for b in range(B):
        alone = read(rows._replace(valid=rows.valid & (np.arange(B) == b)[:, None]))
        np.testing.assert_allclose(alone.out[b], together.out[b], 1e-5, 1e-5)
        for s, positions in enumerate(together.last.positions[0, b]):
            tokens, n = tokens_of(together.last, b, s), (positions >= 0).sum()
            assert len(tokens) == n
            assert all(position < lengths[b] for _, position in tokens)
            assert min(lengths[b] * entries(case), most - (policy.schedule.frees - 1) * entries(case)) <= n <= most
            assert tokens == tokens_of(alone.last, b, s)
