"""jaxcompress ruler"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from jaxcompress.cli.flags import PlacementFlag, RowsFlag, StateDtypeFlag, WeightFlags, at_least, check_fractions
from jaxcompress.cli.paths import POLICY
from jaxcompress.cli.runtime import check_writable, chosen_policy, open_weights, swept, tell, too_small
from jaxcompress.inputs.text import read_text

if TYPE_CHECKING:
    from jaxcompress.checkpoints import Loaded
    from jaxcompress.evaluation.results import Row
    from jaxcompress.evaluation.ruler import Plan
    from jaxcompress.evaluation.ruler.hops import Puzzle

TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_2",
)  # fmt: skip
"""`jaxcompress.evaluation.ruler.TASKS`, for the parser, which imports no array library."""

IN_TEXT = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
"""Those that hide needles in ordinary text. The others make their own, but for the documents of qa_2."""

_FRACTIONS = (2, 4, 8)

POLICIES = (
    "full", "random", "window+4", "streaming_llm+4", "h2o", "tova", "snapkv+16", "observed_attention", "knorm",
    "keydiff", "lagkv+16", "expected_attention",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ruler(RowsFlag, StateDtypeFlag, PlacementFlag, WeightFlags):
    """What a model remembers of a context that was bounded: the tasks of RULER, for many policies.

    A context of --lengths tokens (256 of them are left for question and answer) is read and bounded to a share of its
    tokens, before or after the question is known, and the answers are scored as RULER scores them. Protocol kvpress:
    the context is read at once and reduced once, and nothing is evicted after that. Protocol oneshot: the same, but
    question and answer go through the same slots. Protocol streaming: everything is read token by token in these slots.
    A sweep that was stopped goes on with the same command and --out; one that cannot be measured is told, and the
    others go on (exit code 4).

    Example: jaxcompress ruler --model smollm2 --policies full tova snapkv+16 --fractions 2 4 8 --out rows.jsonl
    """

    policies: Annotated[tuple[str, ...], POLICY] = POLICIES
    """Eviction policies, spelled as for --policy of other commands; see `jaxcompress info`."""
    tasks: tuple[str, ...] = TASKS
    """Tasks, by RULER's names. qa_2 are questions over two documents."""
    lengths: tuple[int, ...] = (1024,)
    """Tokens of a prompt with its answer."""
    fractions: tuple[int, ...] = _FRACTIONS
    """Slots are the tokens of a context divided by these."""
    question: tuple[Literal["unknown", "known"], ...] = ("unknown", "known")
    """Whether contexts are bounded before or after the question is known."""
    protocols: tuple[Literal["kvpress", "oneshot", "streaming"], ...] = ("kvpress",)
    """How contexts are bounded."""
    seeds: int = 1
    """Number of seeds: each draws its own samples."""
    samples: int = 4
    """Contexts for each task and seed."""
    questions: int = 1
    """Questions of each context, where a task has several."""
    form: Literal["chat", "plain"] | None = None
    """Prompts in the model's chat format or as plain text; chat if not given and the model has a template."""
    haystack: tuple[Path, ...] = ()
    """Texts to hide needles in (UTF-8 files, or folders with .txt files); documentation that the embedded model was not
    trained on, if not given."""
    puzzles: Path | None = None
    """A file of HotpotQA's form for qa_2; questions are made up if not given."""
    batch: int = 4
    """Contexts that are read together."""

    def run(self) -> None:
        at_least(1, fractions=self.fractions, seeds=self.seeds, samples=self.samples, questions=self.questions,
                 batch=self.batch)  # fmt: skip
        self.check_placement(*self.policies)
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"unknown task {unknown[0]!r} in --tasks; known: {', '.join(TASKS)}")
        check_fractions(self.fractions, _FRACTIONS, self.policies)
        if self.puzzles is not None and "qa_2" not in self.tasks:
            raise ValueError(f"--puzzles is for the task qa_2, which is not among {', '.join(self.tasks)}")
        check_writable(self.out)
        puzzles = self._puzzles()
        self._check_haystack(puzzles)
        text = self._text()
        loaded = open_weights(self.model, self.dtype)
        plan = self._plan(loaded, text, puzzles)
        cells = plan.cells(loaded, self.model or "embedded", left_out=self._too_long(plan, loaded))
        if self.out is None:
            tell("nothing is kept without --out FILE; a sweep that is stopped then begins anew")
        print(
            f"{'task':18}{'policy':28}{'slots':>7}{'length':>8}  {'question':10}{'protocol':11}{'seed':>4}"
            f"{'score':>7}{'of':>4}{'KiB':>8}{'tok/s':>7}"
        )
        swept(cells, plan.measure(loaded), self.out, _show)

    def _too_long(self, plan: Plan, loaded: Loaded) -> list[tuple[str, int]]:
        """Tells which tasks do not fit into some of the lengths, and are left out there.

        Raises:
          ValueError: so all of them are everywhere.
        """
        found = plan.too_long(loaded.tokenizer)
        if len(found) == len(self.tasks) * len(self.lengths):
            raise ValueError("; ".join(found.values()))
        for why in found.values():
            tell(f"left out: {why}")
        return list(found)

    def _plan(self, loaded: Loaded, text: str, puzzles: tuple[Puzzle, ...]) -> Plan:
        from jaxcompress.evaluation.ruler import Plan
        from jaxcompress.evaluation.ruler.prompts import REST

        if min(self.lengths) < REST + max(self.fractions):
            raise ValueError(
                f"--lengths must be at least {REST + max(self.fractions)}: {REST} tokens are for question and answer, "
                f"and every one of --fractions leaves a slot; {min(self.lengths)} was given"
            )
        policies = {name: chosen_policy(name, loaded.model, loaded.folder) for name in self.policies}
        slots = [(length - REST) // share for length in self.lengths for share in self.fractions]
        too_small(list(policies.values()), slots)
        form = self.form or ("chat" if loaded.tokenizer.has_chat_template else "plain")
        return Plan(
            tasks=self.tasks, lengths=self.lengths, policies=policies, fractions=self.fractions,
            known=tuple(one == "known" for one in self.question), protocols=self.protocols, seeds=self.seeds,
            samples=self.samples, questions=self.questions, form=form, text=text,
            puzzles=puzzles, placement=self.placement, dtype=self.state_dtype, batch=self.batch,
        )  # fmt: skip

    def _puzzles(self) -> tuple[Puzzle, ...]:
        """The questions of --puzzles; none if it is not given."""
        from jaxcompress.evaluation.ruler.hops import read_puzzles

        return () if self.puzzles is None else read_puzzles(self.puzzles)

    def _check_haystack(self, puzzles: tuple[Puzzle, ...]) -> None:
        """Raises ValueError if --haystack is given for tasks of which none reads it."""
        documents = "qa_2" in self.tasks and len(puzzles) < 2  # several puzzles have documents for one another
        if self.haystack and not documents and not any(task in IN_TEXT for task in self.tasks):
            raise ValueError(
                f"--haystack does nothing for {', '.join(self.tasks)}; it is for {', '.join(IN_TEXT)}, and for qa_2 "
                "without --puzzles: leave it out, or add one of them"
            )

    def _text(self) -> str:
        """The text of the haystack."""
        if not self.haystack:
            from jaxcompress.embedded.corpus import held_out

            return "\n\n".join(document.text for document in held_out("topics/"))
        files = []
        for path in self.haystack:
            found = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
            if not found:
                raise FileNotFoundError(
                    f"--haystack: there is no text in {path.absolute()}; give UTF-8 files, or folders with .txt files"
                )
            files += found
        return "\n\n".join(map(read_text, files))


def _show(rows: Sequence[Row]) -> None:
    """A cell as a line."""
    for cell, figure, _, _ in rows:
        how = cell.settings
        speed = "-" if figure.tokens_per_second is None else f"{figure.tokens_per_second:,.0f}"
        print(
            f"{cell.task:18}{cell.policy:28}{cell.slots:7}{cell.context:8,}  {how['question']:10}{how['protocol']:11}"
            f"{cell.seed:4}{figure.value:6.1f}%{figure.samples:4}{figure.state_bytes / 1024:8,.0f}{speed:>7}",
            flush=True,
        )
