"""Perplexity by position far beyond the length that a model was trained on (TOVA paper, section 7.2).

    python experiments/tova_extrapolation.py --out rows.jsonl                  # the embedded model
    python experiments/tova_extrapolation.py --model smollm2 --texts books/ --out rows.jsonl
    python experiments/tova_extrapolation.py --out rows.jsonl --table table.md # only draws what the file holds

The first `length` tokens of each book are read token by token through one state of fixed size. A cell is one book,
policy and placement; its rows are the losses of blocks of positions. Placements: `absolute` is the position in the
text, `slot` the rank among the tokens held, `compact` shortens gaps of evicted tokens as the paper does.

Without --texts the book is all documents that the embedded model has not seen, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import jax
import numpy as np
from command import arguments
from paper_tables import OfBooks, Plan, markdown, of_experiment, of_texts, run

import jaxcompress as jc
from jaxcompress.cli.runtime import held_out_text
from jaxcompress.evaluation.perplexity import predictions
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.models.modes import calls
from jaxcompress.state.placement import Placement

EXPERIMENT = "tova_extrapolation"


@dataclass(frozen=True, kw_only=True)
class Arguments(OfBooks):
    """Adds rows to the file for each book, policy and placement, and prints the table."""

    policies: tuple[str, ...] = ("tova", "window+4")
    placements: tuple[Placement, ...] = get_args(Placement)
    slots: int = 128
    length: int = 70_000
    """Tokens of each book."""
    block: int = 5_000
    """Positions of a line of the table."""

    def books(self) -> Iterator[tuple[str, str]]:
        """Names and texts."""
        if self.texts or self.pg19 is not None:
            return super().books()
        return iter([held_out_text()])


QUICK = Arguments(quick=True, policies=("tova",), slots=16, length=192, block=96)


def plan(args: Arguments) -> Plan:
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    books = dict(args.books())
    policies = {name: jc.get_policy(name) for name in args.policies}
    make_cell, stored = args.cells_of(EXPERIMENT, model, args.length), model.dtype
    cells = (
        make_cell(
            task=book,
            policy=name,
            slots=args.slots if policy.evicts else args.length,
            settings=dict(placement=placement, block=args.block, trained=model.config.max_position, mode="streaming"),
        )
        for book in books
        for name, policy in policies.items()
        for placement in args.placements
    )

    def figures(cell: Cell) -> Iterator[Figure]:
        ids = tokenizer.encode(books[cell.task])[: cell.context]
        if len(ids) < cell.context:
            raise ValueError(
                f"{cell.task} has {len(ids):,} tokens, fewer than {cell.context:,}; give a smaller --length"
            )
        policy, placement = policies[cell.policy], cell.settings["placement"]
        state = jc.init_state(model.config, policy, cell.slots, dtype=stored)
        state_bytes = sum(part.nbytes for part in state)
        parts = calls("streaming", len(ids) - 1, chunk=1, segment=512)
        read = list(predictions(model, ids[None], state, policy, parts, placement=placement))
        losses = np.concatenate([part.losses[0] for part in read])
        jax.clear_caches()  # programs of other policies would only fill memory
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"non-finite logits, first at position {np.argmin(np.isfinite(losses))}")
        for start in range(0, len(losses), cell.settings["block"]):
            stop = min(start + cell.settings["block"], len(losses))
            yield Figure(
                metric=f"nats per token, positions {start} to {stop - 1}",
                value=float(losses[start:stop].mean()),
                lower_is_better=True,
                tokens=stop - start,
                samples=1,
                state_bytes=state_bytes,
                tokens_per_second=len(losses) / sum(part.seconds for part in read),
                details=dict(start=start, stop=stop),
            )  # fmt: skip

    return of_texts(args, cells, figures, lambda cell: books[cell.task])


def line(row: Row) -> str:
    cell, at = row.cell, row.figure.details
    placed = f"{cell.policy}, {cell.settings['placement']}"
    where = f"{at['start']:,} - {at['stop']:,}"
    return f"{cell.task:32.32} {placed:24} {cell.slots:6} {where:18} {math.exp(row.figure.value):9.3f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each block of positions, a column for each policy and placement."""
    rows = of_experiment(rows, EXPERIMENT)
    losses: dict[tuple[str, int, str], dict[tuple[str, int, int], Row]] = {}
    for row in rows:
        column = (row.cell.policy, int(np.max(row.cell.slots)), row.cell.settings["placement"])
        at = row.figure.details
        losses.setdefault(column, {})[row.cell.task, at["start"], at["stop"]] = row
    if not losses:
        return ["no rows"]
    shared = set.intersection(*(set(found) for found in losses.values()))
    if not shared:
        return ["no block of positions was measured in all columns yet"]
    books, blocks = {book for book, *_ in shared}, sorted({tuple(block) for _, *block in shared})

    def entry(found: dict[tuple[str, int, int], Row], block: tuple[int, ...]) -> str:
        mine = [row.figure for (book, *at), row in found.items() if tuple(at) == block and (book, *at) in shared]
        return f"{math.exp(np.average([one.value for one in mine], weights=[one.tokens for one in mine])):.2f}"

    first = rows[0].cell
    return [
        f"{first.model} (trained on {first.settings['trained']:,} positions), {first.dtype}, perplexity. Books that "
        f"were read token by token: {len(books)}.",
        "",
        *markdown(
            ["positions", *(f"`{policy}`, {slots:,} slots, {place}" for policy, slots, place in losses)],
            ([f"{block[0]:,} – {block[1]:,}", *(entry(found, block) for found in losses.values())] for block in blocks),
        ),
    ]


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT, apart=("placement",))
