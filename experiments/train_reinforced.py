"""Reinforcement learning through the bounded state (GRPO), on facts that a text states and then asks for.

    python experiments/train_reinforced.py --out rows.jsonl
    python experiments/train_reinforced.py --out rows.jsonl --table table.md     # only draws what the file holds

A prompt is text with facts, `# note: KEY -> VALUE`, that ends in a question, `# recall: KEY ->`. The model reads it
through a few slots and writes the value; the reward is the share of its tokens that are right, so anyone can check it.
Of each prompt several answers are drawn. An answer's advantage is its reward, less the mean of its group, over the
group's deviation (Shao et al. 2024), and every step takes new answers.

  bounded  log-probabilities in training are those of the same state: which token was evicted when is the mask
  full     answers are drawn from the same state, but training reads with full attention, as usual trainers do

The table has the reward on held-out prompts, before and after, read through the slots and with the full cache, and the
largest difference between an answer's log-probability when it was drawn and in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import arguments
from paper_tables import OfTable, Plan, markdown, of_experiment, run, spread
from train_embedded import training_texts

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation.recall import WORDS_PER_SIDE, weave, wording
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import init_state
from jaxcompress.training.recurrent import exact_gradient

EXPERIMENT = "reinforced"
BEFORE, AFTER, WHOLE, APART = (
    "reward before", "reward after", "reward after, full cache", "largest difference of log-probabilities"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments(OfTable):
    """Adds rows to the file for each method and seed, and prints the table."""

    methods: tuple[Literal["bounded", "full"], ...] = ("bounded", "full")
    seeds: tuple[int, ...] = (0, 1, 2)
    policy: str = "tova"
    slots: int = 24
    length: int = 160
    """Tokens of a prompt."""
    notes: int = 4
    steps: int = 40
    prompts: int = 4
    """Per step."""
    answers: int = 8
    """Per prompt."""
    rate: float = 1e-4
    """Learning rate of Adam."""
    tests: int = 64
    """Held-out prompts."""


QUICK = Arguments(
    quick=True, methods=("bounded",), seeds=(0,), slots=12, length=64, notes=1, steps=1, prompts=1, answers=2, tests=2
)


class Prompts(NamedTuple):
    """Texts that end in a question, [B, T], where tokens are (padding is in front), and the answers [B, W]."""

    tokens: jax.Array
    valid: jax.Array
    values: np.ndarray


def prompt_maker(tokenizer: jc.Tokenizer, texts: Sequence[str], args: Arguments) -> Callable[..., Prompts]:
    """(seed, how many) -> prompts."""
    encode = lambda text: tokenizer.encode(text, add_bos=False).tolist()
    stream = np.concatenate([np.asarray(encode(text), np.int32) for text in texts])
    words = wording(tokenizer.vocabulary(), encode)

    def one(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        start = rng.integers(len(stream) - args.length)
        how: dict[str, Any] = dict(notes=args.notes, questions=1, tell_in=(0.0, 0.6), ask_in=(0.8, 1.0))
        task = weave(stream[start : start + args.length], words, rng=rng, length=args.length, **how)
        if not task.asked.any():
            return one(rng)
        first = int(np.flatnonzero(task.asked)[0])
        text = np.concatenate([tokenizer.opening(), task.tokens[:first]])[-args.length :]
        return text, task.tokens[first : first + WORDS_PER_SIDE]

    def some(seed: Any, count: int) -> Prompts:
        texts, values = zip(*(one(np.random.default_rng((*seed, i))) for i in range(count)), strict=True)
        lengths = np.array([len(text) for text in texts])
        tokens = np.stack([np.pad(text, (args.length - len(text), 0)) for text in texts])
        valid = np.arange(args.length) >= args.length - lengths[:, None]
        return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(valid), np.stack(values))

    return some


@partial(jax.jit, static_argnames=("slots", "count"))
def answered(
    model: Decoder, prompts: Prompts, key: jax.Array, policy: jc.Policy, slots: int, count: int = WORDS_PER_SIDE
) -> tuple[jax.Array, jax.Array]:
    """Answers [B, W] that are drawn from a state of so many slots, and their log-probabilities."""
    state = init_state(model.config, policy, slots, batch=prompts.tokens.shape[0])
    done = read(model, prompts.tokens, state, policy, valid=prompts.valid)

    def step(carry: Any, key: jax.Array) -> Any:
        logits, state = carry
        token = jax.random.categorical(key, logits)
        chance = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
        done = read(model, token[:, None], state, policy)
        return (model.logits(done.hidden)[:, 0], done.state), (token, chance)

    _, (tokens, chances) = jax.lax.scan(
        step, (model.logits(done.hidden[:, -1:])[:, 0], done.state), jax.random.split(key, count)
    )
    return tokens.T, chances.T


@partial(jax.jit, static_argnames=("slots", "optimizer"))
def learned(
    model: Decoder, moments: Any, prompts: Prompts, answers: jax.Array, advantages: jax.Array, policy: jc.Policy,
    slots: int, optimizer: optax.GradientTransformation,
) -> tuple[Decoder, Any, jax.Array]:  # fmt: skip
    """A step on answers, and their log-probabilities [B, W] as training sees them."""
    tokens = jnp.concatenate([prompts.tokens, answers[:, :-1]], axis=1)
    valid = jnp.pad(prompts.valid, [(0, 0), (0, answers.shape[1] - 1)], constant_values=True)

    def loss(model: Decoder) -> tuple[jax.Array, jax.Array]:
        state = init_state(model.config, policy, slots, batch=len(tokens))
        done = read(model, tokens, state, policy, valid=valid, recurrence=exact_gradient(policy))
        chances = jax.nn.log_softmax(model.logits(done.hidden[:, -answers.shape[1] :]))
        chances = jnp.take_along_axis(chances, answers[..., None], 2)[..., 0]
        return -(advantages[:, None] * chances).mean(), chances

    (_, chances), gradient = jax.value_and_grad(loss, has_aux=True)(model)
    updates, moments = optimizer.update(gradient, moments)
    return jax.tree.map(jnp.add, model, updates), moments, chances


def plan(args: Arguments) -> Plan:
    loaded = args.load()
    policy, whole = jc.get_policy(args.policy), jc.get_policy("full")
    train = prompt_maker(loaded.tokenizer, training_texts(20_000 if args.quick else 2_000_000), args)
    tests = prompt_maker(loaded.tokenizer, [one.text for one in held_out()], args)((9,), args.tests)
    room = args.length + WORDS_PER_SIDE
    how = dict(
        steps=args.steps, prompts=args.prompts, answers=args.answers, rate=args.rate, notes=args.notes, tests=args.tests
    )
    make_cell = args.cells_of(EXPERIMENT, loaded.model, args.length)
    cells = (
        make_cell(task=method, policy=args.policy, slots=args.slots, seed=seed, settings=how)
        for seed in args.seeds for method in args.methods
    )  # fmt: skip

    def reward(model: Decoder, policy: jc.Policy, slots: int) -> float:
        answers, _ = answered(model, tests, jax.random.key(0), policy, slots)
        return float((np.asarray(answers) == tests.values).mean())

    def figures(cell: Cell) -> list[Figure]:
        model, optimizer = loaded.model, optax.adam(args.rate)
        moments, apart, read_tokens = optimizer.init(model), 0.0, 0
        trained_with = (policy, args.slots) if cell.task == "bounded" else (whole, room)
        for step in range(args.steps):
            some = train((cell.seed, step), args.prompts)
            rows = jax.tree.map(lambda x: x.repeat(args.answers, 0), some)
            key = jax.random.fold_in(jax.random.key(cell.seed), step)
            answers, drawn = answered(model, rows, key, policy, args.slots)
            right = (np.asarray(answers) == np.asarray(rows.values)).mean(1).reshape(args.prompts, -1)
            worth = (right - right.mean(1, keepdims=True)) / (right.std(1, keepdims=True) + 1e-4)
            model, moments, seen = learned(model, moments, rows, answers, worth.reshape(-1), *trained_with, optimizer)
            apart = max(apart, float(jnp.abs(seen - drawn).max()))
            read_tokens += 2 * rows.tokens.size
        about: dict[str, Any] = dict(tokens=read_tokens, samples=args.tests, state_bytes=0)
        values = {
            BEFORE: reward(loaded.model, policy, args.slots), AFTER: reward(model, policy, args.slots),
            WHOLE: reward(model, whole, room), APART: apart,
        }  # fmt: skip
        return [
            Figure(metric=name, value=value, lower_is_better=name == APART, **about) for name, value in values.items()
        ]

    return cells, figures


def line(row: Row) -> str:
    return f"{row.cell.task:8} seed {row.cell.seed} {row.figure.metric:42} {row.figure.value:.3g}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each method, mean and standard error over seeds."""
    rows = of_experiment(rows, EXPERIMENT)
    metrics = (BEFORE, AFTER, WHOLE, APART)
    of = lambda task, metric: [row.figure.value for row in rows if (row.cell.task, row.figure.metric) == (task, metric)]
    return markdown(
        ["training", *metrics],
        ([task, *(spread(of(task, metric), ".2g" if metric == APART else ".3f") for metric in metrics)]
         for task in dict.fromkeys(row.cell.task for row in rows)),
    )  # fmt: skip


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT)
