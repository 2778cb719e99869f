"""Figures about policies. Every public function writes a file and returns nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcompress._extras import extra
from jaxcompress.evaluation.lifetimes import KINDS, check_layers, occupancy, survival
from jaxcompress.evaluation.sweep import Row
from jaxcompress.evaluation.tracing import Trace

with extra("plots"):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# Okabe and Ito's palette; colour-blind readers can distinguish its colours too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
_UNKNOWN: dict[str, Any] = dict(facecolor="0.9", edgecolor="0.7", hatch="////", linewidth=0, zorder=0)


class Point(NamedTuple):
    """One value of a policy at a capacity."""

    policy: str
    slots: int
    value: float


def against_slots(panels: Mapping[str, Sequence[Point]], path: Path, title: str = "") -> None:
    """Draws a panel per quantity, with a line per policy over the number of slots; the full cache is a dashed line.

    Values above three times the full cache's value are outside the picture and appear in the legend.
    """
    with mpl.rc_context(STYLE):
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
            color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5,
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


def comparison(
    panels: Mapping[str, Sequence[Point]], path: Path, title: str = "", lower_is_better: Sequence[str] = ()
) -> None:
    """Draws a panel per quantity: a row per policy, a column per number of slots, with colours and numbers.

    Many policies fit, whereas lines would hide each other. The full cache is the first row, with one column for all.

    Args:
      lower_is_better: labels of quantities for which lower is better, shown as numbers with two digits; all others are
        shares.
    """
    names = list(dict.fromkeys(point.policy for points in panels.values() for point in points))
    slots = sorted({p.slots for points in panels.values() for p in points if p.policy != "full"}, reverse=True)
    style: dict[Any, Any] = STYLE | {"axes.grid": False, "font.size": 9}
    with mpl.rc_context(style):
        size = 2.6 + 0.75 * max(len(slots), 1) * len(panels), max(1.4 + 0.27 * len(names), 2.4)
        figure = Figure(figsize=size, layout="constrained")
        rows = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (label, points) in zip(rows, panels.items(), strict=True):
            values = np.full((len(names), max(len(slots), 1)), np.nan)
            for point in points:
                column = slice(None) if point.policy == "full" else slots.index(point.slots)
                values[names.index(point.policy), column] = point.value
            _grid(axes, values, label in lower_is_better)
            axes.set_xticks(range(len(slots)), [str(n) for n in slots])
            axes.set(title=label, xlabel="slots per layer")
        rows[0].set_yticks(range(len(names)), names)
        figure.suptitle(title)
        figure.savefig(path, dpi=150)


def _grid(axes: Axes, values: np.ndarray, lower: bool) -> None:
    """Draws each number on its colour; values far worse than the median all have the worst colour."""
    known = values[np.isfinite(values)]
    low, high = known.min(), known.max()
    if lower:
        high = min(high, low + 3 * (np.median(known) - low) + 1e-9)
    axes.imshow(values, aspect="auto", cmap="viridis_r" if lower else "viridis", vmin=low, vmax=max(high, low + 1e-9))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            bright = (value - low) / max(high - low, 1e-9)
            dark = (bright > 0.5) == lower
            text = f"{value:.2f}" if lower else f"{value:.0%}"
            axes.text(column, row, text, ha="center", va="center", color="w" if dark else "k", fontsize=8)


def death_times(trace: Trace, path: Path, title: str = "", row: int = 0) -> None:
    """Draws the positions that each layer held, and how long it held them.

    Above, a panel per layer: at step i (downwards) a dark point for every position j held; layers with a set per head
    show the share of sets that held it. Below: the number of tokens still held n steps after they arrived.
    """
    death = trace.death[:, row]
    layers, _, total = death.shape
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(min(3.2 * layers, 14), 5.8), layout="constrained")
        panels = figure.subplots(2, layers, squeeze=False, height_ratios=(2.2, 1), sharey="row")
        for layer in range(layers):
            above, below = panels[:, layer]
            above.imshow(_held(death[layer]), cmap="Blues", vmin=0, vmax=1, extent=(0, total, total, 0), aspect="auto")
            above.set(title=f"layer {layer}", xlabel="position")
            above.grid(visible=False)
            remembered = survival(death[layer])
            below.plot(remembered.age, remembered.share, color=COLOURS[0])
            below.set(xscale="log", ylim=(0, 1), xlabel="steps since the token came")
        panels[0, 0].set_ylabel("step")
        panels[1, 0].set_ylabel("share still held")
        figure.suptitle(title)
        figure.savefig(path, dpi=150)


def lifetimes(death: np.ndarray, path: Path, title: str = "", kinds: np.ndarray | None = None) -> None:
    """Draws how long tokens were held, by layer, head and kind.

    Left: the share of tokens still held n steps after they arrived, for every layer (Kaplan-Meier; hatched where the
    text is too short). Middle, where a layer has several sets of slots: the share of each set's tokens that was held
    for more steps than the set has slots, which is 0 for a sliding window. Right, if `kinds` are given: the share held
    by kind.

    Args:
      death: [L, P, T], such as `trace.death[:, row]`.
      kinds: [T], see `jaxcompress.evaluation.lifetimes.token_kinds`.

    Raises:
      ValueError: `death` is not an array of death times of this shape.
    """
    layers, sets, _ = (death := check_layers(death)).shape
    widths = [4.6, *[min(2.6 + 0.25 * sets, 5.6)] * (sets > 1), *[4.6] * (kinds is not None)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(sum(widths), min(max(3.6, 1.6 + 0.22 * layers), 9)), layout="constrained")
        panels = iter(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
        _by_age(next(panels), death)
        if sets > 1:
            _by_head(next(panels), death)
        if kinds is not None:
            _by_kind(next(panels), death, kinds)
        figure.suptitle(title)
        figure.savefig(path, dpi=150)


def _by_age(axes: Axes, death: np.ndarray) -> None:
    """Draws a row per layer, with age on the horizontal axis."""
    total = death.shape[-1]
    ages = np.unique(np.geomspace(1, total, min(total, 200)).astype(int))
    share = np.stack([survival(layer).share[ages - 1] for layer in death])
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **_UNKNOWN))
    edges = np.append(ages, total + 1), np.arange(len(share) + 1) - 0.5
    _bar(axes, axes.pcolormesh(*edges, np.ma.masked_invalid(share), cmap="viridis", vmin=0, vmax=1))
    axes.set(xscale="log", xlabel="steps since the token came", ylabel="layer", title="by age")
    axes.invert_yaxis()
    _count(axes.yaxis)
    _powers_of_ten(axes)
    axes.grid(visible=False)


def _by_head(axes: Axes, death: np.ndarray) -> None:
    """Draws a row per layer, a column per set: the share of tokens that outlive a window with the same number of
    slots."""
    slots = np.minimum(occupancy(death)[..., -1], death.shape[-1])
    share = np.array(
        [
            [survival(one).share[n - 1] for one, n in zip(*layer, strict=True)]
            for layer in zip(death, slots, strict=True)
        ]
    )
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **_UNKNOWN))
    largest = max(np.nan_to_num(share).max(), 0.01)
    image = axes.imshow(np.ma.masked_invalid(share), aspect="auto", cmap="viridis", vmin=0, vmax=largest)
    _bar(axes, image)
    most = int(slots.max())
    after = f"{most}" if most == slots.min() else f"{int(slots.min())} to {most}"
    axes.set(xlabel="head", ylabel="layer", title=f"after {after} steps")
    _count(axes.xaxis)
    _count(axes.yaxis)
    axes.grid(visible=False)


def _by_kind(axes: Axes, death: np.ndarray, kinds: np.ndarray) -> None:
    everything = survival(death)
    axes.plot(everything.age, everything.share, label=f"all ({death.shape[-1]:,})", color="0.45", linestyle="--")
    marked = np.unique(np.geomspace(1, death.shape[-1], 9).astype(int)) - 1
    for i, kind in enumerate(KINDS):
        if (tokens := kinds == i).any():
            curve = survival(death, tokens)
            axes.plot(
                curve.age, curve.share, label=f"{kind} ({tokens.sum():,})",
                color=COLOURS[i], marker=MARKERS[i], markersize=5, markevery=marked.tolist(),
            )  # fmt: skip
    axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="steps since the token came", title="by kind")
    axes.set_ylabel("share still held")
    _powers_of_ten(axes)
    axes.legend(frameon=False, fontsize=8.5)


def _bar(axes: Axes, image: ScalarMappable) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axes, label="share still held")


def _powers_of_ten(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _count(axis: Axis) -> None:
    """Sets ticks on whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _held(death: np.ndarray, pixels: int = 400) -> np.ndarray:
    """[P, T] death times -> share of sets that hold position j at step i, at most `pixels` by `pixels`."""
    total = death.shape[-1]
    step = np.linspace(0, total - 1, min(total, pixels)).astype(int)
    edges = np.linspace(0, total, min(total, pixels) + 1).astype(int)
    token = np.arange(total)
    held = (token <= step[:, None]) & (step[:, None] < death[:, None])
    return np.add.reduceat(held.mean(0), edges[:-1], axis=1) / np.diff(edges)
