"""The bytes that tokens stand for, from how a tokenizer spells them.

A token may be a part of a character, which no text can show. Its spelling knows the bytes: byte-level BPE (GPT-2, Llama
3, Qwen) has a letter for each byte, SentencePiece writes `<0xE4>` for a byte and `▁` for a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that byte-level BPE spells as themselves
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


def bytes_reader(fast: FastTokenizer) -> Callable[[int], bytes]:
    """A function from the id of a token to its bytes; none for an id without a token.

    Added tokens, special ones among them, are spelled as they are. Tokenizers of other kinds (WordPiece) give the text
    that the token has alone.
    """
    added = {token: one.content.encode() for token, one in fast.get_added_tokens_decoder().items()}
    kinds = set(_kinds(fast.decoder))

    def read(token: int) -> bytes:
        if token in added:
            return added[token]
        spelled = fast.id_to_token(token)
        if spelled is None:
            return b""
        if "ByteLevel" in kinds:
            known = all(letter in _BYTE_OF for letter in spelled)
            return bytes(map(_BYTE_OF.__getitem__, spelled)) if known else spelled.encode()
        if kinds & {"ByteFallback", "Metaspace"}:
            byte = _BYTE.fullmatch(spelled)
            return bytes([int(byte[1], 16)]) if byte else spelled.replace(_SPACE, " ").encode()
        return fast.decode([token], skip_special_tokens=False).encode()

    return read


def _kinds(decoder: Any) -> Iterator[str]:
    """The types of all decoders in one."""
    if decoder is None:
        return
    left = [json.loads(decoder.__getstate__())]
    while left:
        one = left.pop()
        yield one["type"]
        left += one.get("decoders", [])
