"""The board as a picture: quality against bytes and against speed, with the points that nothing beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxcompress._extras import extra
from jaxcompress.evaluation.board import Point, front, memory, slowness

with extra("plots"):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxcompress.evaluation.figures import COLOURS, MARKERS, STYLE


def draw(given: Sequence[Point], path: Path) -> None:
    """Draws a row of two panels for each comparison; the suffix of the path decides the format (.svg, .png, .pdf).

    Raises:
      ValueError: there are no points, or the format is unknown.
    """
    comparisons: dict[str, list[Point]] = {}
    for point in given:
        comparisons.setdefault(point.comparison, []).append(point)
    if not comparisons:
        raise ValueError("there are no rows to draw")
    policies = list(dict.fromkeys(point.policy for point in given))
    with mpl.rc_context(STYLE):
        drawing = Figure(figsize=(13, 4.2 * len(comparisons)), layout="constrained")
        for row, mine in zip(drawing.subplots(len(comparisons), 2, squeeze=False), comparisons.values(), strict=True):
            _panel(row[0], mine, policies, lambda point: point.state_bytes / 2**20, memory)
            if max(map(memory, mine)) >= 4 * min(map(memory, mine)) > 0:
                row[0].set_xscale("log", base=2)
            row[0].xaxis.set_major_formatter(lambda x, _: f"{x:,.3g}")
            row[0].set_xlabel("state of one row of text, MiB (measured)")
            _panel(row[1], mine, policies, lambda point: point.tokens_per_second, slowness)
            row[1].set(xlabel="tokens per second")
            one = mine[0]
            row[0].set_title(f"{one.experiment}, {one.task}, context {one.context:,}\n{one.settings}", fontsize=9)
            row[1].legend(*row[0].get_legend_handles_labels(), fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
            for axes in row:
                axes.set_ylabel(one.metric + (" (lower is better)" if one.lower_is_better else ""))
        drawing.savefig(path, dpi=150)


def _panel(
    axes: Axes,
    mine: Sequence[Point],
    policies: Sequence[str],
    at: Callable[[Point], float | None],
    cost: Callable[[Point], float | None],
) -> None:
    for number, policy in enumerate(policies):
        shown = [(x, point) for point in mine if point.policy == policy and (x := at(point)) is not None]
        if shown:
            axes.errorbar(
                [x for x, _ in shown], [point.value for _, point in shown],
                yerr=[point.spread or 0 for _, point in shown], label=policy, linestyle="none", capsize=2,
                color=COLOURS[number % len(COLOURS)], markersize=6,
                marker=MARKERS[(number + number // len(MARKERS)) % len(MARKERS)],
            )  # fmt: skip
    best = [(x, point.value) for point in front(mine, cost) if (x := at(point)) is not None]
    axes.plot([x for x, _ in best], [y for _, y in best], color="0.4", linestyle="--", linewidth=1.2, zorder=0)
