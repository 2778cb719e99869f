"""Reads the header of a GGUF file: its metadata and the positions of its tensors.

GGUF is llama.cpp's format: one file with a model's shape, tokenizer and weights. The layout is specified in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3 are read, little-endian.

A file may hold anything. Every length is checked against the file size before anything is read or allocated, so a
damaged file causes an error and allocates no memory. (`gguf.GGUFReader` checks no lengths, and takes seconds to read
a vocabulary.)
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
SUFFIX = ".gguf"

# From GGUF's type numbers to NumPy's names, and from those to `struct` formats.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_FORMATS = {
    "<u1": "<B", "<i1": "<b", "<u2": "<H", "<i2": "<h", "<u4": "<I", "<i4": "<i", "<f4": "<f", "?": "<?", "<u8": "<Q",
    "<i8": "<q", "<f8": "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

MOST_STRING, MOST_STRINGS, MOST_ENTRIES, MOST_TENSORS, MOST_AXES = 2**24, 2**24, 2**16, 2**20, 4
"""Upper limits: bytes of a string, strings of a list, entries, tensors, axes of a tensor. No model comes near them."""


class TensorPlace(NamedTuple):
    """The position of a tensor in its file.

    Attributes:
      name: the name in GGUF, e.g. "blk.0.attn_q.weight".
      shape: [out, in], as in safetensors; GGUF writes it in the reverse order.
      kind: the number of the tensor's type, a `gguf.GGMLQuantizationType`.
      start: the offset of the first byte from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


class Header(NamedTuple):
    """The part of a GGUF file before its weights.

    Attributes:
      path: the path of the file.
      metadata: numbers, strings, NumPy arrays and lists of strings, by key.
      tensors: the positions of the tensors, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: list[TensorPlace]


def is_gguf(path: Path) -> bool:
    """Whether to read a path as GGUF. This holds for any file, since every other checkpoint is a folder."""
    return path.is_file()


def read_header(path: Path) -> Header:
    """Reads the metadata of a GGUF file and the table of its tensors. No weight is read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not GGUF, is cut off or damaged, or has an unknown version; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def entry(metadata: Mapping[str, Any], key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """A value of the metadata, or None if the key is absent.

    Args:
      kind: the Python type that the value must have.
      what: that type in words, for the message.

    Raises:
      ValueError: the value has another type.
    """
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise ValueError(f"{key} must be {what}, not {value!r:.80}")
    return value


class _Cursor:
    """Reads values one after another from a memory map, and never beyond the end."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.data = np.frombuffer(self.bytes, np.uint8)
        self.at = 0

    def skip(self, size: int, what: str) -> int:
        """The offset of the next `size` bytes. Moves the cursor past them."""
        start = self.at
        if size > len(self.data) - start:
            raise ValueError(f"the file ends within {what} (byte {len(self.data):,}): it is cut off or damaged")
        self.at = start + size
        return start

    def number(self, kind: str, what: str) -> Any:
        form = _FORMATS[kind]
        start = self.skip(struct.calcsize(form), what)
        return struct.unpack_from(form, self.bytes, start)[0]

    def count(self, kind: str, most: int, what: str) -> int:
        value = self.number(kind, what)
        if value > most:
            raise ValueError(f"{what} is {value:,}, at most {most:,} is known: the file is damaged")
        return value

    def string(self, what: str) -> str:
        size = self.count("<u8", MOST_STRING, f"the length of {what}")
        start = self.skip(size, what)
        try:
            return bytes(self.bytes[start : start + size]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8: {error.reason} at its byte {error.start}") from None

    def strings(self, count: int, what: str) -> list[str]:
        """Reads `count` strings in one loop, for speed: vocabularies have hundreds of thousands."""
        data = self.bytes
        found, at, end, unpack = [], self.at, len(data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if end - at < 8 or (size := unpack(data, at)[0]) > end - at - 8:
                raise ValueError(f"the file ends within {what} (byte {end:,}): it is cut off or damaged")
            found.append(bytes(data[at + 8 : at + 8 + size]))
            at += 8 + size
        self.at = at
        try:
            return [one.decode("utf-8") for one in found]
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} has an entry that is not UTF-8: {error.object!r:.60}") from None


def _read(path: Path) -> Header:
    if not path.stat().st_size:
        raise ValueError("the file is empty, not GGUF")
    cursor = _Cursor(path)
    if (magic := bytes(cursor.bytes[:4])) != MAGIC:
        raise ValueError(f"not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    cursor.skip(4, "its header")
    version = cursor.number("<u4", "its header")
    if version not in (2, 3):
        big = version and not version & 0xFFFF
        raise ValueError(
            "big-endian GGUF is not read" if big else f"GGUF version {version:,} is not known; 2 and 3 are"
        )
    tensors = cursor.count("<u8", MOST_TENSORS, "the number of tensors")
    entries = cursor.count("<u8", MOST_ENTRIES, "the number of entries")
    metadata: dict[str, Any] = {}
    for number in range(entries):
        key = cursor.string(f"the name of entry {number}")
        if key in metadata:
            raise ValueError(f"{key!r:.80} is there twice")
        metadata[key] = _value(cursor, cursor.number("<u4", f"{key!r:.80}"), f"{key!r:.80}")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, not {alignment!r:.80}")
    places = [_place(cursor, number) for number in range(tensors)]
    first = -(-cursor.at // alignment) * alignment
    if twice := [name for name, times in Counter(place.name for place in places).items() if times > 1]:
        raise ValueError(f"the tensor {twice[0]!r:.80} is there twice")
    return Header(path, metadata, [place._replace(start=first + place.start) for place in places])


def _value(cursor: _Cursor, kind: int, what: str, depth: int = 0) -> Any:
    if kind in _SCALARS:
        value = cursor.number(_SCALARS[kind], what)
        # The shortest decimal that equals this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if _SCALARS[kind] == "<f4" else value
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY:
        raise ValueError(f"{what} has a value of an unknown type, {kind}")
    kind, count = cursor.number("<u4", what), cursor.number("<u8", what)
    if kind in _SCALARS:
        dtype = np.dtype(_SCALARS[kind])
        start = cursor.skip(count * dtype.itemsize, what)
        return cursor.data[start : cursor.at].view(dtype)
    if depth == 4 or count > MOST_STRINGS:
        raise ValueError(f"{what} is a list of {count:,}, or one within many others: the file is damaged")
    if kind == _STRING:
        return cursor.strings(count, what)
    return [_value(cursor, kind, what, depth + 1) for _ in range(count)]


def _place(cursor: _Cursor, number: int) -> TensorPlace:
    name = cursor.string(f"the name of tensor {number}")
    what = f"the tensor {name!r:.80}"
    axes = cursor.count("<u4", MOST_AXES, f"the number of axes of {what}")
    shape = tuple(cursor.number("<u8", what) for _ in range(axes))
    return TensorPlace(name, shape[::-1], cursor.number("<u4", what), cursor.number("<u8", what))


def check_places(header: Header, size_of: Callable[[TensorPlace], int]) -> None:
    """Checks that every tensor is within the file, and that no two tensors share a byte.

    Args:
      size_of: maps a tensor's place to its size in bytes.

    Raises:
      ValueError: the file is cut off or damaged.
    """
    end = header.path.stat().st_size
    spans = sorted((place.start, place.start + size_of(place), place.name) for place in header.tensors)
    for _, stop, name in spans:
        if stop > end:
            where = f"ends at byte {stop:,}, the file at byte {end:,}"
            raise ValueError(f"the tensor {name!r:.80} {where}: the file is cut off or damaged")
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            raise ValueError(f"the tensors {name!r:.80} and {other!r:.80} overlap: the file is damaged")
