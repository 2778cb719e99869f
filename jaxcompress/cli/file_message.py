"""A file of any length as a user's message: what a tokenizer's chat template writes before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxcompress.generation.text import Tokenizer

_MARK = "jaxcompress7c1e"
_PROBE = f'{_MARK}<b>&amp; "it\'s" {{{{ x }}}}\\\n\n  {_MARK}'
"""What a template that escapes, cuts or rewrites a message would not leave as it is."""


class Frame(NamedTuple):
    """What stands around a content.

    Attributes:
      before, after: text of the template.
      trims_start, trims_end: whether the template takes white space off that end of the content.
    """

    before: str
    after: str
    trims_start: bool
    trims_end: bool


def written(tokenizer: Tokenizer, content: str, system: str | None, arguments: Mapping[str, Any]) -> str:
    """The conversation that begins with a user's message, after a system message if there is one."""
    from jaxcompress.generation.turns import begun, of_user, turn_text

    return turn_text(tokenizer, begun(system), of_user(content), arguments)


def joined(content: str, question: str | None) -> str:
    """A content and a question about it, as one message."""
    return content if question is None else f"{content}\n\n{question}"


def frame(tokenizer: Tokenizer, system: str | None, question: str | None, arguments: Mapping[str, Any]) -> Frame:
    """What the chat template writes around a content, and a question about it.

    Raises:
      ValueError: there is no template, it refuses the messages, or it changes what it is given.
    """
    around = lambda content: written(tokenizer, joined(content, question), system, arguments)
    whole = around(_PROBE)
    before, probe, after = whole.partition(_PROBE)
    if not probe or _PROBE in after or before + _MARK + after != around(_MARK):
        raise ValueError(
            f"the chat template of {tokenizer.folder} changes the content of a message, so that a file cannot be read "
            "piece by piece; leave --chat out"
        )
    spaced = around(f"\n {_PROBE}\n ")
    trims = not spaced.startswith(f"{before}\n ")
    return Frame(before, after, trims, trims and question is None)


def framed(around: Frame, pieces: Iterable[str]) -> Iterator[str]:
    """The text of the whole conversation, piece by piece.

    Raises:
      ValueError: the content is empty.
    """
    yield around.before
    begun, space = False, ""
    for piece in pieces:
        if around.trims_start and not begun:
            piece = piece.lstrip()
        if not piece:
            continue
        begun = True
        piece = space + piece
        kept = piece.rstrip() if around.trims_end else piece
        space = piece[len(kept) :]
        yield kept
    if not begun:
        raise ValueError("the file is empty; there is nothing to read")
    yield around.after


class Pieces:
    """Pieces of text as something to read from, for `jaxcompress.generation.encode_stream`."""

    def __init__(self, pieces: Iterable[str]):
        self._pieces = filter(None, pieces)

    def read(self, size: int, /) -> str:
        """The next piece, whatever its size; "" at the end."""
        return next(self._pieces, "")
