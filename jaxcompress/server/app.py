"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any
from uuid import uuid4

from jaxcompress._extras import extra
from jaxcompress.server.answering import Answering
from jaxcompress.server.ask import read_ask, unknown_model
from jaxcompress.server.errors import ApiError
from jaxcompress.server.guard import Room, check_key, read_body
from jaxcompress.server.logs import LOG, told
from jaxcompress.server.metrics import Metrics
from jaxcompress.server.settings import Served, Settings
from jaxcompress.serving.engine import Engine

with extra("serve"):
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

SLOW_SECONDS = 60
"""Time that a client may take to read a stream, beyond the time for the answer."""

QUIET = ("/health", "/ready", "/metrics")
"""Paths that are asked for all the time; they are not logged."""

Handler = Callable[[Request], Awaitable[Response]]


class App:
    """The handlers, and what they share."""

    def __init__(self, served: Served, engine: Engine, settings: Settings) -> None:
        self._served, self._engine, self._settings = served, engine, settings
        self._metrics, self._room = Metrics(engine), Room(settings.concurrency)
        self._ready = self._broken = False

    @asynccontextmanager
    async def life(self, _: Starlette) -> AsyncIterator[None]:
        """The engine compiles its programs beside the server, which answers 503 until it is ready."""
        starting = asyncio.create_task(asyncio.to_thread(self._start))
        try:
            yield
        finally:
            await starting
            await asyncio.to_thread(self._engine.close, self._settings.stop_seconds)
            told("stopped")

    def _start(self) -> None:
        begun = time.monotonic()
        try:
            self._engine.start()
        except Exception:
            self._broken = True  # /health says so: whoever watches the server starts another
            LOG.exception("the engine could not start")
            return
        self._ready = True
        told("ready", seconds=round(time.monotonic() - begun, 1), pools=list(self._engine.pools))

    async def answer(self, request: Request, *, chat: bool) -> Response:
        """/v1/chat/completions and /v1/completions."""
        if self._broken:
            raise ApiError(503, "the engine could not start; the server's log says why", code="failed")
        if not self._ready:
            raise ApiError(503, "the model is being made ready; /ready says when it is", code="starting")
        body = await read_body(request, self._settings)
        client = f"{request.client.host if request.client else ''} {body.get('user') if isinstance(body, dict) else ''}"
        ask = await asyncio.to_thread(read_ask, body, self._served, self._settings, chat=chat, client=client)
        answering = Answering(ask, self._served, self._engine)
        request.state.tickets = answering.tickets
        ended = partial(self._ended, request, answering)
        if not ask.stream:
            try:
                return JSONResponse(await answering.whole(request))
            finally:
                ended()
        room = request.state.room
        request.state.room = None  # given back at the end of the stream

        def left() -> None:
            answering.cancel()
            room.__exit__()
            ended()

        return _Stream(answering.events(), self._settings.seconds + SLOW_SECONDS, left)

    def _ended(self, request: Request, answering: Answering) -> None:
        """Counts and logs a request that was answered, or left."""
        for ticket in answering.tickets:
            self._metrics.ended(ticket)
        ticket = answering.tickets[0]
        first = ticket.times.first
        told(
            "answer", id=request.state.id, prompt_tokens=len(ticket.prompt), known_tokens=ticket.known_tokens,
            completion_tokens=answering.written, choices=len(answering.tickets),
            first_ms=None if first is None else round(1e3 * (first - ticket.times.submitted), 1),
        )  # fmt: skip

    async def models(self, _: Request) -> Response:
        """/v1/models: the model, which stands for its first pool, and each pool."""
        chat = self._served.tokenizer.has_chat_template
        names = [self._served.name, *self._served.pools]
        return JSONResponse(dict(object="list", chat=chat, data=[self._entry(name) for name in dict.fromkeys(names)]))

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME: one of them. A name has slashes."""
        return JSONResponse(self._entry(request.path_params["model"]))

    def _entry(self, name: str) -> dict[str, Any]:
        """What is told of a model. Raises ApiError if there is none of that name."""
        found = self._served.pool(name)
        if found is None:
            raise unknown_model(name, self._served)
        pool = self._served.pools[found]
        slots = pool.slots if isinstance(pool.slots, int) else [*pool.slots]
        facts = dict(policy=pool.policy.name, slots=slots, rows=pool.rows, placement=pool.placement)
        return dict(id=name, object="model", created=self._served.created, owned_by="jaxcompress", jaxcompress=facts)

    async def health(self, _: Request) -> Response:
        """Whether the process can answer at all."""
        if self._broken:
            return PlainTextResponse("the engine could not start\n", 503)
        fine = not self._ready or self._engine.alive
        return PlainTextResponse("ok\n" if fine else "the engine has ended\n", 200 if fine else 503)

    async def readiness(self, _: Request) -> Response:
        """Whether requests are taken."""
        fine = self._ready and self._engine.alive
        return PlainTextResponse("ready\n" if fine else "not ready\n", 200 if fine else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(await asyncio.to_thread(self._metrics.text), media_type="text/plain; version=0.0.4")

    async def page(self, _: Request) -> Response:
        """A chat beside what the state holds."""
        return HTMLResponse(_page(), headers={"content-security-policy": PAGE_POLICY, "x-frame-options": "DENY"})

    def guarded(self, handler: Handler, *, key: bool, room: bool = False) -> Handler:
        """A handler with its errors as answers, its log line and its count."""

        async def handle(request: Request) -> Response:
            begun, request.state.id, request.state.room = time.monotonic(), uuid4().hex[:16], None
            try:
                if key:
                    check_key(request, self._settings)
                if room:
                    request.state.room = self._room.__enter__()
                response = await handler(request)
            except ApiError as error:
                response = _refusal(error)
            except Exception:
                LOG.exception("a request failed")
                response = _refusal(ApiError(500, "the server failed; its log says how", code="failed"))
            finally:
                if request.state.room is not None:
                    request.state.room.__exit__()
            self._metrics.answered(_route(request), response.status_code)
            response.headers["x-request-id"] = request.state.id
            ms = round(1e3 * (time.monotonic() - begun), 1)
            if request.url.path in QUIET:
                return response
            told(
                "request", id=request.state.id, method=request.method, path=request.url.path,
                status=response.status_code, ms=ms, client=request.client.host if request.client else None,
            )  # fmt: skip
            return response

        return handle


class _Stream(StreamingResponse):
    """A stream of events that a slow client cannot keep open for ever."""

    def __init__(self, events: AsyncGenerator[bytes], seconds: float, left: Callable[[], None]) -> None:
        """`left` is called at the end, whatever the end is."""
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._seconds, self._left = events, seconds, left

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            told("a client read too slowly", seconds=self._seconds)
        finally:
            await self._events.aclose()
            self._left()


def make_app(served: Served, engine: Engine, settings: Settings | None = None) -> Starlette:
    """The server as an ASGI application. It starts the engine, and closes it at its end."""
    settings = settings or Settings()
    app = App(served, engine, settings)
    open_to_all, guarded = partial(app.guarded, key=False), partial(app.guarded, key=True)
    answer = lambda path, chat: Route(path, guarded(partial(app.answer, chat=chat), room=True), methods=["POST"])
    routes = [
        answer("/v1/chat/completions", True), answer("/v1/completions", False),
        Route("/v1/models", guarded(app.models)), Route("/v1/models/{model:path}", guarded(app.model)),
        Route("/metrics", guarded(app.metrics)),
        Route("/health", open_to_all(app.health)), Route("/ready", open_to_all(app.readiness)),
        Route("/", open_to_all(app.page)),
    ]  # fmt: skip

    async def unrouted(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return _refusal(ApiError(status, f"{request.method} {request.url.path} is not answered here"))

    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)],
        exception_handlers={404: unrouted, 405: unrouted},
        lifespan=app.life,
    )


def _refusal(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), error.status, headers=headers)


def _route(request: Request) -> str:
    """The path of a request, with a name of a model left open: the metrics then have as many paths as routes."""
    return "/v1/models/{model}" if request.path_params else request.url.path


def _page() -> str:
    return files("jaxcompress.server").joinpath("page.html").read_text(encoding="utf-8")
