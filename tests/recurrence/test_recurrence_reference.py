"""The recurrence equals its definition, for every policy, mode and placement, with padding at any place."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.state.placement import Placement, place

from .harness import RULES, B, Case, T, data, deaths, expected, held, name_of, ragged, run
from .reference import places

jit_place = jax.jit(place, static_argnames="placement")
NAMED = [name for name, (_, rule) in RULES.items() if rule is not None]
CASES = [
    # steps return every state on the way; streaming is the same read in one call (see test_invariants)
    *(Case(name, "steps") for name in ("tova", "h2o", "h2o-layer", "window+2", "streaming-before", "full")),
    *(Case(name) for name in ("tova-kv_head", "tova-query_head", "h2o-kv_head", "window", "streaming-after")),
    *(Case(name, "chunked") for name in NAMED),
    *(Case(name, "one-shot") for name in ("tova", "h2o", "streaming-before")),
    *(Case(name, "steps", "slot") for name in ("streaming-after", "streaming-before")),
    *(Case("h2o-kv_head", "streaming", "compact"), Case("tova", "chunked", "compact")),
    Case("streaming-before", "chunked", "slot"),
    # Sliding-window layers: room for the whole window, and less than that.
    *(Case(name, mode, window=6) for name in ("tova", "full", "streaming-before") for mode in ("steps", "chunked")),
    *(Case("h2o-layer", "streaming", window=8), Case("streaming-before", "chunked", "slot", window=8)),
    # Sinks: policies observe what is left for the tokens.
    Case("tova", "steps", sinks="sinks"),
    Case("h2o", "chunked", sinks="sinks"),
    Case("h2o-kv_head", "streaming", "compact", sinks="sinks"),
    Case("tova", "one-shot", window=6, sinks="sinks"),
    # Query heads per kv head; 2 is everywhere else.
    *(Case("tova", kv_heads=1), Case("tova", kv_heads=4), Case("h2o-kv_head", kv_heads=1)),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
@settings(max_examples=4)
@given(draws=st.data())
def test_equals_the_definition(case: Case, draws: st.DataObject) -> None:
    rows = draws.draw(ragged(case.kv_heads))
    trace = run(case, rows)
    death = deaths(trace)
    if case.window is not None:
        death = np.minimum(death, np.arange(T) + case.window)
    for b in range(B):
        want, n = expected(case, rows, b), int(rows.valid[b].sum())
        np.testing.assert_allclose(trace.out[b, rows.valid[b]], want.out, rtol=1e-4, atol=1e-4)
        assert not trace.out[b, ~rows.valid[b]].any()
        states = trace.states.positions[:, 0, b]  # [calls, P, S]
        if case.mode == "steps":
            assert [[held(p) for p in sets] for sets in states] == want.held
        assert [held(p) for p in states[-1]] == want.held[-1]
        assert np.minimum(death[b, :, :n], n).tolist() == want.death.tolist()


@pytest.mark.parametrize("name", ["tova", "h2o", "streaming-before"])
def test_the_comparison_can_fail(name: str) -> None:
    """Modes keep different tokens, so that comparing with the wrong one must show."""
    case, rows = Case(name), data(0)
    wrong = expected(case._replace(mode="one-shot"), rows, 0)
    assert [held(p) for p in run(case, rows).last.positions[0, 0]] != wrong.held[-1] or name == "streaming-before"
    assert np.abs(run(case, rows).out[0] - wrong.out).max() > 1e-2


@pytest.mark.parametrize("placement", ["absolute", "slot", "compact"])
@given(gaps=st.lists(st.integers(1, 40), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_places(placement: Placement, gaps: list[int], seed: int) -> None:
    """Where tokens far apart stand, in any order of slots, some of them free. Only differences matter to RoPE."""
    tokens = np.cumsum(gaps).tolist()
    slots = np.random.default_rng(seed).permutation(np.array(tokens + [-1] * (10 - len(tokens)), np.int32))
    got, want = np.asarray(jit_place(slots[None, None], placement))[0, 0], places(tokens, placement)
    for slot, j in enumerate(slots.tolist()):
        if j >= 0:
            difference = got[slot] - got[slots.tolist().index(tokens[0])]
            np.testing.assert_allclose(difference, want[j] - want[tokens[0]], atol=1e-4)
