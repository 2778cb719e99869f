"""What becomes of evicted tokens: definitions, the numbers of kvpress, and what holds whatever is read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence.harness import (
    FAST_COMPILE,
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
    _run,
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
from recurrence.test_official import PROMPT, SLOTS, llama, step
from tiny import candidates

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.policies.cache_view import Evicted, LayerContext
from jaxcompress.policies.draws import per_token
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.reduction import Reduction
from jaxcompress.policies.reductions.merge import cam, d2o, merge_nearest, merge_weighted
from jaxcompress.policies.reductions.nearest import BLOCK
from jaxcompress.policies.reductions.reduced import with_reduce
from jaxcompress.policies.reductions.summarise import low_rank, mean_slots, random_features
from jaxcompress.recurrence.advance import advance
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.storage import load_vectors

from . import reference
from .test_kvpress import numbers

REDUCES = {
    "nearest": merge_nearest(), "weighted": merge_weighted(), "cam": cam(2), "d2o": d2o(), "means": mean_slots(2),
    "low_rank": low_rank(3),
}  # fmt: skip
SUMMARIES = ("means", "low_rank")
# Every reduction by steps and by chunks, every kind of scope under a merge and under a summary.
STEPS = [
    "tova/nearest", "h2o-kv_head/weighted", "tova-query_head/cam", "window+2/d2o", "window/means", "tova-pool/low_rank",
]  # fmt: skip
CHUNKED = [
    "tova-pool/nearest", "tova/weighted", "window+2/cam", "random/d2o", "tova-pool/means", "tova-query_head/low_rank",
    "window/means",
]  # fmt: skip
AT_ONCE = ["every-tova/weighted"]
for _name in (*STEPS, *CHUNKED, *AT_ONCE):
    _base, _reduce = _name.split("/")
    RULES[_name] = with_reduce(RULES[_base][0], REDUCES[_reduce]), None
CASES = [*(Case(name, "steps") for name in STEPS + AT_ONCE), *(Case(name, "chunked") for name in CHUNKED)]
every = pytest.mark.parametrize("case", CASES, ids=name_of)
few = settings(max_examples=4)  # of three rows each
exactly = np.testing.assert_array_equal
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def same(a: KVState, b: KVState) -> None:
    """Two states of one layer hold the same tokens with the same numbers, in whatever slots, and the same memory."""
    for row, s in np.ndindex(*a.positions.shape[1:3]):
        one, two = tokens_of(a, row, s), tokens_of(b, row, s)
        assert one.keys() == two.keys()
        i, j = list(one.values()), [two[token] for token in one]
        for x, y in zip(jax.tree.leaves(a.slotted()), jax.tree.leaves(b.slotted()), strict=True):
            for head in range(x.shape[2]) if a.positions.shape[2] == 1 else [s]:
                close(x[0, row, head][i], y[0, row, head][j])
    for x, y in zip(jax.tree.leaves(a.memory), jax.tree.leaves(b.memory), strict=True):
        close(x, y)


# Definitions


def absorbed(reduce: Reduction, k: np.ndarray, v: np.ndarray, kept: np.ndarray, stats: Any, memory: Any = None) -> Any:
    """Reduces all but `kept` [K, n] of one sequence [T, K, D], with free slots and nothing in between, in any order.

    stats: [K, T]. Returns what is held in the order of `kept`, and the memory.
    """
    rng, (tokens, heads, width) = np.random.default_rng(0), k.shape
    n, m = kept.shape[1] + 3, tokens - kept.shape[1] + 3
    memory = reduce.memory(1, heads, width) if memory is None else memory
    sides = []
    for room in (n, m):
        sides.append(dict(
            keys=rng.standard_normal((1, heads, room, width)).astype(np.float32),
            values=rng.standard_normal((1, heads, room, width)).astype(np.float32),
            positions=np.full((1, heads, room), -1, np.int32), stats=np.zeros((1, heads, room), np.float32),
        ))  # fmt: skip
    slot = np.zeros_like(kept)
    for g, at in enumerate(kept):
        gone = np.setdiff1d(np.arange(tokens), at)[::-1]  # the newest first
        slot[g] = rng.permutation(n)[: len(at)]
        for side, these, here in ((sides[0], at, slot[g]), (sides[1], gone, np.arange(len(gone)))):
            side["keys"][0, g, here], side["values"][0, g, here] = k[these, g], v[these, g]
            side["positions"][0, g, here], side["stats"][0, g, here] = these, stats[g, these]

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def absorb(stay: Any, gone: Any, memory: Any) -> Any:
        held = candidates(stay["keys"], stay["values"], stay["positions"], memory=memory)
        held = held._replace(context=held.context._replace(rotate=ROPE))
        return reduce.absorb(stay["stats"], held, Evicted(**gone))

    done = jax.tree.map(np.asarray, absorb(*sides, memory))
    close(done.values[~done.changed], sides[0]["values"][~done.changed])
    pick = lambda x: np.stack([x[0, g][at] for g, at in enumerate(slot)])
    return pick(done.values).swapaxes(0, 1), pick(done.stats), done.memory


def sequence(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k and v [T, K, D], kept [K, 12]."""
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((tokens, K, D)).astype(np.float32) for _ in range(2))
    kept = np.stack([np.sort(rng.permutation(tokens)[:12]) for _ in range(K)])
    return k, v, kept


MANY = [20, 12 + 2 * BLOCK + 7]  # in one block, in several


@pytest.mark.parametrize(("tokens", "threshold"), [(MANY[0], 0.4), (MANY[1], 0.0)])
def test_nearest_equals_the_definition(tokens: int, threshold: float) -> None:
    k, v, kept = sequence(tokens)
    got, _, _ = absorbed(merge_nearest(threshold), k, v, kept, np.zeros((K, tokens)))
    close(got, reference.merging(k, v, kept, threshold))


@pytest.mark.parametrize("tokens", MANY)
def test_weighted_equals_the_definition(tokens: int) -> None:
    """Slots that stand for several already."""
    k, v, kept = sequence(tokens)
    size = np.random.default_rng(1).integers(1, 9, (K, tokens)).astype(np.float32)
    got, sizes, _ = absorbed(merge_weighted(), k, v, kept, size)
    for g, at in enumerate(kept):
        gone = np.setdiff1d(np.arange(tokens), at)
        target = reference.cosine(k[gone, g], k[at, g]).argmax(-1)
        for j, t in enumerate(at):
            those = [t, *gone[target == j]]
            close(sizes[g, j], size[g, those].sum())
            close(got[j, g], np.average(v[those, g], 0, size[g, those]))


def test_of_equals_the_oldest_is_joined() -> None:
    k, v, kept = sequence(20)
    _, sizes, _ = absorbed(merge_weighted(), np.ones_like(k), v, kept, np.ones((K, 20)))
    exactly(sizes, np.broadcast_to([9.0] + [1.0] * 11, (K, 12)))


@pytest.mark.parametrize("tokens", MANY)
def test_cam_equals_the_definition(tokens: int) -> None:
    k, v, kept = sequence(tokens)
    mass = np.random.default_rng(1).exponential(size=(K, tokens)).astype(np.float32)
    mass[:, ::5] = 0
    every = np.broadcast_to(np.arange(tokens, dtype=np.int32), (1, K, tokens))
    by_head = k.swapaxes(0, 1)[None]
    draw = np.asarray(jax.jit(lambda at: per_token(7, candidates(by_head, by_head, at)))(every))[0]
    got, _, _ = absorbed(cam(5, seed=7), k, v, kept, mass)
    want = reference.cam(v, kept, mass, draw, 5)
    close(got, want)
    assert np.abs(want - np.stack([v[at, g] for g, at in enumerate(kept)], 1)).max() > 0.1


@pytest.mark.parametrize("tokens", MANY)
def test_d2o_equals_the_definition(tokens: int) -> None:
    """A second eviction is measured by the first one's threshold; another sequence is not."""
    k, v, kept = sequence(tokens)
    nothing = np.zeros((K, tokens))
    got, _, memory = absorbed(d2o(), k, v, kept, nothing)
    want, limit = reference.d2o(k, v, kept, weigh="paper")
    close(got, want)
    close(memory.threshold[0], limit)
    k, v, kept = sequence(tokens, seed=1)
    later, _, memory = absorbed(d2o(0.3, 0.7), k, v, kept, nothing, memory)
    want, limit = reference.d2o(k, v, kept, limit, 0.3, 0.7, weigh="paper")
    close(later, want)
    close(memory.threshold[0], limit)
    fresh, _, _ = absorbed(d2o(0.3, 0.7), k, v, kept, nothing)
    close(fresh, reference.d2o(k, v, kept, None, weigh="paper")[0])
    assert tokens < BLOCK or np.abs(fresh - later).max() > 1e-3


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_kvpress(name: str) -> None:
    """MergingPress around KnormPress, a prompt read at once."""
    (model, ids), z = llama(name), numbers(name)
    policy = with_reduce(policies.KNorm(), merge_nearest())
    state = init_state(model.config, policy, SLOTS, batch=len(ids))
    (part,) = step(model, jnp.asarray(ids[:, :PROMPT]), state, policy, chunk=PROMPT).state
    order = np.argsort(np.where(part.positions < 0, PROMPT, part.positions), -1)[..., :SLOTS]
    exactly(np.take_along_axis(part.positions, order, -1), np.stack([z[f"merge_knorm/keep{i}"] for i in range(3)]))
    values = np.take_along_axis(part.values, order[..., None], 3)
    want = np.stack([z[f"merge_knorm/v{i}"] for i in range(3)])
    assert np.abs(values - want).max() <= 1e-5 * np.abs(want).max()
    before = np.stack([np.take_along_axis(z[f"full/v{i}"], order[i][..., None], 2) for i in range(3)])
    assert np.abs(want - before).max() > 0.1


@pytest.mark.parametrize("name", ["tova/nearest", "window+2/d2o"])
def test_a_step_merges_what_it_evicts(name: str) -> None:
    """In the recurrence: from one state to the next."""
    rows = data(3)
    states = run(Case(name, "steps"), rows).states
    limit = None
    merged = 0
    for t in range(C, T):
        for b in range(B):
            before, after = (tokens_of(jax.tree.map(lambda x, i=i: x[i], states), b, 0) for i in (t - 1, t))
            at = [position for _, position in sorted(before)] + [t]
            kept = np.array([[i for i, position in enumerate(at) if (0, position) in after]] * K)
            k = rope(rows.k[b], np.arange(T)[:, None])[at]
            v = np.stack([states.values[t - 1, 0, b, :, before[0, p]] for p in at[:-1]] + [rows.v[b, t]])
            if name == "tova/nearest":
                want = reference.merging(k, v, kept)
            else:
                old = None if t == C else states.memory[1].threshold[t - 1, 0, b]
                want, limit = reference.d2o(k, v, kept, old, weigh="paper")
                close(states.memory[1].threshold[t, 0, b], limit)
            got = np.stack([states.values[t, 0, b, :, after[0, at[i]]] for i in kept[0]])
            close(got, want)
            merged += (np.abs(want - v[kept[0]]).max((0, 2)) > 1e-3).sum()
    assert merged > 10
    assert limit is None or not np.any(states.memory[1].threshold[C - 1])


# What holds whatever is read


@every
@few
@given(rows=ragged())
def test_keys_stay_and_values_are_kept(case: Case, rows: Data) -> None:
    """No merge touches a key, no summary a value; the weighted mean of all values stays what it was."""
    state, kind = run(case, rows).last, case.policy.split("/")[1]
    pool = RULES[case.policy][0].scope == "pool"
    for b, s in np.ndindex(*state.positions.shape[1:3]):
        _, k, v = rows.row(b)
        for (owner, position), slot in tokens_of(state, b, s).items():
            for head in range(state.keys.shape[2]) if state.positions.shape[2] == 1 else [s]:
                kv = owner if pool else head * K // state.keys.shape[2]
                close(state.keys[0, b, head, slot], rope(k[position, kv], position))
                if kind in SUMMARIES:
                    exactly(state.values[0, b, head, slot], v[position, kv])
    if kind == "weighted":
        size = np.asarray(state.stats[1])
        size = np.moveaxis(size, -1, 2)[:, :, :, 0] if size.ndim == 5 else size  # [1, B, K, S]
        size = np.where(state.positions >= 0, size, 0)
        total = np.einsum("bks,bksd->bkd", size[0], state.values[0])
        exactly(size.sum((0, 3)), np.broadcast_to(rows.valid.sum(1)[:, None], (B, K)))
        close(total, np.stack([rows.row(b)[2].sum(0) for b in range(B)]), rtol=1e-3, atol=1e-3)


@every
@few
@given(rows=ragged(), other=ragged(), nobody=st.booleans())
def test_rows_are_independent(case: Case, rows: Data, other: Data, nobody: bool) -> None:
    together = run(case, rows)
    for b, mixed in one_row_kept(rows, other, nobody):
        alone = run(case, mixed)
        np.testing.assert_allclose(alone.out[b], together.out[b], 1e-5, 1e-5)
        for x, y in zip(jax.tree.leaves(alone.last.layered()), jax.tree.leaves(together.last.layered()), strict=True):
            np.testing.assert_allclose(x[:, b], y[:, b], 1e-5, 1e-5)


@every
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_padding_changes_nothing(case: Case, rows: Data, seed: int) -> None:
    """Reading nothing leaves all as it is. By single tokens, it does not matter where they stand."""
    before = run(case, rows).last
    after = run(case, data(seed)._replace(valid=np.zeros((B, T), bool)), before)
    same(after.last, before)
    assert not after.out.any()
    if case.mode == "chunked":  # chunks are cut by columns, so that packing changes what is read together
        return
    for side in (slice(None), slice(None, None, -1)):
        packed = Data(*(np.zeros_like(x) for x in rows))
        for b in range(B):
            where = np.sort(np.arange(T)[side][: rows.valid[b].sum()])
            for to, x in zip(packed, rows, strict=True):
                to[b, where] = x[b, rows.valid[b]]
        same(run(case, packed).last, before)


@every
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_the_order_of_slots_has_no_meaning(case: Case, rows: Data, seed: int) -> None:
    start, more = run(case, rows).last, data(seed, scale=0.5)._replace(valid=rows.valid)
    shuffled = permuted(start, np.random.default_rng(seed))
    at = rows.valid.sum(1, keepdims=True)
    one, two = (run(case, more, replace(state, seen=at[:, 0]), first=at) for state in (start, shuffled))
    np.testing.assert_allclose(one.out, two.out, 1e-3, 1e-3)
    same(one.last, two.last)


@pytest.mark.parametrize("name", ["h2o-kv_head/weighted", "window/means"])
def test_a_scan_equals_steps(name: str) -> None:
    for seed in range(3):
        steps, scan = run(Case(name, "steps"), data(seed)), run(Case(name), data(seed))
        np.testing.assert_allclose(steps.out, scan.out, 1e-5, 1e-5)
        same(steps.last, scan.last)


@few
@given(rows=ragged())
def test_means_do_not_depend_on_chunks(rows: Data) -> None:
    """What goes together joins one after the other, the oldest first, as if it had gone so."""
    steps, chunks = (run(Case("window/means", mode), rows).last for mode in ("steps", "chunked"))
    for x, y in zip(steps.memory[1], chunks.memory[1], strict=True):
        close(x, y)


@every
def test_nothing_changes_before_something_goes(case: Case) -> None:
    rows = data(1)
    rows = rows._replace(valid=np.broadcast_to(np.arange(T) < C, (B, T)))
    done = run(case, rows)
    np.testing.assert_allclose(done.out[:, :C], full_attention(*rows[1:], ROPE)[:, :C], 1e-5, 1e-5)
    assert (done.freed == -1).all()
    assert not any(np.any(x) for x in jax.tree.leaves(done.last.memory))


# Where nothing is lost


def attend(policy: Policy, q: Any, k: Any, v: Any, *, chunk: int = 1, turn: Any = ROPE, capacity: int = C) -> Any:
    """out [B, T, H, D] of a sequence read into a fresh state."""
    state = init_state(DecoderConfig(8, 8, 8, 1, H, K, D), policy, capacity, batch=q.shape[0])[0]
    at = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return advance(q, k, v, at, state, 0, policy, chunk=chunk, rotate=turn).out


jit_attend = jax.jit(attend, static_argnames=("chunk", "turn", "capacity"), compiler_options=FAST_COMPILE)
UNTURNED = lambda x, positions: x


def full_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, turn: Any) -> np.ndarray:
    """[B, T, H, D]"""
    at = np.broadcast_to(np.arange(q.shape[1])[:, None], (*q.shape[:2], 1))
    q, k = (np.asarray(turn(jnp.asarray(x), jnp.asarray(at)), np.float64) for x in (q, k))
    k, v = np.repeat(k, H // K, 2), np.repeat(v, H // K, 2)
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D)
    weights = reference.softmax(np.where(np.tri(q.shape[1], dtype=bool), logits, -np.inf))
    return np.einsum("bhts,bshd->bthd", weights, v)


def test_merging_equal_tokens_changes_nothing() -> None:
    """Every token comes again and again: the state stands for all of them, as attention over all shows."""
    rows = data(5)
    again = np.arange(T) % C
    k, v = rows.k[:, again], rows.v[:, again]
    out = jit_attend(with_reduce(policies.Window(), merge_weighted()), rows.q, k, v, turn=UNTURNED)
    np.testing.assert_allclose(out, full_attention(rows.q, k, v, UNTURNED), 2e-6, 2e-6)


def test_merging_tokens_of_equal_key_loses_nothing() -> None:
    """The values of equal keys may differ: only their mean is seen."""
    rows = data(5)
    k = rows.k[:, np.arange(T) % C]
    out = jit_attend(with_reduce(policies.Window(), merge_weighted()), rows.q, k, rows.v, turn=UNTURNED)
    np.testing.assert_allclose(out, full_attention(rows.q, k, rows.v, UNTURNED), 1e-5, 1e-5)


YARN = partial(rotate, rope=RopeConfig(theta=50.0, kind="yarn", factor=4.0, original_context=64, attention_factor=1.3))


@pytest.mark.parametrize(("policy", "chunk", "turn"), [
    (policies.Window(), 1, YARN), (policies.TOVA("pool"), 1, ROPE), (policies.H2O(), 5, ROPE),
    (policies.adaptive(policies.KeyDiff("pool")), T, YARN),
], ids=["window", "pool", "query heads", "one-shot pool"])  # fmt: skip
def test_a_mean_of_one_token_is_that_token(policy: Policy, chunk: int, turn: Any) -> None:
    """As many stand-ins as tokens go: nothing is lost, whoever goes and whatever the rotation multiplies by."""
    rows = data(6)
    spread = 2 * T if policy.scope == "pool" else T  # a head of a pool may lose more than others
    out = jit_attend(with_reduce(policy, mean_slots(spread - C)), rows.q, rows.k, rows.v, chunk=chunk, turn=turn)
    np.testing.assert_allclose(out, full_attention(rows.q, rows.k, rows.v, turn), 1e-4, 1e-5)


def test_a_mean_of_equal_keys_in_one_place_loses_nothing() -> None:
    rows = data(7)
    k = np.where((np.arange(T) < T - C)[:, None, None], rows.k[:, :1], rows.k)  # of all that go
    out = jit_attend(with_reduce(policies.Window(), mean_slots(1)), rows.q, k, rows.v, turn=UNTURNED)
    np.testing.assert_allclose(out, full_attention(rows.q, k, rows.v, UNTURNED), 1e-5, 1e-5)


@pytest.mark.parametrize("turn", [ROPE, YARN], ids=["plain", "yarn"])
def test_means_are_of_keys_before_rotation(turn: Any) -> None:
    """One key at many positions is that key at their mean position; rotated keys would have cancelled out."""
    count, rng = 9, np.random.default_rng(0)
    key, values = rng.standard_normal(D).astype(np.float32), rng.standard_normal((1, 1, count, D)).astype(np.float32)
    at = np.arange(1, 2 * count, 2, dtype=np.int32)
    context = LayerContext(turn, "absolute", None, (1, 1), (0,))

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def summarised(key: Any, values: Any, at: Any) -> Any:
        reduce, zeros = mean_slots(1), np.zeros((1, 1, 2, D), np.float32)
        held = candidates(
            zeros, zeros, np.array([[[100, -1]]], np.int32), memory=reduce.memory(1, 1, D), context=context
        )
        gone = Evicted(turn(jnp.broadcast_to(key, values.shape), at), values, at[None, None], ())
        memory = reduce.absorb((), held, gone).memory
        assert reduce.summarises
        return memory, reduce.summary(memory, context), turn(key, jnp.float32(count))

    memory, summary, turned = summarised(key, values, at)
    close(memory.keys[0, 0, 0], key)
    close(memory.values[0, 0, 0], values[0, 0].mean(0))
    assert (memory.position.item(), memory.count.item()) == (count, count)
    close(summary.keys[0, 0, 0], turned)
    close(summary.bias.item(), np.log(count))


@pytest.mark.parametrize("chunk", [1, 5])
def test_low_rank_is_linear_attention(chunk: int) -> None:
    """out = (A + phi(q) H) / (Z + phi(q) z)"""
    rows = data(8)
    out = jit_attend(with_reduce(policies.Window(), low_rank(3, seed=4)), rows.q, rows.k, rows.v, chunk=chunk)
    w = np.asarray(random_features(3, D, 4), np.float64)
    phi = lambda x: np.exp(x @ w.T / D**0.25 - (x**2).sum(-1, keepdims=True) / (2 * np.sqrt(D))) / np.sqrt(3)
    at = np.arange(T)[:, None]
    for b, t, h in np.ndindex(B, T, H):
        q, k, v = rope(rows.q[b], at)[t, h], rope(rows.k[b], at)[:, h // 2], rows.v[b, :, h // 2].astype(np.float64)
        first = t // chunk * chunk  # of the chunk: what went before it
        gone = max(first - C, 0)
        a = np.exp(k[gone : t + 1] @ q / np.sqrt(D))
        share = phi(k[:gone]) @ phi(q)
        close(out[b, t, h], (a @ v[gone : t + 1] + share @ v[:gone]) / (a.sum() + share.sum()))


def test_random_features_are_right_on_average() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, D)) * 0.7
    w = np.asarray(random_features(20000, D, 0), np.float64) / D**0.25
    phi = lambda x: np.exp(w @ x - x @ x / (2 * np.sqrt(D)))
    np.testing.assert_allclose((phi(q) * phi(k)).mean(), np.exp(q @ k / np.sqrt(D)), rtol=0.03)
    close(w[:D] @ w[:D].T * (1 - np.eye(D)), np.zeros((D, D)))


# Gradients, precision, cost


@pytest.mark.parametrize("name", REDUCES)
def test_gradients_of_reducing(name: str) -> None:
    """Finite with zero vectors on either side, and they reach values that go."""
    reduce, rng = REDUCES[name], np.random.default_rng(0)
    k, v = (rng.standard_normal((1, K, 9, D)).astype(np.float32) for _ in range(2))
    k[:, :, [0, 1, 5, 6]] = v[:, :, [0, 2, 5, 7]] = 0
    at = jnp.broadcast_to(
        jnp.array([5, 8, 6, -1, -1, 9, 7, 4, 3], jnp.int32), (1, K, 9)
    )  # five that stay, four that go

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def gradients(k: Any, v: Any) -> Any:
        def read(k: Any, v: Any) -> Any:
            held = candidates(k[:, :, :5], v[:, :, :5], at[:, :, :5], memory=reduce.memory(1, K, D))
            held = held._replace(context=held.context._replace(rotate=ROPE))
            ones = jnp.ones((1, K, 9))
            done = reduce.absorb(ones[:, :, :5], held, Evicted(k[:, :, 5:], v[:, :, 5:], at[:, :, 5:], ones[:, :, 5:]))
            seen = () if not reduce.summarises else reduce.summary(done.memory, held.context)
            return sum((jnp.where(jnp.isfinite(x), x, 0) ** 2).sum() for x in jax.tree.leaves((done.values, seen)))

        return jax.grad(read, (0, 1))(k, v)

    by_key, by_value = gradients(k, v)
    assert np.isfinite(by_key).all()
    assert np.isfinite(by_value).all()
    assert np.abs(by_value[:, :, 5:]).max() > 0


@pytest.mark.parametrize("name", ["weighted", "means"])
def test_gradients_through_the_recurrence(name: str) -> None:
    """They reach what was evicted through what it was reduced to."""
    tokens, capacity = 8, 3
    q, k, v = (np.array(x[:1, :tokens]) for x in data(9)[1:])
    k[:, 2] = v[:, 2] = v[:, 3] = k[:, 4] = k[:, 6] = v[:, 6] = 0  # some go, some stay
    policy = with_reduce(policies.Window(), REDUCES[name])

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def gradients(q: Any, k: Any, v: Any) -> Any:
        last = lambda k, v: (attend(policy, q, k, v, capacity=capacity)[:, -1] * q[:, 0]).sum()
        return jax.grad(last, (0, 1))(k, v)

    by_key, by_value = gradients(q, k, v)
    assert np.isfinite(by_key).all()
    assert np.isfinite(by_value).all()
    assert (np.abs(by_value).max((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_only_what_changes_is_stored_anew(dtype: str) -> None:
    """One token goes per step and head, so that at most one value changes; sums are float32."""
    case, rows = Case("tova/nearest", "steps"), data(2)
    exact = run(case, rows).states
    states = _run(case, rows.q, rows.k, rows.v, rows.positions, fresh(case, dtype=dtype)).states
    positions, stored = np.asarray(states.positions), np.asarray(jax.tree.leaves(states.values)[0])
    values = np.asarray(load_vectors(states.values), np.float32)
    changes = 0
    for t in range(1, T):
        stays = (positions[t, 0] == positions[t - 1, 0]) & (positions[t, 0] >= 0)
        changed = (stored[t, 0] != stored[t - 1, 0]).any(-1) & stays
        assert (changed.sum(-1) <= 1).all()
        changes += changed.sum()
    assert changes > B * K * (T - C) // 3
    held = C + 2  # as long as both hold the same tokens
    exactly(positions[:held], exact.positions[:held])
    occupied = np.broadcast_to(exact.positions[:held] >= 0, values[:held].shape[:-1])
    np.testing.assert_allclose(values[:held][occupied], exact.values[:held][occupied], atol=0.03)


def test_summaries_are_counted() -> None:
    config = DecoderConfig(8, 8, 8, 3, H, K, D)
    size = lambda policy: sum(part.nbytes for part in init_state(config, policy, 9, batch=2, dtype=jnp.bfloat16))
    base = size(policies.TOVA())
    assert size(with_reduce(policies.TOVA(), merge_nearest())) == base
    assert size(with_reduce(policies.TOVA(), mean_slots(5))) == base + 3 * 2 * K * 5 * (2 * D + 2) * 4
    assert size(with_reduce(policies.TOVA(), low_rank(5))) == base + 3 * 2 * K * (5 * (D + 1) + 1) * 4
    assert size(with_reduce(policies.TOVA(), merge_weighted())) == base + 3 * 2 * K * 10 * 4


def test_a_prompt_that_is_selected_from_once() -> None:
    policy, rows = with_reduce(policies.once(policies.KNorm(), 4), merge_weighted()), data(4)
    state = init_state(DecoderConfig(8, 8, 8, 1, H, K, D), policy, C, batch=B)[0]
    read = jax.jit(
        lambda q, k, v, at, state: advance(q, k, v, at, state, 0, policy, chunk=T, rotate=ROPE).state,
        compiler_options=FAST_COMPILE,
    )
    held = read(rows.q, rows.k, rows.v, rows.positions, state)
    assert ((held.positions >= 0).sum(-1) == 4).all()
    exactly(np.where(held.positions >= 0, held.stats[1], 0).sum(-1), np.full((1, B, K), T))


# What cannot be


def test_names_and_layers() -> None:
    policy = with_reduce(policies.TOVA(), merge_nearest())
    assert policy == with_reduce(policies.TOVA(), merge_nearest())
    assert policy.name == "tova/merge_nearest"
    assert with_reduce(policies.Window(4), mean_slots(8)).name == "window+4/mean_slots8"
    mixed = with_reduce(policies.per_layer(policies.Full(), policies.TOVA()), merge_nearest())
    assert mixed.layers == (policies.Full(), policy)
    assert policies.protect(policy, first=2).reduction == merge_nearest()


@pytest.mark.parametrize(("policy", "reduce", "message"), [
    (policies.Full(), merge_nearest(), "never forgets"),
    (policies.per_layer(policies.Full(), policies.Full()), merge_nearest(), "never forgets"),
    (policies.StreamingLLM(2, "before"), merge_nearest(), "before it sees"),
    (with_reduce(policies.TOVA(), cam()), merge_nearest(), "already"),
    (with_reduce(policies.TOVA(), mean_slots()), merge_nearest(), "already"),
    (policies.StreamingLLM(2), mean_slots(), "absolute"),
    (policies.StreamingLLM(2), low_rank(), "absolute"),
])  # fmt: skip
def test_what_cannot_be_reduced(policy: Policy, reduce: Reduction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_reduce(policy, reduce)


def test_a_summary_needs_absolute_positions_wherever_it_is_used() -> None:
    with pytest.raises(ValueError, match="absolute"):
        run(Case("window/means", "steps", "slot"), data(0))


@pytest.mark.parametrize("make", [
    lambda: merge_nearest(1.5), lambda: cam(0), lambda: d2o(2.0), lambda: d2o(0.5, -1.0), lambda: mean_slots(0),
    lambda: low_rank(0),
])  # fmt: skip
def test_settings_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError):
        make()
