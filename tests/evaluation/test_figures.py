"""Figures: that something is drawn, and that it is what the numbers say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcompress.evaluation.figures import _held, _survival, death_times, perplexity_against_slots
from jaxcompress.evaluation.sweep import Row
from jaxcompress.trace import Trace


def row(policy: str, slots: int, perplexity: float) -> Row:
    return Row(policy, slots, "streaming", float(np.log(perplexity)), perplexity, 1000, 1e4, 2048)


def deaths(*shape: int, seed: int = 0) -> np.ndarray:
    """Random death times [..., T], each token seen at least by its own query, many held to the end."""
    total = shape[-1]
    age = np.random.default_rng(seed).geometric(0.1, shape)
    return np.minimum(np.arange(total) + age, total).astype(np.int32)


def assert_drawn(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        pixels = np.asarray(picture.convert("L"))
    assert 0.002 < (pixels < 200).mean() < 0.9
    assert len(np.unique(pixels)) > 20


@pytest.mark.parametrize("full", [[row("full", 1024, 9.0)], []], ids=["full", "no full"])
def test_perplexity_against_slots(tmp_path: Path, full: list[Row]) -> None:
    rows = [*full, *(row(name, slots, 10 + 900 / slots) for name in ("tova", "window") for slots in (128, 32, 64))]
    perplexity_against_slots(rows, tmp_path / "figure.png", title="A text")
    assert_drawn(tmp_path / "figure.png")


def test_a_single_row_can_be_drawn(tmp_path: Path) -> None:
    for one in (row("full", 64, 9.0), row("tova", 64, 9.0)):
        perplexity_against_slots([one], tmp_path / f"{one.policy}.png")
        assert_drawn(tmp_path / f"{one.policy}.png")


@pytest.mark.parametrize("sets", [1, 2])
def test_death_times(tmp_path: Path, sets: int) -> None:
    layers, batch, total = 2, 2, 60
    trace = Trace(
        positions=np.zeros((layers, 1, batch, sets, 8), np.int32),
        logits=np.zeros((1, batch, 5), np.float32),
        death=deaths(layers, batch, sets, total),
    )
    death_times(trace, tmp_path / "first.png", title="A policy")
    death_times(trace, tmp_path / "second.png", title="A policy", row=1)
    assert_drawn(tmp_path / "first.png")
    assert (tmp_path / "first.png").read_bytes() != (tmp_path / "second.png").read_bytes()


@pytest.mark.parametrize(("total", "pixels"), [(12, 400), (12, 12), (23, 5)])
def test_held_against_counting(total: int, pixels: int) -> None:
    death = deaths(3, total)
    n = min(total, pixels)
    steps = [int(i * (total - 1) / (n - 1)) for i in range(n)]
    edges = [int(i * total / n) for i in range(n + 1)]
    expected = np.zeros((n, n))
    for y, i in enumerate(steps):
        for x in range(n):
            tokens = range(edges[x], edges[x + 1])
            alive = [j <= i < death[p, j] for p in range(3) for j in tokens]
            expected[y, x] = sum(alive) / len(alive)
    np.testing.assert_allclose(_held(death, pixels), expected, atol=1e-12)


def test_held_of_a_window() -> None:
    death = np.minimum(np.arange(6) + 2, 6)[None]
    np.testing.assert_array_equal(_held(death), np.eye(6) + np.eye(6, k=-1))


def test_survival_by_hand() -> None:
    death = np.array([[2, 2, 5, 5, 5]])  # ages 2 and 1, then 3, 2 and 1 at the end of the text
    age, share = _survival(death)
    np.testing.assert_array_equal(age, np.arange(1, 6))
    np.testing.assert_allclose(share, [4 / 5, 4 / 5 * 2 / 3, *[4 / 5 * 2 / 3] * 3])


def test_survival_against_the_product_over_ages() -> None:
    total = 30
    death = deaths(2, total, seed=4)
    ages = [(int(d) - j, d < total) for per_set in death for j, d in enumerate(per_set)]
    expected, alive = [], 1.0
    for n in range(1, total + 1):
        at_risk = sum(age >= n for age, _ in ages)
        if at_risk:
            alive *= 1 - sum(age == n and died for age, died in ages) / at_risk
        expected.append(alive)
    age, share = _survival(death)
    np.testing.assert_array_equal(age, np.arange(1, total + 1))
    np.testing.assert_allclose(share, expected, atol=1e-12)
    assert (np.diff(share) <= 0).all()


def test_survival_where_nothing_dies() -> None:
    _, share = _survival(np.full((1, 8), 8))
    np.testing.assert_array_equal(share, np.ones(8))
