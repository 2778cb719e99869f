"""The board as a page: one HTML file without a server or other files, to sort and filter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

import jinja2
from markupsafe import Markup

from jaxcompress.evaluation.board import points
from jaxcompress.evaluation.results import Row

_FIELDS = (
    "experiment", "task", "metric", "lower_is_better", "model", "device", "policy", "slots", "context", "dtype",
    "settings", "value", "spread", "tokens", "samples", "seeds", "state_bytes", "tokens_per_second",
    "comparison", "codes", "command",
)  # fmt: skip


def board_page(rows: Sequence[Row], title: str = "Board") -> str:
    """The page of rows: means over seeds for each task, and means over the tasks of an experiment.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to show")
    single, means = points(rows, over_tasks=False), points(rows, over_tasks=True)
    shown = [*(point for point in means if point.task.startswith("mean of")), *single]
    data = [{name: getattr(point, name) for name in _FIELDS} for point in shown]
    codes = sorted({row.made.code for row in rows})
    # "<" would end the element that holds the data
    packed = Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
    template = files("jaxcompress.evaluation").joinpath("board.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(title=title, data=packed, count=len(rows), codes=codes)
