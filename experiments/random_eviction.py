"""Does chance beat designed policies on long reasoning? (Liu et al. 2025, position paper, arXiv 2505.19147, section 4)

    python experiments/random_eviction.py --model smollm2 --out rows.jsonl
    python experiments/random_eviction.py --model smollm2 --questions gsm8k_test.jsonl --out rows.jsonl
    python experiments/random_eviction.py --out rows.jsonl --table table.md     # only draws what the file holds

A trace is a conversation in which the model is asked one question of several steps after another and reasons about
each, until `length` tokens are read and written. Two protocols:

  trace   The model with its full cache writes the trace at temperature 1. Every policy reads that trace token by token
          in its slots, and the loss of the tokens that the model wrote is taken. They are drawn from the full cache's
          own distribution, so the mean difference to its loss estimates the KL divergence from it without bias: 0 is
          perfect, whatever the model knows. Only tokens after the largest number of slots count, so that columns are
          of the same tokens.
  own     Every policy writes its own trace, greedily, and the share of right answers is taken: the last number of an
          answer has to be the right one. Errors add up here as they do in use. It says something only where the full
          cache answers; a model of 135 million parameters answers few questions.

A cell is one policy, size and seed; the seed draws questions and trace. `random` is drawn with the same seed.
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from command import arguments, stop
from paper_tables import OfTable, Plan, markdown, of_experiment, of_texts, run, spread

import jaxcompress as jc
from jaxcompress.checkpoints import Loaded
from jaxcompress.evaluation.perplexity import predictions
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.generation import GenerationConfig, decode, init_decode_state, prefill
from jaxcompress.generation.turns import ROLE_OF_MODEL, closing_token, of_user, turn_text, without_stop
from jaxcompress.inputs.text import json_lines, read_text
from jaxcompress.models.init_state import init_state
from jaxcompress.models.modes import FEWEST, calls
from jaxcompress.policies import Random

EXPERIMENT, LOSS, RIGHT = "random_eviction", "nats per token of the trace", "right answers, %"
CONTEXT = 16  # tokens before a turn that decide how it is encoded; a few suffice


@dataclass(frozen=True, kw_only=True)
class Arguments(OfTable):
    """Adds rows to the file for each policy, size and seed, and prints the table."""

    policies: tuple[str, ...] = ("full", "random", "window+4", "tova", "h2o", "snapkv+32/every32", "rkv/every32")
    """The first must be full."""
    slots: tuple[int, ...] = (128, 256, 512)
    length: int = 2000
    """Tokens of a trace, at least."""
    answer: int = 192
    """Tokens of an answer, at most."""
    seeds: int = 3
    questions: Path | None = None
    """JSON lines with "question" and "answer", such as GSM8K's test set (what follows the last #### counts); made up
    if not given."""
    own: bool = True
    """Also let every policy write its own trace."""


QUICK = Arguments(quick=True, policies=("full", "random", "tova"), slots=(32,), length=96, answer=8, seeds=1)


class Question(NamedTuple):
    """A question and the number that answers it."""

    text: str
    answer: float


def made_up(rng: random.Random) -> Question:
    """A sum of three steps about things."""
    name = rng.choice(("Anna", "Ben", "Clara", "David", "Emma", "Felix"))
    thing = rng.choice(("apples", "books", "coins", "marbles", "pencils", "shells"))
    start, more, times = rng.randint(3, 12), rng.randint(2, 9), rng.randint(2, 4)
    gone = rng.randint(1, start + more - 1)
    text = (
        f"{name} has {start} {thing} and gets {more} more. Then {name} gives {gone} away. A friend has {times} times "
        f"as many {thing} as {name} has now. How many {thing} does the friend have? Think step by step."
    )
    return Question(text, times * (start + more - gone))


def questions_of(args: Arguments, seed: int) -> Iterator[Question]:
    """As many as are asked for."""
    rng = random.Random(seed)
    if args.questions is None:
        while True:
            yield made_up(rng)
    numbers = (
        (one["question"], last_number(one["answer"].rpartition("####")[2])) for _, _, one in json_lines(args.questions)
    )
    known = [Question(asked, number) for asked, number in numbers if number is not None]
    if not known:
        stop(f"no answer in {args.questions} ends in a number")
    while True:
        yield from rng.sample(known, len(known))


def last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


class Trace(NamedTuple):
    """A conversation.

    Attributes:
      tokens: [T] ids.
      written: [T], whether the model wrote it.
      right: of each answer, whether its last number was the right one.
      state_bytes: of the state in which it was written.
    """

    tokens: np.ndarray
    written: np.ndarray
    right: list[bool]
    state_bytes: int


def trace(
    loaded: Loaded[Any, Any, Any], policy: jc.Policy, slots: int, args: Arguments, seed: int, temperature: float
) -> Trace:
    """Asks until the trace is long enough."""
    tokenizer, said = loaded.tokenizer, []
    chat = tokenizer.has_chat_template
    closing = closing_token(tokenizer, None, {}) if chat else None
    ends = (*tokenizer.eos_ids, *(() if closing is None else (closing,)))
    config = GenerationConfig(temperature=temperature, stop_token_ids=tuple(dict.fromkeys(map(int, ends))))
    state = init_decode_state(loaded.model, policy, slots, seeds=seed)
    ids, written, right = [], [], []
    for question in questions_of(args, seed):
        asked = of_user(question.text)
        text = turn_text(tokenizer, said, asked, {}) if chat else f"\n\nQuestion: {question.text}\nAnswer:"
        if ids and ids[-1] in config.stop_token_ids:
            text = without_stop(tokenizer, text, ids[-1])
        before = tokenizer.decode(ids[-CONTEXT:], skip_special=False) if ids else ""
        piece = tokenizer.encode_after(before, text) if ids else tokenizer.encode(text, add_bos=not chat)
        state = prefill(loaded.model, [piece], state, segment=FEWEST)
        new, state = decode(loaded.model, state, args.answer, config)
        answer = np.asarray(new[0])[np.asarray(new[0]) >= 0].tolist()
        ids += [*piece.tolist(), *answer]
        written += [False] * len(piece) + [True] * len(answer)
        words = tokenizer.decode(answer)
        right.append(last_number(words) == question.answer)
        said += [asked, dict(role=ROLE_OF_MODEL, content=words)]
        if len(ids) >= args.length:
            break
    nbytes = sum(part.nbytes for part in state.kv)
    return Trace(np.array(ids, np.int32), np.array(written), right, nbytes)


def read_losses(model: Any, tokens: np.ndarray, policy: jc.Policy, slots: int) -> tuple[np.ndarray, int, float]:
    """Losses of all tokens but the first, read token by token; bytes of the state; tokens per second."""
    state = init_state(model.config, policy, slots, batch=1, dtype=model.dtype)
    nbytes = sum(part.nbytes for part in state)
    parts = list(
        predictions(model, tokens[None], state, policy, calls("streaming", len(tokens) - 1, chunk=1, segment=512))
    )
    losses = np.concatenate([part.losses[0] for part in parts])
    return losses, nbytes, len(losses) / sum(part.seconds for part in parts)


def seeded(name: str, seed: int) -> jc.Policy:
    """The policy of a name; that of `random` is drawn with the seed."""
    return Random(seed) if name == "random" else jc.get_policy(name)


def plan(args: Arguments) -> Plan:
    if args.policies[0] != "full":
        stop("--policies must begin with full: the others are measured beside it")
    if args.questions is not None and not args.questions.is_file():
        stop(f"there are no questions in {args.questions.absolute()}: --questions takes a file of JSON lines")
    given = "" if args.questions is None else read_text(args.questions)
    loaded = args.load()
    make_cell = args.cells_of(EXPERIMENT, loaded.model, args.length)
    room = args.length + args.answer + 512  # the last turn may pass the length
    asked = "made up" if args.questions is None else args.questions.name
    cells = (
        make_cell(
            task=protocol, policy=name, slots=slots, seed=seed,
            settings=dict(answer=args.answer, questions=asked, after=max(args.slots)),
        )
        for protocol in ("trace", "own")[: 2 if args.own else 1]
        for name in args.policies
        for slots in (args.slots if jc.get_policy(name).evicts else (room,))
        for seed in range(args.seeds)
    )  # fmt: skip
    traces: dict[int, Trace] = {}

    def figures(cell: Cell) -> Iterator[Figure]:
        policy, slots = seeded(cell.policy, cell.seed), int(np.max(cell.slots))
        if cell.task == "own":
            own = trace(loaded, policy, slots, args, cell.seed, 0.0)
            yield Figure(metric=RIGHT, value=100 * statistics.mean(own.right), tokens=int(own.written.sum()),
                         samples=len(own.right), state_bytes=own.state_bytes)  # fmt: skip
            return
        if cell.seed not in traces:
            traces[cell.seed] = trace(loaded, jc.get_policy("full"), room, args, cell.seed, 1.0)
        given = traces[cell.seed]
        losses, nbytes, speed = read_losses(loaded.model, given.tokens, policy, slots)
        counted = given.written[1:] & (np.arange(1, len(given.tokens)) >= cell.settings["after"])
        yield Figure(metric=LOSS, value=float(losses[counted].mean()), lower_is_better=True, tokens=int(counted.sum()),
                     samples=1, state_bytes=nbytes, tokens_per_second=speed)  # fmt: skip
        if cell.seed == args.seeds - 1:
            jax.clear_caches()  # programs of other sizes would only fill memory

    return of_texts(args, cells, figures, lambda cell: given)


def line(row: Row) -> str:
    cell, figure = row.cell, row.figure
    return f"{cell.task:6} {cell.policy:20} {cell.slots!s:>6} {cell.seed:4} {figure.metric:30} {figure.value:9.4f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each policy; a column for each size and protocol."""
    rows = of_experiment(rows, EXPERIMENT)
    found: dict[tuple[str, str, Any], dict[int, Figure]] = {}
    for row in rows:
        size = "all" if row.cell.policy == "full" else row.cell.slots
        found.setdefault((row.cell.task, row.cell.policy, size), {})[row.cell.seed] = row.figure
    whole = found.get(("trace", "full", "all"), {})
    if not whole:
        return ["the full cache's trace was not measured yet"]
    sizes = sorted({size for _, _, size in found if size != "all"})
    answered = any(task == "own" for task, _, _ in found)

    def over(name: str, size: Any) -> str:
        mine = found.get(("trace", name, size), {})
        return spread([mine[seed].value - whole[seed].value for seed in mine if seed in whole], ".4f")

    right = lambda name, size: spread([one.value for one in found.get(("own", name, size), {}).values()], ".0f")
    first = rows[0].cell
    names = list(dict.fromkeys(row.cell.policy for row in rows if row.cell.policy != "full"))
    said = f"{first.model}, {first.dtype}, traces of {first.context:,} tokens: {len(whole)}, questions "
    said += (
        f"{first.settings['questions']}; {sum(one.tokens for one in whole.values()):,} tokens counted. The full cache"
    )
    said += f" loses {spread([one.value for one in whole.values()], '.3f')} nats per token"
    if asked := found.get(("own", "full", "all"), {}):
        said += f" and answers {right('full', 'all')} % of {sum(one.samples for one in asked.values())} questions right"
    return [
        f"{said}. Nats per token above the full cache, mean and standard error over traces.",
        "",
        *markdown(
            ["policy", *(f"{size:,} slots" for size in sizes),
             *(f"right, %, {size:,} slots" for size in sizes if answered)],
            ([f"`{name}`", *(over(name, size) for size in sizes), *(right(name, size) for size in sizes if answered)]
             for name in names),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT)
