"""Draws which patches of a picture each method kept; dropped patches are greyed out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from jaxcompress._extras import extra

with extra("plots"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

Pixels = UInt8[np.ndarray, "side side 3"]


class Panel(NamedTuple):
    """One version of a picture.

    Attributes:
      title: text above the picture.
      kept: [N], which patches stayed, in raster order; None for all.
      note: text below the picture.
    """

    title: str
    kept: Bool[np.ndarray, " N"] | None = None
    note: str = ""


def greyed(pixels: Pixels, kept: Bool[np.ndarray, " N"]) -> Pixels:
    """The picture with dropped patches in pale grey and kept patches unchanged.

    Raises:
      ValueError: the patches do not form a square grid of the picture.
    """
    side = int(round(len(kept) ** 0.5))
    if side**2 != len(kept) or pixels.shape[0] % side or pixels.shape[0] != pixels.shape[1]:
        raise ValueError(
            f"{len(kept)} patches are no square grid of a picture of {pixels.shape[1]} x {pixels.shape[0]}"
        )
    patch = pixels.shape[0] // side
    mask = kept.reshape(side, side).repeat(patch, 0).repeat(patch, 1)[..., None]
    pale = 225 + 0.1 * (pixels.mean(-1, keepdims=True) - 128)
    return np.where(mask, pixels, pale).astype(np.uint8)


def draw_dropped(pixels: Pixels, rows: Sequence[Sequence[Panel | None]], path: Path, title: str = "") -> None:
    """Writes an image of one picture in many versions, with one line of panels per row. None leaves a place empty."""
    columns = max(map(len, rows))
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.6 * columns, 1.95 * len(rows) + 0.4), layout="constrained")
        for line, panels in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
            for axes in line:
                axes.axis("off")
            for axes, panel in zip(line, panels, strict=False):
                if panel is None:
                    continue
                axes.imshow(pixels if panel.kept is None else greyed(pixels, panel.kept), interpolation="nearest")
                axes.set_title(panel.title, fontsize=8)
                axes.text(0.5, -0.03, panel.note, transform=axes.transAxes, ha="center", va="top", fontsize=8)
        figure.suptitle(title)
        figure.savefig(path, dpi=110)


def draw_heat(panels: Mapping[str, Float[np.ndarray, "rows columns"]], path: Path, title: str = "") -> None:
    """Writes an image of how often each place was kept, on one scale from never to always."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.3 * len(panels) + 0.6, 2.9), layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        image = None
        top = max(float(heat.max()) for heat in panels.values())
        for axes, (name, heat) in zip(row, panels.items(), strict=True):
            image = axes.imshow(heat, vmin=0, vmax=top, cmap="viridis")
            axes.set(title=name, xticks=[], yticks=[])
        if image is not None:
            figure.colorbar(image, ax=list(row), label="share of pictures", shrink=0.8)
        figure.suptitle(title)
        figure.savefig(path, dpi=130)
