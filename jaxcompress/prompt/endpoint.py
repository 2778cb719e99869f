"""A teacher behind HTTP: any server that speaks OpenAI's chat completions, with the standard library alone."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from jaxcompress.prompt.teacher import TeacherFailed

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # may succeed later
_NEVER = {401, 403, 404, 405, 501}  # no text will ever succeed


class Refused(TeacherFailed):
    """The server will not answer any text: wrong key, unknown model, wrong address. Trying others is no use."""


@dataclass(frozen=True)
class Endpoint:
    """Calls POST {url}/chat/completions; may be called from several threads.

    What may pass (no connection, a timeout, a rate limit, an overloaded server) is tried again after a pause that
    doubles each time and varies by chance, or that the server asks for (`Retry-After`, in seconds or as a date). A
    server that asks one thread to wait makes all of them wait.

    Attributes:
      url: up to the version: `https://host/v1`.
      model: its name on the server.
      key: sent as bearer token; None: none is sent.
      temperature, top_p, max_tokens: of the answer; defaults are the paper's.
      timeout: seconds per attempt.
      attempts: in all.
      first_pause, longest_pause: seconds.
      per_minute: at most so many requests are begun per minute; None: no limit.
      extra: more fields of the request's body.

    Raises (when called):
      Refused: no request will ever succeed (status 401, 403, 404, 405, 501).
      TeacherFailed: this text was refused (other statuses, at once), no answer after all attempts, an answer cut off by
        max_tokens, or one that makes no sense.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    temperature: float = 0.3
    top_p: float = 1.0
    max_tokens: int = 4000
    timeout: float = 120.0
    attempts: int = 6
    first_pause: float = 1.0
    longest_pause: float = 60.0
    per_minute: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    _gate: _Gate = field(default_factory=lambda: _Gate(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the endpoint's url begins with http:// or https://, not {self.url!r}")
        if self.attempts < 1:
            raise ValueError(f"at least 1 attempt is needed, not {self.attempts}")

    def __call__(self, instruction: str, text: str) -> str:
        messages = [dict(role="system", content=instruction), dict(role="user", content=text)]
        body = dict(
            model=self.model, messages=messages, temperature=self.temperature, top_p=self.top_p,
            max_tokens=self.max_tokens, **self.extra,
        )  # fmt: skip
        why = ""
        for attempt in range(self.attempts):
            self._gate.wait(60.0 / self.per_minute if self.per_minute else 0.0)
            try:
                return _answer(self._post(body))
            except urllib.error.HTTPError as error:
                why = f"status {error.code}: {_told(error)}"
                if error.code not in _AGAIN:
                    kind = Refused if error.code in _NEVER else TeacherFailed
                    raise kind(f"{self.url} refused the request for model {self.model!r}: {why}") from None
                asked = _retry_after(error.headers.get("Retry-After"))
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                why, asked = str(getattr(error, "reason", error)), None
            if attempt + 1 < self.attempts:
                pause = min(self.first_pause * 2**attempt, self.longest_pause) * random.uniform(0.5, 1.0)
                if asked is None:
                    time.sleep(pause)
                else:
                    self._gate.hold(asked)
        raise TeacherFailed(f"{self.url} gave no answer in {self.attempts} attempts; the last: {why}")

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            data = response.read()
        try:
            return json.loads(data)
        except ValueError:
            raise TeacherFailed(f"{address} answered with something that is not JSON: {data[:80]!r}") from None


class _Gate:
    """When requests may begin, for all threads."""

    def __init__(self) -> None:
        self._lock, self._turn, self._held = threading.Lock(), 0.0, 0.0

    def wait(self, gap: float) -> None:
        """Waits for this request's turn; the next one's is `gap` seconds later."""
        with self._lock:
            turn = max(self._turn, time.monotonic())
            self._turn = turn + gap
        while (left := max(turn, self._held) - time.monotonic()) > 0:  # it may be held while we wait
            time.sleep(left)

    def hold(self, seconds: float) -> None:
        """Nobody begins for so long."""
        with self._lock:
            self._held = max(self._held, time.monotonic() + seconds)


def _answer(reply: Any) -> str:
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise TeacherFailed(f"the answer has no choices[0].message.content: {str(reply)[:120]}") from None
    if choice.get("finish_reason") == "length":
        raise TeacherFailed("the answer was cut off by max_tokens; what it did not reach would count as deleted")
    if not isinstance(text, str) or not text.strip():
        raise TeacherFailed("the answer is empty")
    return text.strip()


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait; None if it does not, or says nothing that can be understood."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


def _told(error: urllib.error.HTTPError) -> str:
    text = error.read(500).decode("utf-8", "replace").strip()
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text or error.reason
