"""What dropping visual tokens costs and saves: answers to questions about held-out drawings, FLOPs, bytes, time.

A method is measured as it is served: `prefill_encoded` reads picture and question into a KV state, and `decode` writes
the answer under the method's own decode policy. Words and visual tokens stand at the positions that they have in the
prompt with the whole picture; a merged token stands where its first patch does.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.embedded.drawings import Drawing, Question, draw, questions
from jaxcompress.evaluation.operations import matmul_flops
from jaxcompress.generation.config import GenerationConfig
from jaxcompress.generation.decode_state import DecodeState, init_decode_state
from jaxcompress.generation.generate import decode
from jaxcompress.generation.pictures import process
from jaxcompress.generation.text import Tokenizer
from jaxcompress.generation.visual import TokensLeft, trace_prefill
from jaxcompress.inputs.scalars import whole
from jaxcompress.models.decoder import read
from jaxcompress.models.llava import Llava
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import State
from jaxcompress.vision.method import Encoded, Method
from jaxcompress.vision.reading import encode, read_encoded, slots_per_layer

ANSWER = 2
"""Tokens of an answer: the word, and the stop token."""
BATCH = 64
"""Prompts that are served at once, at most."""


class Exam(NamedTuple):
    """Questions about pictures, as many about each.

    Attributes:
      drawings: I pictures.
      pixels: [I, 3, side, side], processed.
      asked: [I][Q] questions.
      prompts: R = I * Q rows of token ids: the opening token, an image token, the question. All have one opening.
      answers: [R], the right token.
      stop: the tokens that end an answer.
    """

    drawings: tuple[Drawing, ...]
    pixels: Float[np.ndarray, "I channels side side"]
    asked: tuple[tuple[Question, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: Int[np.ndarray, " R"]
    stop: tuple[int, ...]


def exam(
    model: Llava, tokenizer: Tokenizer, processor: Any, *, pictures: int = 64, each: int = 8, first: int = 0
) -> Exam:
    """Questions about held-out pictures, the same at every call.

    Args:
      pictures: how many.
      each: questions about each picture.
      first: number of the first picture.

    Raises:
      ValueError: no pictures, or no questions about them.
    """
    pictures, each = whole(pictures, "pictures", least=1), whole(each, "each, the questions about a picture,", least=1)
    drawings = tuple(draw(number, held_out=True) for number in range(first, first + pictures))
    asked = tuple(
        tuple(questions(drawing, np.random.default_rng((number, 11)), each))
        for number, drawing in enumerate(drawings, first)
    )
    flat = [question for row in asked for question in row]
    opening = (int(tokenizer.opening()[0]), model.config.image_token)
    prompts = tuple((*opening, *tokenizer.encode(question.text, add_bos=False).tolist()) for question in flat)
    answers = np.array([tokenizer.encode(question.answer, add_bos=False)[0] for question in flat])
    pixels = process([drawing.pixels for drawing in drawings], processor, model.config).pixels
    return Exam(drawings, pixels, asked, prompts, answers, tuple(tokenizer.eos_ids))


def guessing(asked: Exam) -> float:
    """The share that is right if every question of a kind gets the answer that is most often right for that kind."""
    by_kind: dict[str, list[str]] = {}
    for question in (q for row in asked.asked for q in row):
        by_kind.setdefault(question.kind, []).append(question.answer)
    right = sum(max(map(answers.count, set(answers))) for answers in by_kind.values())
    return right / len(asked.answers)


class Outcome(NamedTuple):
    """One line of the table.

    Attributes:
      method: its name.
      tokens: visual tokens that go into the decoder.
      left: visual tokens in a layer of the decoder after the prompt, the mean over layers.
      accuracy: share of answers whose word is right and that end after it; `by_kind` of each kind of question.
      word_accuracy: share of answers whose first word is right, whatever follows: decoding has no part in it.
      flops: of the matrix products in the decoder, for one prompt and its answer.
      kv_bytes: of the KV state of one prompt and its answer: keys, values, positions, the policy's statistics.
      seconds: to read one prompt in the decoder and write its answer: the median over batches, divided by their size.
      kept: [R, N], at which patches the last layer still holds a token when the answer is written.
    """

    method: str
    tokens: int
    left: float
    accuracy: float
    word_accuracy: float
    by_kind: dict[str, float]
    flops: int
    kv_bytes: int
    seconds: float
    kept: Bool[np.ndarray, "R N"]


class Examiner:
    """Measures methods on one exam. A program that two methods share is compiled once."""

    def __init__(self, model: Llava, asked: Exam, *, runs: int = 1):
        """
        Args:
          runs: how often every batch is timed.

        Raises:
          ValueError: runs is below 1.
        """
        self.model, self.asked, self.runs = model, asked, whole(runs, "runs", least=1)
        self._flops: dict[Any, int] = {}

    def __call__(self, method: Method) -> Outcome:
        """Measures one method.

        Raises:
          FloatingPointError: logits are not finite.
          ValueError: a number of tokens that the method cannot leave.
        """
        model, asked = self.model, self.asked
        rows = len(asked.prompts)
        size = next(n for n in range(min(rows, BATCH), 0, -1) if rows % n == 0)
        encoded = jax.jit(partial(_encoded_rows, method=method, rows=rows))(model, asked.pixels)
        batches = [slice(at, at + size) for at in range(0, rows, size)]
        try:
            self._answer(encoded, method, batches[0])  # compiles
            answers = [[self._answer(encoded, method, rows) for rows in batches] for _ in range(self.runs)]
        except FloatingPointError as error:
            raise FloatingPointError(f"{method.name}: logits are not finite ({error})") from error
        written = np.concatenate([answer.written for answer in answers[0]])
        word = written[:, 0] == asked.answers
        right = word & np.isin(written[:, 1], asked.stop)
        m = encoded.place.shape[1]
        return Outcome(
            method=method.name,
            tokens=m,
            left=float(np.mean(method.tokens_per_layer(model.config, tokens=m))),
            accuracy=float(right.mean()),
            word_accuracy=float(word.mean()),
            by_kind=_by_kind(asked, right),
            flops=self._count(encoded, method),
            kv_bytes=answers[0][0].kv_bytes,
            seconds=statistics.median(answer.seconds for run in answers for answer in run) / size,
            kept=np.concatenate([answer.kept for answer in answers[0]]),
        )

    def _begin(self, method: Method, tokens: int, batch: int) -> DecodeState:
        """A fresh state with room for the longest prompt, and for the answer where the policy cannot make room."""
        policy = method.decode_policy(1, 1 + self.model.config.tower.num_patches)
        words = max(map(len, self.asked.prompts)) - 1
        room = words + (0 if policy.forgets else ANSWER)
        slots = slots_per_layer(self.model.config, method, room, tokens=tokens)
        return init_decode_state(self.model.decoder, policy, slots, batch=batch)

    def _answer(self, encoded: Encoded, method: Method, rows: slice) -> _Answer:
        model, prompts = self.model, self.asked.prompts[rows]
        patches, stop = model.config.tower.num_patches, GenerationConfig(stop_token_ids=self.asked.stop)
        encoded = Encoded(*(x[rows] for x in encoded))
        state = self._begin(method, encoded.place.shape[1], len(prompts))
        jax.block_until_ready((state.arrays, encoded))
        begun = time.perf_counter()
        state, left = trace_prefill(model, prompts, encoded, state, method, patches=patches)
        written, state = decode(model.decoder, state, ANSWER, stop)
        jax.block_until_ready(written)
        seconds = time.perf_counter() - begun
        kv_bytes = sum(part.nbytes for part in state.kv) // len(prompts)
        return _Answer(np.asarray(written), _kept(left, encoded, state.kv, patches), kv_bytes, seconds)

    def _count(self, encoded: Encoded, method: Method) -> int:
        """FLOPs of one row."""
        model, m = self.model, encoded.place.shape[1]
        state = self._begin(method, m, 1)
        key = m, method.prune_steps(model.config.decoder, m), method.raters, state.policy
        if key not in self._flops:
            one = Encoded(*(x[:1] for x in encoded))
            tokens = jax.ShapeDtypeStruct((1, m + max(map(len, self.asked.prompts)) - 1), jnp.int32)
            reading = matmul_flops(partial(_read_prompt, method=method), model, tokens, one, state.kv, state.policy)
            self._flops[key] = reading + ANSWER * matmul_flops(_read_token, model, state.kv, state.policy)
        return self._flops[key]


class _Answer(NamedTuple):
    """What one batch of prompts gave: tokens [B, ANSWER], `kept` [B, N] as of `Outcome`, and bytes of one row."""

    written: Int[np.ndarray, "B answer"]
    kept: Bool[np.ndarray, "B N"]
    kv_bytes: int
    seconds: float


def _encoded_rows(model: Llava, pixels: Any, *, method: Method, rows: int) -> Encoded:
    """The visual tokens of each row's picture, where R / I rows ask about each of I pictures."""
    encoded = encode(model, pixels[:, None], method).in_raster_order(model.config.tower.num_patches)
    return Encoded(*(jnp.repeat(x, rows // pixels.shape[0], axis=0) for x in encoded))


def _read_prompt(
    model: Llava, tokens: Int[Array, "B T"], encoded: Encoded, kv: State, policy: Policy, *, method: Method
) -> Float[Array, "B V"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    left, _ = read_encoded(model, tokens, positions, encoded, kv, policy, method)
    return model.decoder.logits(left.hidden[:, -1:])[:, 0]


def _read_token(model: Llava, kv: State, policy: Policy) -> Float[Array, "B V"]:
    done = read(model.decoder, jnp.zeros((kv[0].seen.shape[0], 1), jnp.int32), kv, policy)
    return model.decoder.logits(done.hidden)[:, 0]


def _kept(left: TokensLeft, encoded: Encoded, kv: State, patches: int) -> Bool[np.ndarray, "B N"]:
    """At which patches the last layer holds a token."""
    held = np.asarray(kv[-1].positions)[-1].reshape(left.positions.shape[0], -1)
    positions, patch, place = (np.asarray(x) for x in (left.positions, left.patch, encoded.place))
    stays = (patch >= 0) & (positions >= 0) & (positions[:, :, None] == held[:, None]).any(-1)
    out = np.zeros((len(place), patches), bool)
    row, column = np.nonzero(stays)
    out[row, place[row, patch[row, column]]] = True
    return out


def _by_kind(asked: Exam, right: Bool[np.ndarray, " R"]) -> dict[str, float]:
    kinds = np.array([question.kind for row in asked.asked for question in row])
    return {str(kind): float(right[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
