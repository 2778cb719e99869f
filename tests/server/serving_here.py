"""A server in a thread of this process, with a tiny chat model."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tiny_chat import TEMPLATE, chat_folder

from jaxcompress.checkpoints import load
from jaxcompress.policies.names import get_policy
from jaxcompress.server import Served, Settings, bound
from jaxcompress.server.run import make_server
from jaxcompress.serving import Engine, EngineLimits, PoolSpec, PrefixLimits


class Here(NamedTuple):
    """A running server."""

    port: int
    served: Served
    engine: Engine
    server: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and content; JSON where it is JSON. A body of bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {} if body is None else {"content-type": "application/json"}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, content, kind | given)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        plain = "json" not in (answer.getheader("content-type") or "")
        return answer.status, text.decode() if plain else json.loads(text)

    def idle(self, seconds: float = 20) -> bool:
        """Whether no row has work, soon."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not any(one.waiting + one.reading + one.writing for one in self.engine.stats().values()):
                return True
            time.sleep(0.01)
        return False


def tiny_served(folder: Path, template: str | None = TEMPLATE) -> Served:
    loaded = load(chat_folder(folder, template))
    pool = lambda policy, slots: PoolSpec(loaded.model, get_policy(policy), slots, rows=3, segment=16, group=4)
    return Served("tiny", loaded, {"tiny/tova:16": pool("tova", 16), "tiny/window:16": pool("window", 16)})


@contextmanager
def serving(served: Served, settings: Settings | None = None, **limits: Any) -> Iterator[Here]:
    """Runs a server until the block is left."""
    engine = Engine(served.pools, limits=EngineLimits(**limits), prefixes=PrefixLimits())
    listening = bound("127.0.0.1", 0)
    server = make_server(served, engine, settings or Settings(stop_seconds=5.0))
    run = lambda: asyncio.run(server.serve(sockets=[listening]))
    thread = threading.Thread(target=run)
    thread.start()
    here = Here(listening.getsockname()[1], served, engine, server)
    try:
        while here.ask("/ready")[0] != 200:
            time.sleep(0.02)
        yield here
    finally:
        server.should_exit = True
        thread.join()
