"""jaxcompress retention"""

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
    warn_of_positions,
    write_json,
)
from jaxcompress.inputs.text import named, read_text


@dataclass(frozen=True)
class Retention:
    """Shows what a policy keeps of a text: a page with every token coloured by how long it was remembered.

    The page is one HTML file that any browser opens, with no server and no network. A table of how long each kind of
    token was held is printed: the share still held n steps after a token came (Kaplan-Meier estimate), and at the end.

    Example: jaxcompress retention --text book.txt --policy tova --slots 128 --compare h2o --out page.html
    """

    out: Path
    """Where to write the page (.html)."""
    text: Path | None = None
    """UTF-8 text; - for standard input; a document held out from the embedded model's training if not given."""
    model: str | None = None
    """Hugging Face folder, hub id, GGUF file or smollm2; the embedded model if not given."""
    policy: str = "tova"
    """See `jaxcompress info` for the names."""
    slots: tuple[int, ...] = (128,)
    """Capacity: one for all layers, or one for each."""
    compare: str | None = None
    """Another policy: also print how much of what the two hold, with as many slots, is the same."""
    limit: int = 2048
    """Use so many tokens of the text."""
    mode: Literal["streaming", "chunked", "oneshot"] = "streaming"
    """streaming: token by token, exactly as in decoding. chunked, oneshot: the first --prompt tokens are selected from
    every --chunk tokens or once, the rest is streamed."""
    prompt: int | None = None
    """For modes chunked and oneshot; half of the tokens if not given."""
    chunk: int | None = None
    """Tokens between two selections in mode chunked; 128 if not given."""
    placement: Literal["absolute", "slot", "compact"] | None = None
    """Where tokens stand for RoPE; as the policy was published if not given."""
    dtype: str | None = None
    """Of weights, e.g. float32; the checkpoint's if not given."""
    state_dtype: StateDtype | None = None
    """What keys and values are stored in, the last three with a scale per slot and head; as --dtype if not given."""
    figure: Path | None = None
    """Also draw maps of what each layer, head and kind of token kept (.png)."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> None:

        chunk = chunk_of(self.mode, self.chunk)
        at_least(1, limit=self.limit)
        if self.mode == "streaming" and self.prompt is not None:
            raise ValueError("--prompt is for --mode chunked and oneshot; streaming reads all tokens one by one")
        check_writable(self.out, self.figure)
        model, tokenizer = open_model(self.model, self.dtype)
        from jaxcompress.evaluation.page import page
        from jaxcompress.evaluation.retention import overlap, survival_by_kind, token_kinds, token_texts
        from jaxcompress.evaluation.tracing import trace
        from jaxcompress.inputs.token_ids import token_ids

        names = [name for name in (self.policy, self.compare) if name is not None]
        policies = [policy_named(name, tokenizer.folder) for name in names]
        name, text = _held_out() if self.text is None else (named(self.text), read_text(self.text))
        if not text:
            raise ValueError(f"{name} is empty; there is nothing to remember")
        ids = tokenizer.encode(text)
        every, ids = len(ids), token_ids(ids, model.config.vocab_size, name)[: self.limit]
        total = len(ids)
        slots = self.slots[0] if len(self.slots) == 1 else self.slots
        # Streaming is the same wherever the prompt ends, and fastest without decoding steps.
        prompt = self.prompt
        if prompt is None:
            prompt = total if self.mode == "streaming" else max(total // 2, 1)
        warn_of_positions(model, [self.placement or policy.placement for policy in policies], total)
        deaths = [
            trace(
                model, ids[None], policy, slots,
                prompt=prompt, mode=self.mode, chunk=chunk, placement=self.placement, dtype=self.state_dtype,
            ).death[:, 0]
            for policy in policies
        ]  # fmt: skip
        death = deaths[0]
        layers, sets, _ = death.shape
        texts = token_texts(tokenizer, ids)
        kinds = token_kinds(texts, marks=[tokenizer.is_special(token) for token in ids])
        table = survival_by_kind(death, kinds)
        about: dict[str, Any] = dict(
            policy=self.policy, slots=slots, text=name, tokens=total, of=every, model=self.model or "embedded",
            layers=layers, sets=sets, mode=self.mode, prompt=None if self.mode == "streaming" else prompt,
        )  # fmt: skip
        title = f"What {self.policy} keeps in {_words(slots)} slots"
        html = page(death, texts, title=title, about=_told(about), kinds=kinds)
        self.out.write_text(html, encoding="utf-8")
        if self.figure is not None:
            from jaxcompress.evaluation.figures import retention

            retention(death, self.figure, f"{title}: {name}", kinds)
        same = overlap(*deaths) if self.compare is not None else None
        if self.json:
            return write_json(dict(about, kinds=[_row(row) for row in table], overlap=_overlap(self.compare, same)))
        print(f"{self.policy}, {_words(slots)} slots, {total:,} of {every:,} tokens of {name}; ", end="")
        print(f"{layers} layers, {sets} set{'s' * (sets > 1)} of slots in each\n")
        _print_kinds(table)
        if same is not None:
            _print_overlap(self.policy, self.compare, same)
        print(f"\n{self.out}")
        return None


def _held_out() -> tuple[str, str]:
    """The longest piece of prose that the embedded model has not seen: its name and text."""
    from jaxcompress.embedded.corpus import held_out

    document = max(held_out("topics/"), key=lambda document: len(document.text))
    return document.name, document.text


def _words(slots: int | tuple[int, ...]) -> str:
    return str(slots) if isinstance(slots, int) else ", ".join(map(str, slots))


def _told(about: dict[str, Any]) -> dict[str, str]:
    """What the page says at its top."""
    sets = "one per layer" if about["sets"] == 1 else f"{about['sets']} per layer"
    prompt = "" if about["prompt"] is None else f", the first {about['prompt']:,} tokens"
    return {
        "policy": about["policy"],
        "slots": _words(about["slots"]),
        "slot sets": sets,
        "model": f"{about['model']}, {about['layers']} layers",
        "text": about["text"],
        "tokens": f"{about['tokens']:,} of {about['of']:,}",
        "read": about["mode"] + prompt,
    }


def _row(row: Any) -> dict[str, Any]:
    from jaxcompress.evaluation.retention import AFTER

    after = {str(steps): _known(share) for steps, share in zip(AFTER, row.after, strict=True)}
    return dict(row._asdict(), after=after)


def _known(share: float) -> float | None:
    """JSON has no NaN."""
    return None if share != share else share


def _overlap(policy: str | None, same: Any) -> dict[str, Any] | None:
    if same is None:
        return None
    jaccard, shared = same.means()
    return dict(
        policy=policy, jaccard=jaccard.tolist(), shared=shared.tolist(), since=same.since.tolist(),
        jaccard_at_end=same.jaccard[:, -1].tolist(), shared_at_end=same.shared[:, -1].tolist(),
    )  # fmt: skip


def _print_kinds(table: list[Any]) -> None:
    from jaxcompress.evaluation.retention import AFTER

    print(f"{'kind':14}{'tokens':>8}" + "".join(f"{f'after {steps}':>12}" for steps in AFTER) + f"{'at the end':>12}")
    for row in table:
        shares = "".join(f"{'-' if share != share else f'{share:.1%}':>12}" for share in (*row.after, row.end))
        print(f"{row.kind:14}{row.tokens:8,}{shares}")


def _print_overlap(policy: str, other: str | None, same: Any) -> None:
    print(f"\nWhat {policy} and {other} both hold, since either forgot something: tokens that both hold / that either")
    print("holds (Jaccard), and / that the larger holds (shared).\n")
    print(f"{'layer':>5}{'since step':>12}{'Jaccard':>10}{'at the end':>12}{'shared':>10}{'at the end':>12}")
    for layer, (jaccard, shared) in enumerate(zip(*same.means(), strict=True)):
        print(
            f"{layer:5}{same.since[layer]:12,}{jaccard:10.1%}{same.jaccard[layer, -1]:12.1%}"
            f"{shared:10.1%}{same.shared[layer, -1]:12.1%}"
        )
