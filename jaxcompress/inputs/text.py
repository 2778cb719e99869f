"""Text from outside: bytes and strings of unknown origin become clean text here, and nowhere else.

Clean text is what every tokenizer takes and every file can hold: a string without surrogates. The rules:

- Bytes are UTF-8. A byte order mark at the beginning is left out. Anything else is refused, with the place.
- JSON can spell half of a character (`"\\ud83d"`, a cut emoji), and so can a Python string. Two halves that belong
  together become the character, any other one U+FFFD: one cut emoji does not stop a corpus.
- Line ends, NUL and other control characters are text, and stay as they are.

Arguments of the command line are stricter, see `jaxcompress.cli.arguments`: a person is there to mend them.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

DEPTH = 200
"""So deep may lists and objects of JSON and TOML be nested."""

_HALF = re.compile("[\ud800-\udfff]")
_SPELLED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_BOM = "\ufeff"
_OTHER_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_LOOKED_AT = 64  # bytes, to see UTF-16 without a byte order mark


def clean(text: str) -> str:
    """A text without surrogates: pairs of them become characters, others U+FFFD."""
    if text.isascii() or not _HALF.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def masked(text: str) -> str:
    """A text of the same length, every surrogate U+FFFD: for where places in the text count."""
    return text if text.isascii() else _HALF.sub("\ufffd", text)


def decode(data: bytes, what: str) -> str:
    """The text of UTF-8 bytes.

    Args:
      what: they are, for messages.

    Raises:
      ValueError: not UTF-8; says what it is instead, or names the byte.
    """
    return "".join(decoded([data], what))


def decoded(blocks: Iterable[bytes | str], what: str) -> Iterator[str]:
    """The same of bytes that come in blocks, cut anywhere; blocks of text are cleaned, too.

    Raises:
      ValueError: as `decode`. What came before has been yielded by then.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, half, begun = 0, "", False
    for block in blocks:
        if isinstance(block, str):
            block = half + block
            half = block[-1:] if "\ud800" <= block[-1:] <= "\udbff" else ""
            yield clean(block[:-1] if half else block)
            continue
        if offset == 0:
            _refuse_other_encodings(block, what)
        text = _decoded(decoder, block, offset, what)
        offset += len(block)
        yield text if begun else text.removeprefix(_BOM)
        begun = begun or bool(text)
    yield clean(half) + _decoded(decoder, b"", offset, what)


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, what: str) -> str:
    """The characters that a block completes; an empty block is the end. `offset` is where the block begins."""
    unfinished = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        wrong = offset - unfinished + error.start
        raise ValueError(
            f"{what} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {wrong} ({error.reason}); "
            "convert it first, e.g. iconv -f LATIN1 -t UTF-8"
        ) from None


def _refuse_other_encodings(block: bytes, what: str) -> None:
    name = next((name for mark, name in _OTHER_BOMS.items() if block.startswith(mark)), None)
    even, odd = block[:_LOOKED_AT:2], block[1:_LOOKED_AT:2]
    if len(odd) >= 4 and any(not any(a) and all(b) for a, b in [(even, odd), (odd, even)]):  # ASCII as UTF-16
        name = name or "UTF-16"
    if name:
        raise ValueError(f"{what} is {name}, not UTF-8; convert it first, e.g. iconv -f {name} -t UTF-8")


def read_text(path: Path | str | None) -> str:
    """The text of a UTF-8 file, or of standard input for None and `-`.

    Raises:
      ValueError: not UTF-8; standard input is closed.
      OSError: the file cannot be read.
    """
    data = standard_input().read() if path is None or str(path) == "-" else Path(path).read_bytes()
    return decode(data, named(path))


def standard_input() -> BufferedIOBase:
    """Standard input, as a binary file. Raises ValueError if it is closed."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; there is nothing to read")
    return cast(BufferedIOBase, sys.stdin.buffer)


def named(path: Path | str | None) -> str:
    """What a message calls a file."""
    return "standard input" if path is None or str(path) == "-" else str(path)


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text, its strings clean.

    Raises:
      ValueError: not JSON; nested more than `DEPTH` deep; two keys of an object that are the same when clean.
    """
    value = _parsed(json.loads, text, what, "JSON")
    return clean_value(value, what) if _SPELLED_HALF.search(text) else value


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """The table of a TOML text. Raises ValueError: not TOML; nested more than `DEPTH` deep."""
    return _parsed(tomllib.loads, text, what, "TOML")


def json_lines(path: Path | str) -> Iterator[tuple[int, str, Any]]:
    """Number, name for messages, and value of each line of a file of JSON lines; lines of white space are left out.

    One line is in memory at a time.

    Raises:
      OSError: the file cannot be read; raised at the call.
      ValueError: a line is not UTF-8 or not JSON; names file and line; raised when the line is reached.
    """
    with open(path, "rb"):
        pass
    return _json_lines(path)


def _json_lines(path: Path | str) -> Iterator[tuple[int, str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):  # cut at \n only: strings may hold the other separators of lines
            where = f"{path}, line {number}"
            text = decode(line, where)
            if text.strip():
                yield number, where, parse_json(text, where)


def _parsed(parse: Callable[[str], Any], text: str, what: str, kind: str) -> Any:
    try:
        value = parse(text)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply; {DEPTH} levels are read") from None
    except ValueError as error:
        raise ValueError(f"{what} is not {kind}: {error}") from None
    if text.count("[") + text.count("{") > DEPTH:
        _check_depth(value, what)
    return value


def _check_depth(value: Any, what: str) -> None:
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > DEPTH:
            raise ValueError(f"{what} is nested too deeply; {DEPTH} levels are read")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()


def clean_value(value: Any, what: str) -> Any:
    """A JSON value, as `json.loads` gives it, with clean strings and keys.

    Raises:
      ValueError: as `parse_json`.
    """
    _check_depth(value, what)
    return _cleaned(value, what)


def _cleaned(value: Any, what: str) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list | tuple):
        return [_cleaned(inner, what) for inner in value]
    if not isinstance(value, Mapping):
        return value
    keys = {key: clean(key) if isinstance(key, str) else key for key in value}
    if len(set(keys.values())) < len(keys):
        raise ValueError(f"{what} has keys that differ only in halves of characters: {', '.join(map(ascii, keys))}")
    return {keys[key]: _cleaned(inner, what) for key, inner in value.items()}


def unescaped(text: str) -> str:
    r"""A flag's text, in which \n, \r, \t and \\ stand for a line feed, a carriage return, a tab and a backslash."""
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[match[1]], text)
