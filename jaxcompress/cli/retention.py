"""jaxcompress retention"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxcompress.cli.flags import (
    FigureFlag,
    JsonFlag,
    LimitFlag,
    ModeFlags,
    PlacementFlag,
    PolicyFlags,
    PromptTokensFlag,
    StateDtypeFlag,
    TextFlags,
    WeightFlags,
    at_least,
)
from jaxcompress.cli.paths import POLICY
from jaxcompress.cli.runtime import check_figure, check_writable, chosen_policy, open_model, write_json
from jaxcompress.inputs.whole_file import whole_file

if TYPE_CHECKING:
    import numpy as np

    from jaxcompress.models.decoder import Decoder
    from jaxcompress.models.init_state import Slots


@dataclass(frozen=True, kw_only=True)
class Retention(
    JsonFlag, FigureFlag, StateDtypeFlag, PlacementFlag, ModeFlags, PromptTokensFlag, PolicyFlags, WeightFlags,
    LimitFlag, TextFlags,
):  # fmt: skip
    """Shows what a policy keeps of a text: a page with every token coloured by how long it was held.

    The page is one HTML file. It needs no server and no network. The command prints how long each kind of token was
    held: the share still held n steps after a token was read (Kaplan-Meier estimate), and the share held at the end.
    Without --file and --prompt it reads a document that the embedded model was not trained on.

    Example: jaxcompress retention --file book.txt --policy tova --slots 128 --compare h2o --out page.html
    """

    out: Path
    """Write the page to this file (.html)."""
    compare: Annotated[str | None, POLICY] = None
    """Another policy with as many slots: print how many tokens both hold."""

    def run(self) -> None:
        self._check()
        name, text = self.text() or _held_out()
        if not text:
            raise ValueError(f"{name} is empty; there is nothing to read")
        model, tokenizer = open_model(self.model, self.dtype)
        from jaxcompress.evaluation.lifetimes import overlap, survival_by_kind, token_kinds, token_texts
        from jaxcompress.evaluation.page import page
        from jaxcompress.inputs.token_ids import token_ids

        ids = tokenizer.encode(text)
        every, ids = len(ids), token_ids(ids, model.config.vocab_size, name)[: self.limit]
        prompt = self._prompt(len(ids))
        policies = [one for one in (self.policy, self.compare) if one is not None]
        deaths = self._deaths(model, ids, [chosen_policy(one, model, tokenizer.folder) for one in policies], prompt)
        texts = token_texts(tokenizer, ids)
        kinds = token_kinds(texts, marks=[tokenizer.is_special(token) for token in ids])
        layers, sets, total = deaths[0].shape
        about: dict[str, Any] = dict(
            policy=self.policy, slots=self.capacity, text=name, tokens=total, of=every, model=self.model or "embedded",
            layers=layers, sets=sets, mode=self.mode, prompt=None if self.mode == "streaming" else prompt,
        )  # fmt: skip
        title = f"What {self.policy} keeps in {slots_told(self.capacity)} slots"
        drawn = page(deaths[0], texts, title=title, about=about_told(about), kinds=kinds)
        with whole_file(self.out) as part:
            part.write_text(drawn, encoding="utf-8")
        if self.figure is not None:
            from jaxcompress.evaluation.figures import lifetimes

            lifetimes(deaths[0], self.figure, f"{title}: {name}", kinds)
        table = survival_by_kind(deaths[0], kinds)
        same = overlap(*deaths) if self.compare is not None else None
        if self.json:
            return write_json(dict(about, kinds=[_row(row) for row in table], overlap=_overlap(self.compare, same)))
        print(f"{self.policy}, {slots_told(self.capacity)} slots, {total:,} of {every:,} tokens of {name}; ", end="")
        print(f"{layers} layers, {sets} set{'s' * (sets > 1)} of slots in each\n")
        _print_kinds(table)
        if same is not None:
            _print_overlap(self.policy, self.compare, same)
        print(f"\n{self.out} shows {self.policy}" + (f", and {self.figure}" if self.figure is not None else ""))
        return None

    def _check(self) -> None:
        """What can be known before anything is loaded."""
        self.chunk_tokens()
        self.check_placement(self.policy, self.compare or self.policy)
        at_least(1, limit=self.limit)
        if self.mode == "streaming" and self.prompt_tokens is not None:
            raise ValueError("--prompt-tokens is for --mode chunked and oneshot; streaming reads all tokens one by one")
        check_writable(self.out)
        check_figure(self.figure)

    def _prompt(self, total: int) -> int:
        """How many tokens are the prompt. In mode streaming its end makes no difference; all tokens are fastest."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return total if self.mode == "streaming" else max(total // 2, 1)

    def _deaths(self, model: Decoder, ids: np.ndarray, policies: list[Any], prompt: int) -> list[np.ndarray]:
        """By policy, when each token was evicted, [layers, sets, tokens]."""
        from jaxcompress.evaluation.tracing import trace

        return [
            trace(
                model, ids[None], policy, self.capacity, prompt=prompt, mode=self.mode, chunk=self.chunk_tokens(),
                placement=self.placement, dtype=self.state_dtype,
            ).death[:, 0]
            for policy in policies
        ]  # fmt: skip


def _held_out() -> tuple[str, str]:
    """The longest piece of prose that the embedded model has not seen: its name and text."""
    from jaxcompress.embedded.corpus import held_out

    document = max(held_out("topics/"), key=lambda document: len(document.text))
    return document.name, document.text


def slots_told(slots: Slots) -> str:
    """Capacities as a person writes them."""
    return str(slots) if isinstance(slots, int) else ", ".join(map(str, slots))


def about_told(about: dict[str, Any]) -> dict[str, str]:
    """What the page says at its top."""
    sets = "one per layer" if about["sets"] == 1 else f"{about['sets']} per layer"
    prompt = "" if about["prompt"] is None else f", the first {about['prompt']:,} tokens"
    return {
        "policy": about["policy"],
        "slots": slots_told(about["slots"]),
        "slot sets": sets,
        "model": f"{about['model']}, {about['layers']} layers",
        "text": about["text"],
        "tokens": f"{about['tokens']:,} of {about['of']:,}",
        "read": about["mode"] + prompt,
    }


def _row(row: Any) -> dict[str, Any]:
    from jaxcompress.evaluation.lifetimes import AFTER

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
    from jaxcompress.evaluation.lifetimes import AFTER

    print(f"{'kind':14}{'tokens':>8}" + "".join(f"{f'after {steps}':>12}" for steps in AFTER) + f"{'at the end':>12}")
    for row in table:
        shares = "".join(f"{'-' if share != share else f'{share:.1%}':>12}" for share in (*row.after, row.end))
        print(f"{row.kind:14}{row.tokens:8,}{shares}")

    print("At the end: of all tokens, those just read among them.")


def _print_overlap(policy: str, other: str | None, same: Any) -> None:
    print(f"\nWhat {policy} and {other} both hold, since either forgot something: tokens that both hold / that either")
    print("holds (Jaccard), and / that the larger holds (shared).\n")
    print(f"{'layer':>5}{'since step':>12}{'Jaccard':>10}{'at the end':>12}{'shared':>10}{'at the end':>12}")
    for layer, (jaccard, shared) in enumerate(zip(*same.means(), strict=True)):
        print(
            f"{layer:5}{same.since[layer]:12,}{jaccard:10.1%}{same.jaccard[layer, -1]:12.1%}"
            f"{shared:10.1%}{same.shared[layer, -1]:12.1%}"
        )
