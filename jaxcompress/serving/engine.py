"""Continuous batching: requests come and go, and the rows of a pool are never without work that waits."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.generation.config import check_config
from jaxcompress.generation.sampling import check_seed
from jaxcompress.inputs.described import described
from jaxcompress.inputs.scalars import number, whole
from jaxcompress.inputs.token_ids import token_ids
from jaxcompress.serving.batcher import Batcher, Counts
from jaxcompress.serving.pool import Pool, PoolSpec
from jaxcompress.serving.prefixes import PrefixLimits, PrefixStore
from jaxcompress.serving.request import Answer, EngineClosed, EngineFull, Piece, Request, Ticket, answer_of
from jaxcompress.serving.row_sampling import check_row_config

LOG = logging.getLogger("jaxcompress.serving")


class PoolStats(NamedTuple):
    """What a pool does now.

    Attributes:
      waiting, reading, writing: requests.
      rows: of the pool.
      nbytes: of its rows.
      counts: what it has done.
    """

    waiting: int
    reading: int
    writing: int
    rows: int
    nbytes: int
    counts: Counts


@dataclass(frozen=True)
class EngineLimits:
    """What an engine takes.

    Attributes:
      waiting: requests of a pool that may wait for a row; one more is refused with `EngineFull`.
      prompt_tokens, max_new_tokens: of one request.
    """

    waiting: int = 256
    prompt_tokens: int = 2**20
    max_new_tokens: int = 2**16


class Engine:
    """Answers many requests at a time, each with the tokens that `generate` gives it alone.

        engine = Engine({"tova": PoolSpec(model, get_policy("tova"), slots=256, rows=8)})
        with engine:
            tickets = [engine.submit(Request(prompt, max_new_tokens=64)) for prompt in prompts]
            for ticket in tickets:
                print(tokenizer.decode(ticket.answer().tokens))

    A thread of the engine does in turn: end what was cancelled or is late, give free rows to those that wait, write a
    group of tokens of all answers, read one piece of one prompt. So a prompt of any length delays the others by one
    piece at a time, and prompts are read in turn.

    Attributes:
      pools: what each pool is made of, by name. The first is the default.
      limits: what the engine takes.
    """

    def __init__(
        self, pools: Mapping[str, PoolSpec], *, limits: EngineLimits | None = None, prefixes: PrefixLimits | None = None
    ) -> None:
        """Makes the rows. `start`, or a `with` block, starts the thread.

        Args:
          pools: by name.
          prefixes: how much states of prefixes may take; None: none are kept.

        Raises:
          ValueError: no pools, or no specs.
          OSError: the folder of the prefixes cannot be made.
        """
        if not pools or not all(isinstance(spec, PoolSpec) for spec in pools.values()):
            raise ValueError(f"pools are PoolSpec(model, policy, slots) by name, not {described(pools)}")
        self.pools, self.limits = dict(pools), limits or EngineLimits()
        self._prefixes = None if prefixes is None else PrefixStore(prefixes)
        self._batchers = {name: Batcher(Pool(spec), self._prefixes) for name, spec in pools.items()}
        self._lock = threading.Condition()
        self._arrived: list[tuple[str, Ticket]] = []
        self._accepts, self._ends_at = True, None
        self._turn = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close(seconds=0.0)

    def start(self, *, warm: bool = True) -> None:
        """Compiles all programs, and starts the thread, once. After that nothing is compiled, whatever arrives."""
        if self._thread is not None:  # two threads would take the arrays of the rows from one another
            return
        if warm:
            for batcher in self._batchers.values():
                batcher.pool.warm_up()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, seconds: float | None = None) -> None:
        """Takes no more requests, and returns when those that it has are answered.

        Args:
          seconds: after which answers end where they are, with the reason `closed`; None: never.
        """
        with self._lock:
            self._accepts = False
            self._ends_at = None if seconds is None else time.monotonic() + seconds
            self._lock.notify_all()
        if self._thread is None:
            self._end()
        else:
            self._thread.join()
        if self._prefixes is not None:
            self._prefixes.close()

    def submit(
        self, request: Request, pool: str | None = None, *, deliver: Callable[[Piece], None] | None = None
    ) -> Ticket:
        """Takes a request. Any thread may call it.

        Args:
          pool: its name; the first one by default.
          deliver: gets each piece, in the thread of the engine, instead of the ticket's iterator. It must return soon.

        Raises:
          ValueError: the request is invalid, or too long for a policy that cannot make room, or there is no such pool.
          EngineFull: too many requests wait.
          EngineClosed: the engine is closed.
        """
        name = next(iter(self.pools)) if pool is None else pool
        if name not in self.pools:
            raise ValueError(f"unknown pool {name!r}; known: {', '.join(self.pools)}")
        ticket = Ticket(request, self._checked(request, self.pools[name]), deliver)
        ticket.woken = self._wake
        with self._lock:
            if not self._accepts:
                raise EngineClosed("the engine is closed and takes no more requests")
            batcher = self._batchers[name]
            waiting = len(batcher.waiting) + sum(other == name for other, _ in self._arrived) - batcher.free
            if waiting >= self.limits.waiting:
                raise EngineFull(f"{waiting} requests wait for a row of pool {name!r}, as many as may; ask again later")
            self._arrived.append((name, ticket))
            self._lock.notify_all()
        return ticket

    def stream(self, request: Request, pool: str | None = None) -> AsyncPieces:
        """The pieces of an answer, for asyncio. Raises as `submit`."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def deliver(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        return AsyncPieces(self.submit(request, pool, deliver=deliver), pieces)

    async def answer(self, request: Request, pool: str | None = None) -> Answer:
        """A whole answer, for asyncio. If the task is cancelled, so is the request. Raises as `submit` and as
        `Ticket.__next__`."""
        async with self.stream(request, pool) as pieces:
            return answer_of(pieces.ticket, [piece async for piece in pieces])

    def stats(self) -> dict[str, PoolStats]:
        """What each pool does now; approximate, since it goes on meanwhile."""
        return {
            name: PoolStats(
                len(one.waiting), len(one.reading), len(one.writing), one.pool.spec.rows, one.pool.nbytes, one.counts
            )
            for name, one in self._batchers.items()
        }

    @property
    def prefixes(self) -> PrefixStore | None:
        """The states of prefixes; None if none are kept."""
        return self._prefixes

    @property
    def alive(self) -> bool:
        """Whether the thread of the engine runs."""
        return self._thread is not None and self._thread.is_alive()

    def _checked(self, request: Request, spec: PoolSpec) -> np.ndarray:
        """The prompt as an array. Raises ValueError for a request that no row can answer."""
        if not isinstance(request, Request):
            raise ValueError(f"a Request is expected, not {described(request)}")
        prompt = token_ids(request.prompt, spec.model.config.vocab_size, "prompt")
        if not len(prompt):
            raise ValueError("the prompt is empty; give at least one token (a BOS token will do)")
        if len(prompt) > self.limits.prompt_tokens:
            raise ValueError(
                f"the prompt has {len(prompt):,} tokens, and the engine takes {self.limits.prompt_tokens:,} at most"
            )
        written = whole(request.max_new_tokens, "max_new_tokens", least=1)
        if written > self.limits.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {written:,}, and the engine writes {self.limits.max_new_tokens:,} at most"
            )
        check_config(spec.model, request.config)
        check_row_config(request.config)
        check_seed(request.seed)
        if request.seconds is not None and number(request.seconds, "seconds") <= 0:
            raise ValueError(f"seconds must be above 0, not {request.seconds}")
        spec.check_request(len(prompt), written)
        return prompt

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _run(self) -> None:
        """The thread. Whatever ends it, no request waits for ever."""
        try:
            self._loop()
        except BaseException:
            LOG.exception("the engine has ended")
        finally:
            self._end()

    def _end(self) -> None:
        """Takes no more requests, and ends those that it has."""
        with self._lock:
            self._accepts = False
            for name, ticket in self._arrived:
                self._batchers[name].waiting.add(ticket)
            self._arrived.clear()
        for batcher in self._batchers.values():
            batcher.close("closed")

    def _loop(self) -> None:
        """It ends when the engine is closed and nothing is left to do."""
        while True:
            with self._lock:
                busy = lambda: any(one.busy for one in self._batchers.values())
                while self._accepts and not self._arrived and not busy():
                    self._lock.wait()
                for name, ticket in self._arrived:
                    self._batchers[name].waiting.add(ticket)
                self._arrived.clear()
                if not self._accepts and not busy():
                    return
                late = self._ends_at is not None and time.monotonic() >= self._ends_at
            if late:
                for batcher in self._batchers.values():
                    batcher.close("closed")
            self._step()

    def _step(self) -> None:
        """One turn: tokens for all answers, and one piece of one prompt."""
        batchers = list(self._batchers.values())
        for batcher in batchers:
            self._guarded(batcher, batcher.sweep, batcher.admit, batcher.write)
        for n in range(len(batchers)):  # the pools read in turn
            batcher = batchers[(self._turn + n) % len(batchers)]
            if batcher.reading:
                self._guarded(batcher, batcher.read)
                self._turn = (self._turn + n + 1) % len(batchers)
                return

    def _guarded(self, batcher: Batcher, *steps: Callable[[], None]) -> None:
        """Does these; a failure ends the requests that have a row, and the pool goes on with new rows."""
        try:
            for step in steps:
                step()
        except Exception as error:
            LOG.exception("a pool failed and begins anew")
            batcher.fail(error)


class AsyncPieces(AsyncIterator[Piece]):
    """The pieces of an answer, as `Ticket` gives them to threads.

    The request is cancelled where its answer is left: at the end of an `async with` block, by `aclose`, when the task
    that waits for a piece is cancelled, and when nobody holds this object any more, as after `break` in a loop over it.

    Attributes:
      ticket: the request.
    """

    def __init__(self, ticket: Ticket, pieces: asyncio.Queue[Piece]) -> None:
        self.ticket, self._pieces, self._over = ticket, pieces, False

    async def __anext__(self) -> Piece:
        """The next piece. Raises as `Ticket.__next__`."""
        if self._over:
            raise StopAsyncIteration
        try:
            piece = await self._pieces.get()
        except asyncio.CancelledError:
            self.ticket.cancel()
            raise
        self._over = piece.ended is not None
        if piece.error is not None:
            raise piece.error
        return piece

    async def __aenter__(self) -> AsyncPieces:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the answer, if it has not ended."""
        if not self._over:
            self._over = True
            self.ticket.cancel()

    def __del__(self) -> None:
        if not self._over:
            self.ticket.cancel()
