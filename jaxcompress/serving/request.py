"""What is asked of an engine, and what it answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal, NamedTuple

import numpy as np

from jaxcompress.generation.config import GREEDY, GenerationConfig
from jaxcompress.generation.sampling import row_keys

LOG = logging.getLogger("jaxcompress.serving")

Reason = Literal["stop", "length", "cancelled", "deadline", "closed", "failed"]
"""Why an answer ended: a stop token; `max_new_tokens`; `Ticket.cancel`; no time left; the engine closed; an error."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered.

    Attributes:
      prompt: token ids.
      max_new_tokens: tokens of the answer, at most.
      config: the sampling method and up to 16 stop tokens. The answer includes the stop token.
      seed: of what is drawn; the answer is that of `generate` with `seeds=[seed]`.
      logprobs: whether log-probabilities are given with the tokens.
      seconds: time until the whole answer is there, from the submission; None: no limit. What was written until then is
        the answer, with the reason `deadline`.
      client: whose request it is. Clients take turns.
      watched: whether each piece tells what the row holds.
    """

    prompt: Sequence[int] | np.ndarray
    max_new_tokens: int
    config: GenerationConfig = GREEDY
    seed: int = 0
    logprobs: bool = False
    seconds: float | None = None
    client: str = ""
    watched: bool = False


class TokenLogprobs(NamedTuple):
    """Log-probabilities under the model's own distribution, before temperature and everything else.

    Attributes:
      chosen: of the token.
      tokens, logprobs: up to 20 most likely tokens and theirs, best first.
    """

    chosen: float
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class Piece(NamedTuple):
    """Some tokens of an answer.

    Attributes:
      tokens: ids.
      logprobs: one for each token, if asked for.
      ended: why the answer ends with these tokens; None if it goes on.
      error: why it failed.
      held: [T] float, of each token so far the share of layers and heads that hold it, if watched.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    ended: Reason | None = None
    error: Exception | None = None
    held: np.ndarray | None = None


@dataclass
class Times:
    """Seconds on the clock of `time.monotonic`; None: not yet."""

    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first: float | None = None
    ended: float | None = None


class Answer(NamedTuple):
    """A whole answer.

    Attributes:
      tokens: [T] int32.
      logprobs: one for each token, if asked for.
      reason: why it ended.
      prompt_tokens, known_tokens: tokens of the prompt, and those of them that a prefix saved from being read.
    """

    tokens: np.ndarray
    logprobs: tuple[TokenLogprobs, ...]
    reason: Reason
    prompt_tokens: int
    known_tokens: int


class EngineFull(RuntimeError):
    """As many requests wait as may wait. Ask again later."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class Ticket(Iterator[Piece]):
    """A request that an engine took. Iterate over it for the pieces of the answer, or ask for the whole `answer`.

    Raises ValueError for a seed of more than 64 bits.

    Attributes:
      request: as given; `prompt` is an array.
      keys: [1], from the seed.
      times: when what happened.
      known_tokens: tokens of the prompt that a prefix saved from being read.
    """

    def __init__(self, request: Request, prompt: np.ndarray, deliver: Callable[[Piece], None] | None = None) -> None:
        self.request, self.prompt, self.times = request, prompt, Times()
        self.keys = row_keys([request.seed])
        self.known_tokens = 0
        self.cancelled = False
        self._pieces: SimpleQueue[Piece] = SimpleQueue()
        self._deliver = deliver or self._pieces.put
        self._over = False
        self.woken: Callable[[], None] = lambda: None  # by the engine

    @property
    def deadline(self) -> float | None:
        """On the clock of `time.monotonic`."""
        seconds = self.request.seconds
        return None if seconds is None else self.times.submitted + seconds

    def put(self, piece: Piece) -> None:
        """For the engine: the next piece."""
        now = time.monotonic()
        if piece.tokens and self.times.first is None:
            self.times.first = now
        if piece.ended is not None and self.times.ended is None:
            self.times.ended = now
        try:
            self._deliver(piece)
        except Exception:  # of the one who asked: no other request is to end for it
            LOG.exception("a request is cancelled: its pieces cannot be delivered")
            self.cancelled = True

    def cancel(self) -> None:
        """Ends the answer soon; tokens that are being written may still come. Any thread may call it, at any time."""
        self.cancelled = True
        self.woken()

    def __next__(self) -> Piece:
        """The next piece, which has tokens or is the last one. Waits for it.

        Raises:
          FloatingPointError, RuntimeError: the request failed.
        """
        if self._over:
            raise StopIteration
        piece = self._pieces.get()
        self._over = piece.ended is not None
        if piece.error is not None:
            raise piece.error
        return piece

    def answer(self) -> Answer:
        """The whole answer. Raises as `__next__`."""
        return answer_of(self, list(self))


def answer_of(ticket: Ticket, pieces: Sequence[Piece]) -> Answer:
    """All pieces of an answer in one."""
    tokens = np.array([token for piece in pieces for token in piece.tokens], np.int32)
    logprobs = tuple(one for piece in pieces for one in piece.logprobs)
    reason = pieces[-1].ended if pieces else None
    assert reason is not None, "an answer ends with its last piece"
    return Answer(tokens, logprobs, reason, len(ticket.prompt), ticket.known_tokens)
