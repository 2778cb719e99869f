"""jaxcompress perplexity"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from jaxcompress.cli.flags import (
    FigureFlag,
    JsonFlag,
    ModeFlags,
    PlacementFlag,
    PromptTokensFlag,
    RowsFlag,
    StateDtypeFlag,
    TextFlags,
    WeightFlags,
    at_least,
)
from jaxcompress.cli.mesh import ProfileFlag, is_first
from jaxcompress.cli.paths import POLICY
from jaxcompress.cli.runtime import (
    check_figure,
    check_writable,
    chosen_policy,
    dtypes_told,
    held_out_text,
    line_of,
    open_model,
    progress,
    short_hash,
    swept,
    tell,
    too_small,
    write_json,
)

if TYPE_CHECKING:
    import numpy as np

    from jaxcompress.distributed import ShardingRules
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.policies import Policy

_SLOTS = (64, 128, 256, 512)
_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Perplexity(
    JsonFlag,
    FigureFlag,
    RowsFlag,
    ProfileFlag,
    StateDtypeFlag,
    PlacementFlag,
    ModeFlags,
    PromptTokensFlag,
    WeightFlags,
    TextFlags,
):
    """Perplexity of a long text for several policies and capacities.

    The text is cut into rows of --context tokens, which are read side by side; with --context 0 it is one row. In mode
    oneshot only the tokens after the prompt are measured. The last line tells how many tokens of the text the table
    leaves out. Without --file and --prompt it reads documents that the embedded model was not trained on. An
    interrupted run prints the JSON of the rows that were finished, and goes on with the same command and --out. One
    that cannot be measured is told, and the others go on (exit code 4).

    Example: jaxcompress perplexity --file book.txt --policies full window tova --slots 64 128 256 --out rows.jsonl
    """

    policies: Annotated[tuple[str, ...], POLICY] = ("full", "window", "window+4", "h2o", "tova", "random")
    """Eviction policies, spelled as for --policy of other commands; see `jaxcompress info`."""
    slots: tuple[int, ...] | None = None
    """Capacities to try; 64 128 256 512 if not given. A policy that keeps everything gets the whole context, and /onceN
    what its name says and every later token."""
    context: int = 2048
    """Tokens per row, the beginning-of-sequence token included; 0: the text is one row."""
    rows: int | None = _ROWS
    """Number of rows, evenly spread over the text; None: all."""

    def run(self) -> None:
        self._check()
        rules = self.rules()
        name, text = self.text() or held_out_text()
        model, tokenizer = open_model(self.model, self.dtype, rules)
        tokens, about = self._rows(tokenizer, name, text)
        policies = {name: chosen_policy(name, model, tokenizer.folder) for name in self.policies}
        slots = self._capacities(list(policies.values()))
        if about["read"] < about["of"]:
            each = about["read"] // len(tokens)
            tell(
                f"reads {len(tokens)} of {about['of'] // each} rows; --rows None reads all rows, --context 0 all tokens"
            )
        about["state_dtype"] = self.state_dtype or model.dtype.name
        done: list[Any] = []
        if not self.json:
            print(
                f"{'policy':{self._widest}}{'slots':>8}{'perplexity':>12}{'nats':>8}{'tokens/s':>11}{'KiB a row':>11}"
            )
        runs = sum(1 if not policy.forgets else len(slots) for policy in policies.values())
        try:
            with progress(runs * tokens.size, "reading") as bar:
                self._sweep(model, tokens, policies, slots, about, done, bar, rules)
        finally:
            self._tell(done, about)

    def _tell(self, done: list[Any], about: dict[str, Any]) -> None:
        """What is told of all lines that there are, also if others could not be measured."""
        if self.json:
            write_json(dict(about, table=[row._asdict() for row in done]))
        elif done:
            last = done[-1]
            print(f"{last.tokens:,} of the text's {about['of']:,} tokens are predicted, {last.left_out:,} left out")
        if done and self.figure is not None and is_first():
            from jaxcompress.evaluation.figures import perplexity_against_slots

            perplexity_against_slots(done, self.figure, title=about["text"])

    @property
    def _widest(self) -> int:
        """The width of the column of policies."""
        return max(23, *map(len, self.policies)) + 1

    def _check(self) -> None:
        """What can be known before anything is loaded."""
        self.chunk_tokens()
        self.check_placement(*self.policies)
        at_least(1, slots=self.slots, rows=self.rows, prompt_tokens=self.prompt_tokens)
        if self.context < 0 or self.context == 1:
            raise ValueError(f"--context must be 0 (one row) or at least 2, not {self.context}")
        if self.prompt_tokens is not None and self.mode != "oneshot":
            raise ValueError(f"--prompt-tokens is for --mode oneshot; {self.mode} measures every token")
        if not self.context and self.rows != _ROWS:
            raise ValueError("--rows does nothing with --context 0, where the text is one row")
        check_writable(self.out)
        check_figure(self.figure)

    def _rows(self, tokenizer: Tokenizer, name: str, text: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Token ids [rows, context], and what is said of them."""
        import numpy as np

        from jaxcompress.evaluation.sweep import rows_of_text

        ids, bos = tokenizer.encode(text, add_bos=False), tokenizer.bos_id
        if self.context:
            tokens = rows_of_text(ids, self.context, self.rows, bos)
        else:
            tokens = np.atleast_2d(ids if bos is None else np.concatenate([[bos], ids]))
        about: dict[str, Any] = dict(
            model=self.model or "embedded", text=name, rows=tokens.shape[0], context=tokens.shape[1],
            read=tokens.size - len(tokens) * (bos is not None), of=len(ids),
        )  # fmt: skip
        return tokens, about

    def _capacities(self, policies: list[Policy]) -> tuple[int, ...]:
        """The numbers of slots to try."""
        if self.slots is not None:
            if not any(policy.forgets for policy in policies):
                names = ", ".join(policy.name for policy in policies)
                raise ValueError(f"--slots does nothing for {names}: the name says what is kept; leave it out")
            if idle := [policy.name for policy in policies if policy.schedule.when == "once"]:
                tell(f"{', '.join(idle)}: the name says what is kept; --slots is for the other policies")
        slots = _SLOTS if self.slots is None else self.slots
        too_small(policies, slots)
        return slots

    def _sweep(
        self, model: Any, tokens: np.ndarray, policies: dict[str, Policy], slots: tuple[int, ...],
        about: dict[str, Any], done: list[Any], bar: Callable[[int], None], rules: ShardingRules | None,
    ) -> None:  # fmt: skip
        """Measures, and adds each line to `done`, to the file and to what is printed."""
        from jaxcompress.evaluation.policy_hash import policy_settings
        from jaxcompress.evaluation.results import Cell, Figure
        from jaxcompress.evaluation.sweep import Row, capacities, measured, sweep
        from jaxcompress.models.fingerprint import fingerprint

        total = tokens.shape[1]
        prompt = None if self.mode != "oneshot" else self.prompt_tokens or total // 2
        reading: dict[str, Any] = dict(
            mode=self.mode, chunk=self.chunk_tokens(), prompt=prompt,
            placement=self.placement, dtype=self.state_dtype, sharding=rules, text=about["of"],
        )  # fmt: skip
        sweep(model, tokens, list(policies.values()), slots, **reading)  # checks what all lines share
        made: dict[str, Any] = dict(
            experiment="perplexity", task=about["text"], model=about["model"], model_hash=fingerprint(model),
            context=total, dtype=dtypes_told(model.dtype.name, self.state_dtype),
        )  # fmt: skip
        settings = dict(
            mode=self.mode, chunk=reading["chunk"] if self.mode == "chunked" else None, prompt=prompt,
            placement=self.placement, rows=len(tokens), tokens=short_hash(tokens.tobytes()),
        )  # fmt: skip
        cells = (
            Cell(policy=name, slots=capacity, settings=settings | policy_settings(name, policy), **made)
            for name, policy in policies.items()
            for capacity in capacities(policy, slots, total, prompt)
        )

        def measure(cell: Cell) -> list[Figure]:
            assert isinstance(cell.slots, int)
            row = measured(model, tokens, policies[cell.policy], cell.slots, progress=bar, **reading)
            return [Figure(
                metric="nats per token", value=row.nats, lower_is_better=True, tokens=row.tokens, samples=len(tokens),
                state_bytes=row.state_bytes // len(tokens), tokens_per_second=row.tokens_per_second,
                details=row._asdict(),
            )]  # fmt: skip

        def show(rows: Sequence[Any]) -> None:
            row = line_of(Row, rows[0], self.out)
            done.append(row)
            if not self.json:
                print(
                    f"{row.policy:{self._widest}}{row.slots:8}{row.perplexity:12.3f}{row.nats:8.3f}"
                    f"{row.tokens_per_second:11,.0f}{row.state_bytes / len(tokens) / 1024:11,.0f}",
                    flush=True,
                )

        swept(cells, measure, self.out, show)
