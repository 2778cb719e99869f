"""jaxcompress perplexity"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxcompress.cli.runtime import StateDtype


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
    slots: tuple[int, ...] = (64, 128, 256, 512)
    """Capacities."""
    model: str | None = None
    """Hugging Face folder or hub id; the embedded model if not given."""
    context: int = 2048
    """Tokens per row, the beginning-of-sequence token included; 0: one endless row."""
    rows: int | None = 8
    """So many rows, evenly spread over the text."""
    mode: Literal["streaming", "chunked", "oneshot"] = "streaming"
    """streaming: exactly as in decoding. chunked: selection every --chunk tokens. oneshot: the first --prompt tokens
    are selected from once, the rest is streamed and measured."""
    chunk: int = 128
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

        from jaxcompress.cli.runtime import open_model, policy_named, progress, read_text, write_json

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
        prompt = self.prompt or tokens.shape[1] // 2
        reading: dict[str, Any] = dict(
            mode=self.mode, chunk=self.chunk, prompt=prompt, placement=self.placement, dtype=self.state_dtype
        )
        about = dict(
            model=self.model or "embedded",
            text=str(self.text or "held-out documents"),
            rows=tokens.shape[0],
            context=tokens.shape[1],
            state_dtype=self.state_dtype or model.embedding[...].dtype.name,
        )
        done = []
        runs = sum(1 if not policy.forgets else len(self.slots) for policy in policies)
        if not self.json:
            print(f"{'policy':24}{'slots':>8}{'perplexity':>12}{'nats':>8}{'tokens/s':>11}{'state KiB':>11}")
        try:
            with progress(runs * tokens.size, "reading") as read:
                for row in sweep(model, tokens, policies, self.slots, progress=read, **reading):
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
