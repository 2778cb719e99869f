"""From tokens to text: the answer of an engine as it grows, up to a stop string."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np

from jaxcompress.generation.text import TextUntil
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
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    ended: Reason | None
    held: np.ndarray | None


async def text_pieces(
    pieces: AsyncPieces, tokenizer: Tokenizer, stop: tuple[str, ...], stop_ids: tuple[int, ...]
) -> AsyncIterator[TextPiece]:
    """The text of an answer. It ends before the first stop; the row is free for others then.

    Raises:
      ApiError: there was not enough time, the server is closing, or the request failed.
    """
    until = TextUntil(tokenizer, stop, stop_ids, pieces.ticket.prompt)
    async with pieces:
        try:
            async for piece in pieces:
                text, taken = "", 0
                for token in piece.tokens:
                    text, taken = text + until.push(token), taken + 1
                    if until.stopped:
                        break
                ended = "stop" if until.stopped else piece.ended
                if ended is not None:
                    _check_whole(ended)
                    text += until.finish()
                yield TextPiece(text, piece.tokens[:taken], piece.logprobs[:taken], ended, piece.held)
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
