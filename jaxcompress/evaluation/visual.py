"""What dropping visual tokens costs and saves: answers to questions about held-out drawings, FLOPs, bytes, time.

For every `jaxcompress.vision.Method` the same: words and visual tokens stand at the positions they have in the whole
prompt, a merged token at that of its first patch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.embedded.drawings import Drawing, Question, draw, questions
from jaxcompress.evaluation.operations import matmul_flops
from jaxcompress.generation.pictures import process
from jaxcompress.generation.text import Tokenizer
from jaxcompress.models.init_state import init_state
from jaxcompress.models.llava import Llava
from jaxcompress.models.rope import rotate
from jaxcompress.policies.full import Full
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision.choose import take
from jaxcompress.vision.method import Encoded, Given, Method
from jaxcompress.vision.reading import encode, place, stages


class Exam(NamedTuple):
    """Questions about pictures, as many about each.

    Attributes:
      drawings: I pictures.
      pixels: [I, 3, side, side], processed.
      asked: [I][Q] questions.
      words: [I * Q, W] token ids of the questions, padded at the end; `valid` says what is padding.
      answers: [I * Q], the right token.
      bos: the token that prompts begin with.
    """

    drawings: tuple[Drawing, ...]
    pixels: Float[np.ndarray, "I channels side side"]
    asked: tuple[tuple[Question, ...], ...]
    words: Int[np.ndarray, "R W"]
    valid: Bool[np.ndarray, "R W"]
    answers: Int[np.ndarray, " R"]
    bos: int


def exam(
    tokenizer: Tokenizer, processor: Any, model: Llava, *, pictures: int = 64, each: int = 8, first: int = 0
) -> Exam:
    """Questions about held-out pictures, the same at every call.

    Args:
      first: number of the first picture.
    """
    drawings = tuple(draw(number, held_out=True) for number in range(first, first + pictures))
    asked = tuple(
        tuple(questions(drawing, np.random.default_rng((number, 11)), each))
        for number, drawing in enumerate(drawings, first)
    )
    flat = [question for row in asked for question in row]
    encoded = [tokenizer.encode(question.text, add_bos=False) for question in flat]
    words = np.zeros((len(flat), max(map(len, encoded))), np.int32)
    valid = np.zeros(words.shape, bool)
    for row, ids in enumerate(encoded):
        words[row, : len(ids)], valid[row, : len(ids)] = ids, True
    answers = np.array([tokenizer.encode(question.answer, add_bos=False)[0] for question in flat])
    pixels = process([drawing.pixels for drawing in drawings], processor, model.config).pixels
    return Exam(drawings, pixels, asked, words, valid, answers, int(tokenizer.opening()[0]))


def guessing(asked: Exam) -> float:
    """The share that is right if every question of a kind gets the answer that is most often right for that kind."""
    by_kind: dict[str, list[str]] = {}
    for question in (q for row in asked.asked for q in row):
        by_kind.setdefault(question.kind, []).append(question.answer)
    right = sum(max(map(answers.count, set(answers))) for answers in by_kind.values())
    return right / len(asked.answers)


def encoded(model: Llava, pixels: Any, method: Method) -> Encoded:
    """What the decoder gets of each picture, in raster order; tokens without a place come last."""
    given = encode(model, pixels[:, None], method)
    place = jnp.where(given.place < 0, model.config.tower.num_patches - 1, given.place)
    order = jnp.argsort(place, axis=1, stable=True)
    return Encoded(*(take(x, order) for x in given._replace(place=place)))


class VisualReadings(NamedTuple):
    """What reading prompts gave.

    Attributes:
      logits: [R, V] after the last word.
      kept: [R, N], at which patches there is still a token after the last layer.
      counts: [L], the tokens of a prompt in each layer, padding included.
    """

    logits: Float[Array, "R V"]
    kept: Bool[Array, "R N"]
    counts: Int[Array, " L"]


def ask(
    model: Llava, given: Encoded, words: Int[Array, "R W"], valid: Bool[Array, "R W"], *, bos: int, method: Method
) -> VisualReadings:
    """Reads each picture's tokens and then each of its questions, R / I in number.

    Plain causal attention, layer after layer and nothing in a loop, so that the compiler's count of FLOPs is complete.
    """
    decoder, config = model.decoder, model.config
    (pictures, n), r, total = given.place.shape, words.shape[0], config.tower.num_patches
    given = Encoded(*(jnp.repeat(x, r // pictures, axis=0) for x in given))
    first, image = jnp.full((r, 1), bos), jnp.full((r, n), config.image_token)
    tokens = jnp.concatenate([first, image, words], axis=1)
    after = jnp.where(valid, total + jnp.cumsum(valid, axis=1), -1)
    positions = jnp.concatenate([jnp.zeros((r, 1), jnp.int32), 1 + given.place, after.astype(jnp.int32)], axis=1)
    block = place(model, tokens, positions, given)
    rates = jnp.ones((r, tokens.shape[1] - n), bool)
    if method.rates is not None:
        rates = method.rates(block, rates.shape[1])
    rules = stages(Given(rates, given.key, config.decoder.rope), method.cuts(config.decoder, n))
    after_layer, counts = {stage.layer: stage.reduce for stage in rules}, []
    rope, windows = config.decoder.rope, config.decoder.windows

    def attend(q, k, v, positions, layer, index, carry, xs):
        q, k = (rotate(y, positions[..., None], rope) for y in (q, k))
        shown = AttentionInputs(q, k, jnp.zeros(positions.shape, jnp.float32), positions)
        window = None if windows is None else windows[index]
        return causal_attention(q, k, v, positions, window=window), shown, xs

    for layer in range(config.decoder.num_layers):
        counts.append(block.positions.shape[1])
        start = jnp.zeros((*block.positions.shape, 1, config.decoder.head_dim), block.hidden.dtype)
        shape = lambda n, like=start: jnp.broadcast_to(like, (*like.shape[:2], n, like.shape[-1]))
        nothing = AttentionInputs(
            shape(config.decoder.num_heads), shape(config.decoder.num_kv_heads),
            jnp.zeros(block.positions.shape, jnp.float32), block.positions,
        )  # fmt: skip
        x, shown, _ = decoder.run_layers(block.hidden, block.positions, attend, nothing, layers=range(layer, layer + 1))
        block = block._replace(hidden=x)
        if layer in after_layer:
            block = after_layer[layer](block, shown)
    last = block.positions.argmax(-1)[:, None, None]
    logits = decoder.logits(decoder.norm(jnp.take_along_axis(block.hidden, last, axis=1)))[:, 0]
    left = (block.patch[:, None] == jnp.arange(n)[:, None]).any(-1)  # [R, n]
    kept = jnp.zeros((r, total), bool).at[
        jnp.arange(r)[:, None], jnp.where(left & (given.size > 0), given.place, total)
    ]
    return VisualReadings(logits, kept.set(True, mode="drop"), jnp.array(counts))


class Outcome(NamedTuple):
    """One line of the table.

    Attributes:
      method: its name.
      tokens: visual tokens that go into the decoder.
      left: visual tokens in a layer of the decoder, the mean over layers.
      accuracy: share of right answers; `by_kind` of each kind of question.
      flops: of the matrix products in reading one prompt in the decoder (see `jaxcompress.evaluation.operations`).
      kv_bytes: of one prompt's keys, values and positions, in float32.
      seconds: of reading one prompt in the decoder, the median of several runs over all prompts, divided.
      kept: [R, N], at which patches there was still a token at the end.
    """

    method: str
    tokens: int
    left: float
    accuracy: float
    by_kind: dict[str, float]
    flops: float
    kv_bytes: int
    seconds: float
    kept: Bool[np.ndarray, "R N"]


class Examiner:
    """Measures methods on one exam. What two of them share is compiled once."""

    def __init__(self, model: Llava, asked: Exam, *, runs: int = 3):
        self.model, self.asked, self.runs = model, asked, runs
        self._read: dict[Any, Any] = {}

    def __call__(self, method: Method) -> Outcome:
        """Measures one method.

        Raises:
          FloatingPointError: logits are not finite.
        """
        asked, model = self.asked, self.model
        visual = jax.jit(partial(encoded, method=method))(model, asked.pixels)
        given = (model, visual, asked.words, asked.valid)
        key = visual.place.shape, method.cuts(model.config.decoder, visual.place.shape[1]), method.rates
        if key not in self._read:
            read = jax.jit(partial(ask, bos=asked.bos, method=method))
            self._read[key] = read.lower(*given).compile(), matmul_flops(read, *given)
        compiled, flops = self._read[key]
        took, done = [], None
        for _ in range(self.runs):
            begun = time.perf_counter()
            done = jax.block_until_ready(compiled(*given))
            took.append(time.perf_counter() - begun)
        assert done is not None
        logits, counts = np.asarray(done.logits), np.asarray(done.counts)
        if not np.isfinite(logits).all():
            raise FloatingPointError(f"{method.name}: logits are not finite")
        right = logits.argmax(-1) == asked.answers
        rows, words = len(asked.answers), 1 + asked.words.shape[1]
        return Outcome(
            method=method.name,
            tokens=visual.place.shape[1],
            left=float(counts.mean() - words),
            accuracy=float(right.mean()),
            by_kind=_by_kind(asked, right),
            flops=flops / rows,
            kv_bytes=kv_bytes(model, counts),
            seconds=statistics.median(took) / rows,
            kept=np.asarray(done.kept),
        )


def kv_bytes(model: Llava, counts: Sequence[int] | np.ndarray) -> int:
    """Bytes of a state that holds so many tokens in each layer."""
    slots = [int(n) for n in counts]
    state = jax.eval_shape(lambda: init_state(model.config.decoder, Full(), slots))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _by_kind(asked: Exam, right: Bool[np.ndarray, " R"]) -> dict[str, float]:
    kinds = np.array([question.kind for row in asked.asked for question in row])
    return {str(kind): float(right[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
