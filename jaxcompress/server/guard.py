"""What a request has to pass before it is read: the key, its kind and size, and how many there are already."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from jaxcompress._extras import extra
from jaxcompress.server.errors import ApiError
from jaxcompress.server.settings import Settings

with extra("serve"):
    from starlette.requests import ClientDisconnect, Request


def check_key(request: Request, settings: Settings) -> None:
    """Raises ApiError 401 if the key is missing or wrong. The comparison takes the same time for every wrong key."""
    if settings.api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), settings.api_key.encode())
    if scheme.lower() != "bearer" or not right:
        raise ApiError(
            401, "a key is needed: Authorization: Bearer KEY, as given with --api-key", code="invalid_api_key"
        )


async def read_body(request: Request, settings: Settings) -> Any:
    """The body as JSON.

    Only `application/json` is taken: a page of another site cannot send that without asking first, and is refused then.

    Raises:
      ApiError: it is of another type, too large, too slow, or no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, not {kind or 'of no type'}")
    too_large = ApiError(413, f"the body is larger than {settings.body_bytes:,} bytes", code="too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > settings.body_bytes:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                content += part
                if len(content) > settings.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body was not there within {settings.body_seconds:g} seconds") from None
    except ClientDisconnect:
        raise ApiError(499, "the client has gone") from None
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None


class Room:
    """How many requests there are; one too many is refused."""

    def __init__(self, most: int) -> None:
        self._most, self.now = most, 0

    def __enter__(self) -> Room:
        if self.now >= self._most:
            raise ApiError(429, f"{self.now} requests are being answered, as many as may; ask again later", code="busy")
        self.now += 1
        return self

    def __exit__(self, *_: Any) -> None:
        self.now -= 1
