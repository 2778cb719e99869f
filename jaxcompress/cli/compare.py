"""jaxcompress compare"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxcompress.cli.flags import (
    FigureFlag,
    PlacementFlag,
    StateDtypeFlag,
    TableFlag,
    TextFlags,
    WeightFlags,
    at_least,
)
from jaxcompress.cli.runtime import (
    check_writable,
    chosen_policy,
    held_out_text,
    open_model,
    tell,
    too_small,
    words_of,
    write_json,
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
class Compare(FigureFlag, TableFlag, StateDtypeFlag, PlacementFlag, WeightFlags, TextFlags):
    """Compares policies: loss, recall, bytes and speed at fractions of the context, with their spread over seeds.

    Facts and questions about them are woven into the text. It is read token by token (nats, recall), or the context is
    compressed in one shot, while the question is not yet known (before) or known (after). If the tokenizer has too few
    whole words for facts, only the loss is measured. "asked" are the bytes of so many slots of keys and values, "KiB"
    what the state of one text takes, the policy's own numbers included. Without --file and --prompt it reads documents
    that the embedded model was not trained on.

    Example: jaxcompress compare --policies full window+4 tova snapkv+16/every16 --fractions 4 8 --out table.json
    """

    policies: tuple[str, ...] = POLICIES
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
        import jax

        at_least(1, fractions=self.fractions, seeds=self.seeds, rows=self.rows)
        if self.context < max(2, *self.fractions):
            raise ValueError(
                f"--context must be at least 2, and leave at least one slot for each of --fractions, not {self.context}"
            )
        self.check_placement(*self.policies)
        if self.fractions != _FRACTIONS and set(self.policies) == {"full"}:
            raise ValueError("--fractions does nothing for full, which gets the whole context; leave it out")
        check_writable(self.out, self.figure)
        model, tokenizer = open_model(self.model, self.dtype)
        policies = [chosen_policy(name, model, tokenizer.folder) for name in self.policies]
        from jaxcompress.evaluation.compare import compare

        name, text = self.text() or held_out_text()
        tasks = self._exams(tokenizer, text)
        slots = [self.context // fraction for fraction in self.fractions]
        too_small(policies, slots)
        about = dict(
            model=self.model or "embedded", text=name, context=self.context,
            seeds=self.seeds, rows=self.rows, questions=len(tasks.single), placement=self.placement,
            state_dtype=self.state_dtype,
        )  # fmt: skip
        print(f"{'policy':34}{'slots':>6}{'nats':>15}{'recall':>12}{'before':>12}{'after':>12}{'asked':>8}{'KiB':>7}"
              f"{'held':>6}{'tok/s':>8}")  # fmt: skip
        done = []
        for row in compare(model, tasks, policies, slots, placement=self.placement, dtype=self.state_dtype):
            if done and done[-1]["policy"] != row.policy:
                jax.clear_caches()  # hundreds of compiled programs at once are more than a process may map
            done.append(asdict(row))
            if self.out is not None:
                write_json(dict(about, table=done), self.out)
            print(_line(row), flush=True)
        if self.figure is not None:
            _draw(done, self.figure, name)

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
