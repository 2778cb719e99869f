"""Text in and out of a model: a model folder's tokenizer, text that appears as tokens arrive, text of any length.

Only the `tokenizers` library is imported, which takes milliseconds; `transformers` is loaded when a chat template is
asked for, and not before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.reading import clean, decoded, masked

TokenIds = Int[np.ndarray, "T"]

_REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are not, or not yet, a character
_CHARACTER_BYTES = 4  # UTF-8's longest character
_FIRST_HALF = 0xD800  # surrogates, which clean text does not have, are free for other uses
_WINDOW = 32  # tokens without printable text that a stream keeps; any number above 16 is right

# Between a word and a line break no tokenizer in use joins anything, and nothing there is decided by looking across
# it: the regular expressions of GPT-2, Llama 3, Qwen and o200k all give the same tokens with a cut as without. (After
# the line break they would not: GPT-2 splits a run of white space by what follows it, Llama 3 joins ".\n".)
_CUTS = (
    re.compile(r".*[^\W_](?=\r?\n)", re.DOTALL),
    re.compile(r".*[^\W_](?= [^\W_])", re.DOTALL),
    re.compile(r".*\S(?=\s)", re.DOTALL),
)
_LAST_WORD = re.compile(r"\S{1,64}\Z")


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
      folder: where it was read from.
      bos_id: the token that begins a text, or None.
      eos_ids: the tokens that end one: those of generation_config.json (else config.json), and the tokenizer's own.
      pad_id: a token to fill batches with; the end token or 0 where the model has none, since padding is never read.
      adds_bos: whether a text begins with `bos_id`: the post-processor of tokenizer.json says so, and where it has
        none, `add_bos_token` of tokenizer_config.json.
      vocab_size: the number of tokens; a model may have more logits, for padding.
    """

    def __init__(self, folder: str | Path):
        """Reads tokenizer.json and, where present, the configs beside it.

        Raises:
          FileNotFoundError: the folder has no tokenizer.json.
          ValueError: tokenizer.json or a config cannot be read, or names a token that is not in the vocabulary.
        """
        self.folder = Path(folder)
        self._fast = _read_fast(self.folder)
        self._special = frozenset(
            token for token, added in self._fast.get_added_tokens_decoder().items() if added.special
        )
        config = _read_json(self.folder / "special_tokens_map.json") | _read_json(self._config_path)
        model = _read_json(self.folder / "config.json") | _read_json(self.folder / "generation_config.json")
        bos, eos = self._named(config.get("bos_token")), self._named(config.get("eos_token"))
        self.bos_id = next(iter(bos + _as_ids(model.get("bos_token_id"))), None)
        self.eos_ids = tuple(dict.fromkeys(_as_ids(model.get("eos_token_id")) + eos))
        self.pad_id = (*_as_ids(model.get("pad_token_id")), *self.eos_ids, 0)[0]
        self.vocab_size = self._fast.get_vocab_size()
        self.adds_bos = self.bos_id is not None and (
            bool(config.get("add_bos_token"))
            if self._fast.post_processor is None
            else self._fast.encode("").ids[:1] == [self.bos_id]
        )

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.folder)!r})"

    def vocabulary(self) -> dict[str, int]:
        """From tokens, as the tokenizer spells them, to ids."""
        return self._fast.get_vocab()

    def encode(self, text: str, add_bos: bool = True) -> TokenIds:
        """Token ids [T] int32.

        Names of special tokens in the text become those tokens, as with Hugging Face.

        Args:
          text: any string; halves of characters are read as U+FFFD (see `jaxcompress.reading`).
          add_bos: begin with `bos_id` if the model is used to it (`adds_bos`). A chat template writes it itself, so
            pass False for its output. No end token is ever added.
        """
        ids = self._fast.encode(clean(text), add_special_tokens=False).ids
        return np.array(self.opening(add_bos) + ids, np.int32)

    def encode_with_places(self, text: str) -> tuple[TokenIds, Int[np.ndarray, "T 2"]]:
        """Token ids [T] without `opening`, and the characters text[start:end] that each stands for, [T, 2].

        Halves of characters are read as U+FFFD, pairs of them as two.
        """
        encoding = self._fast.encode(masked(text), add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    def encode_after(self, context: str, text: str) -> TokenIds:
        """Token ids [T] int32 of a text as the continuation of `context`, whose own tokens are left out.

        It keeps a tokenizer from treating `text` as the beginning of something: SentencePiece would put a space there.
        """
        context = clean(context)
        encoding = self._fast.encode(context + clean(text), add_special_tokens=False)
        start = len(context)
        if any(first < start < end for first, end in encoding.offsets):  # a token joins the two: it would be lost
            return self.encode(text, add_bos=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return np.array([token for token, (first, _) in pairs if first >= start], np.int32)

    def opening(self, add_bos: bool = True) -> list[int]:
        """The ids that come before the first token of a text: `bos_id` or nothing."""
        return [self.bos_id] if add_bos and self.adds_bos and self.bos_id is not None else []

    def decode(self, ids: Sequence[int] | TokenIds, skip_special: bool = True) -> str:
        """The text of token ids [T]; bytes that are no UTF-8 appear as U+FFFD. Special tokens are left out."""
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def is_special(self, token: int | np.integer) -> bool:
        """Whether a token is a mark (begin, end, turn, ...) and not text."""
        return token in self._special

    def special_tokens(self) -> dict[str, int]:
        """From the names of marks to ids."""
        return {added.content: token for token, added in self._fast.get_added_tokens_decoder().items() if added.special}

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, as the model's own template writes it.

        Args:
          messages: e.g. `[{"role": "user", "content": "Hello"}]`.
          add_generation_prompt: end with what opens the model's turn.

        Returns:
          Text for `encode(text, add_bos=False)`.

        Raises:
          ValueError: the folder has no chat template, or it does not take these messages; says why.
          ImportError: transformers or jinja2 is not installed.
        """
        if not self.has_chat_template:
            raise ValueError(
                f"{self.folder} has no chat template (neither chat_template.jinja nor chat_template in "
                "tokenizer_config.json); pass a plain prompt to encode(), or use an instruction-tuned model"
            )
        chat = self._chat
        try:
            return chat.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it raises what it likes
            raise ValueError(
                f"the chat template of {self.folder} does not take these messages: {error or type(error).__name__}"
            ) from error

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` has a template to apply."""
        return (self.folder / "chat_template.jinja").exists() or bool(
            _read_json(self._config_path).get("chat_template")
        )

    @cached_property
    def _chat(self) -> Any:
        try:
            import jinja2  # noqa: F401
            import transformers
        except ImportError as error:
            raise ImportError("chat templates need two more packages: pip install transformers jinja2") from error
        return transformers.AutoTokenizer.from_pretrained(str(self.folder))

    @property
    def _config_path(self) -> Path:
        return self.folder / "tokenizer_config.json"

    def _named(self, token: str | Mapping[str, Any] | None) -> tuple[int, ...]:
        name = token.get("content") if isinstance(token, Mapping) else token
        if name is None:
            return ()
        index = self._fast.token_to_id(name)
        if index is None:
            raise ValueError(f"{self._config_path} names the token {name!r}, which tokenizer.json does not have")
        return (index,)


class TextStream:
    """Turns tokens into text as they arrive; what `push` and `finish` return, joined, is the text.

    Text is given out as soon as no later token can change it: a character whose bytes are spread over several tokens
    waits for the last of them. Each token costs a constant amount of work, for only the tokens since the last printed
    character are decoded, with those of the character before them as context (it decides about leading spaces).

    Args:
      tokenizer: of the model.
      after: the ids [T] before the first one pushed, e.g. the prompt. Given them, the output continues their text
        (its leading space is kept); without them it begins a text of its own.
      skip_special: leave out special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] | TokenIds = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._restart([token for token in map(int, after[-_WINDOW:]) if not self._skipped(token)][-_CHARACTER_BYTES:])

    def push(self, token: int | np.integer) -> str:
        """Takes the next token id; returns the text that has become final, often of the token before, often ""."""
        token = int(token)
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
        self._printed = 0  # characters of the pending tokens' text that are out

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, self._skip_special) if tokens else ""

    def _body(self) -> str:
        """The text of the pending tokens."""
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # SentencePiece spells out a run of byte tokens only if all of it is UTF-8, so an unfinished character spoils
        # the finished ones of the context; bytes need no context.
        return self._decode(self._pending)

    def _print(self, body: str, end: int) -> str:
        text = body[self._printed : end]
        self._printed = max(self._printed, end)
        return text

    def _shorten(self, body: str) -> str:
        """Forgets all but the last tokens of a long run that is no text, so that memory stays bounded."""
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
    """Ends a text at the first of several strings, of which nothing is ever printed.

    Text that may be the beginning of a stop string is held back until it is decided. How the text is cut into pieces
    makes no difference: the stop string that is complete first counts.

        stop = StopStrings(["\\n\\n", "User:"])
        for token in tokens:
            print(stop.push(stream.push(token)), end="")
            if stop.stopped:
                break
        else:
            print(stop.push(stream.finish()) + stop.finish())

    Attributes:
      stopped: whether a stop string was found; from then on `push` and `finish` return "".
      found: which one, or None.

    Raises:
      ValueError: a stop string is empty, or a plain string was given in place of a list of strings.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        if isinstance(strings, str):
            raise ValueError(f"stop strings must be a list of strings, got {strings!r}; write [{strings!r}]")
        if not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop strings must be strings that are not empty, got {list(strings)!r}")
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def push(self, text: str) -> str:
        """Takes the next piece of text; returns what can be printed."""
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
        """What is still held back, when the text ends without a stop string."""
        text, self._held = self._held, ""
        return text

    def _beginning(self, text: str) -> int:
        """How many last characters of the text may be the beginning of a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._strings)), 0)


class TextUntil:
    """Turns tokens into text as they arrive, up to a stop of which nothing is printed: `TextStream` and `StopStrings`.

    Stop strings may be, or hold, names of special tokens, of which the text itself shows nothing.

        text = TextUntil(tokenizer, stop=["<|eot_id|>", "User:"], after=prompt)
        for token in tokens:
            print(text.push(token), end="")
            if text.stopped:
                break
        print(text.finish())

    Args:
      tokenizer: of the model.
      stop: strings to stop at.
      stop_ids: token ids to stop at.
      after: as for `TextStream`.

    Attributes:
      ids: the token ids that end the text: `stop_ids`, and the special tokens that are stop strings as a whole. A loop
        that is given them (`Settings.stop`) ends early.
      stopped: whether a stop was found; from then on `push` returns "".

    Raises:
      ValueError: as `StopStrings`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        after: Sequence[int] | TokenIds = (),
    ) -> None:
        StopStrings(stop)  # are they strings?
        special = tokenizer.special_tokens()
        self.ids = tuple(dict.fromkeys((*map(int, stop_ids), *(special[s] for s in stop if s in special))))
        # The matcher meets a special token as one character that no text has.
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

    def push(self, token: int | np.integer) -> str:
        """Takes the next token id; returns the text that has become final."""
        token = int(token)
        if self.stopped:
            return ""
        if token in self.ids:
            text = self.finish()
            self._ended = True
            return text
        return self._without_marks(self._strings.push(self._marks.get(token) or self._stream.push(token)))

    def finish(self) -> str:
        """The text still held back, when the tokens end without a stop; "" after one."""
        if self.stopped:
            return ""
        return self._without_marks(self._strings.push(self._stream.finish()) + self._strings.finish())

    def _without_marks(self, text: str) -> str:
        return text.translate(dict.fromkeys(map(ord, self._marks.values()))) if self._marks else text


@runtime_checkable
class Readable(Protocol):
    """A file, standard input, a socket's file: something with `read`."""

    def read(self, size: int, /) -> Any: ...


def encode_stream(
    readable: Readable, tokenizer: Tokenizer, chunk_chars: int = 65536, *, add_bos: bool = True
) -> Iterator[TokenIds]:
    """Tokenizes text of any length, piece by piece; memory does not grow with it.

    The pieces end before a line break that follows a letter or digit, where the tokens of byte-level BPE (GPT-2,
    Llama 3, Qwen) are those of the whole text. Where a chunk has no such place, they end before a space
    between words, then before any white space, then anywhere; only such a cut, or a tokenizer that joins words, may
    change the tokens around it. Line breaks are kept as they are.

    Args:
      readable: a binary file (`open(path, "rb")`, `sys.stdin.buffer`) of UTF-8, with or without a byte order mark, or
        a text file; the bytes of the latter are read where it has them.
      tokenizer: of the model.
      chunk_chars: about how many characters are tokenized at a time; at most four times as many are held.
      add_bos: begin with the tokenizer's begin token, if the model is used to it.

    Yields:
      Token ids [T] int32, T >= 1.

    Raises:
      ValueError: chunk_chars is not positive, or the input is not UTF-8 (the message names the byte offset). What
        came before has been yielded by then.
    """
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


def _undecided(text: str) -> int:
    """How many characters at the end of a text more tokens may still change.

    An unfinished character appears as one U+FFFD (byte-level) or as one for each of its up to three bytes
    (SentencePiece). More of them are bytes that never become text.
    """
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _CHARACTER_BYTES - 1)


def _read_fast(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Only fast tokenizers (tokenizer.json) are read; a folder with a SentencePiece "
            f"model alone is converted by transformers.AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})"
        )
    try:
        fast = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
    fast.no_truncation()
    fast.no_padding()
    return fast


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """An id, a list of ids or nothing, as configs give them."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
