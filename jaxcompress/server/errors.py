"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from jaxcompress.inputs.text import clean

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
      status: of HTTP.
      message: what was given, what was expected, what to do.
      param: the field that is wrong.
      code: for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The answer, as JSON that UTF-8 can hold: the message may quote half of a character."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else clean(self.param)
        return dict(error=dict(message=clean(self.message), type=kind, param=param, code=self.code))


def refused(param: str, message: str) -> ApiError:
    """A field that is wrong, status 400."""
    return ApiError(400, message, param=param, code="invalid_value")
