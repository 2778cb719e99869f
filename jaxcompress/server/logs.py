"""Logs as lines of JSON. They hold no text of prompts or answers."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LOG = logging.getLogger("jaxcompress.server")

NAMES = ("jaxcompress", "uvicorn.error")


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, event, and the facts given as `extra=dict(facts=...)`."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = dict(
            time=f"{when}.{int(record.msecs):03d}Z", level=record.levelname.lower(), logger=record.name,
            event=record.getMessage(),
        )  # fmt: skip
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json(level: int = logging.INFO) -> None:
    """Sends the logs of the server and of what runs it to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in NAMES:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def told(event: str, **facts: Any) -> None:
    """Logs an event with its facts."""
    LOG.info(event, extra=dict(facts=facts))
