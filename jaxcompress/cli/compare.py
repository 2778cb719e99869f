"""jaxcompress compare"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from jaxcompress.cli.flags import (
    FigureFlag,
    PlacementFlag,
    RowsFlag,
    StateDtypeFlag,
    TextFlags,
    WeightFlags,
    at_least,
    check_fractions,
)
from jaxcompress.cli.paths import POLICY
from jaxcompress.cli.runtime import (
    check_figure,
    check_writable,
    chosen_policy,
    dtypes_told,
    held_out_text,
    line_of,
    open_model,
    short_hash,
    swept,
    tell,
    too_small,
    words_of,
)

POLICIES = (
    "full", "random", "window", "window+4", "streaming_llm+4", "h2o", "h2o-layer", "tova", "tova-kv_head",
    "observed_attention", "scissorhands", "knorm", "tova/protect-first4", "tova/sampled4",
    # Their scores cost a sort or another pass over the keys: selected from every 16 steps.
    "snapkv+16/every16", "snapkv+16-layer/by_chunks20/every16", "snapkv+16/critical/every16",
    "snapkv+16-pool/adaptive/every16", "tova-pool/adaptive/every16", "nacl/every16", "keydiff/every16",
    "lagkv+16/every16", "cur/every16", "expected_attention/every16", "rkv/every16", "rkv-sketch16/every16",
)  # fmt: skip


_FRACTIONS = (2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Compare(FigureFlag, RowsFlag, StateDtypeFlag, PlacementFlag, WeightFlags, TextFlags):
    """Compares policies: loss, recall, bytes and speed at fractions of the context, with their spread over seeds.

    Facts and questions about them are woven into the text. It is read token by token (nats, recall), or the context is
    compressed in one shot, while the question is not yet known (before) or known (after). If the tokenizer has too few
    whole words for facts, only the loss is measured. "asked" are the bytes of so many slots of keys and values, "KiB"
    what the state of one text takes, the policy's own numbers included. Without --file and --prompt it reads documents
    that the embedded model was not trained on. A sweep that was stopped goes on with the same command and --out; one
    that cannot be measured is told, and the others go on (exit code 4).

    Example: jaxcompress compare --policies full window+4 tova snapkv+16/every16 --fractions 4 8 --out rows.jsonl
    """

    policies: Annotated[tuple[str, ...], POLICY] = POLICIES
    """Eviction policies, spelled as for --policy of other commands; see `jaxcompress info`."""
    fractions: tuple[int, ...] = _FRACTIONS
    """Slots are the context divided by these."""
    context: int = 1024
    """Tokens per row."""
    seeds: int = 3
    """Number of seeds: facts, fillers and questions are drawn anew for each."""
    rows: int = 2
    """Rows per seed."""

    def run(self) -> None:
        at_least(1, fractions=self.fractions, seeds=self.seeds, rows=self.rows)
        if self.context < max(2, *self.fractions):
            raise ValueError(
                f"--context must be at least 2, and leave at least one slot for each of --fractions, not {self.context}"
            )
        self.check_placement(*self.policies)
        check_fractions(self.fractions, _FRACTIONS, self.policies)
        check_writable(self.out)
        check_figure(self.figure)
        name, text = self.text() or held_out_text()
        model, tokenizer = open_model(self.model, self.dtype)
        policies = {name: chosen_policy(name, model, tokenizer.folder) for name in self.policies}
        from jaxcompress.evaluation.compare import compare

        tasks = self._exams(tokenizer, text)
        slots = [self.context // fraction for fraction in self.fractions]
        too_small(list(policies.values()), slots)
        how: dict[str, Any] = dict(placement=self.placement, dtype=self.state_dtype)
        compare(model, tasks, list(policies.values()), slots, **how)  # checks what all lines share
        print(f"{'policy':34}{'slots':>6}{'nats':>15}{'recall':>12}{'before':>12}{'after':>12}{'asked':>8}{'KiB':>7}"
              f"{'held':>6}{'tok/s':>8}")  # fmt: skip
        done: list[Any] = []
        try:
            self._sweep(model, tasks, policies, slots, name, done)
        finally:
            if self.figure is not None and done:
                _draw(done, self.figure, name)

    def _sweep(
        self, model: Any, tasks: Any, policies: dict[str, Any], slots: list[int], name: str, done: list[Any]
    ) -> None:
        """Measures, and adds each line to `done`, to the file and to what is printed."""
        import jax

        from jaxcompress.evaluation.compare import Compared, capacities, compared
        from jaxcompress.evaluation.policy_hash import policy_settings
        from jaxcompress.evaluation.results import Cell
        from jaxcompress.models.fingerprint import fingerprint

        made: dict[str, Any] = dict(
            experiment="compare", task=name, model=self.model or "embedded", model_hash=fingerprint(model),
            context=self.context, dtype=dtypes_told(model.dtype.name, self.state_dtype),
        )  # fmt: skip
        settings = dict(
            seeds=self.seeds, rows=self.rows, questions=len(tasks.single), placement=self.placement,
            tokens=short_hash(b"".join(row.tokens.tobytes() for row in tasks.whole)),
        )  # fmt: skip
        cells = (
            Cell(policy=name, slots=capacity, settings=settings | policy_settings(name, policy), **made)
            for name, policy in policies.items()
            for capacity in capacities(tasks, policy, slots)
        )
        before: list[str] = []

        def measure(cell: Cell) -> list[Any]:
            if before and before[-1] != cell.policy:
                jax.clear_caches()  # hundreds of compiled programs at once are more than a process may map
            before[:] = [cell.policy]
            assert isinstance(cell.slots, int)
            row = compared(
                model, tasks, policies[cell.policy], cell.slots, placement=self.placement, dtype=self.state_dtype
            )
            return _figures(row, tasks)

        def show(rows: Sequence[Any]) -> None:
            row = line_of(Compared, rows[0], self.out)
            done.append(asdict(row))
            print(_line(row), flush=True)

        swept(cells, measure, self.out, show)

    def _exams(self, tokenizer: Any, text: str) -> Any:
        """The texts to read, with facts where the tokenizer has words for them."""
        from jaxcompress.evaluation.compare import exams

        words, missing = None, ""
        try:
            words = words_of(tokenizer)
        except ValueError as error:
            missing = f"no recall tasks: {error}"
        tasks = exams(
            tokenizer.encode(text, add_bos=False), words,
            context=self.context, seeds=self.seeds, rows=self.rows, bos=tokenizer.bos_id,
        )  # fmt: skip
        if missing:
            tell(missing)
        return tasks


def _figures(row: Any, tasks: Any) -> list[Any]:
    """What a line says, as figures; the first has the whole line as its details."""
    from jaxcompress.evaluation.results import Figure

    read, asked = sum(len(one.tokens) for one in tasks.whole), len(tasks.single)
    facts: dict[str, Any] = dict(state_bytes=row.state_bytes, tokens_per_second=row.tokens_per_second)
    found = [
        ("nats per token", 1, row.nats, row.nats_spread, read, len(tasks.whole)),
        ("recall %", 100, row.recall, row.recall_spread, read, len(tasks.whole)),
        ("recall, asked after compression %", 100, row.before, row.before_spread, asked * tasks.prompt, asked),
        ("recall, asked before %", 100, row.after, row.after_spread, asked * tasks.prompt, asked),
    ]
    # A line has the standard deviation over seeds; a figure that of the mean.
    error = lambda spread: spread / (tasks.seeds - 1) ** 0.5 if tasks.seeds > 1 else None
    figures = [
        Figure(metric=metric, value=scale * value, spread=error(scale * spread), lower_is_better=scale == 1,
               tokens=tokens, samples=samples, **facts)
        for metric, scale, value, spread, tokens, samples in found
        if value is not None
    ]  # fmt: skip
    return [replace(figures[0], details=asdict(row)), *figures[1:]]


def _line(row: Any) -> str:
    """A row of the table, as it is printed."""
    share = lambda mean, spread: "-" if mean is None else f"{mean:.0%} ±{spread:.0%}"
    nats = "-" if row.nats is None else f"{row.nats:.3f} ±{row.nats_spread:.3f}"
    speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
    return (
        f"{row.policy:34}{row.slots:6}{nats:>15}{share(row.recall, row.recall_spread):>12}"
        f"{share(row.before, row.before_spread):>12}{share(row.after, row.after_spread):>12}"
        f"{row.asked_bytes / 1024:8,.0f}{row.state_bytes / 1024:7,.0f}{row.occupied:6.0%}{speed:>8}"
    )


def _draw(table: list[dict[str, Any]], path: Path, title: str) -> None:
    from jaxcompress.evaluation.figures import Point, comparison

    point = lambda name: [Point(row["policy"], row["slots"], row[name]) for row in table if row[name] is not None]
    panels = {
        "nats per token": point("nats"), "recall": point("recall"),
        "asked after compression": point("before"), "asked before": point("after"),
    }  # fmt: skip
    drawn = {label: points for label, points in panels.items() if points}
    comparison(drawn, path, title=title, lower_is_better=["nats per token"])
