"""Answers in the shape of OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from uuid import uuid4

from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.server.ask import Ask
from jaxcompress.server.texts import TextPiece
from jaxcompress.serving.request import Ticket

LEAST = -9999.0
"""A log-probability that JSON can hold, in place of minus infinity."""


@dataclass
class Shaped:
    """The answer to one request: everything in it that is not text.

    Attributes:
      id, created: of the answer.
    """

    ask: Ask
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def head(self) -> dict[str, Any]:
        kind = "chat.completion" if self.ask.chat else "text_completion"
        prefix = "chatcmpl" if self.ask.chat else "cmpl"
        return dict(id=f"{prefix}-{self.id}", object=kind, created=self.created, model=self.ask.model)

    def whole(self, choices: Sequence[Sequence[TextPiece]], tickets: Sequence[Ticket]) -> dict[str, Any]:
        """An answer that is not streamed."""
        shaped = []
        for index, pieces in enumerate(choices):
            text = "".join(piece.text for piece in pieces)
            content = dict(message=dict(role="assistant", content=text)) if self.ask.chat else dict(text=text)
            logprobs = self._logprobs(pieces)
            shaped.append(dict(index=index, **content, logprobs=logprobs, finish_reason=pieces[-1].ended))
        written = sum(len(piece.tokens) for pieces in choices for piece in pieces)
        return dict(self.head, choices=shaped, usage=self.usage(tickets, written))

    def chunk(self, index: int, piece: TextPiece, *, first: bool, offset: int) -> dict[str, Any]:
        """A part of an answer that is streamed.

        Args:
          offset: characters of the tokens before it.
        """
        content: dict[str, Any] = dict(text=piece.text)
        if self.ask.chat:
            content = dict(delta=dict(content=piece.text) | (dict(role="assistant") if first else {}))
        choice = dict(index=index, **content, logprobs=self._logprobs([piece], offset), finish_reason=piece.ended)
        return dict(self._chunk_head, choices=[choice])

    def last(self, tickets: Sequence[Ticket], written: int) -> dict[str, Any]:
        """The end of a stream, with the usage."""
        return dict(self._chunk_head, choices=[], usage=self.usage(tickets, written))

    def usage(self, tickets: Sequence[Ticket], written: int) -> dict[str, Any]:
        """The tokens of a request. A prompt counts once, however many choices it has."""
        prompts = tickets[:: self.ask.choices]
        read, known = (
            sum(numbers) for numbers in ([len(t.prompt) for t in prompts], [t.known_tokens for t in prompts])
        )
        return dict(
            prompt_tokens=read, completion_tokens=written, total_tokens=read + written,
            prompt_tokens_details=dict(cached_tokens=known),
        )  # fmt: skip

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return dict(self.head, object="chat.completion.chunk") if self.ask.chat else self.head

    def _name(self, token: int) -> str:
        """As OpenAI spells a token: its text, or its bytes where they are a part of a character."""
        found = self.tokenizer.token_bytes(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def characters(self, piece: TextPiece) -> int:
        """Characters that its tokens add to the text, as `text_offset` counts them."""
        return sum(map(self._added, piece.tokens, piece.texts))

    def _added(self, token: int, text: str) -> int:
        return 0 if self.tokenizer.is_special(token) else len(text)

    def _logprobs(self, pieces: Sequence[TextPiece], offset: int = 0) -> dict[str, Any] | None:
        most = self.ask.top_logprobs
        if most is None:
            return None
        told = [pair for piece in pieces for pair in zip(piece.tokens, piece.logprobs, strict=False)]
        top = lambda one: list(zip(one.tokens, one.logprobs, strict=True))[:most]
        if self.ask.chat:
            entry = lambda token, logprob: dict(
                token=self._name(token), logprob=max(logprob, LEAST), bytes=list(self.tokenizer.token_bytes(token))
            )
            return dict(
                content=[
                    entry(token, one.chosen) | dict(top_logprobs=[entry(*pair) for pair in top(one)])
                    for token, one in told
                ],
                refusal=None,
            )
        added = [self._added(*pair) for piece in pieces for pair in zip(piece.tokens, piece.texts, strict=True)]
        return dict(
            tokens=[self._name(token) for token, _ in told],
            token_logprobs=[max(one.chosen, LEAST) for _, one in told],
            top_logprobs=[self._by_name(top(one)) for _, one in told],
            text_offset=list(accumulate(added, initial=offset))[:-1],
        )

    def _by_name(self, likely: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by names of tokens, best first. Of two tokens of one name the better one counts."""
        found: dict[str, float] = {}
        for token, logprob in likely:
            found.setdefault(self._name(token), max(logprob, LEAST))
        return found
