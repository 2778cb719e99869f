"""The board: rows of results as points that can be compared, and which of them nothing beats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.evaluation.policy_hash import POLICY_HASH
from jaxcompress.evaluation.results import Cell, Row, Slots

NOT_COMPARED = ("fraction", POLICY_HASH)
"""Settings by which points of one comparison differ, as they do by policy and slots."""


class Point(NamedTuple):
    """The mean of rows that differ only in their seeds, and in their tasks if there are several.

    Attributes:
      comparison: equal for points that may be compared: experiment, tasks, metric, model, context, settings.
      task: the task, or `mean of N tasks`.
      policy: as it was named; `#` and six digits tell apart what goes by one name, such as two learned policies. Where
        numbers of different types are compared, such as int8 states, the type follows.
      settings: in words.
      value: mean over seeds within a task, then over tasks.
      spread: standard deviation of that over seeds; of a single row its own spread; None if it is not known.
      tokens, samples: of all rows together.
      state_bytes, tokens_per_second: means.
      rows: how many there are.
      codes: of the rows, by which version of the code they were made.
      command: a command that made one of them.
    """

    comparison: str
    experiment: str
    task: str
    metric: str
    lower_is_better: bool
    model: str
    device: str
    policy: str
    slots: Slots
    context: int
    dtype: str
    settings: str
    value: float
    spread: float | None
    tokens: int
    samples: int
    seeds: int
    state_bytes: float
    tokens_per_second: float | None
    rows: int
    codes: tuple[str, ...]
    command: str


def points(rows: Iterable[Row], *, over_tasks: bool = True) -> list[Point]:
    """The points of rows, in the order in which their first rows were made. Of rows of one cell the newest counts.

    Args:
      over_tasks: whether the tasks of an experiment are averaged, such as RULER's or the books of a table; else each
        is a point of its own.
    """
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.at):
        groups.setdefault(_group(row, over_tasks), []).append(row)
    found = [_point(group, over_tasks) for group in groups.values()]
    dtypes: dict[str, set[str]] = {}
    for point in found:
        dtypes.setdefault(point.comparison, set()).add(point.dtype)
    several = lambda point: len(dtypes[point.comparison]) > 1
    return [point._replace(policy=f"{point.policy}, {point.dtype}") if several(point) else point for point in found]


def _group(row: Row, over_tasks: bool) -> str:
    said: dict[str, Any] = json.loads(row.cell.key)
    del said["seed"]
    if over_tasks:
        del said["task"]
    return json.dumps([said, row.figure.metric, row.made.device], sort_keys=True)


def _point(rows: Sequence[Row], over_tasks: bool) -> Point:
    newest = {(row.cell.task, row.cell.seed): row for row in rows}
    rows = list(newest.values())
    cell, figure, made, _ = rows[0]
    tasks = list(dict.fromkeys(row.cell.task for row in rows))
    seeds = sorted({row.cell.seed for row in rows})
    of_task = lambda task, of: float(np.mean([of(row) for row in rows if row.cell.task == task]))
    mean = lambda of: float(np.mean([of_task(task, of) for task in tasks]))
    speeds = [row.figure.tokens_per_second for row in rows if row.figure.tokens_per_second is not None]
    shared = {name: value for name, value in cell.settings.items() if name not in NOT_COMPARED}
    task = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    compared = [
        cell.experiment, sorted(tasks), figure.metric, cell.model_hash, cell.context, shared, made.device,
    ]  # fmt: skip
    return Point(
        json.dumps(compared, sort_keys=True), cell.experiment, task if over_tasks else tasks[0], figure.metric,
        figure.lower_is_better, cell.model, made.device, _named(cell), cell.slots, cell.context, cell.dtype,
        in_words(shared), mean(lambda row: row.figure.value), _spread(rows, tasks, seeds),
        sum(row.figure.tokens for row in rows), sum(row.figure.samples for row in rows), len(seeds),
        mean(lambda row: row.figure.state_bytes), float(np.mean(speeds)) if speeds else None, len(rows),
        tuple(dict.fromkeys(row.made.code for row in rows)), made.command,
    )  # fmt: skip


def _named(cell: Cell) -> str:
    """The policy; of one whose name does not say all, a few digits more tell it from others of that name."""
    own = cell.settings.get(POLICY_HASH)
    return cell.policy if own is None else f"{cell.policy} #{own[:6]}"


def _spread(rows: Sequence[Row], tasks: Sequence[str], seeds: Sequence[int]) -> float | None:
    """The standard deviation over seeds that have every task; of one row its own."""
    if len(rows) == 1:
        return rows[0].figure.spread
    by_seed = [[row.figure.value for row in rows if row.cell.seed == seed] for seed in seeds]
    whole = [float(np.mean(values)) for values in by_seed if len(values) == len(tasks)]
    return float(np.std(whole, ddof=1)) if len(whole) > 1 else None


def in_words(settings: dict[str, Any]) -> str:
    """Settings in a line. Those that are None or a hash are left out: they part comparisons, and say nothing."""
    hashes = ("text", "puzzles", "tokens")
    shown = {name: value for name, value in settings.items() if value is not None and name not in hashes}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def front(chosen: Sequence[Point], cost: Callable[[Point], float | None]) -> list[Point]:
    """The points that no other beats: none costs as little or less and is as good or better, one of both truly.

    Of points that are equal in both, all are on it.

    Args:
      chosen: points of one comparison.
      cost: lower is better; None: the point is left out.

    Returns:
      By cost, from the cheapest.
    """
    worth = lambda point: -point.value if point.lower_is_better else point.value
    costs = [(cost(point), -worth(point), number) for number, point in enumerate(chosen)]
    priced = [(price, loss, number) for price, loss, number in costs if price is not None]
    kept, best = [], (float("inf"), float("inf"))
    for price, loss, number in sorted(priced):
        if loss < best[1] or (price, loss) == best:
            best = price, loss
            kept.append(chosen[number])
    return kept


def memory(point: Point) -> float:
    """The bytes that a point costs."""
    return point.state_bytes


def slowness(point: Point) -> float | None:
    """Lower for faster points; None if the speed is not known."""
    return None if point.tokens_per_second is None else -point.tokens_per_second


def fronts(given: Sequence[Point], cost: Callable[[Point], float | None]) -> set[Point]:
    """The points on the front of their own comparison."""
    comparisons: dict[str, list[Point]] = {}
    for point in given:
        comparisons.setdefault(point.comparison, []).append(point)
    return {point for some in comparisons.values() for point in front(some, cost)}


def table(given: Sequence[Point]) -> list[str]:
    """The points as lines of text, a heading and a table for each comparison. * marks the front of bytes."""
    best = fronts(given, memory)
    lines: list[str] = []
    for comparison in dict.fromkeys(point.comparison for point in given):
        mine = [point for point in given if point.comparison == comparison]
        one = mine[0]
        better = "lower" if one.lower_is_better else "higher"
        lines += [
            *([""] if lines else []),
            f"{one.experiment}, {one.task}: {one.metric} ({better} is better)",
            f"{one.model}, context {one.context:,}{', ' if one.settings else ''}{one.settings}; {one.device}",
            f"{'policy':32}{'slots':>8}{'value':>19}{'KiB':>9}{'tok/s':>8}{'seeds':>6}{'samples':>8}{'tokens':>10}",
        ]
        lines += [_line(point, point in best) for point in mine]
    return lines


def _line(point: Point, best: bool) -> str:
    slots = str(point.slots) if isinstance(point.slots, int) else f"~{sum(point.slots) // len(point.slots)}"
    value = f"{point.value:,.3f}" + (f" ±{point.spread:,.3f}" if point.spread is not None else "")
    speed = "-" if point.tokens_per_second is None else f"{point.tokens_per_second:,.0f}"
    return (
        f"{point.policy:32}{slots:>8}{value:>18}{'*' if best else ' '}{point.state_bytes / 1024:9,.0f}{speed:>8}"
        f"{point.seeds:6}{point.samples:8,}{point.tokens:10,}"
    )


def uneven(given: Sequence[Point]) -> list[str]:
    """Comparisons of one experiment that differ only in their tasks: means over them cannot be set side by side."""
    tasks: dict[str, set[str]] = {}
    for point in given:
        said = json.loads(point.comparison)
        tasks.setdefault(json.dumps([said[0], *said[2:]]), set()).add(f"{point.task} of {', '.join(said[1])}")
    lines = (
        f"{json.loads(key)[0]}: policies were measured on different tasks: {'; '.join(sorted(found))}"
        for key, found in tasks.items() if len(found) > 1
    )  # fmt: skip
    return list(dict.fromkeys(lines))
