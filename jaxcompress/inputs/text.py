"""External text: only this module turns bytes and strings of unknown origin into clean text.

Clean text is a string without surrogates. Every tokenizer accepts it and every file can hold it. The rules:

- Bytes are UTF-8. A byte order mark at the beginning is left out. Other bytes are refused; the error names the place.
- JSON and Python strings can contain a surrogate (`"\\ud83d"`, half of an emoji). A surrogate pair becomes its
  character, and a lone surrogate becomes U+FFFD, so that one cut emoji does not stop a corpus.
- Line ends, NUL and other control characters are text, and stay as they are.

The rules for command-line arguments are stricter (`jaxcompress.cli.arguments`), since the user can correct them.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from jaxcompress.inputs.described import described

DEPTH = 200
"""The largest nesting depth of lists and objects in JSON and TOML."""

_HALF = re.compile("[\ud800-\udfff]")
_SPELLED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_BOM = "\ufeff"
_OTHER_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_SIGNATURES = {
    b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture", b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "a gzip archive", b"GGUF": "a GGUF model",
}  # fmt: skip
"""How common files that are not text begin."""
_LOOKED_AT = 64  # the number of bytes that are inspected to detect UTF-16 without a byte order mark


def clean(text: str) -> str:
    """A text without surrogates: surrogate pairs become characters, lone surrogates become U+FFFD.

    Raises:
      ValueError: `text` is no string.
    """
    _check_string(text)
    if text.isascii() or not _HALF.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def masked(text: str) -> str:
    """A text with every surrogate replaced by U+FFFD. The length is unchanged, so offsets stay valid.

    Raises:
      ValueError: `text` is no string.
    """
    _check_string(text)
    return text if text.isascii() else _HALF.sub("\ufffd", text)


def _check_string(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a text is a string, not {described(text)}; give texts one by one, and bytes decoded")


def decode(data: bytes, what: str) -> str:
    """Decodes UTF-8 bytes to clean text.

    Args:
      what: the source of the bytes, for messages.

    Raises:
      ValueError: the bytes are not UTF-8; the message names the actual encoding or the offending byte.
    """
    return "".join(decoded([data], what))


def decoded(blocks: Iterable[bytes | str], what: str) -> Iterator[str]:
    """Like `decode`, for bytes in blocks that may be cut anywhere. Blocks of text are cleaned, too.

    Raises:
      ValueError: as `decode`. The text before the error has been yielded by then.
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
    """The characters that a block completes. An empty block marks the end. `offset` is the position of the block."""
    unfinished = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        wrong = offset - unfinished + error.start
        kind = _kind_of(error.object if offset == unfinished else b"")
        remedy = f"it is {kind}, not a text" if kind else "convert it first, e.g. iconv -f LATIN1 -t UTF-8"
        raise ValueError(
            f"{what} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {wrong} ({error.reason}); {remedy}"
        ) from None


def _kind_of(beginning: bytes) -> str | None:
    """What a file is that begins so and is no UTF-8; None if it may be a text in another encoding."""
    known = next((kind for mark, kind in _SIGNATURES.items() if beginning.startswith(mark)), None)
    return known or ("binary" if b"\0" in beginning else None)


def _refuse_other_encodings(block: bytes, what: str) -> None:
    name = next((name for mark, name in _OTHER_BOMS.items() if block.startswith(mark)), None)
    even, odd = block[:_LOOKED_AT:2], block[1:_LOOKED_AT:2]
    if len(odd) >= 4 and any(not any(a) and all(b) for a, b in [(even, odd), (odd, even)]):  # ASCII as UTF-16
        name = name or "UTF-16"
    if name:
        raise ValueError(f"{what} is {name}, not UTF-8; convert it first, e.g. iconv -f {name} -t UTF-8")


def read_text(path: Path | str | None) -> str:
    """The text of a UTF-8 file, or of standard input if the path is None or `-`.

    Raises:
      ValueError: the content is not UTF-8, or standard input is closed.
      FileNotFoundError: there is no such file, or it is a folder.
      OSError: the file cannot be read.
    """
    with opened(path) as file:
        return decode(file.read(), named(path))


@contextmanager
def opened(path: Path | str | None) -> Iterator[BufferedIOBase]:
    """A file, or standard input if the path is None or `-`, to read bytes from; standard input stays open.

    Raises:
      ValueError: standard input is closed.
      FileNotFoundError: there is no such file, or it is a folder.
      OSError: the file cannot be read.
    """
    check_file(path)
    if path is None or str(path) == "-":
        yield standard_input()
        return
    with open(path, "rb") as file:
        yield file


def check_file(path: Path | str | None) -> None:
    """That there is a file, or standard input if the path is None or `-`, without reading it. Raises as `opened`."""
    if path is None or str(path) == "-":
        standard_input()
    elif Path(path).is_dir():
        raise FileNotFoundError(f"{path} is a folder; give one file of it")
    elif not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path} (looked for in {Path.cwd()})")
    elif not os.access(path, os.R_OK):
        raise PermissionError(f"{path} cannot be read: permission denied")


def standard_input() -> BufferedIOBase:
    """Standard input, as a binary file. Raises ValueError if it is closed."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; there is nothing to read")
    return cast(BufferedIOBase, sys.stdin.buffer)


def named(path: Path | str | None) -> str:
    """The name of a file in messages."""
    return "standard input" if path is None or str(path) == "-" else str(path)


def parse_json(text: str, what: str, *, parse_float: Callable[[str], Any] | None = None) -> Any:
    """Parses a JSON text. The strings of the value are clean.

    Args:
      parse_float: what a number with a fraction or an exponent becomes; None: a float.

    Raises:
      ValueError: the text is not JSON, is nested deeper than `DEPTH`, or has an object with two keys that are equal
        once clean.
    """
    value = _parsed(partial(json.loads, parse_float=parse_float), text, what, "JSON")
    return clean_value(value, what) if _SPELLED_HALF.search(text) else value


def parse_toml(text: str, what: str) -> dict[str, Any]:
    """Parses a TOML text.

    Raises:
      ValueError: the text is not TOML, or is nested deeper than `DEPTH`.
    """
    return _parsed(tomllib.loads, text, what, "TOML")


def json_lines(path: Path | str) -> Iterator[tuple[int, str, Any]]:
    """Yields the number, the name for messages and the value of each line of a JSON Lines file.

    Lines of white space are left out. Only one line is in memory at a time.

    Raises:
      OSError: the file cannot be read; raised at the call.
      ValueError: a line is not UTF-8 or not JSON; the message names the file and the line; raised when the line is
        reached.
    """
    with open(path, "rb"):
        pass
    return _json_lines(path)


def _json_lines(path: Path | str) -> Iterator[tuple[int, str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):  # split at \n only: strings may contain other line separators
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
    """Cleans the strings and keys of a JSON value from `json.loads`.

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
    r"""Decodes a flag's text: \n, \r, \t and \\ become a line feed, a carriage return, a tab and a backslash."""
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[match[1]], text)
