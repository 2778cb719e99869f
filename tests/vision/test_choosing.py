"""Scores and what they choose: definitions restated in NumPy, ties, budgets, wrong input."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.policies.cache_view import CacheView, LayerContext, Observation
from jaxcompress.vision import choose, dual_attention, fastv, fitprune, prumerge, sparsevlm, uniform, windows
from jaxcompress.vision.cdpruner import diverse, question_relevance
from jaxcompress.vision.dart import dart
from jaxcompress.vision.output_aware import OutputAware
from jaxcompress.vision.schedule import falling, spread_over
from jaxcompress.vision.visionzip import visionzip


@hypothesis.given(
    scores=st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), min_size=1, max_size=9), data=st.data()
)
@hypothesis.settings(max_examples=25)
def test_the_best_are_exactly_n_and_of_equals_the_earlier(scores: list[float], data: st.DataObject) -> None:
    n = data.draw(st.integers(0, len(scores)))
    order = sorted(range(len(scores)), key=lambda i: (-np.nan_to_num(scores[i], nan=-np.inf), i))[:n]
    x = jnp.asarray([scores], jnp.float32)
    assert choose.ranked_indices(x, n)[0].tolist() == order
    assert choose.top_indices(x, n)[0].tolist() == sorted(order)
    assert choose.complement(choose.top_indices(x, n), len(scores))[0].tolist() == [
        i for i in range(len(scores)) if i not in order
    ]


def test_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="cannot keep 9 of 8 tokens; give a number from 0 to 8"):
        choose.top_indices(jnp.zeros((1, 8)), 9)
    with pytest.raises(ValueError, match="cannot keep -1"):
        choose.top_indices(jnp.zeros((1, 8)), -1)


def numpy_dart(patches, words, patch_norm, word_norm, n, pivots=4):
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    chosen = list(np.argsort(-patch_norm, kind="stable")[: min(pivots, n)])
    asking = list(np.argsort(-word_norm, kind="stable")[:pivots])
    vectors = [patches[i] for i in chosen] + [words[i] for i in asking]
    kept, rest = set(chosen), n - len(chosen)
    for i, vector in enumerate(vectors):
        quota = rest // len(vectors) + (i < rest % len(vectors))
        like = unit(patches) @ unit(vector)
        left = sorted((j for j in range(len(patches)) if j not in kept), key=lambda j: (like[j], j))
        kept |= set(left[:quota])
    return sorted(kept)


@pytest.mark.parametrize("n", [2, 4, 13, 30, 31])
def test_dart_as_restated(n: int) -> None:
    rng = np.random.default_rng(n)
    patches, words = rng.standard_normal((2, 31, 6)), rng.standard_normal((2, 7, 6))
    patch_norm, word_norm = rng.random((2, 31)), rng.random((2, 7))
    present = np.ones((2, 7), bool)
    present[1, 4:] = False  # padding is asked nothing
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    found = dart(as_float(patches), as_float(words), as_float(patch_norm), as_float(word_norm), jnp.asarray(present), n)
    for row, m in enumerate((7, 4)):
        expected = numpy_dart(patches[row], words[row, :m], patch_norm[row], word_norm[row, :m], n)
        assert found.kept[row].tolist() == expected


def test_dart_takes_empty_places_last() -> None:
    """Hidden states share a direction, as those of real models do, so that zeros are least similar to every pivot."""
    rng = np.random.default_rng(0)
    patches, words = 3 + rng.standard_normal((1, 20, 6)), 3 + rng.standard_normal((1, 5, 6))
    patch_norm, word_norm = rng.random((1, 20)), rng.random((1, 5))
    there = rng.permutation(20)[None] < 12
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    found = lambda x, norms, n, **more: dart(
        as_float(x), as_float(words), as_float(norms), as_float(word_norm), jnp.ones((1, 5), bool), n, **more
    ).kept[0]
    alone = np.flatnonzero(there[0])[found(patches[:, there[0]], patch_norm[:, there[0]], 9)]
    emptied = np.where(there[..., None], patches, 0)
    assert found(emptied, patch_norm, 9, there=jnp.asarray(there)).tolist() == alone.tolist()
    assert set(found(emptied, patch_norm, 14, there=jnp.asarray(there)).tolist()) > set(np.flatnonzero(there[0]))


def test_every_window_keeps_its_best_before_any_its_second() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((3, 36)).astype(np.float32)
    table = windows.window_table(6, 6, 2)
    order = choose.ranked_indices(fastv.by_window(jnp.asarray(scores), table), 36)
    for row in range(3):
        members = scores[row][table]
        nth = np.argsort(np.argsort(-members, axis=1), axis=1)
        window = {patch: (nth[w, i], -scores[row, patch]) for w, ps in enumerate(table) for i, patch in enumerate(ps)}
        assert order[row].tolist() == sorted(range(36), key=window.__getitem__)
        for n in (9, 18):  # each window has as many
            kept = np.isin(table, np.asarray(order[row, :n])).sum(1)
            assert (kept == n // 9).all()


def test_dual_attention_in_words_and_padding() -> None:
    rng = np.random.default_rng(1)
    rows = rng.random((1, 3, 5, 8)).astype(np.float32)
    present = np.array([[True, True, True, False, False]])
    there = np.array([[True] * 7 + [False]])
    share, individual = dual_attention.dual_attention(jnp.asarray(rows), jnp.asarray(present), jnp.asarray(there))
    mean = rows.mean(1)[0, :3, :7]
    np.testing.assert_allclose(share[0, :7], mean.sum(0) / mean.sum(), rtol=1e-5)
    np.testing.assert_allclose(individual[0, :7], mean.max(0), rtol=1e-5)
    assert share[0, 7] == individual[0, 7] == 0
    # As the library's defaults are: nothing is below an individual threshold of 0.
    assert bool(dual_attention.passes(share, individual, (1.0, 0.0)).all())


@hypothesis.given(seed=st.integers(0, 1000), n=st.integers(1, 11))
@hypothesis.settings(max_examples=10)
def test_ranked_budgets_are_thresholds(seed: int, n: int) -> None:
    """The n best by relevance are what passes for thresholds in a constant ratio."""
    rows = jax.random.uniform(jax.random.key(seed), (1, 2, 4, 12))
    share, individual = dual_attention.dual_attention(rows, jnp.ones((1, 4), bool), jnp.ones((1, 12), bool))
    score = np.asarray(dual_attention.relevance(share, individual))[0]
    limit = np.sort(score)[::-1][n - 1]
    passed = dual_attention.passes(share, individual, (float(limit), float(limit * individual.sum())))
    kept = choose.top_indices(jnp.asarray(score)[None], n)[0].tolist()
    assert set(kept) - set(np.flatnonzero(passed[0]).tolist()) <= {int(np.flatnonzero(score == limit)[0])}
    assert set(np.flatnonzero(passed[0]).tolist()) <= set(kept)


def test_rank_says_how_many() -> None:
    rows = np.zeros((1, 2, 4, 6), np.float32)
    rows[0, :, 0, 0] = rows[0, :, 1, 3] = 1.0
    rows[0, :, 2] = rows[0, :, 1]  # adds no rank
    rates = jnp.array([[True, True, True, False]])
    everything = jnp.ones((1, 6), bool)
    budget = lambda scale, bias: int(sparsevlm.rank_budget(jnp.asarray(rows), rates, everything, scale, bias)[0])
    assert budget(1.0, 0.0) == 2
    assert budget(1.5, 1.0) == 4
    assert budget(9.0, 9.0) == 5  # all but one at most
    assert int(sparsevlm.rank_budget(jnp.eye(6)[None, None], jnp.ones((1, 6), bool), everything, 0.1, 0.0)[0]) == 6


@pytest.mark.slow
def test_clusters_count_only_what_is_there() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 12, 4))
    present = jnp.arange(12) < jnp.array([[9], [12]])
    padded = sparsevlm.cluster(x, 4, present=present, count=jnp.array([2, 4]))
    alone = sparsevlm.cluster(x[:1, :9], 2)
    np.testing.assert_allclose(padded.x[0, :2], alone.x[0], atol=1e-5)
    np.testing.assert_array_equal(padded.centres[0, :2], alone.centres[0])
    same = sparsevlm.cluster(jnp.ones((1, 5, 3)), 2)  # all densities are equal
    np.testing.assert_allclose(same.x[0], 1.0, atol=1e-5)


@pytest.mark.slow
def test_prumerge_with_no_outlier_keeps_what_went() -> None:
    x = jax.random.normal(jax.random.key(1), (1, 40, 4))
    flat = jnp.full((1, 40), 1 / 41)
    done, kept = prumerge.prumerge_adaptive(x, flat, x)
    assert np.asarray(done.present)[0].nonzero()[0].tolist() == [40]
    np.testing.assert_allclose(done.x[0, -1], x[0].sum(0) / 41, atol=1e-5)
    assert (kept == 40).all()
    _, stepped = prumerge.prumerge_adaptive(x, flat, x, stepped=True)
    assert np.asarray(stepped)[0, :2].tolist() == [0, 40]  # one step is the whole picture


def test_visionzip_with_nothing_to_sum_up() -> None:
    x = jax.random.normal(jax.random.key(2), (1, 10, 4))
    done = visionzip(x, x[..., 0], x, 10, 0)
    np.testing.assert_array_equal(done.x, x)
    with pytest.raises(ValueError, match="cannot keep 11 of 10"):
        visionzip(x, x[..., 0], x, 6, 5)


def test_what_goes_first_in_fitprune_is_lowest_and_of_equals_the_later() -> None:
    assert fitprune.lowest_first(jnp.array([[2.0, 1.0, 1.0, 3.0]])).tolist() == [[2, 1, 0, 3]]
    assert all(sum(recipe) < 576 for recipe in fitprune.RECIPES.values())
    assert all(len(recipe) == 32 for recipe in fitprune.RECIPES.values())


def test_fitting_finds_the_smallest_threshold_that_saves_enough() -> None:
    seen = []

    def run(alpha: float) -> tuple[float, list[int]]:
        seen.append(alpha)
        return 100 * (1 - alpha), [int(10 * alpha)] * 2

    leaves, alpha = fitprune.fit(run, 37.0)
    assert 0.63 <= alpha <= 0.63 + 0.011
    assert leaves == (6, 6)
    assert seen[:3] == [1.0, 0.5, 0.75]
    with pytest.raises(ValueError, match="no threshold saves enough"):
        fitprune.fit(lambda alpha: (50.0, [0]), 10.0)
    mass = np.array([0.1, 0.4, 0.2, 0.3])
    assert fitprune.removable(mass, 1.0, 0.35).tolist() == [0, 2]  # 0.3 may go; the next would make 0.6
    assert fitprune.removable(mass, 1.0, 0.0).tolist() == []
    assert fitprune.removable_both(mass, mass[::-1], (1.0, 1.0), 0.35).tolist() == []


def test_diversity_without_a_question_is_not_similarity() -> None:
    x = jnp.concatenate([jnp.eye(4), jnp.eye(4) + 0.01])[None]
    chosen = diverse(x, jnp.ones((1, 8)), 4).order[0] % 4
    assert sorted(chosen.tolist()) == [0, 1, 2, 3]
    beyond = diverse(x, jnp.ones((1, 8)), 8).order[0]  # more than the rank: still every one once
    assert sorted(beyond.tolist()) == list(range(8))
    relevance = question_relevance(x, jnp.ones((2, 4)))
    assert float(relevance.min()) >= 0
    assert float(relevance.max()) <= 1 + 1e-4


@hypothesis.given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
@hypothesis.settings(max_examples=40)
def test_cells_tile_the_picture(rows: int, columns: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, rows * columns))
    if not [a for a in range(1, rows + 1) if n % a == 0 and n // a <= columns]:
        with pytest.raises(ValueError, match="the nearest numbers that do"):
            uniform.cells(rows, columns, n)
        return
    down, across = uniform.cells(rows, columns, n)
    assert down * across == n
    cell = uniform.cell_of(rows, columns, n)
    assert sorted(set(cell.tolist())) == list(range(n))
    middle = uniform.centres(rows, columns, n)
    assert len(set(middle.tolist())) == n
    assert cell[middle].tolist() == list(range(n))


def test_uniform_of_published_sizes() -> None:
    assert uniform.cells(24, 24, 64) == (8, 8)
    assert uniform.cells(24, 24, 144) == (12, 12)
    assert uniform.stride(10, 4).tolist() == [0, 2, 5, 7]
    nested = [set(choose.top_indices(uniform.random_scores(3, jnp.arange(20))[None], n)[0].tolist()) for n in (4, 9)]
    assert nested[0] < nested[1]


def test_what_the_output_does_not_look_at_goes_first() -> None:
    policy = OutputAware(2, 5)
    weights = lambda *numbers: jnp.asarray(numbers, jnp.float32)[None, None, None, None]
    see = lambda stats, row, at: policy.observe(
        stats, Observation(weights(*row), jnp.array([[at]]), jnp.ones((1, 1, 1)), 1)
    )
    stats = jnp.zeros((1, 1, 7))
    stats = see(stats, (0, 0, 0, 9, 0, 0, 0), 3)  # a patch looks: the prompt does not count ... from `last` on it does
    assert float(stats.sum()) == 0
    stats = see(stats, (0.9, 0, 0.02, 0.01, 0.07, 0, 0), 6)

    positions, vectors = jnp.arange(7)[None, None], jnp.zeros((1, 1, 7, 2))
    around = LayerContext(lambda x, at: x, "absolute", None, (1, 1), (0,))
    held = CacheView(vectors, vectors, positions, None, jnp.array([7]), jnp.array(0), (), 6, around)
    order = jnp.argsort(policy.score(stats, held))[0, 0].tolist()
    assert order == [3, 2, 4, 0, 1, 5, 6]  # patches by attention, then words, the oldest first
    with pytest.raises(ValueError, match="patches stand at positions"):
        OutputAware(5, 5)


def test_schedules() -> None:
    assert falling(576, 64, 4) == (333, 192, 111, 64)
    assert falling(9, 9, 3) == (9, 9, 9)
    assert falling(5, 0, 2)[-1] == 0
    with pytest.raises(ValueError, match="cannot keep 10 of 9 visual tokens"):
        falling(9, 10, 2)
    assert spread_over((2, 6, 10, 14), 32) == (2, 6, 10, 14)
    assert spread_over((2, 6, 10, 14), 6) == (0, 1, 2, 3)
    assert spread_over((1,), 4) == (0,)
    assert spread_over((1,), 1) == ()
