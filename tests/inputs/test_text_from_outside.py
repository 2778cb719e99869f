"""Text from outside: any bytes and strings become clean text or a clear error."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.cli.train import train_defaults
from jaxcompress.inputs.described import described
from jaxcompress.inputs.text import (
    DEPTH,
    clean,
    clean_value,
    decode,
    decoded,
    json_lines,
    masked,
    parse_json,
    read_text,
    unescaped,
)
from jaxcompress.prompt.dataset import read_examples, read_pairs
from jaxcompress.prompt.structured import parse
from jaxcompress.training.data import read_documents

ANY_TEXT = st.text(st.characters(codec=None), max_size=40)  # surrogates, too


@given(ANY_TEXT)
def test_clean_text_can_be_written_and_only_halves_change(text: str) -> None:
    assert clean(text) == text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    clean(text).encode()
    assert len(masked(text)) == len(text)
    pairs = zip(text, masked(text), strict=True)
    assert all(after == ("\ufffd" if "\ud800" <= before <= "\udfff" else before) for before, after in pairs)


def test_two_halves_are_a_character_and_one_is_a_replacement() -> None:
    assert clean("a\ud83d\ude00b") == "a😀b"
    assert clean("a\ud83db\ude00") == "a\ufffdb\ufffd"
    assert parse_json(r'{"\ud83d": ["\ude00\ud83d", "\ud83d\ude00"]}', "x") == {"\ufffd": ["\ufffd\ufffd", "😀"]}
    assert clean_value({"a\ud83d": ("b\ud83d", 1)}, "x") == {"a\ufffd": ["b\ufffd", 1]}
    with pytest.raises(ValueError, match=r"x has keys that differ only in halves of characters: '\\ud83d', '\\ud83e'"):
        parse_json(r'{"\ud83d": 1, "\ud83e": 2}', "x")


@pytest.mark.parametrize("wrong", [["a", "b"], None, b"a", 3])
@pytest.mark.parametrize("read", [clean, masked])
@pytest.mark.usefixtures("as_users_call_it")
def test_what_is_no_text(read: Callable[[Any], str], wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=f"a text is a string, not {re.escape(described(wrong))}; give texts one by one"
    ):
        read(wrong)


@given(ANY_TEXT, st.lists(st.integers(0, 60)))
def test_how_it_is_cut_makes_no_difference(text: str, cuts: list[int]) -> None:
    data = b"\xef\xbb\xbf" + clean(text).encode()
    for whole in (data, text):
        places = sorted({0, *(cut for cut in cuts if cut < len(whole)), len(whole)})
        blocks = [whole[a:b] for a, b in zip(places, places[1:], strict=False)]
        if isinstance(whole, str) or not data[3:].startswith(b"\xff"):
            assert "".join(decoded(blocks, "x")) == clean(text)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"caf\xe9 au lait", "x is not UTF-8: byte 0xe9 at offset 3"),
        ("text".encode("utf-16"), "x is UTF-16, not UTF-8; convert it first, e.g. iconv -f UTF-16 -t UTF-8"),
        ("text".encode("utf-32"), "x is UTF-32"),
        ("text".encode("utf-16-le"), "x is UTF-16"),
        ("text".encode("utf-16-be"), "x is UTF-16"),
        (b"\xed\xa0\xbd", "x is not UTF-8: byte 0xed at offset 0"),
        (b"ok \xe4\xbd", "x is not UTF-8: byte 0xe4 at offset 3"),
    ],
)
def test_other_encodings(data: bytes, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode(data, "x")
    assert str(caught.value).startswith(says)


def test_line_ends_and_control_characters_stay(tmp_path: Path) -> None:
    text = "a\r\nb\rc\nd\x00e\x1a\u2028\ufeff"
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text(tmp_path / "a") == text


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_json_lines(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + b'{"text": "one\xe2\x80\xa8line"}\r\n\n{"text": "half \\ud83d"}')
    assert [value["text"] for _, _, value in json_lines(path)] == ["one\u2028line", "half \ufffd"]
    assert read_documents(path) == ["one\u2028line", "half \ufffd"]


def test_depth() -> None:
    nested = lambda depth: "[" * depth + "]" * depth
    assert parse_json(nested(DEPTH), "x")
    for depth in (DEPTH + 2, 100_000):
        with pytest.raises(ValueError, match="x is nested too deeply"):
            parse_json(nested(depth), "x")
    assert parse_json(json.dumps(nested(1000)), "x") == nested(1000)


def test_escapes() -> None:
    assert unescaped(r"\r\n\t\\n\x") == "\r\n\t\\n\\x"


NOISE = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(
            [b'{"text": ', b'"\\ud83d"', b"}", b"\n", b"\r", b"[", b"1e999", b'"tokens": [99999999999999999999]', b"{",
             b"\xef\xbb\xbf", b'"words"', b":", b",", b"null", b"steps = ", b'"x"', b"data", b"=", b"[[a]]", b"\x00"]
        ),
        max_size=8,
    ).map(b"".join),
)  # fmt: skip


@given(NOISE)
@settings(max_examples=200)
def test_any_file_gives_something_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("noise.txt", "noise.jsonl", "noise.toml"):
        (folder / name).write_bytes(data)
    for read in (
        lambda: read_documents(folder / "noise.txt"),
        lambda: read_documents(folder / "noise.jsonl"),
        lambda: read_pairs(folder / "noise.jsonl"),
        lambda: read_examples(folder / "noise.jsonl"),
        lambda: train_defaults(["--config", str(folder / "noise.toml")]),
    ):
        with suppress(ValueError):
            read()


@given(st.lists(st.sampled_from(["<llmlingua", ", rate=0.5", "compress", "=", ",", ">", "</llmlingua>", " ", "a"])))
def test_any_tags_give_parts_or_a_clear_error(parts: list[str]) -> None:
    text = "".join(parts)
    try:
        segments = parse(text)
    except ValueError:
        return
    assert all(part.text in text for part in segments)


@pytest.mark.parametrize("text", ["<llmlingua>" * 200_000, "<llmlingua" + " " * 1_000_000 + ">x</llmlingua>"])
def test_tags_take_linear_time(text: str) -> None:
    with pytest.raises(ValueError) if text.count("<") > 2 else pytest.MonkeyPatch.context():
        parse(text)


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa")))
    assert read_text(None) == "a"
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        read_text(None)
