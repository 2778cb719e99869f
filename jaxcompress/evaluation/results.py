"""Results as lines of a file, each with all that is needed to measure it again.

A *cell* is what was asked for: experiment, task, model, policy, slots, context, seed. A *row* is one figure that a cell
gave: a metric and its value, what it cost, and how it was made. A file of rows (JSON Lines) only grows. A sweep that
was interrupted goes on: cells that are in the file are not measured again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxcompress.evaluation.provenance import Provenance
from jaxcompress.inputs.text import parse_json

Slots = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is asked for. Two rows with equal cells measure the same thing.

    Attributes:
      experiment: the table, such as `ruler` or `perplexity`.
      task: what is measured within it: `niah_single_1`, the name of a text.
      model: the model as it was named.
      model_hash: `jaxcompress.models.fingerprint`; it stands for the model, whatever its name.
      policy: an expression that `jaxcompress.get_policy` reads.
      slots: capacity, for all layers or for each.
      context: tokens of a text.
      dtype: of the weights, and of the state if it is another: `float32`, `float32/int8`.
      seed: of all that is drawn.
      settings: whatever else decides the figure.
    """

    experiment: str
    task: str
    model: str
    model_hash: str
    policy: str
    slots: Slots
    context: int
    dtype: str
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for equal cells. A model's name is not part of it."""
        return json.dumps(asdict(self) | {"model": None}, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure that a cell gave.

    Attributes:
      metric: what the value is, with its unit: `nats per token`, `string match %`.
      value: finite.
      spread: standard deviation of the mean over samples; None if it is not known.
      lower_is_better: such as a loss.
      tokens: on how many tokens the value rests.
      samples: on how many texts, questions or rows.
      state_bytes: measured bytes of the state of one row of text, the policy's own numbers included.
      tokens_per_second: of all rows together, without compilation; None if it was not measured.
      details: what the value was computed from, such as answers; any JSON.
    """

    metric: str
    value: float
    spread: float | None = None
    lower_is_better: bool = False
    tokens: int
    samples: int
    state_bytes: int
    tokens_per_second: float | None = None
    details: Any = None


def _is_number(x: Any) -> bool:
    """Whether it is a number that a float can hold, which NaN and infinities are not."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def _is_slots(x: Any) -> bool:
    return type(x) is int or (isinstance(x, tuple) and len(x) > 0 and all(type(one) is int for one in x))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a string", lambda x: isinstance(x, str)),
    "bool": ("true or false", lambda x: isinstance(x, bool)),
    "int": ("a number", _is_number),
    "float": ("a number", _is_number),
    "float | None": ("a number or null", lambda x: x is None or _is_number(x)),
    "Slots": ("a number or a list of numbers", _is_slots),
    "Mapping[str, Any]": ("an object", lambda x: isinstance(x, dict)),
}
EXPECTED = {
    one.name: _KINDS[str(one.type)] for kind in (Cell, Figure, Provenance) for one in fields(kind) if one.type != "Any"
}
"""What the fields of a row must be, in words and as a test."""


class Row(NamedTuple):
    """A line of a file."""

    cell: Cell
    figure: Figure
    made: Provenance
    at: str

    def line(self) -> str:
        """JSON of one line.

        Raises:
          FloatingPointError: the value, its spread or its speed is not finite.
        """
        said = {**asdict(self.cell), **asdict(self.figure), **asdict(self.made), "at": self.at}
        try:
            return json.dumps(said, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise FloatingPointError(f"{self.figure.metric} of {self.cell.policy} is not finite: {error}") from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in the order in which they were made.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not a row; the message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no results in {path.absolute()}; a sweep with --out {path} makes them")
    lines = path.read_bytes().split(b"\n")
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: bytes, where: str) -> Row:
    try:
        said = parse_json(line.decode("utf-8"), where)
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{where} is not JSON ({error}); mend or delete that line") from None
    if not isinstance(said, dict):
        raise ValueError(f"{where} must be a JSON object, not a {type(said).__name__}; mend or delete that line")
    if isinstance(said.get("slots"), list):
        said["slots"] = tuple(said["slots"])
    for name, (expected, holds) in EXPECTED.items():
        if name in said and not holds(said[name]):
            raise ValueError(f"{where}: {name} must be {expected}, not {said[name]!r:.40}; mend or delete that line")
    if "value" in said:
        said["value"] = float(said["value"])
    own = lambda kind: kind(**{one.name: said[one.name] for one in fields(kind) if one.name in said})
    try:
        return Row(own(Cell), own(Figure), own(Provenance), str(said.get("at", "")))
    except TypeError as error:
        raise ValueError(f"{where} is not a row of results: {str(error).partition(') ')[2] or error}") from None


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a file in one write. Nothing that was there changes. A last line without an end gets one.

    Raises:
      FloatingPointError: a value is not finite.
      OSError: the file cannot be written; it is as it was.
    """
    data = "".join(row.line() + "\n" for row in rows).encode()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(file).st_size
        if before and os.pread(file, 1, before - 1) != b"\n":
            data = b"\n" + data
        written = os.write(file, data)
        if written < len(data):
            os.ftruncate(file, before)
            raise OSError(f"{path}: only {written} of {len(data)} bytes could be written; the disk may be full")
    finally:
        os.close(file)


class Swept(NamedTuple):
    """What became of the cells of a sweep.

    Attributes:
      measured, found: cells measured now, and cells that the file had already.
      failed: why each of the others could not be measured, by what it was.
    """

    measured: int
    found: int
    failed: dict[str, str]


def run_cells(
    cells: Iterable[Cell],
    measure: Callable[[Cell], Iterable[Figure]],
    made: Provenance,
    path: Path | None = None,
    *,
    shown: Callable[[Sequence[Row]], None] = lambda rows: None,
    failed: Callable[[Cell, Exception], None] = lambda cell, error: None,
) -> Swept:
    """Measures cells one after another, and adds the rows of each to a file as soon as it is done.

    A cell that is in the file is left as it is. A cell that fails is told and left out, so that a later run tries it
    again; the others go on.

    A cell that is given twice is measured and shown once. Where several processes measure together, all must see the
    file, and the first writes it.

    Args:
      measure: gives the figures of a cell.
      path: the file of rows; None: nothing is kept.
      shown: takes the rows of every cell, measured now or found in the file.
      failed: takes every cell that could not be measured, and why.

    Raises:
      ValueError: the file has a line that is no row.
      OSError: the file cannot be written.
    """
    there: dict[str, list[Row]] = {}
    for row in read_rows(path) if path is not None and path.exists() else []:
        there.setdefault(row.cell.key, []).append(row)
    measured, found, wrong, done = 0, 0, {}, set()
    for cell in cells:
        if cell.key in done:
            continue
        done.add(cell.key)
        if rows := there.get(cell.key, []):
            found += 1
        else:
            try:
                rows = _measured(cell, measure, made)
            except Exception as error:  # whatever it is, other cells may succeed
                wrong[f"{cell.task}, {cell.policy}, {cell.slots} slots, seed {cell.seed}"] = str(error)
                failed(cell, error)
                continue
            measured += 1
            if path is not None and jax.process_index() == 0:
                append(path, rows)
        shown(rows)
    return Swept(measured, found, wrong)


def _measured(cell: Cell, measure: Callable[[Cell], Iterable[Figure]], made: Provenance) -> list[Row]:
    """The rows of a cell. Raises what `measure` raises, and FloatingPointError for a figure that is no number."""
    figures = list(measure(cell))
    rows = [Row(cell, figure, made, datetime.now(UTC).isoformat(timespec="seconds")) for figure in figures]
    for row in rows:
        row.line()
    return rows
