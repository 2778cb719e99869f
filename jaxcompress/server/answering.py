"""Asks the engine, and gives its answers to HTTP: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from jaxcompress._extras import extra
from jaxcompress.evaluation.lifetimes import token_texts
from jaxcompress.server.ask import Ask
from jaxcompress.server.errors import ApiError, refused
from jaxcompress.server.merging import merged
from jaxcompress.server.settings import Served
from jaxcompress.server.shapes import Shaped
from jaxcompress.server.texts import TextPiece, text_pieces
from jaxcompress.serving.engine import AsyncPieces, Engine
from jaxcompress.serving.request import EngineClosed, EngineFull

with extra("serve"):
    from starlette.requests import Request


class Answering:
    """The answer to one request of HTTP, which may have several choices.

    Attributes:
      tickets: of the engine, one for each choice.
    """

    def __init__(self, ask: Ask, served: Served, engine: Engine) -> None:
        """Asks the engine. Raises ApiError if it refuses."""
        _check_room(ask, engine)
        self._ask, self._served, self._shaped = ask, served, Shaped(ask, served.tokenizer)
        asked: list[AsyncPieces] = []
        try:
            for request in ask.requests:
                asked.append(engine.stream(request, ask.pool))
        except Exception as error:
            for pieces in asked:
                pieces.ticket.cancel()
            raise _as_api(error) from error
        self.tickets = [pieces.ticket for pieces in asked]
        self._texts = [
            text_pieces(pieces, served.tokenizer, ask.stop, ask.requests[0].config.stop_token_ids) for pieces in asked
        ]
        self.written = 0

    async def whole(self, request: Request) -> dict[str, Any]:
        """The whole answer; if the client goes, the requests are cancelled. Raises ApiError."""
        gone = asyncio.create_task(_gone(request))
        answer = asyncio.create_task(self._collect())
        try:
            await asyncio.wait([gone, answer], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ApiError(499, "the client has gone")
            return self._shaped.whole(answer.result(), self.tickets)
        finally:
            for task in (gone, answer):
                task.cancel()
            await asyncio.gather(gone, answer, return_exceptions=True)
            self.cancel()

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events. An error on the way is the last event."""
        shaped, offsets = self._shaped, dict[int, int]()
        try:
            async with aclosing(merged(self._texts)) as pieces:
                async for index, piece in pieces:
                    self.written += len(piece.tokens)
                    first, offset = index not in offsets, offsets.get(index, 0)
                    chunk = shaped.chunk(index, piece, first=first, offset=offset)
                    if self._ask.watched:
                        chunk["jaxcompress"] = self._watched(index, piece, first=first)
                    offsets[index] = offset + shaped.characters(piece)
                    yield _event(chunk)
            if self._ask.usage:
                yield _event(shaped.last(self.tickets, self.written))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())

    def cancel(self) -> None:
        """Ends what is not ended yet."""
        for ticket in self.tickets:
            if ticket.times.ended is None:
                ticket.cancel()

    async def _collect(self) -> list[list[TextPiece]]:
        choices: list[list[TextPiece]] = [[] for _ in self._texts]
        async with aclosing(merged(self._texts)) as pieces:
            async for index, piece in pieces:
                choices[index].append(piece)
                self.written += len(piece.tokens)
        return choices

    def _watched(self, index: int, piece: TextPiece, *, first: bool) -> dict[str, Any]:
        """What the row holds, for the page: hundredths for each token so far, and the tokens' texts."""
        held = [] if piece.held is None else [round(100 * share) for share in piece.held.tolist()]
        texts = dict(prompt=token_texts(self._served.tokenizer, self.tickets[index].prompt)) if first else {}
        return dict(texts, tokens=list(piece.texts), held=held)


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def _check_room(ask: Ask, engine: Engine) -> None:
    """Refuses more answers than a pool takes at a time: to ask again later would not help."""
    rows, waiting, asked = engine.pools[ask.pool].rows, engine.limits.waiting, len(ask.requests)
    if asked > rows + waiting:
        raise refused(
            "n" if ask.choices > 1 else "prompt",
            f"{asked} answers are more than {ask.pool} takes at a time: it has {rows} rows, and {waiting} may "
            f"wait; ask for {rows + waiting} at most, of all prompts together",
        )


def _as_api(error: Exception) -> ApiError:
    if isinstance(error, EngineFull):
        return ApiError(429, str(error), code="busy")
    if isinstance(error, EngineClosed):
        return ApiError(503, "the server is closing", code="closed")
    if isinstance(error, ValueError | OverflowError):
        return ApiError(400, str(error), code="invalid_value")
    raise error
