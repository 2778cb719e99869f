"""What a policy keeps of books: how recent, the first token, which kinds of tokens, by layer (TOVA paper, section 6).

    python experiments/tova_kept.py --model smollm2 --texts books/ --out rows.jsonl
    python experiments/tova_kept.py --out rows.jsonl --table table.md      # only draws what the file holds

Rows of `context` tokens of each book are read token by token, as in decoding. A cell is one book, policy and size.

*Recent* is the share of the tokens held that are among the newest tokens, as many as are held: 100 % is a window. It
is a mean over 64 steps from the first eviction on. *First token* is the share of the row's steps that saw it. *After n*
is the share of a kind's tokens still held n steps after they were read (Kaplan-Meier estimate).

The paper sorts tokens by Penn part of speech, for which a tagger must be trained or fetched. Here the kinds are those
of `jaxcompress.evaluation.token_kinds`: the first four tokens, white space, digits, punctuation, and rare and common
words by their counts in the book.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from command import arguments
from paper_tables import OfBooks, Plan, markdown, of_experiment, of_texts, run, spread

import jaxcompress as jc
from jaxcompress.evaluation import ages, held, rows_of_text, survival_by_kind, token_kinds, token_texts, trace
from jaxcompress.evaluation.lifetimes import KINDS
from jaxcompress.evaluation.results import Cell, Figure, Row

EXPERIMENT, STEPS = "tova_kept", 64
RECENT, FIRST, AGE = "recent, % of the tokens held", "first token, % of steps held", "mean age, tokens"


@dataclass(frozen=True, kw_only=True)
class Arguments(OfBooks):
    """Adds rows to the file for each book, policy and size, and prints the tables."""

    policies: tuple[str, ...] = ("tova", "h2o", "snapkv+32/every32")
    slots: tuple[int, ...] = (128, 256, 512)
    context: int = 2048
    rows: int = 2
    """Rows of each book."""
    after: tuple[int, ...] = (64, 256, 1024)
    """Steps after which the share of each kind that is still held is told."""


QUICK = Arguments(
    quick=True, policies=("tova", "h2o", "snapkv+4/every4"), slots=(16,), context=64, rows=2, after=(8, 32)
)


class Text(NamedTuple):
    """Rows of a book [B, T], and the kinds of their tokens [B, T]."""

    tokens: np.ndarray
    kinds: np.ndarray


def read(text: str, args: Arguments, tokenizer: Any) -> Text:
    ids = np.asarray(tokenizer.encode(text, add_bos=False))
    rows = rows_of_text(ids, args.context, args.rows, tokenizer.bos_id)
    counts = Counter(re.findall(r"\w+", text.lower()))
    special = [[tokenizer.is_special(token) for token in row] for row in rows]
    kinds = [
        token_kinds(token_texts(tokenizer, row), counts=counts, marks=marks)
        for row, marks in zip(rows, special, strict=True)
    ]
    return Text(rows, np.stack(kinds))


def recent(death: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """[L, B, P, T] death times -> [L], the share of the tokens held that are among the newest as many."""
    place, shares = np.arange(death.shape[-1]), []
    for step in steps:
        alive = held(death, step)
        count = alive.sum(-1, keepdims=True)
        shares.append(((alive & (step - place < count)).sum(-1) / count[..., 0]).mean((1, 2)))
    return np.mean(shares, axis=0)


def by_kind(death: np.ndarray, kinds: np.ndarray, after: Sequence[int]) -> dict[tuple[str, int], tuple[float, int]]:
    """[L, B, P, T] -> by kind and number of steps, the share held and the tokens that it rests on.

    Rows count by their tokens of a kind. Steps are left out that no token of the kind was watched for.
    """
    found: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for row, mine in enumerate(kinds):
        for kind in survival_by_kind(death[:, row], mine, after):
            for steps, share in zip(after, kind.after, strict=True):
                if not np.isnan(share):
                    found.setdefault((kind.kind, steps), []).append((share, kind.tokens))
    tokens = {key: [n for _, n in values] for key, values in found.items()}
    return {
        key: (float(np.average([share for share, _ in values], weights=tokens[key])), sum(tokens[key]))
        for key, values in found.items()
    }


def figures_of(death: np.ndarray, text: Text, slots: int, after: Sequence[int], state_bytes: int) -> list[Figure]:
    """Death times [L, B, P, T] -> the figures of a cell, with those of each layer as details."""
    total = death.shape[-1]
    steps = np.unique(np.linspace(min(slots, total - 1), total - 1, STEPS).astype(int)).tolist()
    layers = {
        RECENT: 100 * recent(death, steps),
        FIRST: 100 * np.minimum(death[..., 0], total).mean((1, 2)) / total,
        AGE: ages(death, steps).mean.mean((1, 2, 3)),
    }
    facts: dict[str, Any] = dict(samples=len(text.tokens), state_bytes=state_bytes)
    found = [
        Figure(
            metric=metric,
            value=float(np.mean(values)),
            tokens=text.tokens.size,
            details=dict(layers=values.tolist()),
            **facts,
        )  # fmt: skip
        for metric, values in layers.items()
    ]
    each = [by_kind(layer[None], text.kinds, after) for layer in death]
    for (kind, n), (share, tokens) in by_kind(death, text.kinds, after).items():
        details = dict(
            kind=kind, after=n, layers=[100 * layer[kind, n][0] if (kind, n) in layer else None for layer in each]
        )
        metric = f"{kind}, % held after {n}"
        found.append(Figure(metric=metric, value=100 * share, tokens=tokens, details=details, **facts))
    return found


def plan(args: Arguments) -> Plan:
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    books, read_books = dict(args.books()), {}
    policies = {name: jc.get_policy(name) for name in args.policies}
    make_cell = args.cells_of(EXPERIMENT, model, args.context)
    cells = (
        make_cell(
            task=book, policy=name, slots=slots, settings=dict(rows=args.rows, after=list(args.after), mode="streaming")
        )
        for book in books
        for name in policies
        for slots in args.slots
    )

    def figures(cell: Cell) -> list[Figure]:
        if cell.task not in read_books:
            read_books[cell.task] = read(books[cell.task], args, tokenizer)
        text, policy = read_books[cell.task], policies[cell.policy]
        death = trace(model, text.tokens, policy, cell.slots, prompt=text.tokens.shape[1], mode="streaming").death
        stored = model.dtype
        state = jax.eval_shape(lambda: jc.init_state(model.config, policy, cell.slots, dtype=stored))
        jax.clear_caches()  # programs of other sizes would only fill memory
        return figures_of(death, text, int(np.max(cell.slots)), args.after, sum(part.nbytes for part in state))

    return of_texts(args, cells, figures, lambda cell: books[cell.task])


def line(row: Row) -> str:
    cell = row.cell
    return f"{cell.task:32.32} {cell.policy:20} {cell.slots:6} {row.figure.metric:36} {row.figure.value:9.1f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: the whole, the kinds, the layers. Means and standard errors over books."""
    rows = of_experiment(rows, EXPERIMENT)
    if not rows:
        return ["no rows"]
    values: dict[tuple[str, Any, str], list[Row]] = {}
    for row in rows:
        values.setdefault((row.cell.policy, row.cell.slots, row.figure.metric), []).append(row)
    cells = list(dict.fromkeys((policy, slots) for policy, slots, _ in values))
    after = sorted({row.figure.details["after"] for row in rows if "after" in row.figure.details})
    kinds = [kind for kind in (*KINDS, "all") if any(row.figure.details.get("kind") == kind for row in rows)]
    books, first = {row.cell.task for row in rows}, rows[0].cell
    tokens = sum(row.figure.tokens for row in values.get((*cells[0], RECENT), ()))
    entry = lambda *key: spread([row.figure.value for row in values.get(key, ())], ".1f")
    lines = [
        f"{first.model}, {first.dtype}, rows of {first.context:,} tokens, {tokens:,} tokens of {len(books)} books for "
        "each policy and size, read token by token. Means and standard errors over books.",
        "",
        *markdown(
            ["policy", "slots", RECENT, FIRST, AGE],
            ([f"`{policy}`", f"{slots:,}", *(entry(policy, slots, one) for one in (RECENT, FIRST, AGE))]
             for policy, slots in cells),
        ),
        "",
        "Share of each kind of tokens still held after a number of steps, in %:",
        "",
        *markdown(
            ["policy", "slots", "steps", *kinds],
            ([f"`{policy}`", f"{slots:,}", f"{n:,}",
              *(entry(policy, slots, f"{kind}, % held after {n}") for kind in kinds)]
             for policy, slots in cells for n in after),
        ),
        "",
        f"By layer, {RECENT} / {FIRST}:",
        "",
    ]  # fmt: skip

    def layers(policy: str, slots: Any, metric: str) -> np.ndarray:
        return np.mean([row.figure.details["layers"] for row in values[policy, slots, metric]], axis=0)

    columns = [zip(layers(*cell, RECENT), layers(*cell, FIRST), strict=True) for cell in cells]
    by_layer = enumerate(zip(*columns, strict=True))
    return lines + markdown(
        ["layer", *(f"`{policy}`, {slots:,}" for policy, slots in cells)],
        ([str(layer), *(f"{near:.0f} / {start:.0f}" for near, start in entries)] for layer, entries in by_layer),
    )


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT)
