"""jaxcompress board"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcompress.cli.flags import FigureFlag, JsonFlag
from jaxcompress.cli.runtime import check_figure, check_writable, tell, write_json
from jaxcompress.inputs.whole_file import whole_file

if TYPE_CHECKING:
    from jaxcompress.evaluation.results import Row


@dataclass(frozen=True, kw_only=True)
class Board(FigureFlag, JsonFlag):
    """Compares results: quality against measured bytes and speed, and which policies nothing beats.

    It reads the rows that `--out` of other commands and scripts added to files. Rows that differ only in their seeds
    are averaged, and those of several tasks too; ± is the standard deviation of the rows over seeds, or for one row
    the standard error of its mean over samples. * marks points that no other beats in quality and bytes. Only rows of
    one experiment, model, length, setting and device are compared.

    Example: jaxcompress board --rows rows.jsonl --page board.html --figure board.svg
    """

    rows: tuple[Path, ...]
    """Files of rows (JSON Lines)."""
    experiments: tuple[str, ...] = ()
    """Only these experiments."""
    tasks: tuple[str, ...] = ()
    """Only these tasks."""
    metrics: tuple[str, ...] = ()
    """Only these metrics."""
    policies: tuple[str, ...] = ()
    """Only these policies; * is among them."""
    by_task: bool = False
    """A table for each task instead of the mean over tasks."""
    page: Path | None = None
    """Write a page of it to this file: one HTML file to sort and filter, which needs no network."""
    kvpress: Path | None = None
    """Write rows of `jaxcompress ruler` in protocol kvpress into this folder, as kvpress's evaluation does."""

    def run(self) -> None:
        check_writable(self.page)
        check_figure(self.figure)
        rows = self._chosen()
        from jaxcompress.evaluation.board import points, table, uneven

        found = points(rows, over_tasks=not self.by_task)
        if self.json:
            write_json([point._asdict() for point in found])
        else:
            print("\n".join(table(found)))
        for line in () if self.by_task else uneven(found):  # by task, there are no means to be uneven
            tell(line)
        if self.figure is not None:
            from jaxcompress.evaluation.board_figure import draw

            draw(found, self.figure)
        if self.page is not None:
            from jaxcompress.evaluation.board_page import board_page

            with whole_file(self.page) as part:
                part.write_text(board_page(rows), encoding="utf-8")
        if self.kvpress is not None:
            from jaxcompress.evaluation.kvpress_format import write_kvpress

            folders = write_kvpress(rows, self.kvpress)
            tell(f"{len(folders)} folders are in {self.kvpress}")

    def _chosen(self) -> list[Row]:
        """The rows of all files that the flags let through.

        Raises:
          FileNotFoundError, ValueError: as `read_rows`; no row is left.
        """
        from jaxcompress.evaluation.results import read_rows

        rows = [row for path in self.rows for row in read_rows(path)]
        if not rows:
            raise ValueError(f"there are no rows in {', '.join(map(str, self.rows))}")
        wanted = dict(experiments="experiment", tasks="task", policies="policy")
        for flag, name in wanted.items():
            given = getattr(self, flag)
            rows = [row for row in rows if not given or getattr(row.cell, name) in given]
        rows = [row for row in rows if not self.metrics or row.figure.metric in self.metrics]
        if not rows:
            raise ValueError("no row has what --experiments, --tasks, --metrics and --policies name")
        return rows
