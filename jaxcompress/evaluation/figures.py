"""Pictures of what policies do. Every function writes a file and returns nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxcompress.evaluation.sweep import Row
from jaxcompress.trace import Trace

# Okabe and Ito's palette, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_MARKERS = "osD^vPX*"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


class Point(NamedTuple):
    """One value of a policy at a capacity."""

    policy: str
    slots: int
    value: float


def against_slots(panels: Mapping[str, Sequence[Point]], path: Path, title: str = "") -> None:
    """A panel per quantity, in it a line per policy over the number of slots; the full cache is a dashed line.

    What is more than three times the full cache's value leaves the picture and is told in the legend.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
        for axes, (label, points) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            _lines(axes, points)
            axes.set(xlabel="slots per layer", ylabel=label)
        figure.suptitle(title)
        figure.savefig(path, dpi=150)


def _lines(axes: Axes, points: Sequence[Point]) -> None:
    full = [point for point in points if point.policy == "full"]
    bounded = [point for point in points if point.policy != "full"]
    limit = 3 * full[0].value if full else float("inf")
    for i, name in enumerate(dict.fromkeys(point.policy for point in bounded)):
        mine = sorted((point for point in bounded if point.policy == name), key=lambda point: point.slots)
        inside = [point for point in mine if point.value <= limit]
        outside = max((point.value for point in mine if point.value > limit), default=None)
        axes.plot(
            [point.slots for point in inside], [point.value for point in inside],
            label=name if outside is None else f"{name} (up to {outside:,.0f})",
            color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)], markersize=5,
        )  # fmt: skip
    if full:
        label = f"full ({full[0].slots})"
        axes.axhline(full[0].value, color="0.35", linestyle="--", linewidth=1.2, label=label)
    ticks = sorted({point.slots for point in bounded})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.legend(frameon=False)


def perplexity_against_slots(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """`against_slots` of the perplexities of a sweep."""
    against_slots({"perplexity": [Point(row.policy, row.slots, row.perplexity) for row in rows]}, path, title)


def death_times(trace: Trace, path: Path, title: str = "", row: int = 0) -> None:
    """Which positions each layer held, and for how long.

    Above, a panel per layer: at step i (downwards) a dark point for every position j held; layers with a set per head
    show the share of sets that held it. Below: how many of the tokens were still held n steps after they came.
    """
    death = trace.death[:, row]
    layers, _, total = death.shape
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(min(3.2 * layers, 14), 5.8), layout="constrained")
        panels = figure.subplots(2, layers, squeeze=False, height_ratios=(2.2, 1), sharey="row")
        for layer in range(layers):
            above, below = panels[:, layer]
            above.imshow(_held(death[layer]), cmap="Blues", vmin=0, vmax=1, extent=(0, total, total, 0), aspect="auto")
            above.set(title=f"layer {layer}", xlabel="position")
            above.grid(visible=False)
            ages, share = _survival(death[layer])
            below.plot(ages, share, color=_COLOURS[0])
            below.set(xscale="log", ylim=(0, 1), xlabel="steps since the token came")
        panels[0, 0].set_ylabel("step")
        panels[1, 0].set_ylabel("share still held")
        figure.suptitle(title)
        figure.savefig(path, dpi=150)


def _held(death: np.ndarray, pixels: int = 400) -> np.ndarray:
    """[P, T] death times -> share of sets that hold position j at step i, at most `pixels` by `pixels`."""
    total = death.shape[-1]
    step = np.linspace(0, total - 1, min(total, pixels)).astype(int)
    edges = np.linspace(0, total, min(total, pixels) + 1).astype(int)
    token = np.arange(total)
    held = (token <= step[:, None]) & (step[:, None] < death[:, None])
    return np.add.reduceat(held.mean(0), edges[:-1], axis=1) / np.diff(edges)


def _survival(death: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kaplan-Meier estimate of the share of tokens held n steps after they came (censored at the end)."""
    total = death.shape[-1]
    age = (death - np.arange(total)).ravel()
    died = (death < total).ravel()
    deaths, leaving = (np.bincount(age[which], minlength=total + 1) for which in (died, np.ones_like(died)))
    at_risk = age.size - np.concatenate([[0], np.cumsum(leaving)[:-1]])
    share = np.cumprod(1 - deaths / np.maximum(at_risk, 1))
    return np.arange(1, total + 1), share[1 : total + 1]
