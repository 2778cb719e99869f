"""Pictures of what policies do. Every function writes a file and returns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

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


def perplexity_against_slots(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """One line per policy over the number of slots; the full cache is a dashed line.

    Where there is a full cache, what is more than three times worse leaves the picture and is told in the legend.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        full = [row for row in rows if row.policy == "full"]
        bounded = [row for row in rows if row.policy != "full"]
        for i, name in enumerate(dict.fromkeys(row.policy for row in bounded)):
            mine = sorted((row for row in bounded if row.policy == name), key=lambda row: row.slots)
            outside = [row for row in mine if full and row.perplexity > 3 * full[0].perplexity]
            label = f"{name} (up to {max(row.perplexity for row in outside):,.0f})" if outside else name
            axes.plot(
                [row.slots for row in mine], [row.perplexity for row in mine], label=label,
                color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)], markersize=5,
            )  # fmt: skip
        if full:
            axes.axhline(
                full[0].perplexity, color="0.35", linestyle="--", linewidth=1.2, label=f"full ({full[0].slots})"
            )
            lowest = min(row.perplexity for row in rows)
            highest = max(row.perplexity for row in rows)
            axes.set_ylim(0.96 * lowest, min(1.1 * highest, 3 * full[0].perplexity))
        ticks = sorted({row.slots for row in bounded})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.set(xlabel="slots per layer", ylabel="perplexity", title=title)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


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
