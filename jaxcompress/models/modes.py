"""The three modes of reading a text, and the split of its tokens into calls."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Mode = Literal["streaming", "chunked", "oneshot"]
"""How a text is read.

  streaming  token by token, as in decoding: each token may evict one
  chunked    so many tokens at once, then one selection
  oneshot    the whole prompt at once, then one selection
"""

MODES: tuple[Mode, ...] = get_args(Mode)


class ReadCall(NamedTuple):
    """The part of a text that one call reads.

    Attributes:
      start, stop: tokens [start, stop) of the text.
      width: tokens of the call, including padding; `stop - start` of them are text.
      chunk: tokens between two selections.
    """

    start: int
    stop: int
    width: int
    chunk: int


FEWEST = 32
"""The width of the shortest call; shorter texts are padded to it."""


def padded(tokens: int, most: int) -> int:
    """The width of a call that reads this number of tokens. Only a few widths exist, so few programs are compiled.

    Widths up to `most` are the powers of two from `FEWEST` on, and `most`. Widths above it are multiples of `most`.
    """
    if tokens > most:
        return -(-tokens // most) * most
    return min(max(1 << (tokens - 1).bit_length(), FEWEST), most)


def calls(mode: Mode, total: int, *, chunk: int, segment: int, start: int = 0) -> list[ReadCall]:
    """The sequence of calls that reads tokens [start, total) of a text in a named mode.

    The ends of calls do not change the result: a segment is rounded to a whole number of chunks, and padding is masked.
    Only `oneshot` needs all tokens in one call, since it selects from all of them at once.

    Raises:
      ValueError: the mode is unknown, or a chunk or segment is below 1.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if chunk < 1 or segment < 1:
        raise ValueError(f"a chunk and a segment have at least 1 token, not chunk={chunk}, segment={segment}")
    if mode == "oneshot":
        width = padded(total - start, segment)
        return [ReadCall(start, total, width, width)]
    by = 1 if mode == "streaming" else chunk
    segment = max(segment // by, 1) * by
    plan = []
    for at in range(start, total, segment):
        stop = min(at + segment, total)
        width = padded(stop - at, segment)
        if width <= by:  # a single selection from all tokens
            plan.append(ReadCall(at, stop, width, width))
        else:
            plan.append(ReadCall(at, stop, -(-width // by) * by, by))
    return plan
