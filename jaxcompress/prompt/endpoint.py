"""A teacher behind HTTP: any server that speaks OpenAI's chat completions, through OpenAI's own client."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxcompress._extras import extra
from jaxcompress.prompt.teacher import TeacherFailed

_NEVER = {401, 403, 404, 405, 501}  # no text will ever succeed
_CUT_OFF = {"length": "max_tokens", "content_filter": "the server's content filter"}


class Refused(TeacherFailed):
    """The server will not answer any text: wrong key, unknown model, wrong address. Trying others is no use."""


@dataclass(frozen=True)
class Endpoint:
    """Asks a server for a compression; may be called from several threads.

    The client tries again what may pass: no connection, a timeout, a rate limit, an overloaded server. Its pauses
    double each time and vary by chance, or are those that the server asks for (`Retry-After`).

    Needs one more package: `pip install "jaxcompress[teacher]"`.

    Attributes:
      url: up to the version: `https://host/v1`.
      model: its name on the server.
      key_variable: environment variable with the API key. Where it is not set, the server is asked with the key "none",
        which servers without keys ignore.
      temperature, top_p, max_tokens: of the answer; defaults are the paper's.
      timeout: seconds per attempt.
      attempts: in all.
      extra: more fields of the request's body.

    Raises:
      ValueError: a url that is none, or no attempt.
      ImportError: the client is not installed.

    Raises (when called):
      Refused: no request will ever succeed (status 401, 403, 404, 405, 501).
      TeacherFailed: this text was refused (other statuses), no answer after all attempts, an answer cut off by
        max_tokens or a content filter, or one that makes no sense.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.3
    top_p: float = 1.0
    max_tokens: int = 4000
    timeout: float = 120.0
    attempts: int = 6
    extra: Mapping[str, Any] = field(default_factory=dict)
    _client: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the endpoint's url begins with http:// or https://, not {self.url!r}")
        if self.attempts < 1:
            raise ValueError(f"at least 1 attempt is needed, not {self.attempts}")
        client = _openai().OpenAI(
            base_url=self.url, api_key=os.environ.get(self.key_variable) or "none", timeout=self.timeout,
            max_retries=self.attempts - 1,
        )  # fmt: skip
        object.__setattr__(self, "_client", client)

    def __call__(self, instruction: str, text: str) -> str:
        openai = _openai()
        messages = [dict(role="system", content=instruction), dict(role="user", content=text)]
        try:
            reply = self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=self.temperature, top_p=self.top_p,
                max_tokens=self.max_tokens, extra_body=dict(self.extra),
            )  # fmt: skip
        except openai.APIStatusError as error:
            kind = Refused if error.status_code in _NEVER else TeacherFailed
            tries = f" in {self.attempts} attempts" if _may_pass(error.status_code) else ""
            told = f"status {error.status_code}: {_told(error)}"
            raise kind(f"{self.url} refused the request for model {self.model!r}{tries}: {told}") from None
        except openai.APIConnectionError as error:  # timeouts too
            why = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
            raise TeacherFailed(f"{self.url} gave no answer in {self.attempts} attempts; the last: {why}") from None
        except ValueError as error:  # what should be JSON is not
            raise TeacherFailed(f"{self.url} answered with something that is not JSON: {error}") from None
        return _answer(reply, self.url)


def _openai() -> Any:
    """The package. Raises MissingExtra if it is not installed."""
    with extra("teacher"):
        import openai  # pyright: ignore[reportMissingImports]
    return openai


def _may_pass(status: int) -> bool:
    """Whether the client tries again after this status."""
    return status in (408, 409, 429) or status >= 500


def _answer(reply: Any, url: str) -> str:
    """The text of a reply. Raises TeacherFailed if there is none, or not all of it."""
    if isinstance(reply, str | bytes):  # the client gives what is not declared to be JSON as it is
        raise TeacherFailed(f"{url} answered with something that is not JSON: {reply[:80]!r}")
    try:
        choice = reply.choices[0]
        text = choice.message.content
    except (AttributeError, IndexError, KeyError, TypeError):
        raise TeacherFailed(f"the answer has no choices[0].message.content: {str(reply)[:120]}") from None
    if choice.finish_reason in _CUT_OFF:
        by = _CUT_OFF[choice.finish_reason]
        raise TeacherFailed(f"the answer was cut off by {by}; what it did not reach would count as deleted")
    if not isinstance(text, str) or not text.strip():
        raise TeacherFailed("the answer is empty")
    return text.strip()


def _told(error: Any) -> str:
    """What the server said."""
    body = error.body
    said = body.get("message") if isinstance(body, Mapping) else body
    return str(said or error.response.text or error.message)[:500]
