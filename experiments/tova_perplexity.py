"""Perplexity of books against the size of the multi-state, for many policies (TOVA paper, section 5.1, figure 3).

    python experiments/tova_perplexity.py --model smollm2 --texts books/ --out rows.jsonl
    python experiments/tova_perplexity.py --out rows.jsonl --table table.md      # only draws what the file holds

Rows of `context` tokens, evenly spread over each book, are read token by token, as in decoding. A cell is one book,
policy and size. It is kept as soon as it is measured, so a sweep that was stopped goes on with the same command.

The paper reads PG-19 (`--pg19 test`, by name from the Hugging Face hub) with Llama-2-7B at 4,096 tokens. The table has
the perplexity over all books, and in brackets the ratio to the full cache, with its standard error over books.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from command import arguments
from paper_tables import OfBooks, Plan, figure_of_rows, markdown, of_experiment, of_texts, run

import jaxcompress as jc
from jaxcompress.evaluation import rows_of_text
from jaxcompress.evaluation.results import Cell, Figure, Row

EXPERIMENT, METRIC = "tova_perplexity", "nats per token"


@dataclass(frozen=True, kw_only=True)
class Arguments(OfBooks):
    """Adds a row to the file for each book, policy and size, and prints the table."""

    policies: tuple[str, ...] = ("full", "window", "window+4", "tova", "h2o", "snapkv+32/every32", "random")
    slots: tuple[int, ...] = (128, 256, 512)
    context: int = 2048
    rows: int = 4
    """Rows of each book."""
    batch: int = 2
    """Rows that are read side by side. It changes the speed: a CPU is faster with few rows, whose keys and values stay
    in its caches; an accelerator wants all of them."""


QUICK = Arguments(quick=True, policies=("full", "window", "tova"), slots=(16,), context=64, rows=2)


def plan(args: Arguments) -> Plan:
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = dict(args.books())
    cut = {}

    def tokens_of(book: str) -> np.ndarray:
        if book not in cut:
            ids = tokenizer.encode(texts[book], add_bos=False)
            cut[book] = rows_of_text(np.asarray(ids), args.context, args.rows, tokenizer.bos_id)
        return cut[book]

    policies = {name: jc.get_policy(name) for name in args.policies}
    make_cell = args.cells_of(EXPERIMENT, model, args.context)
    cells = (
        make_cell(task=book, policy=name, slots=slots, settings=dict(rows=args.rows, mode="streaming"))
        for name, policy in policies.items()
        for slots in (args.slots if policy.evicts else (args.context,))
        for book in texts
    )
    compiled = None

    def figures(cell: Cell) -> list[Figure]:
        nonlocal compiled
        if compiled != (compiled := (cell.policy, cell.slots)):
            jax.clear_caches()  # programs of other sizes would only fill memory
        rows = tokens_of(cell.task)
        return [figure_of_rows(METRIC, model, rows, policies[cell.policy], cell.slots, args.batch)]

    return of_texts(args, cells, figures, lambda cell: texts[cell.task])


def line(row: Row) -> str:
    cell = row.cell
    return f"{cell.task:40.40} {cell.policy:20} {cell.slots:6} {math.exp(row.figure.value):9.3f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each policy, a column for each size. Books that a cell lacks are left out of all cells."""
    rows = of_experiment(rows, EXPERIMENT)
    losses: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        losses.setdefault((row.cell.policy, int(np.max(row.cell.slots))), {})[row.cell.task] = row
    if not losses:
        return ["no rows"]
    shared = sorted(set.intersection(*(set(found) for found in losses.values())))
    if not shared:
        return ["no book was measured in all cells yet"]
    sizes = sorted({slots for _, slots in losses})
    whole = next((found for (policy, _), found in losses.items() if policy == "full"), None)

    def entry(policy: str, slots: int) -> str:
        found = losses.get((policy, slots))
        if found is None:
            return ""
        tokens = [found[book].figure.tokens for book in shared]
        nats = np.average([found[book].figure.value for book in shared], weights=tokens)
        if whole is None or policy == "full" or len(shared) < 2:
            return f"{math.exp(nats):.2f}"
        over = [math.exp(found[book].figure.value - whole[book].figure.value) for book in shared]
        error = statistics.stdev(over) / len(over) ** 0.5
        return f"{math.exp(nats):.2f} ({statistics.mean(over):.3f} ± {error:.3f})"

    names = dict.fromkeys(policy for policy, _ in losses)
    tokens = sum(next(iter(losses.values()))[book].figure.tokens for book in shared)
    first = rows[0].cell
    return [
        f"{first.model}, {first.dtype}, rows of {first.context:,} tokens, {tokens:,} predictions, {len(shared)} books. "
        "In brackets: the ratio to the full cache, mean and standard error over books.",
        "",
        *markdown(
            ["policy", *(f"{slots:,} slots" for slots in sizes)],
            ([f"`{name}`", *(entry(name, slots) for slots in sizes)] for name in names),
        ),
    ]


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT)
