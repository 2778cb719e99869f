"""From tokens to text: the answer of an engine as it grows, up to a stop string."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np

from jaxcompress.generation.text import TextStream, TextUntil
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.server.errors import ApiError
from jaxcompress.serving.engine import AsyncPieces
from jaxcompress.serving.request import Reason, TokenLogprobs


class TextPiece(NamedTuple):
    """Some text of an answer.

    Attributes:
      text: what has become final.
      tokens, logprobs: the tokens that came; text may lag behind them.
      ended: why the answer ends here; None if it goes on.
      held: of each token so far the share of layers and heads that hold it, if watched.
      texts: what each token adds to the text, marks spelt out, if watched or with log-probabilities. A character that
        several tokens spell belongs to the last of them.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    ended: Reason | None
    held: np.ndarray | None
    texts: tuple[str, ...] = ()


async def text_pieces(
    pieces: AsyncPieces, tokenizer: Tokenizer, stop: tuple[str, ...], stop_ids: tuple[int, ...]
) -> AsyncIterator[TextPiece]:
    """The text of an answer. It ends before the first stop; the row is free for others then.

    Raises:
      ApiError: there was not enough time, the server is closing, or the request failed.
    """
    ticket = pieces.ticket
    until = TextUntil(tokenizer, stop, stop_ids, ticket.prompt)
    told = ticket.request.watched or ticket.request.logprobs
    by_token = TextStream(tokenizer, ticket.prompt, skip_special=False)
    async with pieces:
        try:
            async for piece in pieces:
                text, taken = "", 0
                for token in piece.tokens:
                    text, taken = text + until.push(token), taken + 1
                    if until.stopped:
                        break
                if until.stopped and ticket.times.ended is None:  # here, whatever the row still writes
                    ticket.times.ended = time.monotonic()
                ended = "stop" if until.stopped else piece.ended
                if ended is not None:
                    _check_whole(ended)
                    text += until.finish()
                    ended = "stop" if until.stopped else ended  # in what was held back
                tokens = piece.tokens[:taken]
                texts = tuple(map(by_token.push, tokens)) if told else ()
                if texts and ended is not None:
                    texts = (*texts[:-1], texts[-1] + by_token.finish())
                yield TextPiece(text, tokens, piece.logprobs[:taken], ended, piece.held, texts)
                if ended is not None:
                    return
        except (FloatingPointError, RuntimeError) as error:
            raise ApiError(500, f"the answer failed: {error}", code="failed") from error


def _check_whole(reason: Reason) -> None:
    """Raises ApiError for an answer that was cut off."""
    if reason == "deadline":
        raise ApiError(504, "there was no time left to answer; ask for fewer tokens, or later", code="deadline")
    if reason in ("closed", "cancelled"):
        raise ApiError(503, "the server is closing", code="closed")
