"""jaxcompress perplexity"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxcompress.cli.runtime import (
    StateDtype,
    at_least,
    check_writable,
    chunk_of,
    open_model,
    policy_named,
    progress,
    tell,
    too_small,
    warn_of_positions,
    write_json,
)
from jaxcompress.inputs.text import read_text

_SLOTS = (64, 128, 256, 512)
_ROWS = 8


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a long text for many policies and capacities.

    The text is cut into rows of --context tokens that are read side by side, or is one endless row if that is 0. An
    interrupted run leaves the JSON of what was finished.

    Example: jaxcompress perplexity --text book.txt --policies full window tova --slots 64 128 256 --out table.json
    """

    text: Path | None = None
    """UTF-8 text; - for standard input; the embedded model's held-out documents if not given."""
    policies: tuple[str, ...] = ("full", "window", "window+4", "h2o", "tova", "random")
    """See `jaxcompress info` for the names."""
    slots: tuple[int, ...] | None = None
    """Capacities; 64 128 256 512 if not given. A policy that keeps everything, or as much as its name says (/onceN),
    gets the whole context."""
    model: str | None = None
    """Hugging Face folder, hub id, GGUF file or smollm2; the embedded model if not given."""
    context: int = 2048
    """Tokens per row, the beginning-of-sequence token included; 0: one endless row."""
    rows: int | None = _ROWS
    """So many rows, evenly spread over the text; None: all."""
    mode: Literal["streaming", "chunked", "oneshot"] = "streaming"
    """streaming: exactly as in decoding. chunked: selection every --chunk tokens. oneshot: the first --prompt tokens
    are selected from once, the rest is streamed and measured."""
    chunk: int | None = None
    """Tokens between two selections in mode chunked; 128 if not given."""
    prompt: int | None = None
    """For mode oneshot; half of the context if not given."""
    placement: Literal["absolute", "slot", "compact"] | None = None
    """Where tokens stand for RoPE; as the policy was published if not given."""
    dtype: str | None = None
    """Of weights; the checkpoint's if not given."""
    state_dtype: StateDtype | None = None
    """What keys and values are stored in, the last three with a scale per slot and head; as --dtype if not given."""
    out: Path | None = None
    """Write the table here (JSON), after each row."""
    figure: Path | None = None
    """Draw perplexity against slots (.png)."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        import numpy as np

        chunk = chunk_of(self.mode, self.chunk)
        at_least(1, slots=self.slots, rows=self.rows, prompt=self.prompt)
        if self.context < 0 or self.context == 1:
            raise ValueError(f"--context must be 0 (one endless row) or at least 2, not {self.context}")
        if self.prompt is not None and self.mode != "oneshot":
            raise ValueError(f"--prompt is for --mode oneshot; {self.mode} measures every token")
        if not self.context and self.rows != _ROWS:
            raise ValueError("--rows does nothing with --context 0, which is one endless row")
        check_writable(self.out, self.figure)
        model, tokenizer = open_model(self.model, self.dtype)
        from jaxcompress.embedded.corpus import held_out
        from jaxcompress.evaluation.sweep import rows_of_text, sweep

        text = "\n".join(document.text for document in held_out()) if self.text is None else read_text(self.text)
        ids = tokenizer.encode(text, add_bos=False)
        bos = tokenizer.bos_id
        if self.context:
            tokens = rows_of_text(ids, self.context, self.rows, bos)
        else:
            tokens = np.atleast_2d(ids if bos is None else np.concatenate([[bos], ids]))
        policies = [policy_named(name, tokenizer.folder) for name in self.policies]
        slots = _SLOTS if self.slots is None else self.slots
        if self.slots is not None and (idle := [policy.name for policy in policies if policy.schedule.when == "once"]):
            tell(f"{', '.join(idle)}: the name says what is kept; --slots is for the other policies")
        if self.slots is not None and not any(policy.forgets for policy in policies):
            raise ValueError(
                f"--slots does nothing for {', '.join(policy.name for policy in policies)}: nothing is evicted from a "
                "full state; leave it out"
            )
        too_small(policies, slots)
        read, total = tokens.size - len(tokens) * (bos is not None), len(ids)
        if read < total:
            count = total // (read // len(tokens))
            tell(
                f"{read:,} of the text's {total:,} tokens are read, in {len(tokens)} of {count} rows; --rows None "
                "reads all rows, --context 0 all tokens"
            )
        warn_of_positions(model, [self.placement or policy.placement for policy in policies], tokens.shape[1] - 1)
        prompt = tokens.shape[1] // 2 if self.prompt is None else self.prompt
        reading: dict[str, Any] = dict(
            mode=self.mode, chunk=chunk, prompt=prompt, placement=self.placement, dtype=self.state_dtype
        )
        about = dict(
            model=self.model or "embedded",
            text=str(self.text or "held-out documents"),
            rows=tokens.shape[0],
            context=tokens.shape[1],
            read=read,
            of=total,
            state_dtype=self.state_dtype or model.embedding[...].dtype.name,
        )
        done = []
        runs = sum(1 if not policy.forgets else len(slots) for policy in policies)
        if not self.json:
            print(f"{'policy':24}{'slots':>8}{'perplexity':>12}{'nats':>8}{'tokens/s':>11}{'state KiB':>11}")
        try:
            with progress(runs * tokens.size, "reading") as bar:
                for row in sweep(model, tokens, policies, slots, progress=bar, **reading):
                    done.append(row)
                    if self.out is not None:
                        write_json(dict(about, table=[r._asdict() for r in done]), self.out)
                    if not self.json:
                        print(
                            f"{row.policy:24}{row.slots:8}{row.perplexity:12.3f}{row.nats:8.3f}"
                            f"{row.tokens_per_second:11,.0f}{row.state_bytes / 1024:11,.0f}",
                            flush=True,
                        )
        finally:
            if self.json:
                write_json(dict(about, table=[r._asdict() for r in done]))
        if self.figure is not None:
            from jaxcompress.evaluation.figures import perplexity_against_slots

            perplexity_against_slots(done, self.figure, title=str(about["text"]))
