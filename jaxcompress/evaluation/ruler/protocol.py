"""How a context is read, bounded and asked about: three protocols.

kvpress     The context is read at once and reduced once to n slots in every set (layer and head). What follows is
            added, and nothing is evicted. So kvpress measures presses (pipeline.py, 0.5.5), and rows may stand beside
            its own.
oneshot     The context is read at once and reduced to n slots. What follows is read and written in these n slots.
streaming   Everything is read token by token in n slots.

Before the question is known, the context is what stands before it, as in kvpress. After it is known, the question is
read with the context, before anything is evicted (kvpress: `compress_questions`). The end of the turn and the first
words of the answer come after that in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jax.typing import DTypeLike

from jaxcompress.evaluation.ruler.prompts import REST, Prompt
from jaxcompress.generation.config import GenerationConfig
from jaxcompress.generation.decode_state import DecodeState, init_decode_state
from jaxcompress.generation.generate import decode_stream, prefill
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.modes import Mode
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.waiting import once
from jaxcompress.state.placement import Placement

Protocol = Literal["kvpress", "oneshot", "streaming"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

GROUP = 32
"""Tokens that are written between two looks at whether all answers have ended."""

_SEGMENT = 256  # tokens per call: a context of 1,024 - REST tokens is not padded
_STEP = 64  # room for questions and answers is a multiple of it, so that few programs are compiled


class Reading(NamedTuple):
    """How a context and what follows it are read.

    Attributes:
      policy, slots: of the state.
      context, later: the modes in which the context and what follows are read.
    """

    policy: Policy
    slots: int
    context: Mode
    later: Mode


def reading(protocol: Protocol, policy: Policy, slots: int, *, context: int, rest: int) -> Reading:
    """The reading of a protocol.

    Args:
      slots: n, how many tokens stay of the context. A policy that evicts nothing keeps all.
      context: tokens of the longest context, its question not counted.
      rest: tokens that follow, at most.

    Raises:
      ValueError: the policy cannot be used so.
    """
    if not policy.evicts:
        return Reading(policy, context + rest, "oneshot", "oneshot")
    if protocol == "kvpress":
        return Reading(once(policy, slots), slots + rest, "oneshot", "oneshot")
    return Reading(policy, slots, protocol, "oneshot" if policy.oneshot_only else "streaming")


@dataclass(frozen=True)
class Answered:
    """What a model wrote.

    Attributes:
      written: its answers, a text for each question of each prompt, prompt by prompt.
      tokens: that were read and written for them.
      state_bytes: of the state of one prompt.
      tokens_per_second: at which all rows together were written.
    """

    written: list[str]
    tokens: int
    state_bytes: int
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Asks a model about prompts.

    Attributes:
      model: the decoder.
      decode: makes text of token ids.
      stop: tokens that end an answer.
      length: nominal tokens of a prompt with its answer, see `prompts.fitted`.
      new_tokens: tokens of an answer, at most.
      questions: how many questions of each prompt are asked.
      batch: prompts that are read together.
    """

    model: Decoder
    decode: Callable[[np.ndarray], str]
    stop: tuple[int, ...]
    length: int
    new_tokens: int
    questions: int = 1
    batch: int = 4
    placement: Placement | None = None
    dtype: DTypeLike | None = None

    def ask(
        self, prompts: Sequence[Prompt], policy: Policy, slots: int, protocol: Protocol, *, known: bool
    ) -> Answered:
        """Reads each context, bounds it, and asks.

        A context is read once for all its questions if they are not known; else once for each.

        Args:
          slots: see `reading`.
          known: whether the context is bounded after the question is known.

        Raises:
          ValueError: the policy cannot be used in this protocol, or not with so few slots.
          FloatingPointError: logits are not finite.
        """
        later = max(len(a) + len(c) for one in prompts for a, c in zip(one.asked, one.closing, strict=True))
        rest = max(REST, -(-(later + self.new_tokens) // _STEP) * _STEP)
        how = reading(protocol, policy, slots, context=self.length - REST, rest=rest)
        each = min(self.questions, *(len(one.questions) for one in prompts)) if prompts else 0
        state = lambda: init_decode_state(
            self.model, how.policy, how.slots, batch=self.batch, dtype=self.dtype, placement=self.placement
        )
        written: list[list[str]] = [[] for _ in prompts]
        read = wrote = written_by_all = nbytes = 0
        seconds = 0.0
        for start in range(0, len(prompts), self.batch):
            some = [prompts[min(start + i, len(prompts) - 1)] for i in range(self.batch)]  # the last fills the batch
            real = min(self.batch, len(prompts) - start)
            shared: DecodeState | None = None
            for number in range(each):
                if known or shared is None:
                    shared = self._read(some, state(), how, number if known else None)
                    read += sum(len(one.context) for one in some[:real])
                asked = self._ask(some, shared.copy(), how, number, known)
                texts, tokens, of_all, took = self._written(asked, real)
                wrote, written_by_all, seconds = wrote + tokens, written_by_all + of_all, seconds + took
                nbytes = sum(part.nbytes for part in asked.kv) // self.batch if nbytes == 0 else nbytes
                for i, text in enumerate(texts):
                    written[start + i].append(text)
        flat = [text for mine in written for text in mine]
        return Answered(flat, read + wrote, nbytes, written_by_all / seconds if seconds else 0.0)

    def _read(self, prompts: Sequence[Prompt], state: DecodeState, how: Reading, question: int | None) -> DecodeState:
        """The state after the contexts, and after a question if it is known."""
        rows = [one.context if question is None else np.r_[one.context, one.asked[question]] for one in prompts]
        return prefill(self.model, rows, state, mode=how.context, segment=_SEGMENT)

    def _ask(
        self, prompts: Sequence[Prompt], state: DecodeState, how: Reading, number: int, known: bool
    ) -> DecodeState:
        """The state after what follows the contexts."""
        pieces = [one.closing[number] if known else np.r_[one.asked[number], one.closing[number]] for one in prompts]
        return prefill(self.model, pieces, state, mode=how.later, segment=_SEGMENT)

    def _written(self, state: DecodeState, real: int) -> tuple[list[str], int, int, float]:
        """The answers of the first `real` rows, how many tokens they and all rows wrote, and in how many seconds."""
        config = GenerationConfig(stop_token_ids=self.stop)
        next(decode_stream(self.model, state.copy(), 1, config))  # compiles
        begun = time.perf_counter()
        groups = list(decode_stream(self.model, state, self.new_tokens, config, stream_every=GROUP))
        seconds = time.perf_counter() - begun
        tokens = np.concatenate(groups, axis=1)
        count = lambda rows: int((rows >= 0).sum())
        return [self.decode(row) for row in tokens[:real]], count(tokens[:real]), count(tokens), seconds
