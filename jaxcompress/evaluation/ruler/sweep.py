"""RULER for many policies: the cells of a sweep, and what each of them gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.evaluation.policy_hash import policy_settings
from jaxcompress.evaluation.results import Cell, Figure
from jaxcompress.evaluation.ruler.hops import Puzzle
from jaxcompress.evaluation.ruler.prompts import REST, Form, Prompt, check_fits, fitted
from jaxcompress.evaluation.ruler.protocol import Answered, Asker, Protocol
from jaxcompress.evaluation.ruler.sample import Sources
from jaxcompress.evaluation.ruler.scoring import match_all, match_any
from jaxcompress.evaluation.ruler.tasks import get_task
from jaxcompress.generation.turns import closing_token
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.fingerprint import fingerprint
from jaxcompress.policies.policy import Policy
from jaxcompress.state.placement import Placement

EXPERIMENT = "ruler"
METRIC = "string match %"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep over tasks, lengths, policies and shares of the context.

    Attributes:
      tasks: names of `tasks.TASKS`.
      lengths: tokens of a prompt with its answer; a context has `REST` fewer.
      policies: by the expression that names each.
      fractions: slots are the tokens of a context divided by these.
      known: whether contexts are bounded after the question is known; both may be measured.
      seeds: how many; each draws its own samples.
      samples: contexts per cell.
      questions: questions of each context, where a task has several.
      form: chat or plain text.
      text, puzzles: see `sample.Sources`.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    policies: dict[str, Policy]
    fractions: Sequence[int]
    known: Sequence[bool] = (False,)
    protocols: Sequence[Protocol] = ("kvpress",)
    seeds: int = 1
    samples: int = 4
    questions: int = 1
    form: Form = "chat"
    text: str
    puzzles: tuple[Puzzle, ...] = ()
    placement: Placement | None = None
    dtype: str | None = None
    batch: int = 4

    def cells(
        self, loaded: Loaded[Any, Any, Tokenizer], model: str, *, left_out: Collection[tuple[str, int]] = ()
    ) -> Iterator[Cell]:
        """The cells, those of one policy together.

        A policy that evicts nothing is measured once per length, and one that needs more slots is left out there.

        Args:
          left_out: tasks and the lengths at which they have no cells, such as those of `too_long`.
        """
        print_of_model = fingerprint(loaded.model)
        weights = loaded.model.dtype.name
        dtype = weights if self.dtype in (None, weights) else f"{weights}/{self.dtype}"
        for expression, policy in self.policies.items():
            own = policy_settings(expression, policy)
            for length in self.lengths:
                for settings, slots in self._settings(policy, length):
                    for task in (task for task in self.tasks if (task, length) not in left_out):
                        for seed in range(self.seeds):
                            yield Cell(
                                experiment=EXPERIMENT, task=task, model=model, model_hash=print_of_model,
                                policy=expression, slots=slots, context=length, dtype=dtype, seed=seed,
                                settings=settings | own,
                            )  # fmt: skip

    def _settings(self, policy: Policy, length: int) -> Iterator[tuple[dict[str, Any], int]]:
        """What decides a figure beside the fields of a cell, and the slots."""
        whole = length - REST
        shares = [(1, whole)] if not policy.evicts else [(share, whole // share) for share in self.fractions]
        protocols = self.protocols if policy.evicts else self.protocols[:1]
        for share, slots in shares:
            for protocol in protocols:
                for known in self.known if policy.evicts else self.known[:1]:
                    if slots >= policy.needs:
                        yield dict(
                            fraction=share, question="known" if known else "unknown", protocol=protocol,
                            form=self.form, samples=self.samples, questions=self.questions,
                            placement=self.placement, text=_short_hash(self.text), puzzles=_short_hash(self.puzzles),
                        ), slots  # fmt: skip

    def too_long(self, tokenizer: Tokenizer) -> dict[tuple[str, int], str]:
        """The tasks of which not even the smallest sample fits into a length, and why not."""
        found = {}
        for task in self.tasks:
            for length in self.lengths:
                try:
                    check_fits(task, length, 0, 0, tokenizer, Sources(self.text, length, self.puzzles), self.form)
                except ValueError as error:
                    found[task, length] = str(error)
        return found

    def measure(self, loaded: Loaded[Any, Any, Tokenizer]) -> Callable[[Cell], list[Figure]]:
        """The function that measures a cell of this plan."""
        stop = _stops(loaded.tokenizer, self.form)

        @lru_cache(maxsize=len(self.tasks) * len(self.lengths) * self.seeds)
        def prompts(task: str, length: int, seed: int) -> list[Prompt]:
            sources = Sources(self.text, length, self.puzzles)
            numbers = range(self.samples)
            return [fitted(task, length, index, seed, loaded.tokenizer, sources, self.form) for index in numbers]

        before: list[str] = []

        def measure(cell: Cell) -> list[Figure]:
            if before and before[-1] != cell.policy:
                jax.clear_caches()  # hundreds of compiled programs at once are more than a process may map
            before[:] = [cell.policy]
            asker = Asker(
                model=loaded.model, decode=loaded.tokenizer.decode, stop=stop, length=cell.context,
                new_tokens=get_task(cell.task).new_tokens, questions=self.questions,
                batch=min(self.batch, self.samples), placement=self.placement, dtype=self.dtype,
            )  # fmt: skip
            mine = prompts(cell.task, cell.context, cell.seed)
            known, protocol = cell.settings["question"] == "known", cell.settings["protocol"]
            assert isinstance(cell.slots, int)
            return [_scored(cell, mine, asker.ask(mine, self.policies[cell.policy], cell.slots, protocol, known=known))]

        return measure


def _stops(tokenizer: Tokenizer, form: Form) -> tuple[int, ...]:
    """The tokens that end an answer."""
    closing = closing_token(tokenizer, None, {}) if form == "chat" else None
    return tuple(dict.fromkeys([*tokenizer.eos_ids, *([] if closing is None else [closing])]))


def _scored(cell: Cell, prompts: Sequence[Prompt], given: Answered) -> Figure:
    """The score of the answers, and the answers themselves."""
    task = get_task(cell.task)
    match = match_any if task.match_any else match_all
    asked = [(one, question) for one in prompts for question in one.questions[: cell.settings["questions"]]]
    pairs = [(written, one, question) for written, (one, question) in zip(given.written, asked, strict=True)]
    scores = 100 * np.array([match(written, question.answers) for written, _, question in pairs])
    details = [
        dict(
            question=question.text, answer_prefix=question.prefix, answer=list(question.answers),
            predicted_answer=written, context_tokens=len(one.context), max_new_tokens=task.new_tokens,
        ) for written, one, question in pairs
    ]  # fmt: skip
    return Figure(
        metric=METRIC, value=float(scores.mean()),
        spread=float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None,
        tokens=given.tokens, samples=len(scores), state_bytes=given.state_bytes,
        tokens_per_second=given.tokens_per_second, details=details,
    )  # fmt: skip


def _short_hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]
