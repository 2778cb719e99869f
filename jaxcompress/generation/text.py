"""Text input and output of a model: streamed decoding of tokens, and encoding of text of any length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxcompress.inputs.described import described
from jaxcompress.inputs.text import clean, decoded
from jaxcompress.inputs.tokenizer import TokenIds as TokenIds
from jaxcompress.inputs.tokenizer import Tokenizer as Tokenizer

_REPLACEMENT = "\ufffd"  # printed by a decoder for bytes that do not, or not yet, form a character
_CHARACTER_BYTES = 4  # UTF-8's longest character
_FIRST_HALF = 0xD800  # surrogates do not occur in clean text, so they can serve as marks
_WINDOW = 32  # maximum number of unprintable tokens that a stream keeps; any number above 16 works

# No tokenizer in use joins a word with a following line break, or looks across that place to split text: the regular
# expressions of GPT-2, Llama 3, Qwen and o200k give the same tokens with a cut there as without. A cut after the line
# break would change tokens: GPT-2 splits a run of white space by the text after it, and Llama 3 joins ".\n".
_CUTS = (
    re.compile(r".*[^\W_](?=\r?\n)", re.DOTALL),
    re.compile(r".*[^\W_](?= [^\W_])", re.DOTALL),
    re.compile(r".*\S(?=\s)", re.DOTALL),
)
_LAST_WORD = re.compile(r"\S{1,64}\Z")


class TextStream:
    """Turns tokens into text as they arrive; the text is the concatenation of all results of `push` and `finish`.

    Text is returned as soon as no later token can change it: a character whose bytes are spread over several tokens
    waits for the last of these tokens. Each token costs a constant amount of work. Only the tokens since the last
    printed character are decoded, with the tokens of the previous character as context (it decides about leading
    spaces).

    Args:
      tokenizer: the model's tokenizer.
      after: the ids [T] before the first pushed token, e.g. the prompt. With them, the output continues their text (its
        leading space is kept); without them it begins a new text.
      skip_special: omit special tokens.

    Raises:
      ValueError: `tokenizer` is no tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] | TokenIds = (), skip_special: bool = True) -> None:
        check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._restart([token for token in _each(after[-_WINDOW:]) if not self._skipped(token)][-_CHARACTER_BYTES:])

    def push(self, tokens: int | np.integer | Sequence[int | np.integer] | TokenIds) -> str:
        """Takes the next token id, or several [T]; returns the text that has become final.

        For one token it is often "" or the text of the previous token. -1, the padding of finished rows, is left out.

        Raises:
          ValueError: these are not the token ids of one row. Of [B, T], as `generate` yields them, each row has a
            stream of its own.
        """
        return "".join(self._push(token) for token in _each(tokens))

    def _push(self, token: int) -> str:
        if self._skipped(token):
            return ""
        self._pending.append(token)
        body = self._body()
        held = _undecided(body)
        if body and not held:
            text = body[self._printed :]
            self._restart(self._pending)
            return text
        if len(self._pending) > _WINDOW:
            return self._shorten(body)
        return self._print(body, len(body) - held)

    def finish(self) -> str:
        """The text still held back, at the end of the tokens; an unfinished character appears as U+FFFD."""
        body = self._body()
        text = body[self._printed :]
        self._restart(self._pending)
        return text

    def _skipped(self, token: int) -> bool:
        return self._skip_special and self._tokenizer.is_special(token)

    def _restart(self, context: list[int]) -> None:
        self._context = context
        self._context_text = self._decode(context)
        self._pending: list[int] = []
        self._printed = 0  # characters of the pending tokens' text already returned

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, self._skip_special) if tokens else ""

    def _body(self) -> str:
        """The text of the pending tokens."""
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # SentencePiece decodes a run of byte tokens only if the whole run is UTF-8, so an unfinished character would
        # corrupt the finished ones of the context; bytes need no context.
        return self._decode(self._pending)

    def _print(self, body: str, end: int) -> str:
        text = body[self._printed : end]
        self._printed = max(self._printed, end)
        return text

    def _shorten(self, body: str) -> str:
        """Drops all but the last tokens of a long run without printable text, so that memory stays bounded."""
        # Three unfinished characters of up to three bytes may be undecided, and the cut may go through a fourth.
        kept = 3 * _CHARACTER_BYTES
        self._context = self._pending[-kept - _CHARACTER_BYTES : -kept]
        self._context_text = self._decode(self._context)
        self._pending = self._pending[-kept:]
        rest = self._body()
        held = _undecided(rest)
        text = body[self._printed : len(body) - held]
        self._printed = len(rest) - held
        return text


class StopStrings:
    """Ends a text at the first of several stop strings; no part of the stop string is printed.

    Text that may begin a stop string is held back until this is decided. The result does not depend on how the text is
    cut into pieces: the stop string that is complete first counts.

        stop = StopStrings(["\\n\\n", "User:"])
        for token in tokens:
            print(stop.push(stream.push(token)), end="")
            if stop.stopped:
                break
        else:
            print(stop.push(stream.finish()) + stop.finish())

    Attributes:
      stopped: whether a stop string was found; from then on `push` and `finish` return "".
      found: the stop string that was found, or None.

    Raises:
      ValueError: a stop string is empty, or what was given is no list of strings.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        if isinstance(strings, str) or not isinstance(strings, Iterable):
            hint = f"write [{strings!r}]" if isinstance(strings, str) else "() for none"
            raise ValueError(f"stop strings must be a list of strings, got {strings!r:.60}; {hint}")
        if not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop strings must be strings that are not empty, got {list(strings)!r}")
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def push(self, text: str) -> str:
        """Takes the next piece of text; returns the text that can be printed."""
        if self.stopped:
            return ""
        text = self._held + text
        starts = ((text.find(string), string) for string in self._strings)
        hits = [(start + len(string), start, string) for start, string in starts if start >= 0]
        if hits:
            _, end, self.found = min(hits)
            self._held = ""
        else:
            end = len(text) - self._beginning(text)
            self._held = text[end:]
        return text[:end]

    def finish(self) -> str:
        """Returns the text still held back when the text ends without a stop string."""
        text, self._held = self._held, ""
        return text

    def _beginning(self, text: str) -> int:
        """The number of characters at the end of the text that may begin a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._strings)), 0)


class TextUntil:
    """Turns tokens into text as they arrive, up to a stop, which is not printed: `TextStream` with `StopStrings`.

    Stop strings may be or contain names of special tokens, which do not appear in the text.

        text = TextUntil(tokenizer, stop=["<|eot_id|>", "User:"], after=prompt)
        for tokens in decode_stream(model, state, 200, stream_every=8):
            print(text.push(tokens[0]), end="")
            if text.stopped:
                break
        print(text.finish())

    Args:
      tokenizer: the model's tokenizer.
      stop: strings to stop at.
      stop_ids: token ids to stop at.
      after: as for `TextStream`.

    Attributes:
      ids: the token ids that end the text: `stop_ids`, and the special tokens whose names are stop strings. Pass them
        as `GenerationConfig.stop_token_ids` to end the decoding loop early.
      stopped: whether a stop was found; from then on `push` returns "".

    Raises:
      ValueError: as `StopStrings` and `TextStream`; `stop_ids` is no list of token ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        after: Sequence[int] | TokenIds = (),
    ) -> None:
        StopStrings(stop)  # checks that they are strings
        check_tokenizer(tokenizer)
        special = tokenizer.special_tokens()
        self.ids = tuple(dict.fromkeys((*_listed(stop_ids), *(special[s] for s in stop if s in special))))
        # For the matcher, a special token is one character that occurs in no text.
        inside = [name for name in sorted(special, key=len, reverse=True) if any(name in string for string in stop)]
        mark = {name: chr(_FIRST_HALF + n) for n, name in enumerate(inside)}
        self._marks = {special[name]: character for name, character in mark.items()}
        names = re.compile("|".join(map(re.escape, inside)) or r"(?!)")
        marked = [names.sub(lambda found: mark[found[0]], string) for string in map(clean, stop)]
        self._strings = StopStrings(list(dict.fromkeys([*map(clean, stop), *marked])))
        self._stream = TextStream(tokenizer, after)
        self._ended = False

    @property
    def stopped(self) -> bool:
        return self._ended or self._strings.stopped

    def push(self, tokens: int | np.integer | Sequence[int | np.integer] | TokenIds) -> str:
        """Takes the next token id, or several [T]; returns the text that has become final.

        -1, the padding of finished rows, is left out, and so is what follows a stop. Raises as `TextStream.push`.
        """
        return "".join(self._push(token) for token in _each(tokens))

    def _push(self, token: int) -> str:
        if self.stopped:
            return ""
        if token in self.ids:
            text = self.finish()
            self._ended = True
            return text
        return self._without_marks(self._strings.push(self._marks.get(token) or self._stream.push(token)))

    def finish(self) -> str:
        """Returns the text still held back when the tokens end without a stop; "" after a stop."""
        if self.stopped:
            return ""
        return self._without_marks(self._strings.push(self._stream.finish()) + self._strings.finish())

    def _without_marks(self, text: str) -> str:
        return text.translate(dict.fromkeys(map(ord, self._marks.values()))) if self._marks else text


@runtime_checkable
class Readable(Protocol):
    """An object with `read`: a file, standard input, or the file of a socket."""

    def read(self, size: int, /) -> Any: ...


def encode_stream(
    readable: Readable, tokenizer: Tokenizer, chunk_chars: int = 65536, *, add_bos: bool = True
) -> Iterator[TokenIds]:
    """Tokenizes text of any length, piece by piece; memory does not grow with it.

    The pieces end before a line break that follows a letter or digit; there byte-level BPE (GPT-2, Llama 3, Qwen) gives
    the tokens of the whole text. If a chunk has no such place, the piece ends before a space between words, else before
    any white space, else anywhere. Only such a cut, or a tokenizer that joins words, may change the tokens around it.
    Line breaks are kept as they are.

    Args:
      readable: a binary file (`open(path, "rb")`, `sys.stdin.buffer`) of UTF-8, with or without a byte order mark, or
        a text file, whose underlying bytes are read if available.
      tokenizer: the model's tokenizer.
      chunk_chars: approximate number of characters tokenized at a time; at most four times as many are held in memory.
      add_bos: begin with the tokenizer's begin token, if the model expects one.

    Yields:
      Token ids [T] int32, T >= 1.

    Raises:
      ValueError: `readable` cannot be read from, or `tokenizer` is no tokenizer; chunk_chars is not positive; the input
        is not UTF-8 (the message names the byte offset). The tokens before that place have been yielded by then.
    """
    if not isinstance(readable, Readable):
        raise ValueError(
            f"text is streamed from an open file, not from {described(readable)}; open it first: open(path, 'rb'), or "
            "encode a text itself: tokenizer.encode(text)"
        )
    check_tokenizer(tokenizer)
    if chunk_chars < 1:
        raise ValueError(f"chunk_chars must be at least 1, got {chunk_chars}")
    return _encode_pieces(_pieces(_texts(readable, chunk_chars), chunk_chars), tokenizer, add_bos)


def _encode_pieces(pieces: Iterator[str], tokenizer: Tokenizer, add_bos: bool) -> Iterator[TokenIds]:
    opening = tokenizer.opening(add_bos)
    if opening:
        yield np.array(opening, np.int32)
    context = ""
    for piece in pieces:
        ids = tokenizer.encode_after(context, piece)
        if len(ids):
            yield ids
        last = _LAST_WORD.search(piece)
        context = last[0] if last else ""


def _pieces(texts: Iterator[str], size: int) -> Iterator[str]:
    buffer = ""
    for text in texts:
        buffer += text
        if len(buffer) < size:
            continue
        cut = next((found.end() for found in (cut.match(buffer) for cut in _CUTS) if found), len(buffer))
        yield buffer[:cut]
        buffer = buffer[cut:]
    if buffer:
        yield buffer


def _texts(readable: Readable, size: int) -> Iterator[str]:
    """The text of a file in blocks of at most `size` characters."""
    source = getattr(readable, "buffer", readable)
    return decoded(_blocks(source, size), "the input")


def _blocks(source: Readable, size: int) -> Iterator[bytes | str]:
    while block := source.read(size):
        yield block


def check_tokenizer(given: Any) -> None:
    """Raises ValueError if `given` is no tokenizer; the message names the tokenizer that it has, if it has one."""
    if not isinstance(given, Tokenizer):
        hint = "; give its .tokenizer" if hasattr(type(given), "tokenizer") else ""
        raise ValueError(f"a Tokenizer is expected, not {described(given)}{hint}")


def _each(tokens: int | np.integer | Sequence[int | np.integer] | TokenIds) -> Iterator[int]:
    """Token ids, one by one, without -1. Raises ValueError if they are not those of one row."""
    given = np.atleast_1d(np.asarray(tokens))
    if given.ndim > 1:
        raise ValueError(f"the token ids of one row are expected, not {list(given.shape)}; push one row: tokens[0]")
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"token ids are whole numbers, not {described(tokens)}; encode a text with tokenizer.encode")
    return (token for token in given.tolist() if token != -1)


def _listed(ids: Sequence[int]) -> list[int]:
    """A list of token ids. Raises ValueError if it is none."""
    if not np.ndim(ids):
        hint = f"; write [{ids}]" if isinstance(ids, int | np.integer) else "; () for none"
        raise ValueError(f"stop_ids must be a list of token ids, not {described(ids)}{hint}")
    return list(_each(ids))


def _undecided(text: str) -> int:
    """The number of characters at the end of a text that later tokens may still change.

    An unfinished character appears as one U+FFFD (byte-level) or as one for each of its up to three bytes
    (SentencePiece). Longer runs of U+FFFD are bytes that never become text.
    """
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _CHARACTER_BYTES - 1)
