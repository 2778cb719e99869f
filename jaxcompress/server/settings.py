"""What a server serves, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.generation.turns import closing_token
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.serving.pool import PoolSpec


@dataclass(frozen=True)
class Settings:
    """The limits of a server.

    Attributes:
      api_key: clients have to send it (`Authorization: Bearer ...`), without white space around it; None: all may ask.
      hosts: names by which clients may call the server, without ports; `*.a.example` for all names that end so, `*` for
        any. A server on a loopback address takes only names of
        this machine, so that no web page can reach it under a name of its own.
      body_bytes: of a request.
      body_seconds: until a request has to be there.
      concurrency: requests at a time, those that wait for a row included; one more is refused with status 429.
      max_tokens: of an answer, and the number if a request names none, as far as there is room.
      choices: `n` of a request, at most.
      seconds: until an answer has to be there.
      stop_seconds: that answers may still take after the server was told to end.

    Raises:
      ValueError: the key is empty, or has letters that a header of HTTP cannot carry; a host is no name.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    concurrency: int = 256
    max_tokens: int = 1024
    choices: int = 8
    seconds: float = 600.0
    stop_seconds: float = 30.0

    def __post_init__(self) -> None:
        for host in self.hosts:
            name = host.removeprefix("*.") if host != "*" else "any"
            port = name.count(":") == 1 or "]:" in name  # an address of IPv6 has more colons
            if not name or port or any(sign in name for sign in "*/ "):
                raise ValueError(
                    f"{host!r} is no name of a host: give one without port, such as a.example, *.a.example for all "
                    "that end so, or * for any"
                )
        if self.api_key is None:
            return
        object.__setattr__(self, "api_key", self.api_key.strip())
        if not self.api_key:
            raise ValueError(
                "the API key is empty, and would guard nothing: give one with --api-key or JAXCOMPRESS_API_KEY, or "
                "give no flag and unset the variable, so that all may ask"
            )
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise ValueError("the API key has letters that a header of HTTP cannot carry; take printable ASCII only")


@dataclass(frozen=True)
class Served:
    """A model with its pools.

    Attributes:
      name: of the model; stands for its first pool too.
      loaded: the model and its tokenizer.
      pools: by name.
    """

    name: str
    loaded: Loaded[Any, Any, Tokenizer]
    pools: Mapping[str, PoolSpec]
    created: int = field(default=0)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, and the one with which the chat template ends an answer."""
        closing = None
        if self.tokenizer.has_chat_template:
            with suppress(ValueError):  # the template writes no answers: the end tokens have to do
                closing = closing_token(self.tokenizer, None, {})
        return tuple(dict.fromkeys([*self.tokenizer.eos_ids, *(() if closing is None else (closing,))]))

    def pool(self, model: str) -> str | None:
        """The pool that a request means by its `model`; None if there is none."""
        if model == self.name:
            return next(iter(self.pools))
        return model if model in self.pools else None
