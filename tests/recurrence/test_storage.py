"""Quantised states: how far what is stored is from what came in, and that nothing that comes later changes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_tokens, tiny_decoder

from jaxcompress import policies
from jaxcompress.evaluation.perplexity import perplexity
from jaxcompress.evaluation.tracing import trace
from jaxcompress.generation import generate, init_decode_state
from jaxcompress.generation.reconstruction import shrink
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import Policy
from jaxcompress.recurrence.advance import advance
from jaxcompress.state.kv_state import KVState
from jaxcompress.state.storage import (
    DTYPES,
    Quantised,
    _pack,
    _unpack,
    load_vectors,
    store_vectors,
    vector_bytes,
    zeros,
)

from .harness import (
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
    data,
    expected,
    fresh,
    held,
    name_of,
    permuted,
    ragged,
    run,
)
from .reference import rope

CODED = ("float8_e4m3fn", "int8", "int4")
coded = pytest.mark.parametrize("name", CODED)
few = settings(max_examples=5)
NOTHING = 1e-32  # in vectors of such numbers the smallest codes are no normal float32
WIDTH = 8  # of vectors that are not of the harness

_store = jax.jit(lambda x, like: store_vectors(x, like))
_load = jax.jit(load_vectors)


def stored(x: Any, name: str) -> Any:
    return _store(jnp.asarray(x), zeros(x.shape, name))


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def out_of_bounds(x: Any, back: Any, name: str) -> np.ndarray:
    """Where the error is larger than `jaxcompress.state.storage` says; x and back [..., D]."""
    x, back = np.asarray(x, np.float64), np.asarray(back, np.float64)
    most = np.abs(x).max(-1, keepdims=True)
    error = np.abs(back - x)
    most_error = {
        "float32": 0 * most,
        "bfloat16": np.abs(x) / 256,
        "float16": np.abs(x) / 2048 + 2.0**-25,
        "float8_e4m3fn": np.maximum(np.abs(x) / 16, most / 450_000),
        "int8": most / 253,
        "int4": 0.31 * most,
    }[name]
    wrong = error > most_error + NOTHING
    if name == "int4":
        wrong |= np.sqrt(np.square(error).mean(-1, keepdims=True)) > most / 13.9 + NOTHING
    return wrong


@st.composite
def vectors(draw: Any) -> np.ndarray:
    """Some vectors, each of its own kind and magnitude."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    x = rng.standard_normal((6, WIDTH)) * draw(st.sampled_from([1e-37, 1e-30, 1e-6, 1.0, 1e4, 1e30, 1e37]))
    x *= 10.0 ** rng.integers(-2, 3, (6, 1))
    x *= {"as it is": 1.0, "sparse": rng.random(x.shape) < 0.3, "zero": 0.0, "equal": 1 / np.where(x, x, 1)}[
        draw(st.sampled_from(["as it is", "as it is", "sparse", "zero", "equal"]))
    ]
    x[:, draw(st.integers(0, WIDTH - 1))] *= draw(st.sampled_from([1.0, 1.0, 30.0, 1000.0]))
    x = np.clip(x, -3e38, 3e38).astype(np.float32)
    return np.asarray(jnp.asarray(x, jnp.bfloat16)) if draw(st.booleans()) else x


@pytest.mark.parametrize("name", DTYPES)
@settings(max_examples=100)
@given(x=vectors())
def test_round_trip(name: str, x: np.ndarray) -> None:
    x = np.clip(x, -65_000, 65_000) if name == "float16" else x
    codes = stored(x, name)
    back = _load(codes)
    assert back.dtype == (jnp.float32 if name in CODED else name)
    assert not out_of_bounds(x, back, name).any()
    assert (np.asarray(back)[np.asarray(x == 0)] == 0).all()


@coded
@settings(max_examples=100)
@given(x=vectors())
def test_storing_what_was_loaded_changes_nothing(name: str, x: np.ndarray) -> None:
    """Or a state that is stored again, e.g. in another layout, would drift."""
    x = np.where(np.abs(x.astype(np.float32)).max(-1, keepdims=True) < NOTHING, 0, x.astype(np.float32))
    once = stored(x, name)
    assert same(stored(_load(once), name), once)


def test_a_scale_that_is_rounded_up_would_drift() -> None:
    """What the test above is good for: the largest code falls short of 127 steps, and the next scale is another."""
    x = np.random.default_rng(0).standard_normal((1000, WIDTH)).astype(np.float32)
    first = x
    for _ in range(50):
        scale = np.asarray(jnp.asarray(np.abs(x).max(-1, keepdims=True) * (1 + 2**-7) / 127, jnp.bfloat16), np.float32)
        x = np.clip(np.round(x / scale), -127, 127) * scale
    assert out_of_bounds(first, x, "int8").any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@coded
def test_numbers_that_are_not_finite_do_not_vanish(name: str, value: float) -> None:
    x = np.ones((2, WIDTH), np.float32)
    x[0, 3] = value
    back = np.asarray(_load(stored(x, name)))
    assert not np.isfinite(back[0]).all()
    assert np.isfinite(back[1]).all()


def test_every_pair_of_4_bit_codes() -> None:
    codes = np.array([(a, b) for a in range(-8, 8) for b in range(-8, 8)], np.int8)
    packed = _pack(jnp.asarray(codes))
    assert (packed.dtype, packed.shape) == (jnp.uint8, (256, 1))
    assert len(np.unique(packed)) == 256
    np.testing.assert_array_equal(np.concatenate(_unpack(packed), -1), codes)
    wide = jnp.asarray(codes.reshape(32, 16))
    np.testing.assert_array_equal(np.concatenate(_unpack(_pack(wide)), -1), wide)


def test_every_8_bit_float() -> None:
    """All finite ones, times a scale of 1."""
    bits = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    one = np.full(bits.shape, jnp.asarray(1, jnp.bfloat16).view(jnp.uint16), np.uint16)
    back = _load(Quantised(jnp.asarray(bits[:, None]), jnp.asarray(one), "float8_e4m3fn"))
    np.testing.assert_array_equal(np.asarray(back)[:, 0], bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "vector"),
    [("float32", 4 * D), ("bfloat16", 2 * D), ("float16", 2 * D), *zip(CODED, (D + 2, D + 2, D // 2 + 2), strict=True)],
)
def test_bytes(name: str, vector: int) -> None:
    config, slots = DecoderConfig(8, 8, 8, 3, H, K, D), C + 1  # scales are counted
    state = init_state(config, policies.Window(), C, batch=B, dtype=name)
    assert sum(x.nbytes for x in jax.tree.leaves((state[0].keys, state[0].values))) == 2 * 3 * B * K * slots * vector
    rest = 3 * B * slots + B + 3  # positions, seen, layer
    assert sum(part.nbytes for part in state) == 2 * 3 * B * K * slots * vector + 4 * rest
    assert vector_bytes(D, name) == vector
    assert state[0].keys.dtype == name
    assert same(init_state(config, policies.Window(), C, batch=B, dtype=state[0].keys.dtype), state)


@pytest.mark.parametrize("dtype", ["int5", "float64", "float8_e5m2", "uint8", np.int32, "4 bits", None])
@pytest.mark.usefixtures("as_users_call_it")
def test_what_a_state_cannot_be_stored_as(dtype: Any) -> None:
    with pytest.raises(ValueError, match="a state cannot be stored as .*; known: float32, bfloat16, .*, int4"):
        zeros((2, 8), dtype)


def test_a_wrong_dtype_is_noticed_before_anything_is_compiled() -> None:
    model, tova, tokens = tiny_decoder(), policies.TOVA(), random_tokens(1, 12)
    for use in (
        lambda: init_decode_state(model, tova, 4, dtype="int3"),
        lambda: next(generate(model, list(tokens), tova, 4, max_new_tokens=3, dtype="int3")),
        lambda: perplexity(model, tokens, tova, 4, dtype="int3"),
        lambda: trace(model, tokens, tova, 4, prompt=3, dtype="int3"),
    ):
        with pytest.raises(ValueError, match="cannot be stored as int3"):
            use()


def test_4_bits_need_an_even_width() -> None:
    with pytest.raises(ValueError, match="even, not 7"):
        zeros((2, 7), "int4")


# ---- in the recurrence

LONG = 10_000
Again = Callable[[Any], Any]


@partial(jax.jit, static_argnames="again")
def _live(q: Any, k: Any, v: Any, state: KVState, policy: Policy, again: Again | None = None) -> tuple[KVState, Any]:
    """Step by step; also how many slots were not, bit for bit, what they were: when their token came, or before.

    `again`: done to keys and values after every step.
    """

    def step(state: KVState, token: Any) -> Any:
        q, k, v, at = token
        positions = jnp.broadcast_to(at, (q.shape[0], 1))
        after = advance(q, k, v, positions, state, 0, policy, rotate=ROPE).state
        if again is not None:
            after = replace(after, keys=again(after.keys), values=again(after.values))
        stays = (after.positions == state.positions) & (after.positions >= 0)
        came = after.positions == at
        here = ROPE(k, positions[..., None])
        changed = jnp.sum((after.positions >= 0) & ~stays & ~came)  # moved
        for new, old, x in ((after.keys, state.keys, here), (after.values, state.values, v)):
            entered = store_vectors(x.swapaxes(1, 2)[None], new)
            for a, b, c in zip(*map(jax.tree.leaves, (new, old, entered)), strict=True):
                wide = lambda mask, a=a: mask.reshape(*mask.shape, *[1] * (a.ndim - 4))
                changed += jnp.sum(wide(stays) & (a != b)) + jnp.sum(wide(came) & (a != c))
        return after, changed

    state, changed = jax.lax.scan(step, state, (q, k, v, jnp.arange(len(q))))
    return state, changed.sum()


def life() -> tuple[np.ndarray, ...]:
    """10,000 tokens for 2 rows whose keys and values differ much in magnitude: q, k, v [T, B, 1, H or K, D]."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((LONG, 2, 1, heads, D), np.float32) for heads in (H, K, K))
    return q, *(x * 10 ** rng.uniform(-1.5, 1.5, (LONG, 2, 1, 1, 1)).astype(np.float32) for x in (k, v))


def wrong_at_the_end(state: KVState, k: np.ndarray, v: np.ndarray, name: str) -> int:
    """How many numbers of held tokens are too far from what they were."""
    wrong, tokens = 0, np.asarray(state.positions[0, :, 0])
    for b, s in np.argwhere(tokens >= 0):
        at = tokens[b, s]
        key = ROPE(jnp.asarray(k[at, b, 0]), jnp.full(1, at))
        for x, y in ((key, state.keys), (v[at, b, 0], state.values)):
            wrong += out_of_bounds(x, np.asarray(load_vectors(y))[0, b, :, s], name).sum()
    return wrong


@pytest.mark.parametrize("policy", [policies.TOVA(), policies.Window(4)], ids=lambda policy: policy.name)
@coded
def test_a_token_is_quantised_once(name: str, policy: Policy) -> None:
    """From entering to leaving its codes and scale are the same bits, and as close to the original as on the first
    day: over 10,000 steps, in which other tokens of a hundred times its magnitude come and go."""
    q, k, v = life()
    empty = init_state(DecoderConfig(8, 8, 8, 1, H, K, D), policy, 8, batch=2, dtype=name)[0]
    state, changed = _live(q, k, v, empty, policy)
    assert changed == 0
    tokens = np.asarray(state.positions[0, :, 0])
    assert ((tokens >= 0).sum(-1) == 8).all()
    if policy.name == "window+4":
        assert [held(row) for row in tokens] == [[0, 1, 2, 3, *range(LONG - 4, LONG)]] * 2
    assert wrong_at_the_end(state, k, v, name) == 0


def _anew(x: Any) -> Any:
    return store_vectors(load_vectors(x), x)


def _one_scale_per_head(x: jax.Array) -> jax.Array:
    """[L, B, K, S, D], every slot in the steps of the largest one."""
    scale = jnp.abs(x).max((-1, -2), keepdims=True) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1)) * scale


def _rounded_up(x: jax.Array) -> jax.Array:
    scale = (jnp.abs(x).max(-1, keepdims=True) * ((1 + 2**-7) / 127)).astype(jnp.bfloat16).astype(x.dtype)
    return jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1)), -127, 127) * scale


@pytest.mark.parametrize("again", [_one_scale_per_head, _rounded_up])
def test_quantising_at_every_step_would_be_noticed(again: Again) -> None:
    """The same tokens, stored anew after each step in two ways that are not this library's."""
    q, k, v = life()
    policy = policies.Window(4)  # the first four tokens live through all of it
    empty = init_state(DecoderConfig(8, 8, 8, 1, H, K, D), policy, 8, batch=2)[0]
    state, changed = _live(q, k, v, empty, policy, again)
    assert changed > LONG
    assert wrong_at_the_end(state, k, v, "int8") > 0


@coded
def test_even_storing_anew_at_every_step_changes_nothing(name: str) -> None:
    q, k, v = (x[:300] for x in life())
    policy = policies.Window(4)
    empty = init_state(DecoderConfig(8, 8, 8, 1, H, K, D), policy, 8, batch=2, dtype=name)[0]
    (once, _), (anew, changed) = _live(q, k, v, empty, policy), _live(q, k, v, empty, policy, _anew)
    assert changed == 0
    assert same(once, anew)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, 1e-4, 1e-4)


def same_tokens(a: KVState, b: KVState) -> None:
    """In whatever slots."""
    flat = lambda state: state.positions.reshape(-1, state.positions.shape[-1])
    assert [held(x) for x in flat(a)] == [held(x) for x in flat(b)]


TOVA = [(Case("tova", mode), name) for mode in ("steps", "chunked") for name in CODED]
OTHERS = [
    (Case("h2o", "chunked"), "int4"),
    (Case("streaming-before", "chunked", "slot"), "int8"),
    (Case("tova-pool", "steps"), "float8_e4m3fn"),
    (Case("every-ada", "chunked"), "int4"),
]


def every(pairs: list[tuple[Case, str]]) -> Any:
    return pytest.mark.parametrize(("case", "name"), pairs, ids=[f"{name}-{name_of(case)}" for case, name in pairs])


@every(TOVA + OTHERS)
@few
@given(rows=ragged(), other=ragged())
def test_rows_are_independent(case: Case, name: str, rows: Data, other: Data) -> None:
    together = run(case, rows, fresh(case, dtype=name))
    mixed = Data(*(np.array(x) for x in other))
    for to, x in zip(mixed, rows, strict=True):
        to[0] = x[0]
    alone = run(case, mixed, fresh(case, dtype=name))
    close(alone.out[0], together.out[0])
    row = lambda state: jax.tree.map(lambda x: x[:, :, 0], [state.keys, state.values, state.positions])
    assert same(row(alone.states), row(together.states))


@every(TOVA + OTHERS)
@few
@given(rows=ragged())
def test_padding_changes_nothing(case: Case, name: str, rows: Data) -> None:
    before = run(case, rows, fresh(case, dtype=name)).last
    after = run(case, data(7)._replace(valid=np.zeros((B, T), bool)), before)
    assert not after.out.any()
    assert same([after.last.keys, after.last.values, after.last.positions],
                [before.keys, before.values, before.positions])  # fmt: skip


@every(TOVA + OTHERS[:2])
@few
@given(rows=ragged(), seed=st.integers(0, 99))
def test_the_order_of_slots_has_no_meaning(case: Case, name: str, rows: Data, seed: int) -> None:
    start, more = (
        run(case, rows, fresh(case, dtype=name)).last,
        data(seed, scale=0.5)._replace(valid=rows.valid),
    )
    shuffled = permuted(start, np.random.default_rng(seed))
    one, two = (run(case, more, state, first=T) for state in (start, shuffled))
    close(one.out, two.out)
    same_tokens(one.last, two.last)


@coded
@few
@given(columns=st.lists(st.integers(0, 4), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_block_of_one_token_is_a_step(name: str, columns: list[int], seed: int) -> None:
    start = run(Case("tova", "chunked"), data(seed + 1), fresh(Case("tova"), dtype=name)).last
    at = [5 * chunk + column for chunk, column in enumerate(columns)]  # one in each of three chunks of 5
    rows = data(seed)._replace(valid=np.broadcast_to(np.isin(np.arange(T), at), (B, T)))
    steps, blocks = (run(Case("tova", mode), rows, start, first=T) for mode in ("steps", "chunked"))
    close(steps.out, blocks.out)
    same_tokens(steps.last, blocks.last)


def as_remembered(rows: Data, name: str) -> Data:
    """The tokens as they are after they were stored: rotated for the cache, stored, loaded, turned back."""
    at = np.maximum(rows.positions, 0)[..., None]
    k, v = _load(stored(ROPE(jnp.asarray(rows.k), jnp.asarray(at)), name)), _load(stored(rows.v, name))
    return rows._replace(k=rope(np.asarray(k), -at), v=np.asarray(v))


@every([*TOVA, OTHERS[0]])
@few
@given(rows=ragged())
def test_equals_the_definition(case: Case, name: str, rows: Data) -> None:
    """A quantised state is the reference recurrence over tokens that were quantised before."""
    got, known = run(case, rows, fresh(case, dtype=name)), as_remembered(rows, name)
    for b in range(B):
        want = expected(case, known, b)
        close(got.out[b, rows.valid[b]], want.out)
        assert [held(p) for p in got.states.positions[-1, 0, b]] == want.held[-1]


@pytest.mark.parametrize(("name", "most"), [("float16", 2e-3), ("int8", 0.02), ("float8_e4m3fn", 0.1), ("int4", 0.25)])
def test_what_comes_out(name: str, most: float) -> None:
    """Attention over a full cache, against float32: as many parts of a typical value off, in the root mean square."""
    case, rows = Case("full", "steps"), data(0)
    got, exact = run(case, rows, fresh(case, dtype=name)).out, run(case, rows).out
    assert got.dtype == np.float32
    off = np.sqrt(np.square(got - exact).mean() / np.square(exact).mean())
    assert most / 8 < off < most


@partial(jax.jit, static_argnames="chunk", compiler_options=FAST_COMPILE)
def _gradients(q: Any, k: Any, v: Any, positions: Any, weight: Any, state: KVState, chunk: int) -> Any:
    def loss(q: Any, k: Any, v: Any) -> Any:
        out = advance(q, k, v, positions, state, 0, RULES["tova"][0], chunk=chunk, rotate=ROPE).out
        return (out * weight).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize(("name", "chunk"), [("bfloat16", 1), ("int8", 1), *((name, 5) for name in CODED)])
def test_gradients(name: str, chunk: int) -> None:
    """They pass through what is rounded to bfloat16. Quantised tokens are constants: queries get the gradient of
    attention over them, keys and values none."""
    rows = data(1)
    how = rows.positions, data(2).q
    q, k, v = _gradients(rows.q, rows.k, rows.v, *how, fresh(Case("tova"), dtype=name), chunk)
    assert all(np.isfinite(x).all() for x in (q, k, v))
    if name not in CODED:
        assert all(np.abs(x).max() > 0.1 for x in (q, k, v))
        return
    assert not k.any()
    assert not v.any()
    known = as_remembered(rows, name)
    k, v = (np.asarray(x, np.float32) for x in (known.k, known.v))
    np.testing.assert_allclose(q, _gradients(rows.q, k, v, *how, fresh(Case("tova")), chunk)[0], 1e-3, 1e-3)


# ---- in a model


def test_reading_in_pieces_and_writing() -> None:
    model, tova, ids = tiny_decoder(), policies.TOVA(), list(random_tokens(2, 24))
    one, two = (
        np.concatenate(list(generate(model, ids, tova, 6, max_new_tokens=8, dtype="int8", **how)), axis=1)
        for how in (dict(), dict(segment=5, stream_every=3))
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_perplexity_is_that_of_the_traced_logits() -> None:
    model, tova, ids = tiny_decoder(), policies.TOVA(), random_tokens(2, 24)
    measured = perplexity(model, ids, tova, 6, dtype="int4")
    assert measured.state_bytes == sum(
        part.nbytes for part in init_decode_state(model, tova, 6, batch=2, dtype="int4").kv
    )
    traced, exact = (trace(model, ids, tova, 6, prompt=1, dtype=name) for name in ("int4", None))
    logits = traced.logits[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[:, 1:].T[..., None], -1)[..., 0]
    np.testing.assert_allclose(measured.nats, (np.log(np.exp(logits).sum(-1)) - chosen).mean(), 1e-4)
    assert traced.positions.shape == exact.positions.shape
    assert np.abs(traced.logits - exact.logits).max() > 0
    np.testing.assert_array_equal(traced.positions[:, :6], exact.positions[:, :6])  # before anything goes


@coded
def test_a_quantised_state_can_be_made_smaller(name: str) -> None:
    """It stays what it was stored as."""
    model = tiny_decoder()
    whole = init_decode_state(model, policies.Full(), 12, dtype=name).kv
    small = shrink(model, whole, jnp.zeros((2, 1, 2, 12)), policies.TOVA(), 4)
    assert all(part.keys.dtype == part.values.dtype == name for part in small)
