"""An HTTP server over the engine, in the shape of OpenAI's API. The extra `serve` installs what it needs."""

from jaxcompress.server.app import make_app
from jaxcompress.server.run import bound, run_server
from jaxcompress.server.settings import Served, Settings

__all__ = ["Served", "Settings", "bound", "make_app", "run_server"]
