"""jaxcompress demo"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxcompress.cli.flags import JsonFlag, at_least
from jaxcompress.cli.runtime import check_figure, open_model, peak_memory, write_json


@dataclass(frozen=True, kw_only=True)
class Demo(JsonFlag):
    """Reads a long text through few slots, compares policies, and draws two pictures.

    Uses the embedded model and text that it was not trained on; needs no download.

    Example: jaxcompress demo --out demo
    """

    out: Path = Path("demo")
    """Write the table (JSON) and the pictures into this folder."""
    slots: int = 128
    """Capacity of each layer in the long read."""
    tokens: int = 32_768
    """Number of tokens of the long read."""

    def run(self) -> None:
        at_least(1, slots=self.slots, tokens=self.tokens)
        self.out.mkdir(parents=True, exist_ok=True)
        check_figure(self.out / "perplexity.png")
        model, tokenizer = open_model(None, "float32")
        say = (lambda *text, **how: None) if self.json else lambda *text, **how: print(*text, **how, flush=True)
        result = {}
        try:
            result["long_read"] = _long_read(model, tokenizer, self, say)
            result["table"] = _compare(model, tokenizer, self.out, say)
            _draw_deaths(model, tokenizer, self.out, say)
        finally:
            write_json(result, self.out / "demo.json")
        if self.json:
            write_json(result)
        say(f"\nEverything is in {self.out}/: demo.json, perplexity.png, deaths.png")


def _long_text(tokenizer, tokens: int):
    """Held-out documents, the longest first, until there are enough tokens."""
    import numpy as np

    from jaxcompress.embedded.corpus import held_out

    pieces, names, count = [[tokenizer.bos_id]], [], 1
    for document in sorted(held_out(), key=lambda document: -len(document.text)):
        pieces.append(tokenizer.encode(document.text, add_bos=False))
        names.append(document.name)
        count += len(pieces[-1])
        if count >= tokens:
            break
    return np.concatenate(pieces)[:tokens], names


def _long_read(model, tokenizer, how: Demo, say) -> dict:
    import time

    import numpy as np

    from jaxcompress.cli.runtime import progress as bar
    from jaxcompress.generation import GenerationConfig, TextStream, decode_stream, init_decode_state, prefill_stream
    from jaxcompress.policies.names import get_policy

    ids, names = _long_text(tokenizer, how.tokens)
    policy, placement, segment = get_policy("tova"), "slot", 1024
    now = init_decode_state(model, policy, how.slots, placement=placement)
    nbytes = sum(run.nbytes for run in now.kv)
    say(f"Reading {len(ids):,} tokens of text it has never seen ({', '.join(names)})")
    say(f"through {how.slots} slots per layer: {nbytes / 1024:.0f} KiB of state, whatever the length.\n")
    marks, begun, last, first = [], 0.0, 0, 0
    with bar(len(ids), "reading") as advance:
        for count, reached in prefill_stream(model, [ids], now, segment=segment):
            advance(count - last)
            last, now = count, reached
            if not begun:
                begun, first = time.perf_counter(), count  # the first segment compiles
            if count >= 8192 * len(marks):
                marks.append((count, peak_memory()))
                say(f"  {count:7,} tokens read   peak memory {peak_memory() / 2**20:,.0f} MiB")
    speed = (len(ids) - first) / (time.perf_counter() - begun)
    say(f"  {len(ids):7,} tokens read   peak memory {peak_memory() / 2**20:,.0f} MiB   {speed:,.0f} tokens/s\n")
    say("It goes on writing:")
    stream, text = TextStream(tokenizer, after=ids[-64:]), ""
    config = GenerationConfig(temperature=0.7, top_p=0.9)
    for tokens in decode_stream(model, now, 96, config, stream_every=16):
        piece = stream.push(tokens[0])
        text += piece
        say(piece, end="")
    rest = stream.finish()
    text += rest
    say(f"{rest}\n")
    return dict(
        documents=names, tokens=len(ids), slots=how.slots, policy=policy.name, placement=placement, state_bytes=nbytes,
        tokens_per_second=float(np.round(speed)), peak_bytes=marks, written=text,
    )  # fmt: skip


def _compare(model, tokenizer, out: Path, say) -> list[dict]:
    import math

    import numpy as np

    from jaxcompress.cli.runtime import chosen_policy, words_of
    from jaxcompress.cli.runtime import progress as bar
    from jaxcompress.embedded.corpus import held_out
    from jaxcompress.evaluation.figures import Point, against_slots
    from jaxcompress.evaluation.recall import answers, exam
    from jaxcompress.evaluation.sweep import rows_of_text, sweep

    context, slots = model.config.max_position, (64, 128, 256)
    text = np.concatenate([tokenizer.encode(document.text, add_bos=False) for document in held_out()])
    rows = rows_of_text(text, context, 4, tokenizer.bos_id)
    tasks = exam(text, words_of(tokenizer), rows=4, length=context, bos=tokenizer.bos_id)
    names = ("full", "window", "window+4", "h2o-layer", "tova", "learned", "random")
    policies = {policy.name: policy for policy in (chosen_policy(name, model, tokenizer.folder) for name in names)}
    say(f"Held-out text in rows of {context} tokens, read token by token through a bounded state.")
    say("With facts: perplexity of such rows into which facts and, 500 to 2,000 tokens later, questions about them")
    say("are woven. Recall: how many of the questions are answered in full. retention-layer is the model's own policy,")
    say("a network that learnt beside it what will be needed.\n")
    titles = f"{'perplexity':>12}{'with facts':>12}{'recall':>9}{'tokens/s':>10}{'state KiB':>11}"
    say(f"{'policy':16}{'slots':>6}{titles}")
    table = []
    with bar(rows.size * (1 + len(slots) * (len(names) - 1)), "comparing") as advance:
        for row in sweep(model, rows, list(policies.values()), slots, progress=advance):
            given = answers(model, tasks, policies[row.policy], row.slots)
            table.append(dict(row._asdict(), with_facts=math.exp(given.nats.mean()), recall=given.accuracy))
            say(
                f"{row.policy:16}{row.slots:6}{row.perplexity:12.2f}{math.exp(given.nats.mean()):12.2f}{given.accuracy:9.0%}"
                f"{row.tokens_per_second:10,.0f}{row.state_bytes / len(rows) / 1024:11,.0f}"
            )
    columns = {"perplexity": "perplexity", "perplexity with facts": "with_facts", "recall": "recall"}
    panels = {label: [Point(r["policy"], r["slots"], r[name]) for r in table] for label, name in columns.items()}
    against_slots(panels, out / "perplexity.png", title="Held-out Python documentation and sources")
    return table


def _draw_deaths(model, tokenizer, out: Path, say) -> None:
    from jaxcompress.evaluation.figures import death_times
    from jaxcompress.evaluation.tracing import trace
    from jaxcompress.policies.names import get_policy

    ids, _ = _long_text(tokenizer, 1024)
    held = trace(model, ids[None], get_policy("tova"), 128)
    death_times(held, out / "deaths.png", title="TOVA, 128 slots: what each layer held")
