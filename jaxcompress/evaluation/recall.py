"""Recall tasks: facts stated early in a text and asked for later.

A fact is a line `# note: KEY -> VALUE`, a question a line `# recall: KEY -> VALUE`; key and value are two ordinary
words each, drawn at random, so that only the note itself gives the answer. For every tokenizer, they consist of words
that are one token each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxcompress.evaluation.perplexity import once_and_stream, predictions
from jaxcompress.inputs.token_ids import token_rows
from jaxcompress.models.checks import check_fits, check_mode, warn_of_positions
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.policies.policy import Policy
from jaxcompress.state.placement import Placement

WORDS_PER_SIDE = 2


class Wording(NamedTuple):
    """The pieces of a task as token ids."""

    note: np.ndarray  # "\n# note:"
    recall: np.ndarray  # "\n# recall:"
    arrow: np.ndarray  # " ->"
    end: np.ndarray  # "\n"
    words: np.ndarray  # single-token words to draw from

    def line(self, kind: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        return np.concatenate([kind, key, self.arrow, value, self.end])


class Recall(NamedTuple):
    """A text with questions.

    Attributes:
      tokens: [T] int32.
      asked: [T] bool, the answer tokens, which a model that remembers the fact predicts.
      told: [T] bool, tokens that no model can predict (keys, and values when first stated).
      distance: [T] int32, at the first token of each answer, the number of tokens since its value was stated; elsewhere
        0.
    """

    tokens: np.ndarray
    asked: np.ndarray
    told: np.ndarray
    distance: np.ndarray


def wording(vocabulary: Mapping[str, int], encode: Callable[[str], Sequence[int]]) -> Wording:
    """Prepares the lines for a byte-level BPE or SentencePiece tokenizer.

    Args:
      vocabulary: a mapping from tokens, as the tokenizer spells them, to ids.
      encode: converts text to ids, without special tokens.

    Raises:
      ValueError: fewer than 64 of the tokenizer's tokens are whole lower-case words.
    """
    piece = lambda text: np.array(encode(text), np.int32)
    words = [i for token, i in vocabulary.items() if re.fullmatch(r"[Ġ▁][a-z]{3,}", token)]
    if len(words) < 64:
        raise ValueError(f"the tokenizer has {len(words)} single-token words; recall tasks need at least 64")
    words = np.array(sorted(words), np.int32)
    return Wording(piece("\n# note:"), piece("\n# recall:"), piece(" ->"), piece("\n"), words)


def weave(  # nine parameters: what describes the text
    filler: np.ndarray,
    words: Wording,
    *,
    rng: np.random.Generator,
    length: int,
    notes: int,
    questions: int,
    ask_in: tuple[float, float] = (0.3, 1.0),
    tell_in: tuple[float, float] = (0.0, 0.8),
    again: bool = True,
) -> Recall:
    """Weaves notes and questions about them into a filler text.

    Args:
      filler: at least `length` tokens of ordinary text.
      rng: draws keys, values and places.
      length: T of the result, exactly.
      notes, questions: number of notes and of questions; each question asks for a note stated before it.
      tell_in, ask_in: the parts of the text, as fractions, where notes and questions are put. A question placed before
        the first note is moved after it.
      again: whether a note may be asked for more than once. If not, there must be at least as many notes as questions.

    Raises:
      ValueError: there are too few notes for the questions, the filler is too short, or `length` is too short for notes
        and questions.
    """
    if questions and notes < (1 if again else questions):
        once = "" if again else ": each is asked for once"
        raise ValueError(f"{questions} questions need more than {notes} notes{once}")
    draw = lambda n: rng.choice(words.words, (n, WORDS_PER_SIDE))
    keys, values = draw(notes), draw(notes)
    size = len(words.line(words.note, keys[0], values[0])), len(words.line(words.recall, keys[0], values[0]))
    room = length - notes * size[0] - questions * size[1]
    if room < 0:
        raise ValueError(f"{notes} notes and {questions} questions do not fit into {length} tokens")
    if len(filler) < room:
        raise ValueError(f"{room} tokens of filler are needed, {len(filler)} were given")
    told_at = np.sort(rng.uniform(*tell_in, notes))
    asked_at = np.sort(rng.uniform(*ask_in, questions))
    asked_at = np.maximum(asked_at, told_at[:1] if again else told_at[:questions]) if questions else asked_at
    events = sorted([(at, 0, i) for i, at in enumerate(told_at)] + [(at, 1, -1) for at in asked_at])

    tokens, asked, told, distance = [], [], [], []
    where = np.zeros(notes, int)  # index of each note's value
    known, used = 0, 0
    unasked: list[int] = []

    def put(piece: np.ndarray) -> None:
        tokens.append(piece)
        for marks in (asked, told, distance):
            marks.append(np.zeros(len(piece), np.int32))

    for at, kind, index in events:
        upto = int(at * room)
        put(filler[used:upto])
        used = max(used, upto)
        candidates = range(known) if again else unasked
        i = index if kind == 0 else candidates[int(rng.integers(len(candidates)))]
        line = words.line((words.note, words.recall)[kind], keys[i], values[i])
        start = sum(map(len, tokens))
        put(line)
        first_key = len((words.note, words.recall)[kind])
        first_value = first_key + WORDS_PER_SIDE + len(words.arrow)
        told[-1][first_key : first_key + WORDS_PER_SIDE] = 1
        (told, asked)[kind][-1][first_value : first_value + WORDS_PER_SIDE] = 1
        if kind == 0:
            where[i] = start + first_value
            known += 1
            unasked.append(i)
        else:
            if not again:
                unasked.remove(i)
            distance[-1][first_value] = start + first_value - where[i]
    put(filler[used:room])
    join = lambda parts, dtype: np.concatenate(parts).astype(dtype)
    return Recall(join(tokens, np.int32), join(asked, bool), join(told, bool), join(distance, np.int32))


def exam(
    filler: np.ndarray,
    words: Wording,
    *,
    rows: int,
    length: int,
    notes: int = 8,
    questions: int = 8,
    seed: int = 0,
    bos: int | None = None,
) -> list[Recall]:
    """Rows with notes in the first half of a text and questions in its last quarter; each note is asked for at most
    once.

    Args:
      filler: tokens of ordinary text; each row takes another part of it.
      bos: a token to put first.
    """
    if questions > notes:
        raise ValueError(f"{questions} questions about {notes} notes: each note is asked for once")
    rng = np.random.default_rng(seed)
    width = length - (bos is not None)
    tasks = []
    for _ in range(rows):
        at = rng.integers(max(len(filler) - width, 0) + 1)
        task = weave(
            filler[at : at + width], words, rng=rng, length=width, notes=notes, questions=questions,
            tell_in=(0.0, 0.5), ask_in=(0.75, 1.0), again=False,
        )  # fmt: skip
        tasks.append(
            task
            if bos is None
            else Recall(
                *(
                    np.concatenate([[first], part]).astype(part.dtype)
                    for first, part in zip((bos, 0, 0, 0), task, strict=True)
                )
            )
        )
    return tasks


def one_by_one(tasks: Sequence[Recall], words: Wording) -> list[Recall]:
    """A row for each question: the text up to the first question, followed by that question with its answer.

    With these rows a state can be compressed before or after the question is known, and each context serves several
    questions.
    """
    rows = []
    for task in tasks:
        starts = {}  # start of each question's line, by the start of its answer
        for answer in np.flatnonzero(task.distance).tolist():
            key = np.flatnonzero(task.told[:answer])[-WORDS_PER_SIDE]
            starts[answer] = int(key) - len(words.recall)
        context = min(starts.values())
        for answer, start in starts.items():
            index = np.r_[0:context, start : answer + WORDS_PER_SIDE]
            row = Recall(*(part[index] for part in task))
            row.distance[:] = 0
            row.distance[context + answer - start] = task.distance[answer] - (start - context)
            rows.append(row)
    return rows


class Answers(NamedTuple):
    """The results of every question of an exam: the distance to its fact, and whether the full answer was right.

    Attributes:
      row: the index of the task of each question.
      distance: number of tokens since the answer was stated.
      right: whether every token of the answer was the most probable one.
      nats: [B] mean loss over all predicted tokens of each row, text, facts and answers together.
      tokens_per_second: speed of all rows together, without compilation.
      state_bytes: bytes of the state of one row.
      occupied: mean share of the capacity that is occupied at the end.
    """

    row: np.ndarray
    distance: np.ndarray
    right: np.ndarray
    nats: np.ndarray
    tokens_per_second: float
    state_bytes: int
    occupied: float

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def answers(
    model: Decoder,
    tasks: Sequence[Recall],
    policy: Policy,
    slots: Slots,
    *,
    prompt: int = 0,
    segment: int = 512,
    placement: Placement | None = None,
    dtype: DTypeLike | None = None,
) -> Answers:
    """Reads the tasks through a bounded state and checks the greedy answers.

    A question counts as right if every token of the answer is the most probable one, given those before it.

    Args:
      prompt: the number of first tokens that are read at once, with one selection (one-shot); the rest is
        read token by token. 0: all tokens are read token by token. Predictions within the prompt are not counted.
      dtype: the dtype of the state; by default the model's.

    Raises:
      ValueError: there are no tasks, tasks have different lengths or ids outside the vocabulary, the prompt leaves
        nothing to predict, the policy needs a prompt and there is none, or a `full` state is too small.
      FloatingPointError: losses are not finite.

    Warns:
      PositionWarning: tasks are longer than the model was trained for.
    """
    if not len(tasks):
        raise ValueError("no tasks were given")
    tokens = token_rows([task.tokens for task in tasks], model.config.vocab_size, "the tasks")
    batch, total = tokens.shape
    if not 0 <= prompt < total - 1:
        raise ValueError(f"a prompt is 0 to {total - 2} of the {total} tokens of a task, not {prompt}")
    check_mode(policy, "oneshot" if prompt else "streaming")
    state = init_state(model.config, policy, slots, batch=batch, dtype=dtype or model.dtype)
    check_fits(model.config, policy, state, total, prompt=prompt)
    warn_of_positions(model.config, policy, placement, total - 1)
    nbytes = sum(part.nbytes for part in state) // batch
    plan = once_and_stream(prompt, total - 1, segment=segment)
    parts = list(predictions(model, tokens, state, policy, plan, placement=placement))
    losses = np.concatenate([part.losses for part in parts], axis=1)
    if not np.isfinite(losses).all():
        row, at = np.argwhere(~np.isfinite(losses))[0]
        raise FloatingPointError(f"non-finite logits, first in row {row} after the token at position {at}")
    right = np.pad(np.concatenate([part.right for part in parts], axis=1), [(0, 0), (1, 0)])
    distance = np.stack([task.distance for task in tasks])
    rows, first = np.nonzero(distance)
    whole = np.logical_and.reduce([right[rows, first + i] for i in range(WORDS_PER_SIDE)])
    # The prompt's predictions come from full attention, so they do not measure the state.
    streamed = [part for part in parts if part.start >= prompt]
    read = sum(part.losses.size for part in streamed)
    occupied = [float(part.occupancy().mean()) / part.capacity for part in parts[-1].state]
    return Answers(
        rows, distance[rows, first], np.asarray(whole), losses[:, prompt:].mean(1),
        read / sum(part.seconds for part in streamed), nbytes, float(np.mean(occupied)),
    )  # fmt: skip
