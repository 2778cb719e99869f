"""A whole model over a bounded state: what the layers share, and what a step costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder, ReadResult, read
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import rotate
from jaxcompress.policies import Policy
from jaxcompress.recurrence.advance import death_times
from jaxcompress.state.kv_state import State

from .harness import FAST_COMPILE

B, T, V = 2, 20, 31
CONFIG = DecoderConfig(V, 16, 24, 3, 4, 2, 8)
SLIDING = DecoderConfig(V, 16, 24, 3, 4, 2, 8, sliding=(None, 6, 9))
SAME_WINDOW = DecoderConfig(V, 16, 24, 3, 4, 2, 8, sliding=(None, 6, 6))
step = jax.jit(read, static_argnames=("chunk", "placement"), compiler_options=FAST_COMPILE)


@cache
def model(config: DecoderConfig = CONFIG, dtype: Any = jnp.float32) -> Decoder:
    """Random weights, large enough for attention to have preferences."""

    def make() -> Decoder:
        made = Decoder(config, rngs=nnx.Rngs(0))
        return jax.tree.map(lambda w: (w * 8 if w.ndim == 3 else w).astype(dtype), made)

    return jax.jit(make, compiler_options=FAST_COMPILE)()


def tokens(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (B, T)), jnp.int32)


def start(policy: Policy, slots: int | Sequence[int], config: DecoderConfig = CONFIG, **how: Any) -> State:
    return init_state(config, policy, slots, batch=B, **how)


def held(state: State, layer: int) -> np.ndarray:
    """Sorted positions [B, P, S] of one layer."""
    for run in state:
        for i, index in enumerate(np.asarray(run.layer).tolist()):
            if index == layer:
                return np.sort(np.asarray(run.positions[i]), -1)
    raise AssertionError(f"no layer {layer}")


jitted_death_times = jax.jit(death_times, static_argnames="total")


def deaths(done: ReadResult, config: DecoderConfig) -> list[jax.Array]:
    """Death times [B, P, T] of each layer after T tokens were read in one call."""
    pairs = zip(done.freed, done.died, strict=True)
    times = [jitted_death_times(f, d, total=T) for freed, died in pairs for f, d in zip(freed, died, strict=True)]
    windows = config.sliding or (None,) * config.num_layers
    return [t if w is None else jnp.minimum(t, jnp.arange(T) + w) for t, w in zip(times, windows, strict=True)]


@partial(jax.jit, compiler_options=FAST_COMPILE)
def masked(decoder: Decoder, ids: jax.Array, death: jax.Array) -> jax.Array:
    """Hidden states of plain attention in which query i sees token j if j <= i < death[j]; death [L, B, H, T]."""
    config = decoder.config
    at = jnp.arange(T)

    def attend(q: Any, k: Any, v: Any, positions: Any, weights: Any, layer: Any, carry: Any, death: Any) -> Any:
        q, k = (rotate(x, positions[..., None], config.rope) for x in (q, k))
        group = config.num_heads // config.num_kv_heads
        k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
        alive = (at <= at[:, None]) & (at[:, None] < death[:, :, None])
        scores = jnp.einsum("bthd,bnhd->bhtn", q, k) * config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(alive, scores, -jnp.inf), -1)
        return jnp.einsum("bhtn,bnhd->bthd", weights, v), carry, ()

    positions = jnp.broadcast_to(at, ids.shape).astype(jnp.int32)
    x, _, _ = decoder.run_layers(decoder.embed(ids), positions, attend, (), death)
    return decoder.norm(x)


@pytest.mark.parametrize(
    ("policy", "slots", "chunk", "config"),
    [
        (policies.TOVA(), 7, 1, CONFIG),
        (policies.H2O(2, "kv_head"), 7, T, CONFIG),
        (policies.StreamingLLM(2, "before"), 7, 6, CONFIG),
        (policies.Window(1), [4, 9, 9], 1, CONFIG),
        (policies.TOVA(), [5, 8, 5], 6, CONFIG),
        (policies.H2O(2, "query_head"), 5, 1, SLIDING),
    ],
    ids=lambda x: str(getattr(x, "name", "" if isinstance(x, DecoderConfig) else x)),
)
def test_death_times_of_all_layers(policy: Policy, slots: Any, chunk: int, config: DecoderConfig) -> None:
    """A model whose layers forget is plain attention under each layer's mask; so capacities are each layer's own."""
    decoder = model(config)
    done = step(decoder, tokens(), start(policy, slots, config), policy, chunk=chunk, placement="absolute")
    death = deaths(done, config)
    assert len(death) == config.num_layers
    per_head = jnp.stack([jnp.repeat(d, config.num_heads // d.shape[1], 1) for d in death])
    np.testing.assert_allclose(done.hidden, masked(decoder, tokens(), per_head), atol=1e-3)
    capacities = [slots] * 3 if isinstance(slots, int) else list(slots)
    for layer, (capacity, window) in enumerate(zip(capacities, config.sliding or [None] * 3, strict=True)):
        alive = np.asarray(death[layer]) >= T if window is None else None
        positions = held(done.state, layer)
        assert ((positions >= 0).sum(-1) == min(capacity, window or capacity)).all()
        if alive is not None:
            assert (alive.sum(-1) >= capacity).all()
        if policy.name.startswith("window"):
            assert (np.asarray(death[layer])[0, 0, 1 : T - capacity] == np.arange(1, T - capacity) + capacity).all()


@settings(max_examples=5)
@given(layout=st.lists(st.booleans(), min_size=2 * T, max_size=2 * T))
def test_ragged_rows_token_by_token(layout: list[bool]) -> None:
    """One call over padded rows, and single tokens of unpadded rows: the same hidden states, tokens and counts."""
    policy, valid = policies.TOVA(), np.array(layout).reshape(B, T)
    done = step(model(), tokens(), start(policy, 7), policy, valid=jnp.asarray(valid), chunk=1, placement="absolute")
    assert done.state[0].seen.tolist() == valid.sum(1).tolist()
    for b in range(B):
        state, ids = start(policy, 7), tokens()[b, valid[b]]
        for i, at in enumerate(np.flatnonzero(valid[b])):
            both = jnp.broadcast_to(ids[i], (B, 1))
            one = step(model(), both, state, policy, valid=jnp.ones((B, 1), bool), chunk=1, placement="absolute")
            state = one.state
            np.testing.assert_allclose(one.hidden[0, 0], done.hidden[b, at], atol=1e-3)
        for layer in range(3):
            np.testing.assert_array_equal(held(state, layer)[0], held(done.state, layer)[b])


@pytest.mark.parametrize(
    ("policy", "slots", "chunk"),
    [
        (policies.TOVA(), T, 1),
        (policies.Full(), T, 1),
        (policies.Full(), T, 6),
        (policies.StreamingLLM(1, "before"), T, 1),
        (policies.H2O(), T, 6),
    ],
    ids=lambda x: str(getattr(x, "name", x)),
)
def test_sliding_windows(policy: Policy, slots: int, chunk: int) -> None:
    """With room for every token that a query may see, nothing is lost; what left a window has freed its slot."""
    decoder, ids = model(SAME_WINDOW), tokens()
    state = start(policy, slots, SAME_WINDOW)
    done = step(decoder, ids, state, policy, chunk=chunk, placement="absolute")
    np.testing.assert_allclose(decoder.logits(done.hidden), plain(decoder, ids), atol=1e-3)
    assert [(run.capacity, run.layer.tolist()) for run in state] == [(T, [0]), (6, [1, 2])]
    for layer, window in enumerate((T, 6, 6)):
        assert (held(done.state, layer)[..., -window:] == np.arange(T - window, T)).all()
        assert ((held(done.state, layer) >= 0).sum(-1) == window).all()


@jax.jit
def plain(decoder: Decoder, ids: jax.Array) -> jax.Array:
    return decoder(ids)


def test_windows_of_the_plain_model_matter() -> None:
    """What the test above compares with: the same weights give something else without windows."""
    assert np.abs(plain(model(SAME_WINDOW), tokens()) - plain(model(), tokens())).max() > 1e-2


@pytest.mark.parametrize(
    ("weights", "state"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_dtypes(weights: str, state: str) -> None:
    """Weights and state may differ. While nothing is evicted, the numbers are those of float32 but for rounding."""
    policy, decoder = policies.TOVA(), model(dtype=weights)
    exact = step(model(), tokens(), start(policy, 7), policy, chunk=1, placement="absolute")
    done = step(decoder, tokens(), start(policy, 7, dtype=state), policy, chunk=1, placement="absolute")
    assert done.hidden.dtype == weights
    assert np.abs(done.hidden.astype(np.float32) - exact.hidden)[:, :7].mean() < 0.05
    assert np.isfinite(done.hidden.astype(np.float32)).all()
    for run in done.state:
        assert run.keys.dtype == run.values.dtype == state
        assert ((run.positions >= 0).sum(-1) == 7).all()


def test_a_full_cache_that_overflows_gives_nan() -> None:
    """Through all layers, from the token that found no room on, in its row only."""
    policy = policies.Full()
    valid = jnp.arange(T) < jnp.array([[T], [12]])
    done = step(model(), tokens(), start(policy, 12), policy, valid=valid, chunk=1, placement="absolute")
    assert np.isfinite(done.hidden[0, :12]).all()
    assert np.isnan(done.hidden[0, 12:]).any(-1).all()
    assert np.isfinite(done.hidden[1]).all()


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those inside of loops too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for parameter in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    ("policy", "slots"),
    [
        (policies.TOVA(), 512),
        (policies.H2O(), 512),
        (policies.StreamingLLM(4, "before"), 513),
    ],
    ids=["tova", "h2o", "before"],
)
def test_a_step_moves_no_keys_and_values(policy: Policy, slots: int) -> None:
    """2: a donated state is updated in place; nothing as large as a layer's keys is gathered, sorted or copied."""
    state = start(policy, slots)
    function = jax.jit(partial(read, policy=policy, placement="absolute"), donate_argnames="state")
    traced = function.trace(model(), tokens()[:, :1], state)
    compiled = traced.lower().compile()
    keys = state[0].keys[0].size  # of one layer
    assert state[0].keys.shape[3] == 513
    reads = {"dynamic_slice", "squeeze", "reshape", "broadcast_in_dim", "convert_element_type"}  # of one layer
    writes = {"scatter", "dynamic_update_slice", "scan", "while", "jit", "pjit"}  # in place
    large = {
        eqn.primitive.name for eqn in equations(traced.jaxpr.jaxpr) if any(x.aval.size >= keys for x in eqn.outvars)
    }
    assert large <= reads | writes, large - reads - writes
    assert "scatter" in large or "dynamic_update_slice" in large  # the comparison of sizes means something
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(run.nbytes for run in state)
    layer = 2 * keys * state[0].keys.dtype.itemsize
    assert memory.temp_size_in_bytes < 2 * layer  # a stack of three would be copied otherwise
    for line in compiled.as_text().splitlines():
        name, _, code = line.partition(" = ")
        shape, _, code = code.partition("]")
        sizes = [int(n) for n in shape.partition("[")[2].split(",") if n.isdigit()]
        if 513 in sizes and np.prod(sizes) >= keys:
            operation = code.partition("} ")[2].partition("(")[0]
            assert operation not in ("copy", "gather", "sort", "concatenate", "transpose", "select"), line.strip()[:200]


def test_the_state_never_grows() -> None:
    policy = policies.TOVA()
    state = start(policy, 7)
    short, long = (step(model(), tokens(), state, policy, chunk=c, placement="absolute").state for c in (1, T))
    assert [run.nbytes for run in state] == [run.nbytes for run in short] == [run.nbytes for run in long]


@pytest.mark.parametrize(
    ("policy", "slots", "message"),
    [
        (policies.TOVA(), 0, "at least 1 slot"),
        (policies.TOVA(), -3, "at least 1 slot"),
        (policies.TOVA(), [4, 0, 4], "at least 1 slot"),
        (policies.TOVA(), [4, 4], "2 entries, the model has 3 layers"),
        (policies.TOVA(), [4, 4, 4, 4], "4 entries, the model has 3 layers"),
        (policies.Window(4), 4, r"window\+4 needs at least 5 slots"),
        (policies.StreamingLLM(4, "before"), [9, 4, 9], "needs at least 5 slots"),
        (policies.H2O(6), 6, "needs at least 7 slots"),
    ],
)
def test_bad_slots(policy: Policy, slots: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_state(CONFIG, policy, slots)


@pytest.mark.parametrize(
    "make",
    [
        lambda: policies.Window(-1),
        lambda: policies.StreamingLLM(-1),
        lambda: policies.H2O(-1),
        lambda: policies.H2O(-0.1),
        lambda: policies.H2O(1.5),
    ],
)
def test_bad_policies(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


def test_annotations_are_checked() -> None:
    """The test suite's hook is at work: a batch that does not fit is found before any array is computed."""
    with pytest.raises(Exception, match="type-check|Type-check"):
        read(model(), tokens()[0], start(policies.TOVA(), 7), policies.TOVA())
    state = start(policies.TOVA(), 7)[0]
    with pytest.raises(Exception, match="type-check|Type-check"):
        replace(state, seen=state.seen[:1])
