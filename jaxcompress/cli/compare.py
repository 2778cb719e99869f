"""jaxcompress compare"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxcompress.cli.runtime import (
    StateDtype,
    at_least,
    check_writable,
    open_model,
    policy_named,
    tell,
    too_small,
    warn_of_positions,
    words_of,
    write_json,
)
from jaxcompress.inputs.text import read_text

POLICIES = (
    "full", "random", "window", "window+4", "streaming_llm+4", "h2o", "h2o-layer", "tova", "tova-kv_head",
    "observed_attention", "scissorhands", "knorm", "tova/protect-first4", "tova/sampled4",
    # Their scores cost a sort or another pass over the keys: selected from every 16 steps.
    "snapkv+16/every16", "snapkv+16-layer/by_chunks20/every16", "snapkv+16/critical/every16",
    "snapkv+16-pool/adaptive/every16", "tova-pool/adaptive/every16", "nacl/every16", "keydiff/every16",
    "lagkv+16/every16", "cur/every16", "expected_attention/every16", "rkv/every16", "rkv-sketch16/every16",
)  # fmt: skip


@dataclass(frozen=True)
class Compare:
    """Compares all policies: loss, recall, bytes and speed at fractions of the context, with their spread over seeds.

    Texts with facts are read token by token (nats, recall), or at once up to a question that is not yet known (before)
    or known (after) when the context is compressed. Where a tokenizer has too few whole words for facts, there is loss
    only. "asked" are the bytes of so many slots of keys and values alone, "KiB" what the state of one text really
    takes, with the policy's own numbers.

    Example: jaxcompress compare --policies full window+4 tova snapkv+16/every16 --fractions 4 8 --out table.json
    """

    policies: tuple[str, ...] = POLICIES
    """See `jaxcompress info` for the names; modifiers follow after slashes."""
    fractions: tuple[int, ...] = (2, 4, 8, 16)
    """Slots are the context divided by these."""
    model: str | None = None
    """Hugging Face folder, hub id, GGUF file or smollm2; the embedded model if not given."""
    text: Path | None = None
    """UTF-8 text to weave facts into; - for standard input; the embedded model's held-out documents if not given."""
    context: int = 1024
    """Tokens of a text."""
    seeds: int = 3
    """Facts, fillers and questions are drawn anew so often."""
    rows: int = 2
    """Texts per seed."""
    state_dtype: StateDtype | None = None
    """What keys and values are stored in, the last three with a scale per slot and head; as --dtype if not given."""
    dtype: str | None = None
    """Of weights; the checkpoint's if not given."""
    out: Path | None = None
    """Write the table here (JSON), after each row."""
    figure: Path | None = None
    """Draw loss and recall of all policies and numbers of slots (.png)."""

    def run(self) -> None:
        from dataclasses import asdict

        import jax

        at_least(1, fractions=self.fractions, seeds=self.seeds, rows=self.rows)
        if self.context < max(2, *self.fractions):
            raise ValueError(
                f"--context must be at least 2, and leave at least one slot for each of --fractions, not {self.context}"
            )
        check_writable(self.out, self.figure)
        model, tokenizer = open_model(self.model, self.dtype)
        policies = [policy_named(name, tokenizer.folder) for name in self.policies]
        from jaxcompress.embedded.corpus import held_out
        from jaxcompress.evaluation.compare import compare, exams

        text = "\n".join(document.text for document in held_out()) if self.text is None else read_text(self.text)
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
        remedy = f"a --context of up to {model.config.max_position} keeps to what it knows"
        warn_of_positions(model, [policy.placement for policy in policies], self.context, remedy)
        slots = [self.context // fraction for fraction in self.fractions]
        too_small(policies, slots)
        about = dict(
            model=self.model or "embedded", text=str(self.text or "held-out documents"), context=self.context,
            seeds=self.seeds, rows=self.rows, questions=len(tasks.single), state_dtype=self.state_dtype,
        )  # fmt: skip
        print(f"{'policy':34}{'slots':>6}{'nats':>15}{'recall':>12}{'before':>12}{'after':>12}{'asked':>8}{'KiB':>7}"
              f"{'held':>6}{'tok/s':>8}")  # fmt: skip
        done = []
        for row in compare(model, tasks, policies, slots, dtype=self.state_dtype):
            if done and done[-1]["policy"] != row.policy:
                jax.clear_caches()  # hundreds of compiled programs at once are more than a process may map
            done.append(asdict(row))
            if self.out is not None:
                write_json(dict(about, table=done), self.out)
            share = lambda mean, spread: "-" if mean is None else f"{mean:.0%} ±{spread:.0%}"
            nats = "-" if row.nats is None else f"{row.nats:.3f} ±{row.nats_spread:.3f}"
            speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
            print(
                f"{row.policy:34}{row.slots:6}{nats:>15}{share(row.recall, row.recall_spread):>12}"
                f"{share(row.before, row.before_spread):>12}{share(row.after, row.after_spread):>12}"
                f"{row.asked_bytes / 1024:8,.0f}{row.state_bytes / 1024:7,.0f}{row.held:6.0%}{speed:>8}",
                flush=True,
            )
        if self.figure is not None:
            from jaxcompress.evaluation.figures import Point, comparison

            point = lambda name: [Point(r["policy"], r["slots"], r[name]) for r in done if r[name] is not None]
            panels = {
                "nats per token": point("nats"), "recall": point("recall"),
                "asked after compression": point("before"), "asked before": point("after"),
            }  # fmt: skip
            drawn = {label: points for label, points in panels.items() if points}
            comparison(drawn, self.figure, title=str(about["text"]), lower_is_better=["nats per token"])
