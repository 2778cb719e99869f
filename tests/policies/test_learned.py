"""Learned policies: against their definitions in NumPy, and what untrained ones are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from recurrence.harness import FAST_COMPILE, ROPE, B, C, D, Data, H, K, T, data, held, permuted, ragged, tokens_of
from recurrence.reference import THETA, rope, softmax

from jaxcompress import policies
from jaxcompress.checkpoints import SavedPolicy, load_policy, save_policy
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.policies import Policy, learned
from jaxcompress.policies.forget_head import ForgetHead, check_head, init_forget_head
from jaxcompress.policies.learned import EPSILON
from jaxcompress.recurrence.advance import advance
from jaxcompress.state.kv_state import KVState

LAYERS, LAYER, WINDOW = 3, 1, 2
CONFIG = DecoderConfig(8, 8, 8, LAYERS, H, K, D)
CUTS = {"streaming": 1, "chunked": 5, "one-shot": T}


def head(outputs: int, *, heads: int = K, width: int = D) -> ForgetHead:
    """Random weights of which no layer or head has the same."""
    fresh = init_forget_head(jax.random.key(0), layers=LAYERS, kv_heads=heads, head_dim=width, hidden=5, start=(0.0,))
    rng = np.random.default_rng(outputs)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((LAYERS, heads, *shape)).astype(np.float32))
    return ForgetHead(fresh.inner, draw(5), draw(5, outputs), draw(outputs))


@cache
def policy(name: str) -> Policy:
    kind, _, scope = name.partition("-")
    if kind == "untrained":
        start = learned.LIKE_TOVA
        return policies.Retention(
            init_forget_head(jax.random.key(1), layers=LAYERS, kv_heads=K, head_dim=D, start=start), scope
        )
    scope = scope or "kv_head"
    return policies.DMS(head(2), WINDOW, scope) if kind == "dms" else policies.Retention(head(4), scope)


NAMES = ("dms", "dms-pool", "retention", "retention-layer", "retention-pool")


def fresh(name: str, slots: Any = C, batch: int = B, dtype: Any = jnp.float32) -> tuple[KVState, ...]:
    return init_state(CONFIG, policy(name), slots, batch=batch, dtype=dtype)


def run(name: str, rows: Data, cut: str = "streaming", state: KVState | None = None, first: Any = 0) -> tuple[Any, Any]:
    """out [B, T, H, D] and the state of the middle layer, read into that layer only."""
    state = fresh(name, batch=len(rows.q))[0] if state is None else state
    positions = np.where(rows.valid, rows.positions + first, -1).astype(np.int32)
    out, state = _run(name, cut, rows.q, rows.k, rows.v, positions, state)
    return np.asarray(out), jax.tree.map(np.asarray, state)


def middle(state: KVState) -> KVState:
    return replace(state, **jax.tree.map(lambda x: x[[LAYER]], state.layered()))


@partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST_COMPILE)
def _run(name: str, cut: str, q: Any, k: Any, v: Any, positions: Any, state: KVState) -> Any:
    done = advance(q, k, v, positions, state, LAYER, policy(name), chunk=CUTS[cut], rotate=ROPE)
    return done.out, done.state


def read_by(mine: Policy, rows: Data, slots: int = C, dtype: Any = jnp.float32, **how: Any) -> KVState:
    """The state of all layers after a policy that is used only once."""
    state = init_state(CONFIG, mine, slots, batch=B, dtype=dtype)[0]
    read = partial(advance, layer=LAYER, policy=mine, **{"rotate": ROPE, **how})
    return jax.jit(read, compiler_options=FAST_COMPILE)(rows.q, rows.k, rows.v, rows.positions, state).state


def numbers(weights: ForgetHead, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[n, K, R] of tokens k and v [n, K, D], in float64."""
    w = [np.asarray(x[LAYER], np.float64) for x in weights]
    parts, sizes = [], []
    for x in (k.astype(np.float64), v.astype(np.float64)):
        size = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        parts.append(x / size)
        sizes.append(np.log(size))
    x = np.einsum("nki,kim->nkm", np.concatenate(parts + sizes, -1), w[0]) + w[1]
    return np.einsum("nkm,kmr->nkr", x / (1 + np.exp(-x)), w[2]) + w[3]


def reference(name: str, rows: Data, b: int, cut: str, capacity: int = C) -> list[list[tuple[int, int]]]:
    """What each set of one row holds at the end, as (head, position); the head is 0 where sets have one each."""
    kind, _, scope = name.partition("-")
    q, k, v = (x.astype(np.float64) for x in rows.row(b))
    n, group = len(q), H // K
    told = numbers(head(2 if kind == "dms" else 4), k, v) if n else np.zeros((0, K, 4))
    sets = {"": [[h] for h in range(K)], "layer": [list(range(K))], "pool": [[h] for h in range(K)]}[scope]
    pool, room = scope == "pool", capacity * (K if scope == "pool" else 1)
    kept: list[list[int]] = [[] for _ in sets]
    last, total = np.zeros((len(sets), n)), np.zeros((len(sets), n))
    columns = np.flatnonzero(rows.valid[b])
    chunk = CUTS[cut]
    for start in range(0, T, chunk):
        piece = [i for i in range(n) if start <= columns[i] < start + chunk]
        if not piece:
            continue
        for s, heads in enumerate(sets):
            seen = kept[s] = kept[s] + piece
            for i in piece:
                there = [j for j in seen if j <= i]
                mass = np.zeros(n)
                for h in [h for g in heads for h in range(g * group, (g + 1) * group)]:
                    keys = rope(k[there, h // group], np.array(there))
                    mass[there] += softmax(keys @ rope(q[i, h], np.array(i)) / np.sqrt(D)) / (group * len(heads))
                last[s] = mass
                total[s] += mass

        def score(s: int, j: int) -> float:
            mine, age = told[j, sets[s]].mean(0), piece[-1] - j + 1  # noqa: B023
            if kind == "dms":
                return np.inf if age <= WINDOW else (told[j, sets[s], 0] + told[j + 1, sets[s], 1]).item()
            log = lambda x: np.log(x + EPSILON)
            return mine[0] + mine[1] * log(last[s, j]) + mine[2] * log(total[s, j] / age) + mine[3] * np.log(age)

        together = [list(range(len(sets)))] if pool else [[s] for s in range(len(sets))]
        for mine in together:
            order = sorted([(-score(s, j), j, s) for s in mine for j in kept[s]])[:room]
            for s in mine:
                kept[s] = sorted(j for _, j, owner in order if owner == s)
    if pool:
        return [[(s, j) for s, mine in enumerate(kept) for j in mine]]
    return [[(0, j) for j in mine] for mine in kept]


@pytest.mark.parametrize("cut", ["streaming", pytest.param("chunked", marks=pytest.mark.slow), "one-shot"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3)
@given(rows=ragged())
def test_against_the_definition(name: str, cut: str, rows: Data) -> None:
    """Ragged rows, padding anywhere, each as if it were alone; only the layer that reads changes."""
    if cut == "one-shot":  # once is enough: chunks of one size are not like those of another
        rows = rows._replace(valid=rows.valid | (np.arange(B) == 0)[:, None])
    out, state = run(name, rows, cut)
    assert np.isfinite(out).all()
    one = middle(state)
    for b in range(B):
        want = reference(name, rows, b, cut)
        got = [sorted(tokens_of(one, b, s)) for s in range(len(want))]
        assert got == want
    assert (np.delete(np.asarray(state.positions), LAYER, 0) == -1).all()


@pytest.mark.parametrize("cut", ["streaming", pytest.param("chunked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scope", ["layer", "kv_head", "pool"])
def test_untrained_retention_is_tova(scope: str, cut: str) -> None:
    rows = data(4)
    _, state = run(f"untrained-{scope}", rows, cut)
    want = read_by(policies.TOVA(scope), rows, chunk=CUTS[cut])
    np.testing.assert_array_equal(state.positions, want.positions)


def test_recent_tokens_are_protected() -> None:
    mine, rows = policies.Retention(head(4), recent=3), data(4)
    kept = read_by(mine, rows).positions
    np.testing.assert_array_equal(
        kept, read_by(policies.protect(policies.Retention(head(4)), recent=3), rows).positions
    )
    assert (kept != read_by(policies.Retention(head(4)), rows).positions).any()
    assert (mine.name, mine.needs) == ("retention-recent3", 4)


def test_untrained_dms_keeps_the_first_and_the_newest() -> None:
    untrained = policies.DMS(init_forget_head(jax.random.key(0), layers=LAYERS, kv_heads=K, head_dim=D), WINDOW)
    state = read_by(untrained, data(0))
    for b, s in np.ndindex(B, K):
        want = [*range(C - WINDOW), *range(T - WINDOW, T)]
        assert held(np.asarray(state.positions[LAYER, b, s])) == want


@pytest.mark.parametrize("kind", ["default", "yarn", "slot", "bfloat16"])
def test_numbers_are_those_of_bare_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However keys are cached; and of each token once, not of every slot at every step."""
    sizes: list[int] = []
    whole = learned.token_numbers
    monkeypatch.setattr(learned, "token_numbers", lambda h, k, v: sizes.append(k.shape[2]) or whole(h, k, v))
    mine = policies.DMS(head(2), 1)
    rows = data(7)
    yarn = dict(kind="yarn", factor=4.0, original_context=8) if kind == "yarn" else {}
    turn = partial(rotate, rope=RopeConfig(theta=THETA, **yarn))
    state = read_by(
        mine, rows, T, jnp.bfloat16 if kind == "bfloat16" else jnp.float32,
        rotate=turn, placement="slot" if kind == "slot" else "absolute",
    )  # fmt: skip
    assert set(sizes) == {1}
    order = np.argsort(np.asarray(state.positions[LAYER]), -1)[..., -T:]
    got = np.take_along_axis(np.asarray(state.stats.before[LAYER]), order, -1)  # [B, K, T]
    assert got.dtype == np.float32
    tolerance = 0.1 if kind == "bfloat16" else 1e-4
    for b in range(B):
        np.testing.assert_allclose(got[b].T, numbers(head(2), rows.k[b], rows.v[b])[..., 1], tolerance, tolerance)


@pytest.mark.parametrize("name", ["dms-pool", "retention"])
def test_the_order_of_slots_has_no_meaning(name: str) -> None:
    _, start = run(name, data(2))
    start = replace(start, seen=np.full(B, T, np.int32))
    shuffled = permuted(start, np.random.default_rng(0))
    one, two = (run(name, data(3), state=state, first=T) for state in (start, shuffled))
    np.testing.assert_allclose(one[0], two[0], 1e-4, 1e-4)
    for b, s in np.ndindex(*one[1].positions.shape[1:3]):
        assert tokens_of(middle(one[1]), b, s).keys() == tokens_of(middle(two[1]), b, s).keys()


@pytest.mark.parametrize("name", ["dms", "retention"])
def test_heads_of_different_capacity(name: str) -> None:
    """Each part of a layer takes the weights of its own heads."""
    rows, group, capacities = data(5), H // K, (C + 2, C - 2)
    parts = fresh(name, [list(capacities)] * LAYERS)
    assert len(parts) == K
    for part in parts:
        (h,) = part.heads
        own = Data(rows.valid, rows.q[:, :, h * group : (h + 1) * group], rows.k[:, :, [h]], rows.v[:, :, [h]])
        _, state = run(name, own, state=part)
        for b in range(B):
            want = reference(name, rows, b, "streaming", capacities[h])[h]
            assert held(np.asarray(state.positions[LAYER, b, 0])) == [j for _, j in want]


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_state(name: str) -> None:
    rows = data(0, scale=0.5)
    out, state = run(name, rows, state=fresh(name, dtype=jnp.bfloat16)[0])
    assert state.keys.dtype == jnp.bfloat16
    assert all(x.dtype in (np.float32, np.int32) for x in jax.tree.leaves(state.stats))
    np.testing.assert_allclose(out[:, :C], run(name, rows)[0][:, :C], atol=0.03)


def test_a_policy_made_of_traced_weights() -> None:
    """Inside a function that is compiled and differentiated; what to forget is a choice, without gradient."""
    rows, weights = data(1), head(4)

    def read(weights: ForgetHead) -> tuple[jax.Array, jax.Array]:
        mine = policies.Retention(weights)
        state = init_state(CONFIG, mine, C, batch=B)[0]
        done = advance(*map(jnp.asarray, (rows.q, rows.k, rows.v, rows.positions)), state, LAYER, mine, rotate=ROPE)
        return done.out.sum(), done.state.positions

    inside = jax.jit(jax.value_and_grad(read, has_aux=True), compiler_options=FAST_COMPILE)
    (_, positions), slope = inside(weights)
    np.testing.assert_array_equal(positions, run("retention", rows)[1].positions)
    assert not any(np.asarray(x).any() for x in slope)


@pytest.mark.parametrize("kind", ["dms", "retention"])
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    settings = dict(scope="pool") | (dict(window=WINDOW) if kind == "dms" else {})
    weights = head(2 if kind == "dms" else 4)
    save_policy(SavedPolicy(kind, dict(settings, slots=[C]), weights._asdict()), tmp_path)
    saved = load_policy(tmp_path)
    assert saved is not None
    again = saved.make()
    mine = policy(f"{kind}-pool")
    assert (again.name, again.scope, again.needs) == (mine.name, mine.scope, mine.needs)
    rows = data(6)
    want = run(f"{kind}-pool", rows, "one-shot")[1].positions
    np.testing.assert_array_equal(read_by(again, rows, chunk=T).positions, want)


def test_wrong_weights_and_settings() -> None:
    with pytest.raises(ValueError, match="unknown learned policy 'tova'; known: dmc, dms, retention"):
        policies.learned_policy("tova", {})
    with pytest.raises(ValueError, match="has the weights inner, .* not inner"):
        policies.learned_policy("dms", {"inner": np.ones(1)})
    with pytest.raises(ValueError, match="retention has no setting window; known: scope, recent"):
        policies.learned_policy("retention", head(4)._asdict(), window=3)
    with pytest.raises(ValueError, match=r"window of 0 tokens"):
        policies.DMS(head(2), 0)
    with pytest.raises(ValueError, match="its scope is kv_head or pool, not layer"):
        policies.DMS(head(2), scope="layer")
    with pytest.raises(ValueError, match="not query_head"):
        policies.Retention(head(4), "query_head")
    with pytest.raises(ValueError, match="0 or more, not -1"):
        policies.Retention(head(4), recent=-1)
    with pytest.raises(ValueError, match=r"dms needs weights .*\[L, K, M, 2\].* not \[3, 2, 18, 5\]"):
        policies.DMS(head(4))
    with pytest.raises(ValueError, match="at least 1 unit, not 0"):
        init_forget_head(jax.random.key(0), layers=1, kv_heads=1, head_dim=4, hidden=0)
    for wrong, says in (
        (head(2, width=4), "2 kv heads of width 4, the model has heads 0 to 1 of width 8"),
        (head(2, heads=1), "1 kv heads of width 8, the model has heads 0 to 1"),
        (ForgetHead(*(x[:2] for x in head(2))), "the weights are for 2 layers, the model has 3"),
    ):
        for made in (policies.DMS(wrong, WINDOW), policies.protect(policies.dmc(wrong))):
            with pytest.raises(ValueError, match=says):
                init_state(CONFIG, made, 20)
    check_head(head(2), layers=LAYERS, kv_heads=K, head_dim=D)
    with pytest.raises(ValueError, match="3 layers of 2 kv heads of width 8, the model has 6 layers of 2 kv heads"):
        check_head(head(2), layers=6, kv_heads=K, head_dim=D)
    with pytest.raises(ValueError, match="at least 65 slots"):
        init_state(CONFIG, policies.DMS(head(2)), 64)
