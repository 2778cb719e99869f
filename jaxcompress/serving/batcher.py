"""Which request is in which row of a pool, and what is done with the rows next."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

from jaxcompress.models.modes import ReadCall
from jaxcompress.serving.pool import Pool
from jaxcompress.serving.prefixes import PrefixStore, marks
from jaxcompress.serving.programs import Written
from jaxcompress.serving.request import Piece, Reason, Ticket, TokenLogprobs
from jaxcompress.serving.row_sampling import set_row
from jaxcompress.serving.waiting import WaitingLine

LOG = logging.getLogger("jaxcompress.serving")


@dataclass(eq=False)
class Running:
    """A request in a row.

    Attributes:
      calls: those that still have to read the prompt.
      keep: which prefixes to keep: digests by their lengths.
      left: tokens that may still be written.
    """

    ticket: Ticket
    row: int
    calls: deque[ReadCall]
    keep: dict[int, bytes]
    left: int


@dataclass
class Counts:
    """What a pool has done since it was made."""

    requests: int = 0
    prompt_tokens: int = 0
    known_tokens: int = 0
    read_tokens: int = 0
    written_tokens: int = 0
    failures: int = 0


class Batcher:
    """The requests of one pool: those that wait, those that are read, those that write. For one thread.

    Attributes:
      pool: the rows.
      waiting: requests without a row.
      reading: requests whose prompt is being read, in turn: after each call another one.
      writing: requests whose answer is being written, all at once.
    """

    def __init__(self, pool: Pool, prefixes: PrefixStore | None) -> None:
        self.pool, self.waiting, self.counts = pool, WaitingLine(), Counts()
        self.reading: deque[Running] = deque()
        self.writing: list[Running] = []
        self._free = list(range(pool.spec.rows))[::-1]
        self._prefixes, self._digest = prefixes, b"" if prefixes is None else pool.spec.digest()

    @property
    def running(self) -> list[Running]:
        """Requests that have a row."""
        return [*self.reading, *self.writing]

    @property
    def free(self) -> int:
        """Rows without a request."""
        return len(self._free)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.reading or self.writing or len(self.waiting))

    def sweep(self) -> None:
        """Ends requests that were cancelled or are out of time."""
        now = time.monotonic()
        late = lambda ticket: ticket.deadline is not None and ticket.deadline <= now
        over = lambda ticket: ticket.cancelled or late(ticket)
        reason = lambda ticket: "cancelled" if ticket.cancelled else "deadline"
        for ticket in self.waiting.leave(over):
            ticket.put(Piece(ended=reason(ticket)))
        for running in self.running:
            if over(running.ticket):
                self._end(running, Piece(ended=reason(running.ticket)))

    def admit(self) -> None:
        """Gives free rows to requests that wait."""
        while self._free and len(self.waiting):
            ticket, row = self.waiting.next(), self._free.pop()
            running = Running(ticket, row, deque(), {}, ticket.request.max_new_tokens)
            self.reading.append(running)  # at once, so that a failure from here on is its end too
            known, row_state = 0, None
            if self._prefixes is not None:
                found = marks(self._digest, ticket.prompt, self.pool.spec.segment)
                known, row_state = self._prefixes.longest(found, self.pool)
                running.keep = self._prefixes.worth_keeping(found, known)
            running.calls.extend(self.pool.spec.calls(len(ticket.prompt), known))
            if not running.calls:  # all of it is known
                self.reading.pop()
                self.writing.append(running)
            self.pool.admit(row, ticket.keys, row_state)
            ticket.known_tokens, ticket.times.admitted = known, time.monotonic()
            self.counts.requests += 1
            self.counts.prompt_tokens += len(ticket.prompt)
            self.counts.known_tokens += known

    def read(self) -> None:
        """Reads one piece of one prompt, of the request that has waited for that longest."""
        if not self.reading:
            return
        running = self.reading.popleft()
        call = running.calls.popleft()
        (self.reading if running.calls else self.writing).append(running)
        finite = self.pool.read(running.row, running.ticket.prompt, call)
        self.counts.read_tokens += call.stop - call.start
        if not finite:
            self._end(running, _broken(call.stop - 1))
        elif self._prefixes is not None and call.stop in running.keep:
            self._prefixes.keep(running.keep[call.stop], self.pool.take(running.row), self.pool)

    def write(self) -> None:
        """Writes a few tokens of every answer whose prompt is read."""
        if not self.writing:
            return
        for one in self.writing:
            request = one.ticket.request
            set_row(self.pool.sampling, one.row, request.config, left=one.left, logprobs=request.logprobs)
        now = list(self.writing)
        written = self.pool.write([one.row for one in now])
        for line, running in enumerate(now):
            self._deliver(running, written, line)

    def fail(self, error: Exception) -> None:
        """Ends all requests that have a row, and makes the rows anew: the call that failed took the arrays with it."""
        self.counts.failures += 1
        for running in self.running:
            running.ticket.put(Piece(ended="failed", error=_told(error)))
        self.reading.clear()
        self.writing.clear()
        self.pool.reset()
        self._free = list(range(self.pool.spec.rows))[::-1]

    def close(self, reason: Reason) -> None:
        """Ends all requests."""
        for ticket in self.waiting.leave(lambda ticket: True):
            ticket.put(Piece(ended=reason))
        for running in self.running:
            self._end(running, Piece(ended=reason))

    def _deliver(self, running: Running, written: Written, line: int) -> None:
        """Gives a request its new tokens."""
        request, ticket = running.ticket.request, running.ticket
        tokens = tuple(int(token) for token in written.tokens[line] if token >= 0)
        running.left -= len(tokens)
        self.counts.written_tokens += len(tokens)
        if written.broken[line] >= 0:
            self._end(running, _broken(int(written.broken[line])))
            return
        ended: Reason | None = "length" if running.left <= 0 else None
        if tokens and tokens[-1] in request.config.stop_token_ids:
            ended = "stop"
        logprobs = _logprobs(written, line, len(tokens)) if request.logprobs else ()
        held = None
        if request.watched:
            read = len(ticket.prompt) + request.max_new_tokens - running.left
            held = self.pool.held(running.row, read)
        piece = Piece(tokens, logprobs, ended, held=held)
        if ended is None:
            ticket.put(piece)
        else:
            self._end(running, piece)

    def _end(self, running: Running, piece: Piece) -> None:
        """Frees the row, whose content is overwritten when another request gets it."""
        here: deque[Running] | list[Running] = self.reading if running in self.reading else self.writing
        here.remove(running)
        self._free.append(running.row)
        running.ticket.put(piece)


def _logprobs(written: Written, line: int, tokens: int) -> tuple[TokenLogprobs, ...]:
    told = written.likely
    return tuple(
        TokenLogprobs(
            float(told.chosen[line, nth]), tuple(map(int, told.tokens[line, nth])),
            tuple(map(float, told.logprobs[line, nth])),
        )
        for nth in range(tokens)
    )  # fmt: skip


def _broken(position: int) -> Piece:
    return Piece(ended="failed", error=FloatingPointError(f"non-finite logits, first by position {position}"))


def _told(error: Exception) -> Exception:
    """An error that each of several requests can raise."""
    return RuntimeError(f"the rows of the pool were lost: {type(error).__name__}: {error}")
