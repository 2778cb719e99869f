"""Runs the server until it is told to end."""

from __future__ import annotations

import errno
import socket

from jaxcompress._extras import extra
from jaxcompress.server.app import make_app
from jaxcompress.server.logs import log_json, told
from jaxcompress.server.settings import Served, Settings
from jaxcompress.serving.engine import Engine

with extra("serve"):
    import uvicorn


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address. Port 0 is any free one.

    Raises:
      OSError: the port is in use, or the address is none of this machine; says which.
      ValueError: there is no such port.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"a port is from 0 (any free one) to {2**16 - 1}, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {host} is in use; give another with --port") from None
        raise OSError(f"the server cannot listen at {host}, port {port}: {error.strerror}") from None
    return found


def make_server(served: Served, engine: Engine, settings: Settings) -> uvicorn.Server:
    """The server, not started. On SIGTERM or SIGINT it takes no more connections, and ends when all are answered or
    `stop_seconds` have passed."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(served, engine, settings), log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.stop_seconds)), timeout_keep_alive=15, lifespan="on",
            h11_max_incomplete_event_size=2**16, http="h11", ws="none",
        )
    )  # fmt: skip


def run_server(served: Served, engine: Engine, settings: Settings, listening: socket.socket) -> None:
    """Serves on a socket until SIGTERM or SIGINT."""
    log_json()
    host, port = listening.getsockname()[:2]
    told("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", pools=list(served.pools))
    make_server(served, engine, settings).run(sockets=[listening])
