"""Prompts in parts, JSON, and texts that come in pieces."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxcompress.prompt import WORDS, Compressor, KeyRule, Segment, compress_json, compress_stream, compress_structured
from jaxcompress.prompt.joining import join
from jaxcompress.prompt.streaming import _windows
from jaxcompress.prompt.structured import parse
from jaxcompress.prompt.words import segment

FIXTURES = Path(__file__).parents[1] / "fixtures" / "prompt"
LONG = "The harbor was quiet that night. Ships, ships, and more ships lay at anchor; nobody spoke."
ASK = "  Answer in one   word:\n"


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return Compressor.load(FIXTURES / "bert")


def test_parts_have_rates_of_their_own(compressor: Compressor) -> None:
    prompt = (
        f"<llmlingua, compress=False>{ASK}</llmlingua>"
        f"<llmlingua, rate=0.3, compress=True>{LONG}</llmlingua>\n---\n<llmlingua>{LONG}</llmlingua>"
    )
    result = compress_structured(compressor, prompt, rate=0.6)
    first, second = (compressor.compress(LONG, rate=rate).text for rate in (0.3, 0.6))
    assert result.text.startswith(f"{ASK}{first}\n")
    assert result.text.endswith(f"\n{second}")
    segments = [Segment(ASK, 1), Segment(LONG, 0.3), Segment("\n---\n"), Segment(LONG)]
    assert compress_structured(compressor, segments, rate=0.6).text == result.text
    assert parse(prompt) == segments
    assert compress_structured(compressor, "", rate=0.6).text == ""
    reader = replace(compressor, count=len)
    counted = compress_structured(reader, prompt, rate=0.6)
    assert counted.tokens_after == len(counted.text) <= counted.asked
    assert counted.tokens_before == len("".join(part.text for part in segments))
    same = compress_structured(compressor, [Segment("the"), Segment(LONG)], rate=0.3)
    assert [one.text != "" for one in same.documents] == [True, True]  # each meets its own, also at the same rate


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<llmlingua>open", "'<llmlingua>' is not closed"),
        ("<llmlingua>a<llmlingua>b</llmlingua></llmlingua>", "inside another one"),
        ("closed</llmlingua>", "not opened"),
        ("<llmlingua, rate=2>a</llmlingua>", r"rate must be in \(0, 1\].*not 2"),
        ("<llmlingua, rate=x>a</llmlingua>", "not x"),
        ("<llmlingua, compress=no>a</llmlingua>", "compress is True or False, not 'no'"),
        ("<llmlingua, ratio=0.3>a</llmlingua>", "unknown settings"),
    ],
)
def test_tags_that_are_wrong(compressor: Compressor, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_structured(compressor, prompt)


def test_json(compressor: Compressor) -> None:
    value = {"id": 7, "name": "Maria Delgado", "notes": [LONG, {"deep": LONG, "ok": True}], "junk": "  ", "none": None}
    rules = {"name": KeyRule(compress=False), "deep": KeyRule(rate=0.25), "junk": KeyRule(remove=True)}
    shorter, result = compress_json(compressor, value, rules, rate=0.5)
    half, quarter = (compressor.compress(LONG, rate=rate).text for rate in (0.5, 0.25))
    assert shorter == {"id": 7, "name": "Maria Delgado", "notes": [half, {"deep": quarter, "ok": True}], "none": None}
    assert json.loads(json.dumps(shorter)) == shorter
    assert result.tokens_after < result.tokens_before
    assert compress_json(compressor, 3)[0] == 3


def test_short_strings_of_json_may_go(compressor: Compressor) -> None:
    """A rate for one key changes nothing for the others: they share the budget, and nothing stands between strings."""
    value = {"a": LONG, "id": "quiet", "b": LONG, "c": LONG}
    rules = {"id": KeyRule(remove=True), "b": KeyRule(rate=0.9)}
    shorter, result = compress_json(replace(compressor, count=WORDS), value, rules, rate=0.3)
    assert list(shorter) == ["a", "b", "c"]
    words, of_b = WORDS(LONG), WORDS(shorter["b"])
    assert of_b == int(0.9 * words + 0.5)
    assert (result.tokens_before, result.tokens_after) == (3 * words + 1, of_b + int(0.3 * (2 * words + 1) + 0.5))
    shorter, result = compress_json(replace(compressor, count=len), value, rules, rate=0.3)
    assert result.tokens_before == sum(map(len, value.values()))
    assert result.tokens_after == sum(map(len, shorter.values()))


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_does_not_depend_on_its_pieces(compressor: Compressor, size: int) -> None:
    text = "\n\n".join([LONG, LONG[:33] + " e\u0301", "会議は三時に始まります。", LONG])
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    results = list(compress_stream(compressor, pieces, rate=0.4, window=70, force=["\n"]))
    whole = list(compress_stream(compressor, [text], rate=0.4, window=70, force=["\n"]))
    assert [r.text for r in results] == [r.text for r in whole]
    assert len(results) > 3
    read, kept = sum(r.tokens_before for r in results), sum(r.tokens_after for r in results)
    assert kept == int(read * 0.4 + 0.5)
    assert read == compressor.tokenizer.count(text)
    assert "\n" in "".join(r.text for r in results)


@pytest.mark.parametrize("size", [3, 10_000])
def test_code_longer_than_a_window(compressor: Compressor, size: int) -> None:
    """It goes on in the windows after it, up to its end, and what follows is no code."""
    code = "```py\n" + "for n in range(7):\n\n    print(n,  n)\n" * 4 + "```"
    text = f"{LONG}\n{code}\n{LONG} {LONG} {LONG} {LONG}\n```\nx  = 1\n```\n{LONG}"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    parts = compress_stream(compressor, pieces, rate=0.7, window=50, protect=["code"], drop_consecutive=True)
    shorter = "".join(part.text for part in parts)
    assert code in shorter
    assert "```\nx  = 1\n```" in shorter
    assert LONG not in shorter
    assert (
        "".join(part.text for part in compress_stream(compressor, pieces, rate=1, window=50, protect=["code"])) == text
    )


def test_white_space_longer_than_memory(compressor: Compressor) -> None:
    """White space between two windows is held as what it becomes."""
    peaks = []
    for size in (20, 1_000):
        pieces = (piece for part in ([LONG], [" " * 1_000] * size, ["\n", LONG]) for piece in part)
        tracemalloc.start()
        shorter = "".join(
            part.text for part in compress_stream(compressor, pieces, rate=0.5, window=2_000, force=["\n"])
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert shorter.startswith(compressor.compress(LONG, rate=0.5).text + "\n")
    assert peaks[1] < 2 * peaks[0]


def test_a_window_whose_share_is_used_up_keeps_nothing(compressor: Compressor) -> None:
    first = "The council voted to approve 12 new measures on the budget of the city this year after a long debate."
    for last, left in (("Ok", ""), ("Ok 9", "9")):
        parts = list(
            compress_stream(
                compressor, [f"{first}\n\n{last}\n\n"], rate=0.25 if left else 0.2, window=len(first) + 1,
                protect=["numbers"],
            )
        )  # fmt: skip
        assert sum(part.tokens_before for part in parts) == compressor.tokenizer.count(f"{first} {last}")
        assert "12" in parts[0].text
        assert parts[1].text.strip() == left
    with pytest.raises(ValueError, match=r"stayed, more than the \d asked for"):
        list(compress_stream(compressor, [f"{first}\n\n1 2 3"], rate=0.2, window=len(first) + 1, protect=["numbers"]))


def test_nothing_between_two_windows_is_lost_where_both_neighbours_stay(compressor: Compressor) -> None:
    """As within a window; and a fence begins and ends a line."""
    text = "1 one two 2\n\n3 three four 4.\n\nfive 5 six\n\n7"
    parts = compress_stream(compressor, [text], rate=0.6, window=18, protect=["numbers"], force=["."])
    kept = "".join(part.text for part in parts)
    assert "2\n\n3" in kept
    fenced = "one two three 1\n\nfour five\n```\nx = 1\n```\nsix seven eight nine"
    for window in (18, 35, 42):
        parts = compress_stream(compressor, [fenced], rate=0.8, window=window, protect=["code", "numbers"])
        lines = "".join(part.text for part in parts).splitlines()
        assert lines.count("```") == 2, window


def test_windows_are_the_text() -> None:
    text = "A b c. " * 30 + "x" * 100 + "e\u0301\u0301" * 30 + "\n\nend"
    for window in (1, 5, 40):
        parts = [part for part, _ in _windows([text], window)]
        assert "".join(parts) == text
        assert not any(part.startswith("\u0301") for part in parts)
        assert max(map(len, parts)) <= max(window, 3)


def test_a_stream_at_rate_1(compressor: Compressor) -> None:
    text = "\n\n".join([LONG] * 3)
    assert "".join(r.text for r in compress_stream(compressor, [text], rate=1, window=100)) == text
    assert list(compress_stream(compressor, ["", "  \n"])) == []
    with pytest.raises(ValueError, match="window must have at least 1"):
        list(compress_stream(compressor, [text], window=0))
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        list(compress_stream(compressor, [text], rate=0))


@pytest.mark.parametrize(
    ("text", "force", "kept"),
    [
        ("a x\r\nx b", ["\n"], "a\r\nb"),
        ("a x\nx b", ["\n"], "a\nb"),
        ("a x\rx b", ["\n"], "a\rb"),
        ("a x\r\nx b", ["\r\n"], "a\r\nb"),
        ("a x\nx b", ["\r\n"], "a b"),
        ("a x\r\nx b", ["\r"], "a b"),
        ("a x\rx b", ["\r"], "a\rb"),
        ("a x\r\n\r\nx b", ["\n\n"], "a\r\n\r\nb"),
        ("a x\r\nx b", ["\n\n"], "a b"),
        ("a x\tx b", ["\n", "\t"], "a\tb"),
    ],
)
def test_line_ends_stay_as_they_are(text: str, force: list[str], kept: str) -> None:
    spans = segment(text)
    assert join(text, spans, np.array([True, False, False, True]), force) == kept


def test_halves_of_characters(compressor: Compressor) -> None:
    shorter, _ = compress_json(compressor, {"a\ud83d": LONG + " cut \ud83d", "b": "\ud83d"}, rate=1)
    assert shorter == {"a\ufffd": LONG + " cut \ufffd", "b": "\ufffd"}
    assert compress_structured(compressor, "<llmlingua, compress=False>a \ud83d\ude00</llmlingua>").text == "a 😀"
