"""Figures: that something is drawn, and that it is what the numbers say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcompress.evaluation.figures import Point, _held, comparison, death_times, lifetimes, perplexity_against_slots
from jaxcompress.evaluation.lifetimes import KINDS
from jaxcompress.evaluation.sweep import Row
from jaxcompress.evaluation.tracing import Trace


def row(policy: str, slots: int, perplexity: float) -> Row:
    return Row(policy, slots, "streaming", float(np.log(perplexity)), perplexity, 1000, 1e4, 2048, 0)


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


def width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.size[0]


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


@pytest.mark.parametrize(("sets", "panels"), [(1, 2), (3, 4)])
def test_lifetimes(tmp_path: Path, sets: int, panels: int) -> None:
    """Two heat maps with their bars for several heads, one for one."""
    death, kinds = deaths(3, sets, 80), np.arange(80) % len(KINDS)
    for name, by_kind in (("maps", None), ("kinds", kinds)):
        lifetimes(death, tmp_path / f"{name}.png", "A policy", by_kind)
        assert_drawn(tmp_path / f"{name}.png")
    assert width(tmp_path / "kinds.png") > width(tmp_path / "maps.png") > 150 * panels


@pytest.mark.parametrize("life", [1, 5, 1000])
def test_lifetimes_where_all_tokens_fare_alike(tmp_path: Path, life: int) -> None:
    """Nothing outlives the window, or nothing is ever forgotten: the colours have no range."""
    death = np.broadcast_to(np.minimum(np.arange(40) + life, 40), (1, 2, 40))
    lifetimes(death, tmp_path / "maps.png", kinds=np.zeros(40, int))
    assert_drawn(tmp_path / "maps.png")


def test_lifetimes_of_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be \[L, P, T\], not \[2, 1, 1, 9\]; .* one row"):
        lifetimes(deaths(2, 1, 1, 9), tmp_path / "maps.png")


@pytest.mark.parametrize("policies", [1, 2, 30])
def test_comparison(tmp_path: Path, policies: int) -> None:
    """Legible however many policies there are: the picture grows, and each has a row."""
    names = ["full", *(f"policy {i}" for i in range(policies - 1))]
    draw = lambda low: [
        Point(name, slots, low + i / 10 + 8 / slots)
        for i, name in enumerate(names)
        for slots in ((256,) if name == "full" else (64, 16))
    ]
    panels = {"nats": draw(2.0), "recall": draw(0.0)}
    comparison(panels, tmp_path / "figure.png", "A text", lower_is_better=["nats"])
    assert_drawn(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.size[1] > 40 * policies
