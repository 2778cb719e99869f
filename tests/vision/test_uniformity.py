"""How evenly kept tokens lie, and which places are favoured."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.vision.uniformity import (
    end_bias,
    evenness,
    gap,
    heat,
    position_bias,
    spatial_evenness,
    temporal_evenness,
)

GRID = (6, 8)


def kept(*places: tuple[int, int]) -> jax.Array:
    out = np.zeros(GRID, bool)
    for place in places:
        out[place] = True
    return jnp.asarray(out.reshape(1, -1))


in_windows = jax.jit(lambda mask: spatial_evenness(mask, GRID, windows=2))
towards_end = jax.jit(end_bias)
distance_of = jax.jit(lambda mask: gap(mask, GRID))


@hypothesis.given(hnp.arrays(np.bool_, (2, 48)))
def test_bounds(mask: np.ndarray) -> None:
    even = np.asarray(in_windows(jnp.asarray(mask)))
    assert ((even >= -1e-6) & (even <= 1 + 1e-6)).all()
    bias = np.asarray(towards_end(jnp.asarray(mask)))
    assert ((bias >= -1 - 1e-6) & (bias <= 1 + 1e-6)).all()
    for row, distance in zip(mask, np.asarray(distance_of(jnp.asarray(mask))), strict=True):
        assert np.isinf(distance) if not row.any() else distance <= np.hypot(5, 7)
        assert (distance == 0) == row.all()


def test_evenness_is_entropy() -> None:
    assert evenness(jnp.array([2.0, 2.0, 2.0, 2.0])) == pytest.approx(1.0)
    assert evenness(jnp.array([5.0, 0.0, 0.0, 0.0])) == 0.0
    assert evenness(jnp.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)
    assert evenness(jnp.array([1.0, 1.0, 0.0, 0.0]), most=2.0) == pytest.approx(1.0)
    assert evenness(jnp.zeros(4)) == 1.0
    assert evenness(jnp.array([7.0])) == 1.0


def test_one_in_every_window_is_even_and_a_corner_is_not() -> None:
    assert spatial_evenness(kept((0, 0), (0, 7), (5, 0), (5, 7)), GRID, windows=2)[0] == pytest.approx(1.0)
    assert spatial_evenness(kept((0, 0), (0, 1), (1, 0), (1, 1)), GRID, windows=2)[0] == 0.0
    assert spatial_evenness(kept((0, 0), (5, 7)), GRID, windows=2)[0] == pytest.approx(1.0)  # two cannot be in four
    assert spatial_evenness(jnp.ones((1, 48), bool), GRID, windows=5)[0] == pytest.approx(
        1.0
    )  # windows of unequal size


def test_the_gap_is_the_distance_to_the_nearest() -> None:
    place = np.stack(np.mgrid[:6, :8], -1).reshape(-1, 2)
    expected = np.minimum(np.hypot(*(place - [1, 2]).T), np.hypot(*(place - [4, 6]).T)).mean()
    assert gap(kept((1, 2), (4, 6)), GRID)[0] == pytest.approx(expected, abs=1e-5)


def test_frames() -> None:
    video = np.zeros((2, 4, 5), bool)
    video[0, :, 0] = True
    video[1, 2] = True
    np.testing.assert_allclose(temporal_evenness(jnp.asarray(video)), [1.0, 0.0], atol=1e-6)


def test_what_random_choice_looks_like() -> None:
    """As the docstring says: a position bias of chance alone, and none towards the end."""
    rows, total, n = 300, 48, 12
    draws = np.random.default_rng(0).random((12, rows, total)).argsort(-1).argsort(-1) < n
    mask = draws[0]
    chance = np.sqrt((1 / n - 1 / total) * total / (2 * np.pi * rows))
    biases = [float(position_bias(jnp.asarray(draw))) for draw in draws]
    assert np.mean(biases) == pytest.approx(chance, rel=0.1)
    assert abs(float(end_bias(jnp.asarray(mask)).mean())) < 0.03
    assert position_bias(jnp.asarray(mask[:1].repeat(rows, 0))) == pytest.approx(1 - n / total)
    assert end_bias(jnp.arange(total)[None] >= total - n)[0] > 0.7
    np.testing.assert_allclose(heat(jnp.asarray(mask), GRID), mask.mean(0).reshape(GRID), atol=1e-6)


def test_nothing_kept_favours_no_place() -> None:
    assert float(position_bias(jnp.zeros((3, 4), bool))) == 0


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="48 patches are no grid of 7 x 7"):
        gap(jnp.ones((1, 48), bool), (7, 7))
    with pytest.raises(ValueError, match="7 windows do not fit along 6 x 8"):
        spatial_evenness(jnp.ones((1, 48), bool), GRID, windows=7)
