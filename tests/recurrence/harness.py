"""What the tests of the core share: a few policies, small arrays, and one compiled function for each combination."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.policies import Policy
from jaxcompress.recurrence.advance import advance, death_times
from jaxcompress.state.attention_traits import AttentionTraits
from jaxcompress.state.kv_state import KVState

from .reference import THETA, History, Rule, recurrence

B, T, H, K, D, C = 3, 16, 4, 2, 8, 6
SINKS = np.array([1.0, -0.5, 3.0, 0.2], np.float32)
"""A logit for each query head."""
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # of many small functions; halves the time of a first run
ROPE = partial(rotate, rope=RopeConfig(theta=THETA))

RULES: dict[str, tuple[Policy, Rule | None]] = {
    "tova": (policies.TOVA(), Rule("tova")),
    "tova-kv_head": (policies.TOVA("kv_head"), Rule("tova", "kv_head")),
    "tova-query_head": (policies.TOVA("query_head"), Rule("tova", "query_head")),
    "h2o": (policies.H2O(), Rule("h2o", "query_head", recent=C // 2)),
    "h2o-kv_head": (policies.H2O(2, "kv_head"), Rule("h2o", "kv_head", recent=2)),
    "h2o-layer": (policies.H2O(0, "layer"), Rule("h2o", "layer", recent=0)),
    "window": (policies.Window(), Rule("window")),
    "window+2": (policies.Window(2), Rule("window", sinks=2)),
    "streaming-after": (policies.StreamingLLM(2), Rule("window", sinks=2)),
    "streaming-before": (policies.StreamingLLM(2, "before"), Rule("window", evict="before", sinks=2)),
    "random": (policies.Random(3, "kv_head"), None),
    "full": (policies.Full(), Rule("full")),
}
MORE: dict[str, Policy] = {
    "observed_attention": policies.ObservedAttention(),
    "scissorhands": policies.Scissorhands(history=5, recent=1),
    "scissorhands-layer": policies.Scissorhands(history=40, recent=0, scope="layer"),
    "snapkv": policies.SnapKV(2, 3),
    "snapkv-max": policies.SnapKV(3, 3, "max", scope="query_head"),
    "nacl": policies.NACL(proxies=2, sinks=1, recent=1),
    "knorm": policies.KNorm(),
    "keydiff": policies.KeyDiff(),
    "keydiff-layer": policies.KeyDiff("layer"),
    "lagkv": policies.LagKV(2, sinks=1),
    "lagkv-cross": policies.LagKV(2, sinks=1, cross=True),
    "cur": policies.CUR(4, sinks=1),
    "expected_attention": policies.ExpectedAttention(future=4, sinks=1),
    "rkv": policies.RKV(window=2, kernel=3),
    "rkv-sketch": policies.RKV(window=2, kernel=3, sketch=3),
    "ada-snapkv": policies.adaptive(policies.SnapKV(2, 3, scope="pool")),
    "ada-keydiff": policies.adaptive(policies.KeyDiff("pool"), floor=0.5),
    "tova-pool": policies.TOVA("pool"),
    "protect": policies.protect(policies.TOVA("kv_head"), first=1, recent=2),
    "pooled": policies.pooled(policies.H2O(0, "kv_head"), 3),
    "chunks": policies.by_chunks(policies.TOVA(), 3),
    "within": policies.within_chunks(policies.KNorm(), 4),
    "mix": policies.mix((0.7, policies.ranked(policies.TOVA())), (0.3, policies.ranked(policies.Window()))),
    "then": policies.then(policies.SnapKV(2, 3), policies.Window(1, "kv_head")),
    "sampled": policies.sampled(policies.H2O(0, "layer"), 3),
    "every": policies.every(policies.KeyDiff(), 3),
    "every-tova": policies.every(policies.TOVA(), 2),
    "every-ada": policies.every(policies.adaptive(policies.H2O(0.5, "pool")), 2),
}
"""Those that the reference does not know; `tests/policies` has the definitions."""
RULES |= {name: (policy, None) for name, policy in MORE.items()}
CHUNKS = {"streaming": 1, "chunked": 5, "one-shot": T}  # 5 does not divide T


class Case(NamedTuple):
    """One compiled function: a policy, how the T columns are cut, where tokens stand."""

    policy: str
    mode: str = "streaming"  # or chunked, one-shot; `steps` and `pieces` return every state on the way
    placement: str = "absolute"
    window: int | None = None
    capacity: int = C
    kv_heads: int = K
    sinks: str = ""  # or "sinks": every query head has one

    @property
    def traits(self) -> AttentionTraits:
        return AttentionTraits(sinks=jnp.asarray(SINKS)) if self.sinks else AttentionTraits()

    @property
    def rule(self) -> Rule:
        rule = RULES[self.policy][1]
        assert rule is not None
        return rule

    @property
    def bound(self) -> int:
        """Capacity; a full cache has room for everything."""
        return T if self.policy == "full" and self.window is None else self.capacity

    def pieces(self, valid: np.ndarray) -> list[list[int]]:
        """Positions of one row's tokens, cut at the columns where the mode cuts."""
        chunk = {"steps": 1, "pieces": 5, **CHUNKS}[self.mode]
        position = np.cumsum(valid) - 1
        return [
            [int(position[i]) for i in range(start, min(start + chunk, T)) if valid[i]] for start in range(0, T, chunk)
        ]


def name_of(case: Case) -> str:
    """For test reports."""
    return "-".join(str(x) for x, usual in zip(case, Case(""), strict=True) if x != usual)


class Trace(NamedTuple):
    """out [B, T, H, D]; states: after each call, in front an axis of calls; freed and died as in `Advanced`."""

    out: Any
    states: KVState
    freed: Any
    died: Any

    @property
    def last(self) -> KVState:
        return jax.tree.map(lambda x: x[-1], self.states)


class Data(NamedTuple):
    """valid [B, T]; q [B, T, H, D]; k and v [B, T, K, D]."""

    valid: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __repr__(self) -> str:
        """For hypothesis: the layouts; q, k and v are random."""
        return f"Data({[''.join('.x'[int(x)] for x in row) for row in self.valid]})"

    @property
    def positions(self) -> np.ndarray:
        return np.where(self.valid, np.cumsum(self.valid, 1) - 1, -1).astype(np.int32)

    def row(self, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One row's tokens without padding."""
        return self.q[b, self.valid[b]], self.k[b, self.valid[b]], self.v[b, self.valid[b]]


def fresh(case: Case, batch: int = B, dtype: Any = jnp.float32) -> KVState:
    """An empty state of one layer."""
    config = DecoderConfig(8, 8, 8, 1, H, case.kv_heads, D)
    return init_state(config, RULES[case.policy][0], case.bound, batch=batch, dtype=dtype)[0]


def tokens_of(state: KVState, b: int, s: int) -> dict[tuple[int, int], int]:
    """Where one set of one row has each token: (owner, position) -> slot."""
    owner = np.zeros_like(state.positions[0]) if state.owner is None else state.owner[0]
    positions = state.positions[0, b, s]
    return {(int(owner[b, s, i]), int(positions[i])): i for i in np.flatnonzero(positions >= 0)}


@partial(jax.jit, static_argnames="case", compiler_options=FAST_COMPILE)
def _run(case: Case, q: Any, k: Any, v: Any, positions: Any, state: KVState) -> Trace:
    piece = {"steps": 1, "pieces": 5}.get(case.mode, T)
    chunk = {"steps": 1, "pieces": 5, **CHUNKS}[case.mode]
    calls = -(-T // piece)

    def cut(x: Any, fill: int = 0) -> Any:
        x = jnp.pad(x, [(0, 0), (0, calls * piece - T), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        return x.reshape(x.shape[0], calls, piece, *x.shape[2:]).swapaxes(0, 1)

    def body(state: KVState, inputs: Any) -> Any:
        q, k, v, positions = inputs
        done = advance(
            q, k, v, positions, state, 0, RULES[case.policy][0],
            chunk=chunk, rotate=ROPE, placement=case.placement, window=case.window,
            traits=case.traits,
        )  # fmt: skip
        return done.state, (done.out, done.state, done.freed, done.died)

    _, (out, states, freed, died) = jax.lax.scan(body, state, (cut(q), cut(k), cut(v), cut(positions, -1)))
    out = out.swapaxes(0, 1).reshape(q.shape[0], calls * piece, *q.shape[2:])[:, :T]
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return Trace(out, states, flat(freed), flat(died))


def one_row_kept(rows: Data, other: Data, nobody: bool) -> Iterator[tuple[int, Data]]:
    """Each row of a batch among strangers: its index, and a batch of which that row alone is from `rows`.

    Args:
      other: the strangers.
      nobody: the other rows are padding instead.
    """
    stranger = rows._replace(valid=np.zeros_like(rows.valid)) if nobody else other
    for b in range(B):
        mixed = Data(*(np.array(x) for x in stranger))
        for to, x in zip(mixed, rows, strict=True):
            to[b] = x[b]
        yield b, mixed


def run(case: Case, data: Data, state: KVState | None = None, *, first: int = 0) -> Trace:
    """Reads the data into a state, a fresh one by default; `first` is the position of each row's first token."""
    state = fresh(case, len(data.q)) if state is None else state
    positions = np.where(data.valid, data.positions + first, -1).astype(np.int32)
    return jax.tree.map(np.asarray, _run(case, data.q, data.k, data.v, positions, state))


@cache
def data(seed: int, kv_heads: int = K, scale: float = 1.0) -> Data:
    """Rows without padding; shared between tests, not to be written to."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: rng.standard_normal((B, T, heads, D)).astype(np.float32)
    return Data(np.ones((B, T), bool), draw(H) * np.float32(scale), draw(kv_heads), draw(kv_heads))


def _layout(draw: Any) -> list[bool]:
    """Where one row's tokens stand: packed to the left or to the right, anywhere, or nowhere."""
    kind = draw(st.sampled_from(["left", "right", "anywhere", "anywhere", "all", "none"]))
    if kind == "anywhere":
        return draw(st.lists(st.booleans(), min_size=T, max_size=T))
    n = {"all": T, "none": 0}.get(kind, draw(st.integers(1, T - 1)))
    packed = [True] * n + [False] * (T - n)
    return packed[::-1] if kind == "right" else packed


@st.composite
def ragged(draw: Any, kv_heads: int = K) -> Data:
    """Random rows with padding at any place, attention from flat to sharp."""
    whole = data(draw(st.integers(0, 2**16)), kv_heads, draw(st.sampled_from([0.5, 1.0, 3.0])))
    return whole._replace(valid=np.array([_layout(draw) for _ in range(B)]))


def expected(case: Case, data: Data, b: int) -> History:
    """What the reference gives for one row."""
    pieces = case.pieces(data.valid[b])
    return recurrence(*data.row(b), case.rule, case.bound, pieces, case.placement, case.window, case.traits.sinks)


_deaths = jax.jit(death_times, static_argnames="total", compiler_options=FAST_COMPILE)


def deaths(trace: Trace) -> np.ndarray:
    """Death times [B, P, T] by what the calls freed; T for tokens still held."""
    return np.array(_deaths(trace.freed, trace.died, total=T))


def held(positions: np.ndarray) -> list[int]:
    """Sorted positions of one set's tokens."""
    return sorted(positions[positions >= 0].tolist())


def permuted(state: KVState, rng: np.random.Generator) -> KVState:
    """The same tokens in other slots, each row and set by an order of its own."""
    layers, batch, sets, slots = state.positions.shape
    order = np.argsort(rng.random((layers, batch, sets, slots)), -1)

    def take(x: Any) -> np.ndarray:
        index = np.broadcast_to(order, (*x.shape[:3], slots))
        return np.take_along_axis(np.asarray(x), index.reshape(*index.shape, *[1] * (x.ndim - 4)), 3)

    return replace(state, **jax.tree.map(take, state.slotted()))
