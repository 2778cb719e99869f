"""What the scripts share that measure a paper's table cell by cell and write it as Markdown."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from command import Command, OfModel, stop

import jaxcompress as jc
from jaxcompress import embedded
from jaxcompress._extras import extra
from jaxcompress.cli.runtime import Incomplete, check_writable, short_hash, swept
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation import perplexity
from jaxcompress.evaluation.policy_hash import POLICY_HASH, policy_settings
from jaxcompress.evaluation.results import Cell, Figure, Row, read_rows
from jaxcompress.models.fingerprint import fingerprint
from jaxcompress.policies.names import own_places

if TYPE_CHECKING:
    from jaxcompress.checkpoints import Loaded
    from jaxcompress.models.decoder import Decoder
    from jaxcompress.models.init_state import Slots

PG19 = "emozilla/pg19"
"""PG-19 as Parquet files on the hub; `deepmind/pg19` needs a script."""
TEXT = "text"
"""The detail of a figure that stands for the text it is from."""


@dataclass(frozen=True, kw_only=True)
class OfRows(Command):
    """Where the rows of a table are, and where it goes."""

    out: Path | None = None
    """The file of rows (JSON Lines), which only grows."""
    table: Path | None = None
    """Writes the table here (Markdown), instead of measuring, from the rows in --out."""


@dataclass(frozen=True, kw_only=True)
class OfTable(OfRows, OfModel):
    """The flags of a table about a language model."""

    dtype: str = "float32"
    """Of the weights."""

    def load(self) -> Loaded:
        """The model and its tokenizer."""
        return jc.load(embedded.decoder_folder() if self.model is None else self.model, dtype=self.dtype)

    def cells_of(self, experiment: str, model: Decoder, context: int) -> Callable[..., Cell]:
        """`Cell` for a table of this model: what is left to give is task, policy, slots and settings."""
        make = partial(
            Cell, experiment=experiment, model=self.model or "embedded", model_hash=fingerprint(model), context=context,
            dtype=dtype_of(model, self.dtype),
        )  # fmt: skip

        def cell(*, policy: str, settings: Mapping[str, Any] = {}, **given: Any) -> Cell:
            own = policy_settings(policy, jc.get_policy(policy)) if own_places(policy) else {}
            return make(policy=policy, settings=dict(settings) | own, **given)

        return cell


def dtype_of(model: Decoder, asked: str) -> str:
    """What the weights are stored in: int8 if that was asked for, which leaves the embedding a float."""
    return asked if asked == "int8" else model.dtype.name


@dataclass(frozen=True, kw_only=True)
class OfBooks(OfTable):
    """The flags of a table that is measured on books."""

    texts: tuple[Path, ...] = ()
    """Books: UTF-8 files, or folders with .txt files. Documents that the embedded model has not seen, if not given."""
    pg19: str | None = None
    """A split of PG-19 in place of --texts, such as `test`; needs `pip install "jaxcompress[data]"` and the hub."""

    def books(self) -> Iterator[tuple[str, str]]:
        """Names and texts."""
        if self.pg19 is not None:
            rows = of_hub(PG19, "PG-19", "--texts", split=self.pg19)
            yield from ((book["short_book_title"], book["text"]) for book in rows)
            return
        if not self.texts:
            yield from ((document.name, document.text) for document in held_out()[: 2 if self.quick else None])
        files: dict[str, Path] = {}
        for path in self.texts:
            found = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
            if not found:
                stop(f"there is no text in {path.absolute()}: --texts takes UTF-8 files, or folders with .txt files")
            for file in found:
                if file.stem in files:
                    stop(f"{files[file.stem]} and {file} would be one text, {file.stem!r}, in the rows: rename one")
                files[file.stem] = file
        yield from ((name, file.read_text("utf-8")) for name, file in files.items())


def of_hub(name: str, what: str, flag: str, **given: Any) -> Any:
    """A dataset of the Hugging Face hub. Ends the program with one line if it cannot be had.

    Args:
      what: the dataset, as people call it.
      flag: takes local files in its place.
      given: keywords of `datasets.load_dataset`.
    """
    with extra("data"):
        from datasets import load_dataset
    try:
        return load_dataset(name, **given)
    except Exception as error:  # whatever the hub's client raises
        stop(f"{what} was looked for as {name} on the Hugging Face hub: {error}; give local files with {flag}")


def figure_of_rows(
    metric: str, model: Decoder, rows: np.ndarray, policy: jc.Policy, slots: Slots, batch: int
) -> Figure:
    """The loss of rows [N, T], of which `batch` are read side by side."""
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    found = [perplexity(model, part, policy, slots) for part in parts]
    counts = np.asarray([part.tokens for part in found])
    return Figure(
        metric=metric,
        value=float(np.average([part.nats for part in found], weights=counts)),
        lower_is_better=True,
        tokens=int(counts.sum()),
        samples=len(rows),
        state_bytes=found[0].state_bytes // len(parts[0]),
        tokens_per_second=float(counts.sum() / np.sum(counts / [part.tokens_per_second for part in found])),
    )  # fmt: skip


Plan = tuple[Iterable[Cell], Callable[[Cell], Iterable[Figure]]]
"""The cells of a table, and what measures one."""


def of_texts(args: OfRows, cells: Iterable[Cell], figures: Callable[[Cell], Iterable[Figure]],
             text: Callable[[Cell], str | None]) -> Plan:  # fmt: skip
    """The same plan, whose figures say from which text they are, in their details.

    A file of rows that has a cell of another text ends the program with one line: a cell names its text only. Rows of
    earlier versions do not say theirs, and are taken as they are.

    Args:
      text: of a cell; None: its settings say from which.
    """
    there: dict[str, set[str]] = {}
    for row in read_rows(args.out) if args.out is not None and args.out.exists() else []:
        if isinstance(row.figure.details, dict) and TEXT in row.figure.details:
            there.setdefault(row.cell.key, set()).add(row.figure.details[TEXT])
    known = lambda cell: None if (read := text(cell)) is None else short_hash(read.encode())

    def checked() -> Iterator[Cell]:
        for cell in cells:
            if there.get(cell.key, set()) - {known(cell)}:
                stop(f"{args.out} has rows of another text that is called {cell.task} too: give another --out")
            yield cell

    def said(cell: Cell) -> Iterator[Figure]:
        here = known(cell)
        for figure in figures(cell):
            yield figure if here is None else replace(figure, details=dict(figure.details or {}, **{TEXT: here}))

    return checked(), said


def run(
    args: OfRows,
    plan: Callable[[], Plan],
    table: Callable[[Sequence[Row]], list[str]],
    line: Callable[[Row], str],
    *,
    experiment: str,
    apart: Collection[str] = (),
) -> None:
    """Measures the cells that --out lacks and prints the table; with --table only writes what --out holds.

    What cannot be done ends the program with one line and exit code 2.

    Args:
      plan: called when something is to be measured.
      table: rows -> lines of Markdown.
      line: a row -> what is printed when it is there.
      experiment: of the rows.
      apart: what the table itself tells apart, see `tables`.
    """
    drawn = lambda rows: "\n".join(tables(of_experiment(rows, experiment), table, apart))
    if args.table is not None:
        with in_a_line():
            check_writable(args.table)
            if args.out is None:
                stop("--table draws the rows of a file: give it as --out")
            rows = read_rows(args.out)
        args.table.write_text(drawn(rows) + "\n", encoding="utf-8")
        return
    if args.out is None and not args.quick:
        stop("--out is missing: the file that keeps what was measured, so that a sweep that is stopped goes on")
    done: list[Row] = []

    def show(rows: Sequence[Row]) -> None:
        done.extend(rows)
        for row in rows:
            print(line(row), flush=True)

    try:
        with in_a_line():
            check_writable(args.out)
            cells, figures = plan()
            swept(cells, figures, args.out, show)
    except Incomplete as error:
        print(error, file=sys.stderr)
        raise SystemExit(4) from None
    finally:
        if done:
            print(drawn(done))


@contextmanager
def in_a_line() -> Iterator[None]:
    """Of arguments and files that are wrong one line is told; what a cell raises is told beside it, and goes on."""
    try:
        yield
    except (ValueError, OSError) as error:
        stop(" ".join(str(error).split()))


def tables(rows: Sequence[Row], table: Callable[[Sequence[Row]], list[str]], apart: Collection[str] = ()) -> list[str]:
    """The table of rows, or several under headings where rows differ in what a line of the table does not say.

    That is the model, the context, the dtype, a setting, or what a policy is beside its name. A row that has no such
    setting is part of every table.

    Args:
      apart: fields (`model`, `context`, `dtype`) and settings that the table tells apart. Where it does so with models,
        what goes by one name must be one model.
    """
    said = [_facts(row.cell, apart) for row in rows]
    values: dict[str, dict[str, None]] = {}
    for facts in said:
        for name, value in facts.items():
            values.setdefault(name, {})[value] = None
    differs = {name: list(found) for name, found in values.items() if len(found) > 1}
    groups: dict[frozenset[int], str] = {}
    for chosen in itertools.product(*differs.values()):
        wanted = dict(zip(differs, chosen, strict=True))
        fits = lambda facts, wanted=wanted: all(facts.get(name, value) == value for name, value in wanted.items())
        groups.setdefault(
            frozenset(number for number, facts in enumerate(said) if fits(facts)),
            ", ".join(f"{name} {value}" for name, value in wanted.items()),
        )
    largest = {some: title for some, title in groups.items() if not any(some < other for other in groups)}
    if len(largest) < 2:
        return table(rows)
    lines: list[str] = []
    for some, title in largest.items():
        lines += [*([""] if lines else []), f"**{title}**", "", *table([rows[number] for number in sorted(some)])]
    return lines


def _facts(cell: Cell, apart: Collection[str]) -> dict[str, str]:
    """What must be equal for rows of one table."""
    found: dict[str, Any] = {"context": cell.context, "dtype": cell.dtype, **cell.settings}
    own = found.pop(POLICY_HASH, None)
    facts = {name: str(value) for name, value in found.items() if name not in apart}
    facts[f"model {cell.model}" if "model" in apart else "model"] = cell.model_hash[:12]
    return facts if own is None else facts | {f"{cell.policy} of {cell.model}": own}


def of_experiment(rows: Sequence[Row], experiment: str) -> list[Row]:
    """The rows of one table; of rows that measure the same figure of a cell twice, the newer one."""
    found = {(row.cell.key, row.figure.metric): row for row in rows if row.cell.experiment == experiment}
    return list(found.values())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    line = lambda entries: "| " + " | ".join(entries) + " |"
    return [line(head), "|---" * len(head) + "|", *map(line, rows)]


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard error, such as `1.20 ± 0.03`; only the mean if there is one value; empty if there is none."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:{form}}"
