"""Compares policies: loss, recall, bytes and speed at several capacities, with standard deviations over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxcompress.evaluation.recall import WORDS_PER_SIDE, Recall, Wording, answers, exam, one_by_one
from jaxcompress.inputs.scalars import whole
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.checks import check_policy
from jaxcompress.policies.policy import Policy
from jaxcompress.state.placement import Placement
from jaxcompress.state.storage import dtype_name, vector_bytes


class Exams(NamedTuple):
    """Texts with facts and questions, several for each seed.

    Attributes:
      whole: the texts with all their questions, `seeds` groups of equal size.
      single: a row per question, for compression before and after the question is known; empty if texts have no facts.
      prompt: the number of first tokens of a `single` row that are context.
      drawn: the seed of each `single` row; seeds may have different numbers of them.
    """

    whole: list[Recall]
    single: list[Recall]
    prompt: int
    seeds: int
    drawn: tuple[int, ...] = ()


def exams(
    filler: np.ndarray,
    words: Wording | None,
    *,
    context: int,
    seeds: int,
    rows: int = 2,
    questions: int = 4,
    bos: int | None,
) -> Exams:
    """Draws new facts, fillers and questions for each seed.

    Args:
      filler: tokens of ordinary text.
      words: the wording of facts and questions; None for texts without facts, of which only the loss can be measured.
      context: number of tokens of a text.
      rows: texts per seed.
      questions: number of questions about the first text of each seed that are asked one by one.
    """
    if words is None:
        return Exams([row for seed in range(seeds) for row in _plain(filler, context, rows, seed, bos)], [], 0, seeds)
    whole, single, drawn = [], [], []
    for seed in range(seeds):
        tasks = exam(filler, words, rows=rows, length=context, notes=8, questions=8, seed=seed, bos=bos)
        whole += tasks
        found = one_by_one(tasks[:1], words)[:questions]
        single += found
        drawn += [seed] * len(found)
    # Every context is cut to the length of the shortest, so that one program reads them all: it loses what follows its
    # first token, which may be the beginning of sequence.
    line = len(words.recall) + 2 * WORDS_PER_SIDE + len(words.arrow)
    prompt = min(len(row.tokens) for row in single) - line
    first = 0 if bos is None else 1
    cut = lambda part: np.concatenate([part[:first], part[len(part) - (prompt + line - first) :]])
    pairs = [(Recall(*map(cut, row)), seed) for row, seed in zip(single, drawn, strict=True)]
    left = [(row, seed) for row, seed in pairs if 0 < row.distance.max() < prompt]
    return Exams(whole, [row for row, _ in left], prompt, seeds, tuple(seed for _, seed in left))


def _plain(filler: np.ndarray, context: int, rows: int, seed: int, bos: int | None) -> list[Recall]:
    """Ordinary text as an exam without questions.

    Raises:
      ValueError: the text is too short.
    """
    first = [] if bos is None else [bos]
    width = context - len(first)
    if len(filler) < width:
        raise ValueError(f"{width} tokens of text are needed, {len(filler)} were given")
    starts = np.random.default_rng(seed).integers(len(filler) - width + 1, size=rows)
    nothing = np.zeros(context, bool)
    tokens = [np.concatenate([first, filler[at : at + width]]).astype(np.int32) for at in starts]
    return [Recall(row, nothing, nothing, np.zeros(context, np.int32)) for row in tokens]


@dataclass(frozen=True)
class Compared:
    """One line of the table: means over seeds, and their standard deviations.

    Attributes:
      slots: capacity per layer or head (for budgets, the mean).
      nats: mean loss per token of texts with facts, read token by token.
      recall: share of the questions answered in full when everything is read token by token.
      before, after: as `recall`, if the context is read at once and compressed before or after the question is known.
      state_bytes: measured bytes of one row; `occupied` is the share of the slots occupied at the end.
      asked_bytes: the bytes of `slots` slots of keys and values in each kv head.
      tokens_per_second: speed of all rows together, token by token.
    """

    policy: str
    slots: int
    nats: float | None
    nats_spread: float | None
    recall: float | None
    recall_spread: float | None
    before: float | None
    before_spread: float | None
    after: float | None
    after_spread: float | None
    asked_bytes: int
    state_bytes: int
    occupied: float
    tokens_per_second: float | None


def compare(
    model: Decoder,
    tasks: Exams,
    policies: Sequence[Policy],
    slots: Sequence[int],
    *,
    placement: Placement | None = None,
    dtype: DTypeLike | None = None,
) -> Iterator[Compared]:
    """Measures every policy at every capacity.

    Arguments are checked at the call. Each line is measured when it is requested. A policy that keeps everything is
    measured once, with room for the whole context. Capacities below the minimum of a policy are skipped. A policy that
    only selects from whole prompts is not measured token by token.

    Args:
      slots: capacities, the same for every layer.
      placement: the positions that RoPE uses; by default those of each policy.
      dtype: the dtype of the state (see `jaxcompress.state.storage`); by default the model's.

    Raises:
      ValueError: a policy or a capacity is invalid, or the dtype is unknown.
      FloatingPointError: losses are not finite.
    """
    slots = [whole(capacity, "slots", least=1) for capacity in slots]
    for policy in policies:
        check_policy(policy)
    dtype_name(dtype or model.dtype)

    def run() -> Iterator[Compared]:
        for policy in policies:
            for capacity in capacities(tasks, policy, slots):
                yield compared(model, tasks, policy, capacity, placement=placement, dtype=dtype)

    return run()


def capacities(tasks: Exams, policy: Policy, slots: Sequence[int]) -> list[int]:
    """The capacities at which `compare` measures a policy, of those that are asked for; the largest first."""
    tried = sorted(slots, reverse=True) if policy.evicts else [len(tasks.whole[0].tokens)]
    return [slots for slots in tried if slots >= policy.needs and (tasks.single or not policy.oneshot_only)]


def compared(
    model: Decoder,
    tasks: Exams,
    policy: Policy,
    slots: int,
    *,
    placement: Placement | None = None,
    dtype: DTypeLike | None = None,
) -> Compared:
    """One line of the table; arguments and errors are those of `compare`."""
    answered = partial(answers, model, policy=policy, slots=slots, placement=placement, dtype=dtype)
    whole = None if policy.oneshot_only else answered(tasks.whole)
    line = len(tasks.single[0].tokens) - tasks.prompt if tasks.single else 0
    before, after = (
        answered(tasks.single, prompt=n) if tasks.single else None
        for n in (tasks.prompt, tasks.prompt + line - WORDS_PER_SIDE)
    )
    config = model.config
    vector = vector_bytes(config.head_dim, dtype or model.dtype)
    some = whole or before
    assert some is not None
    asked = lambda given: given is not None and given.right.size > 0
    share = lambda given, drawn: _spread(given.right, drawn[given.row]) if asked(given) else (None, None)
    drawn = np.repeat(np.arange(tasks.seeds), len(tasks.whole) // tasks.seeds), np.array(tasks.drawn, int)
    nats = (None, None) if whole is None else _of(whole.nats.reshape(tasks.seeds, -1).mean(1))
    return Compared(
        policy.name, slots, *nats, *share(whole, drawn[0]), *share(before, drawn[1]),
        *share(after, drawn[1]), 2 * config.num_layers * config.num_kv_heads * slots * vector,
        some.state_bytes, some.occupied, None if whole is None else whole.tokens_per_second,
    )  # fmt: skip


def _spread(right: np.ndarray, seed: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation over seeds of the share of right answers; the seed of each is given."""
    return _of(np.array([right[seed == s].mean() for s in np.unique(seed)]))


def _of(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std())
