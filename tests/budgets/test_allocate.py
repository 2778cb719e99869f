"""Budgets: against the reference, with exact totals; and what states of different capacity cost and do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import reference
from tiny import random_tokens, tiny_decoder

from jaxcompress.budgets.allocate import (
    from_scores,
    proportional,
    pyramid,
    pyramid_even,
    pyramid_official,
    retrieval_split,
    total,
)
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.policies import H2O, TOVA, Policy
from jaxcompress.state.kv_state import State

MODEL = tiny_decoder()
LAYERS, HEADS, D = MODEL.config.num_layers, MODEL.config.num_kv_heads, MODEL.config.head_dim
layers, means = st.integers(1, 48), st.integers(1, 4096)
reading = jax.jit(read, static_argnames="chunk", compiler_options={"xla_backend_optimization_level": 0})


@given(
    layers=st.integers(2, 48),
    tokens=st.integers(1, 10_000),
    mean=means,
    window=st.integers(1, 64),
    beta=st.integers(2, 40),
)
def test_pyramid_of_the_authors(layers: int, tokens: int, mean: int, window: int, beta: int) -> None:
    mean += window
    expected = reference.pyramid_budgets_official(layers, tokens, mean, window, beta)
    assert pyramid_official(mean, layers, tokens, window, beta) == tuple(expected)


@given(
    layers=layers,
    tokens=st.integers(1, 10_000),
    ratio=st.floats(0, 0.99),
    window=st.integers(1, 64),
    beta=st.integers(2, 40),
)
def test_pyramid_of_kvpress(layers: int, tokens: int, ratio: float, window: int, beta: int) -> None:
    expected = reference.pyramid_budgets_even(layers, tokens, ratio, window, beta)
    assert pyramid_even(tokens * (1 - ratio), layers, tokens, window, beta) == tuple(expected)


def test_pyramids_in_numbers() -> None:
    """Of definitions, by hand: 96 tokens, 48 to keep, a window of 4, beta 5."""
    assert pyramid_official(48, 3, 96, window=4, beta=5) == (84, 48, 12)
    assert pyramid_even(48.0, 3, 96, window=4, beta=5) == (86, 48, 10)
    assert pyramid(48, 3, beta=5) == (86, 48, 10)
    assert pyramid_official(100, 1, 1000) == (100,)
    assert pyramid_official(1000, 4, 99) == (99,) * 4


@given(layers=layers, mean=means, beta=st.floats(1, 60), least=st.integers(1, 64))
def test_pyramid_is_exact_and_falls_evenly(layers: int, mean: int, beta: float, least: int) -> None:
    mean += least
    slots = pyramid(mean, layers, beta, least)
    assert len(slots) == layers
    assert total(slots) == mean * layers
    assert min(slots) >= least
    steps = -np.diff(slots)
    assert (steps >= 0).all()
    assert not len(steps) or steps.max() - steps.min() <= 2  # equal, but for rounding at both ends
    if layers > 1:
        assert abs(slots[-1] - max(mean / beta, least)) < 1
    assert pyramid(mean, layers, 1.0) == (mean,) * layers


weights = st.integers(1, 6).flatmap(
    lambda k: st.lists(st.lists(st.floats(0, 1e6), min_size=k, max_size=k), min_size=1, max_size=6)
)


@given(weights=weights, mean=means, least=st.integers(1, 40))
def test_proportional_is_exact_and_in_proportion(weights: list[list[float]], mean: int, least: int) -> None:
    array, mean = np.array(weights), mean + least
    if not array.any():
        array += 1
    slots = np.array(proportional(array, mean, least))
    assert slots.shape == array.shape
    assert total(proportional(array, mean, least)) == slots.sum() == mean * array.size
    assert slots.min() >= least
    flat, given = slots.ravel(), array.ravel()
    order = np.argsort(given, kind="stable")
    assert (np.diff(flat[order]) >= -1).all()  # more weight, no less but for rounding
    free = flat > least  # of these, none is off its proportion by more than rounding
    if free.sum() > 1:
        exact = given[free] * (flat[free].sum() / given[free].sum())
        assert (np.abs(flat[free] - exact) <= 2).all()
    assert np.array_equal(proportional(given, mean, least), flat)  # [L] alike


def test_proportional_in_numbers() -> None:
    assert proportional([1, 3], 2) == (1, 3)
    assert proportional([1, 1, 1], 5) == (5, 5, 5)
    assert proportional([0, 0, 1], 4) == (1, 1, 10)
    assert proportional([1, 9, 90], 100, least=20) == (20, 25, 255)
    assert proportional([2, 1], 1) == (1, 1)
    assert proportional([[0.5, 0.5], [1.0, 2.0]], 4) == ((2, 2), (4, 8))
    assert proportional([1, 1, 1, 0], 2, 1) == (3, 2, 2, 1)  # equal remainders: the earlier first


def test_headkv_by_weights() -> None:
    """KVCache-Factory's rule where nothing needs rounding: capacity - capacity // beta, and a share of the pool."""
    scores, capacity, beta = np.array([[1.0, 3.0], [2.0, 2.0]]), 128, 2
    theirs = scores / scores.sum() * (capacity // beta) * scores.size + capacity - capacity // beta
    assert proportional(1 - 1 / beta + scores / scores.mean() / beta, capacity) == tuple(map(tuple, theirs.astype(int)))


@given(seed=st.integers(0, 99), mean=st.integers(1, 9), rows=st.integers(1, 3))
def test_from_scores_counts_the_best(seed: int, mean: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 50, (2, rows, 3, 20)).astype(np.float32)  # many ties
    slots = from_scores(jnp.asarray(scores), mean)
    assert total(slots) == mean * 6
    assert np.min(slots) >= 1
    counts = np.zeros((2, 3))
    for row in range(rows):
        flat = scores[:, row].reshape(-1)
        best = np.lexsort((np.tile(np.arange(20), 6), -flat))[: mean * 6]
        np.add.at(counts.reshape(-1), best // 20, 1 / rows)
    if counts.min() >= 1:
        assert np.abs(counts - slots).max() < 1


def test_from_scores_leaves_out_what_is_not_there() -> None:
    scores = np.full((1, 1, 2, 5), -np.inf, np.float32)
    scores[0, 0, 0, :2], scores[0, 0, 1, :4] = 9, 1
    assert from_scores(jnp.asarray(scores), 3) == ((2, 4),)


def test_retrieval_split() -> None:
    assert retrieval_split(np.array([[True, False], [False, False]]), 100, 8) == ((100, 8), (8, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: pyramid(0, 4), "a mean of at least 1, 0 was given"),
        (lambda: pyramid(5, 4, least=6), "a mean of at least 6, 5 was given"),
        (lambda: pyramid(5, 4, least=0), "least=0"),
        (lambda: pyramid(5, 0), "at least 1 of the layers, not 0"),
        (lambda: pyramid(5, 4, beta=0.5), "at least 1, not 0.5"),
        (lambda: pyramid_official(8, 4, 100, window=8), "9 slots or more"),
        (lambda: pyramid_even(0, 4, 100), "a mean of 0 by 4 layers"),
        (lambda: proportional([1, -1], 3), "at least 0"),
        (lambda: proportional([0, 0], 3), "not all 0"),
        (lambda: proportional([1, np.nan], 3), "finite"),
        (lambda: proportional([[[1]]], 3), r"shape \[1, 1, 1\]"),
        (lambda: proportional([1, 1], 3, least=4), "2 layers with 4 slots"),
        (lambda: from_scores(jnp.ones((2, 1, 2, 9)), 3, least=4), "4 heads with 4 slots"),
        (lambda: retrieval_split(np.ones((2, 2)), 3, 1), "bool"),
        (lambda: retrieval_split(np.ones((2, 2), bool), 3, 0), "streaming must be a whole number, at least 1, not 0"),
        (lambda: retrieval_split(np.ones((2, 2), bool), True, 3), "slots must be a whole number, at least 1, not True"),
        (lambda: pyramid(5, 4, beta=np.nan), "beta must be a finite number"),
        (lambda: pyramid(True, 4), "a mean of slots must be a whole number"),
        (lambda: pyramid_official(20, 4, -5), "tokens must be a whole number, at least 1, not -5"),
        (lambda: pyramid_official(20, 4, 100, beta=-2), "beta must be a whole number, at least 1, not -2"),
        (lambda: pyramid_even(np.inf, 4, 100), "a mean of slots must be a finite number"),
        (lambda: pyramid_even(9, 4, 100, beta=0), "at least 1, not 0"),
        (lambda: from_scores(jnp.full((2, 1, 2, 9), -jnp.inf), 3), "all -inf"),
    ],
)
def test_errors_say_what_was_given(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


# What a state makes of them.

SPLITS: dict[str, Slots] = {
    "pyramid": pyramid(6, LAYERS, beta=3),
    "heads": ((3, 9), (9, 3)),
    "alike": ((3, 9), (3, 9)),
    "layers and heads": ((6, 6), (2, 10)),
}


def bytes_of(state: State) -> int:
    return sum(part.nbytes for part in state)


@pytest.mark.parametrize("slots", SPLITS.values(), ids=SPLITS.keys())
def test_a_state_costs_the_sum_of_its_capacities(slots: Slots) -> None:
    """A slot costs the same wherever it is; equal totals, equal bytes. Every head has one more for what comes in."""
    policy, batch = TOVA("kv_head"), 3
    state = init_state(MODEL.config, policy, slots, batch=batch)
    per_head = np.broadcast_to(np.array(slots).reshape(LAYERS, -1), (LAYERS, HEADS))
    each = 2 * 4 * D + 4 + 4  # key and value, position, TOVA's number
    allocated = sum(x.nbytes for part in state for x in jax.tree.leaves(part.slotted()))
    assert allocated == batch * each * (per_head + 1).sum()
    uniform = init_state(MODEL.config, policy, int(per_head.mean()), batch=batch)
    few = 64 * len(state)  # `seen` and `layer` of each part
    assert abs(bytes_of(state) - bytes_of(uniform)) <= few
    assert bytes_of(state) < bytes_of(init_state(MODEL.config, policy, int(per_head.max()), batch=batch)) - few


def only(model: Decoder, head: int) -> Decoder:
    """The model's first layer with one kv head: what the others give is not read, the second layer adds nothing."""

    def changed(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if "attention" in name and "out" in name and "norm" not in name:
            mask = jnp.zeros((LAYERS, HEADS, x.shape[1] // HEADS, 1)).at[0, head].set(1)
            return x * mask.reshape(LAYERS, -1, 1)
        return x

    return jax.tree_util.tree_map_with_path(changed, model)


@pytest.mark.parametrize(("policy", "chunk"), [(TOVA("kv_head"), 1), (H2O(1, "kv_head"), 5)], ids=["tova", "h2o"])
def test_heads_of_different_capacity_do_what_each_does_alone(policy: Policy, chunk: int) -> None:
    tokens, split = jnp.asarray(random_tokens(2, 20)), (3, 7)
    both = reading(MODEL, tokens, init_state(MODEL.config, policy, (split, split), batch=2), policy, chunk=chunk)
    for head, capacity in enumerate(split):
        (mine,) = [part for part in both.state if part.heads == (head,)]
        alone = reading(MODEL, tokens, init_state(MODEL.config, policy, capacity, batch=2), policy, chunk=chunk).state[
            0
        ]
        for x, y in zip(jax.tree.leaves(mine.slotted()), jax.tree.leaves(alone.slotted()), strict=True):
            np.testing.assert_allclose(x[0, :, 0], y[0, :, head], 1e-5, 1e-6)


@pytest.mark.parametrize("head", range(HEADS))
def test_what_a_head_gives_depends_on_its_own_capacity_alone(head: int) -> None:
    model, tokens, policy = only(MODEL, head), jnp.asarray(random_tokens(2, 20)), TOVA("kv_head")
    capacity = (3, 7)[head]
    split = reading(model, tokens, init_state(MODEL.config, policy, ((3, 7), (5, 5)), batch=2), policy)
    alone = reading(model, tokens, init_state(MODEL.config, policy, (capacity, 5), batch=2), policy)
    np.testing.assert_allclose(split.hidden, alone.hidden, 1e-4, 1e-5)


@pytest.mark.slow
def test_rows_with_heads_of_different_capacity_are_independent() -> None:
    policy, slots = H2O(1, "kv_head"), ((3, 7), (6, 2))
    tokens, valid = random_tokens(3, 16), np.ones((3, 16), bool)
    valid[1, 9:] = valid[2, :12] = valid[2, 14] = False
    run = lambda rows: reading(
        MODEL, jnp.asarray(tokens[rows]), init_state(MODEL.config, policy, slots, batch=len(rows)), policy,
        valid=jnp.asarray(valid[rows]),
    )  # fmt: skip
    together, mixed = run([0, 1, 2]), run([2, 0, 1])
    for row, other in ((0, 1), (1, 2), (2, 0)):
        there = valid[row]
        np.testing.assert_allclose(together.hidden[row, there], mixed.hidden[other, there], 1e-4, 1e-5)
        for a, b in zip(together.state, mixed.state, strict=True):
            np.testing.assert_array_equal(a.positions[:, row], b.positions[:, other])
    # Row 1 without its padding, alone.
    alone = reading(MODEL, jnp.asarray(tokens[1:2, :9]), init_state(MODEL.config, policy, slots), policy)
    for a, b in zip(together.state, alone.state, strict=True):
        np.testing.assert_array_equal(np.sort(a.positions[:, 1]), np.sort(b.positions[:, 0]))


def test_every_rule_fits_a_model() -> None:
    given = [
        pyramid(9, LAYERS), pyramid_official(20, LAYERS, 60), pyramid_even(9.0, LAYERS, 60, window=2),
        proportional([1, 2], 9), proportional([[1, 2], [3, 4]], 9), retrieval_split(np.eye(2, dtype=bool), 12, 3),
        from_scores(jnp.asarray(np.random.default_rng(0).random((LAYERS, 2, HEADS, 30))), 9),
    ]  # fmt: skip
    for slots in given:
        assert init_state(MODEL.config, TOVA("kv_head"), slots)
