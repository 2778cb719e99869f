"""The bytes of single tokens: joined they are the text, whatever characters they cut."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.inputs.token_bytes import bytes_reader

TEXT = "grüße 你好 😀\x00\xad\n"


def test_byte_level() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({token: n for n, token in enumerate([*alphabet, "Ġa"])}, [("Ġ", "a")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<é>", special=True)])
    read = bytes_reader(fast)
    assert b"".join(map(read, fast.encode(f"{TEXT} a<é>").ids)) == f"{TEXT} a<é>".encode()
    assert sorted(map(read, range(256))) == [bytes([byte]) for byte in range(256)]
    assert [read(token) for token in fast.encode(" a<é>").ids] == [b" a", "<é>".encode()]
    assert read(10**6) == b""  # a model may have more logits than there are tokens


def test_sentencepiece() -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    fast = FastTokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    read = bytes_reader(fast)
    assert b"".join(map(read, fast.encode(TEXT.replace(" ", "\u2581")).ids)) == TEXT.encode()
    assert [read(vocabulary[piece]) for piece in ("\u2581a", "a", "<0xE4>")] == [b" a", b"a", b"\xe4"]


def test_tokenizers_of_other_kinds() -> None:
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}))
    fast.decoder = decoders.WordPiece()
    assert list(map(bytes_reader(fast), (1, 2))) == [b"play", fast.decode([2]).encode()]
    assert bytes_reader(FastTokenizer(models.WordLevel({"a": 0})))(0) == b"a"
