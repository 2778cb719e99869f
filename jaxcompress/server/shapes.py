"""Answers in the shape of OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.server.ask import Ask
from jaxcompress.server.texts import TextPiece
from jaxcompress.serving.request import Ticket, TokenLogprobs

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
            logprobs = self._logprobs([one for piece in pieces for one in _told(piece)])
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
        choice = dict(index=index, **content, logprobs=self._logprobs(_told(piece), offset), finish_reason=piece.ended)
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
        return self.tokenizer.decode([token], skip_special=False)

    def characters(self, piece: TextPiece) -> int:
        """Characters of its tokens, as `text_offset` counts them."""
        return sum(len(self._name(token)) for token in piece.tokens)

    def _logprobs(self, told: Sequence[tuple[int, TokenLogprobs]], offset: int = 0) -> dict[str, Any] | None:
        most = self.ask.top_logprobs
        if most is None:
            return None
        top = lambda one: list(zip(one.tokens, one.logprobs, strict=True))[:most]
        if self.ask.chat:
            entry = lambda token, logprob: dict(
                token=self._name(token), logprob=max(logprob, LEAST), bytes=list(self._name(token).encode())
            )
            return dict(
                content=[
                    entry(token, one.chosen) | dict(top_logprobs=[entry(*pair) for pair in top(one)])
                    for token, one in told
                ],
                refusal=None,
            )
        names = [self._name(token) for token, _ in told]
        ends = [offset + sum(map(len, names[: n + 1])) for n in range(len(names))]
        return dict(
            tokens=names,
            token_logprobs=[max(one.chosen, LEAST) for _, one in told],
            top_logprobs=[{self._name(token): max(x, LEAST) for token, x in top(one)} for _, one in told],
            text_offset=[end - len(name) for end, name in zip(ends, names, strict=True)],
        )


def _told(piece: TextPiece) -> list[tuple[int, TokenLogprobs]]:
    return list(zip(piece.tokens, piece.logprobs, strict=False))
