"""What training for a bounded state gained: models beside the one they began as, on books and on needles.

    python experiments/training_evidence.py --model smollm2 --trained retention=runs/retention/model \\
        full-0=runs/full/model --control full --texts held-out-books/ --out rows.jsonl
    python experiments/training_evidence.py --control full --out rows.jsonl --table table.md   # only draws the file

Rows of `context` tokens of each book are read token by token in 1/4, 1/8 and 1/16 as many slots, and RULER's needles
are asked for, in the model's chat format, before and after the context is bounded. The model as it is and those without
a policy of their own are read with --policies; a model that was trained with a policy is read with that one, and all
are read with the full cache too. A cell is one model, policy, size and book or needle task.

Models whose names differ in a last number, such as joint-0 and joint-1, are one line: seeds, with their standard error.
The share of the gap that is closed is (untrained - trained) / (untrained - full), in nats at equal slots: untrained is
the model as it is with TOVA, full is the control with its full cache: the model trained with it on as many tokens. The
model as it is takes its place if there is no control.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from command import arguments, stop
from paper_tables import OfBooks, Plan, dtype_of, figure_of_rows, markdown, of_experiment, of_texts, run, spread

import jaxcompress as jc
from jaxcompress import embedded
from jaxcompress.checkpoints import Loaded, load_policy
from jaxcompress.evaluation import rows_of_text
from jaxcompress.evaluation.policy_hash import policy_settings
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.evaluation.ruler import METRIC
from jaxcompress.evaluation.ruler import Plan as Needles
from jaxcompress.models.fingerprint import fingerprint
from jaxcompress.policies import Policy

EXPERIMENT, LOSS, AS_IS, OWN = "training_evidence", "nats per token", "as it is", "learned"


@dataclass(frozen=True, kw_only=True)
class Arguments(OfBooks):
    """Adds rows to the file for each model, policy, size and task, and prints the table."""

    trained: tuple[str, ...] = ()
    """NAME=MODEL: a name for the table, and what --model takes."""
    control: str | None = None
    """Which of them was trained with the full cache: its name, without a seed's number."""
    policies: tuple[str, ...] = ("window+4", "h2o", "snapkv+32/every32", "tova")
    """For models that have no policy of their own; `learned` is the one that ships for them."""
    contexts: tuple[int, ...] = (2048,)
    fractions: tuple[int, ...] = (4, 8, 16)
    """Slots are the tokens of a context divided by these."""
    rows: int = 4
    """Rows of each book."""
    batch: int = 2
    """Rows that are read side by side."""
    needles: tuple[str, ...] = ("niah_single_2", "niah_multikey_1")
    """RULER's tasks."""
    samples: int = 8
    """Contexts of each of these."""


QUICK = Arguments(
    quick=True, trained=("again-0=embedded",), policies=("tova",), contexts=(512,), fractions=(8,), rows=1,
    needles=("niah_single_1",), samples=1,
)  # fmt: skip


class Reader(NamedTuple):
    """A model, and the policies that it is read with."""

    loaded: Loaded
    policies: dict[str, Policy]


def models_of(args: Arguments) -> dict[str, str | None]:
    """What to load, by its name in the table."""
    pairs: dict[str, str] = {}
    for named in args.trained:
        name, _, model = named.partition("=")
        if not model:
            stop(f"--trained takes NAME=MODEL, not {named!r}")
        if name in {AS_IS, *pairs}:
            stop(f"--trained: {name!r} names another model already")
        pairs[name] = model
    if args.control is not None and args.control not in map(group_of, pairs):
        stop(f"--control {args.control} is none of --trained: {', '.join(map(group_of, pairs)) or 'none is given'}")
    return {AS_IS: args.model, **pairs}


def group_of(name: str) -> str:
    """The name without a seed's number."""
    return re.sub(r"-\d+$", "", name)


def has_its_own(loaded: Loaded) -> bool:
    """Whether a model was trained with a policy. One that was trained with its full cache has none of its own."""
    saved = load_policy(loaded.folder)
    return saved is not None and saved.name != "full"


def plan(args: Arguments) -> Plan:
    named, books = models_of(args), dict(args.books())
    text = "\n\n".join(books.values())

    @lru_cache(maxsize=1)
    def reader(name: str) -> Reader:
        model = named[name]
        loaded = jc.load(embedded.decoder_folder() if model in (None, "embedded") else model, dtype=args.dtype)
        names = ("full", OWN) if name != AS_IS and has_its_own(loaded) else ("full", *args.policies)
        learned = loaded.policy if any(one.split("/")[0] == OWN for one in names) else None
        return Reader(loaded, {one: jc.get_policy(one, learned=learned) for one in names})

    def needles(name: str, context: int) -> Needles:
        tokenizer, policies = reader(name).loaded.tokenizer, reader(name).policies
        return Needles(
            tasks=args.needles, lengths=(context,), policies=policies, fractions=args.fractions, known=(False, True),
            protocols=("oneshot",), samples=args.samples, form="chat" if tokenizer.has_chat_template else "plain",
            text=text, batch=args.batch,
        )  # fmt: skip

    def cells() -> Iterator[Cell]:
        for name in named:
            model, policies = reader(name).loaded.model, reader(name).policies
            for context in args.contexts:
                dtype = dtype_of(model, args.dtype)
                for policy in policies:
                    own = policy_settings(policy, policies[policy])
                    for share in args.fractions if policies[policy].evicts else (1,):
                        for book in books:
                            yield Cell(
                                experiment=EXPERIMENT, task=book, model=name, model_hash=fingerprint(model),
                                policy=policy, slots=context // share, context=context, dtype=dtype,
                                settings=dict(name=name, fraction=share, kind="text", rows=args.rows) | own,
                            )  # fmt: skip
                for cell in needles(name, context).cells(reader(name).loaded, name):
                    settings = dict(name=name, kind="needle") | dict(cell.settings)
                    yield replace(cell, experiment=EXPERIMENT, dtype=dtype, settings=settings)

    compiled = None

    def figures(cell: Cell) -> list[Figure]:
        nonlocal compiled
        name = cell.settings["name"]
        loaded, policies = reader(name)
        if cell.settings["kind"] == "needle":
            return needles(name, cell.context).measure(loaded)(cell)
        if compiled != (compiled := (name, cell.policy, cell.slots)):
            jax.clear_caches()  # programs of other sizes would only fill memory
        ids = np.asarray(loaded.tokenizer.encode(books[cell.task], add_bos=False))
        rows = rows_of_text(ids, cell.context, args.rows, loaded.tokenizer.bos_id)
        return [figure_of_rows(LOSS, loaded.model, rows, policies[cell.policy], cell.slots, args.batch)]

    text_of = lambda cell: books[cell.task] if cell.settings["kind"] == "text" else None
    return of_texts(args, cells(), figures, text_of)


def line(row: Row) -> str:
    cell = row.cell
    return f"{cell.model:20.20} {cell.task:28.28} {cell.policy:20} {cell.slots!s:>6} {row.figure.value:9.3f}"


def table(rows: Sequence[Row], control: str | None = None) -> list[str]:
    """Markdown: for each context a line for each model and policy, a column for each size.

    Of each text as many rows are read as of the others: of cells with fewer, none is shown.
    """
    rows = of_experiment(rows, EXPERIMENT)
    if not rows:
        return ["no rows"]
    size = lambda row: (row.cell.context, row.cell.settings["kind"], row.cell.settings.get("rows", row.figure.samples))
    most = {size(row)[:2]: max(size(other) for other in rows if size(other)[:2] == size(row)[:2]) for row in rows}
    lines = []
    for context in sorted({row.cell.context for row in rows}):
        here = [row for row in rows if row.cell.context == context and size(row) == most[size(row)[:2]]]
        lines += _of_context(here, control or AS_IS)
    return lines


def _of_context(rows: Sequence[Row], control: str) -> list[str]:
    """The table of one context."""
    sizes = sorted({row.cell.settings["fraction"] for row in rows} - {1})

    def seeds(metric: str, group: str, policy: str, share: int, question: str | None = None) -> list[float]:
        """The mean over tasks, for each seed that has all of them."""
        found: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            cell = row.cell
            here = (row.figure.metric, group_of(cell.model), cell.policy, cell.settings["fraction"])
            if here == (metric, group, policy, share) and question in (None, cell.settings.get("question")):
                found.setdefault(cell.model, {}).setdefault(cell.task, []).append(row.figure.value)
        tasks = {row.cell.task for row in rows if row.figure.metric == metric}
        return [
            statistics.mean(map(statistics.mean, values.values()))
            for values in found.values()
            if values.keys() == tasks
        ]

    def gap(values: Sequence[float], share: int) -> str:
        untrained, whole = seeds(LOSS, AS_IS, "tova", share), seeds(LOSS, control, "full", 1)
        if not (values and untrained and whole) or (span := untrained[0] - statistics.mean(whole)) <= 0:
            return ""
        return f" ({(untrained[0] - statistics.mean(values)) / span:.0%})"

    def entry(group: str, policy: str, share: int) -> str:
        losses = seeds(LOSS, group, policy, share)
        right = [spread(seeds(METRIC, group, policy, share, known), ".0f") for known in ("unknown", "known")]
        asked = " / ".join(filter(None, right))
        return "; ".join(filter(None, [f"{spread(losses, '.3f')}{gap(losses, share)}", asked and f"{asked} %"]))

    pairs = dict.fromkeys((group_of(row.cell.model), row.cell.policy) for row in rows if row.cell.policy != "full")
    first, tokens = rows[0].cell, {row.cell.task: row.figure.tokens for row in rows if row.figure.metric == LOSS}

    def of_full_cache(group: str) -> str:
        right = spread(seeds(METRIC, group, "full", 1), ".0f")
        return "; ".join(filter(None, [spread(seeds(LOSS, group, "full", 1), ".3f"), right and f"{right} %"]))

    return [
        f"{first.dtype}, contexts of {first.context:,} tokens, {sum(tokens.values()):,} predictions of {len(tokens)} "
        "texts. Nats per token; in brackets the share of the gap that is closed; then needles found, question unknown "
        "/ known when the context is bounded.",
        "",
        *markdown(
            ["model", "policy", *(f"1/{share}" for share in sizes), "full cache"],
            (
                [group, f"`{policy}`", *(entry(group, policy, share) for share in sizes), of_full_cache(group)]
                for group, policy in pairs
            ),
        ),
        "",
    ]


if __name__ == "__main__":
    args = arguments(QUICK)
    run(
        args, lambda: plan(args), lambda rows: table(rows, args.control), line, experiment=EXPERIMENT,
        apart=("model", "context", "name", "fraction", "kind", "rows", "question", "form", "samples"),
    )  # fmt: skip
