"""Samples as token ids, fitted to a length, in the model's chat format or as plain text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from jaxcompress.evaluation.ruler.sample import Question, Sample, Sources
from jaxcompress.evaluation.ruler.tasks import get_task
from jaxcompress.inputs.tokenizer import Tokenizer

Form = Literal["chat", "plain"]

REST = 256
"""Tokens of a length that are left for the question and the answer: a context has so many fewer, in every task."""

_MARK = "\x00context\x00"


class Prompt(NamedTuple):
    """A sample as a model reads it.

    Attributes:
      context: [T] token ids up to the question.
      questions: as they were made.
      asked: [n] each, token ids of each question, without the end of the turn.
      closing: [n] each, the end of the turn and the first words of the answer.
    """

    context: np.ndarray
    questions: tuple[Question, ...]
    asked: tuple[np.ndarray, ...]
    closing: tuple[np.ndarray, ...]


def fitted(task: str, length: int, index: int, seed: int, tokenizer: Tokenizer, sources: Sources, form: Form) -> Prompt:
    """The sample of a task with the most filler whose context has at most `length - REST` tokens.

    Args:
      length: tokens of everything, nominally.
      index: number of the sample.
      seed: of everything that is drawn. Equal arguments give equal prompts.

    Raises:
      ValueError: as `check_fits`; the tokenizer has no chat template.
    """
    check_fits(task, length, index, seed, tokenizer, sources, form)
    sample = lambda size: _sample(task, size, index, seed, sources)
    fits = lambda size: len(_context(sample(size).context, tokenizer, form)[0]) <= length - REST
    return _prompt(sample(largest(get_task(task).least, fits)), tokenizer, form)


def check_fits(
    task: str, length: int, index: int, seed: int, tokenizer: Tokenizer, sources: Sources, form: Form
) -> None:
    """Raises ValueError if not even the smallest sample of a task fits into a length. Arguments are as for `fitted`."""
    smallest = len(_context(_sample(task, get_task(task).least, index, seed, sources).context, tokenizer, form)[0])
    if smallest > length - REST:
        raise ValueError(
            f"{task} does not fit into {length} tokens: its smallest context has {smallest}, and {REST} are left for "
            f"question and answer; give a length of at least {smallest + REST}"
        )


def _sample(task: str, size: int, index: int, seed: int, sources: Sources) -> Sample:
    return get_task(task).make(size, random.Random(f"{seed} {task} {index}"), sources)


def largest(least: int, fits: Callable[[int], bool]) -> int:
    """The largest size that fits, if `least` does and larger ones fit less: by doubling, then by halves."""
    step = max(least, 1)
    while fits(least + step):
        step *= 2
    low, high = least + (step // 2 if step > max(least, 1) else 0), least + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _context(text: str, tokenizer: Tokenizer, form: Form) -> tuple[np.ndarray, str]:
    """Token ids of a context in its form, and the text between a question and its answer."""
    if form == "plain":
        return tokenizer.encode(text), "\n"
    said = tokenizer.apply_chat_template([dict(role="user", content=text + _MARK)])
    before, _, after = said.partition(_MARK)
    return tokenizer.encode(before, add_bos=False), after


def _prompt(sample: Sample, tokenizer: Tokenizer, form: Form) -> Prompt:
    context, between = _context(sample.context, tokenizer, form)
    piece = lambda text: tokenizer.encode(text, add_bos=False)
    return Prompt(
        context, sample.questions, tuple(piece(one.text) for one in sample.questions),
        tuple(piece(between + one.prefix) for one in sample.questions),
    )  # fmt: skip
