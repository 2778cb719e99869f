"""Phrases and sentences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.units import phrases, sentences


def spelled(text: str, units: list) -> list[str]:
    return [text[start:end] for start, end in units]


def test_phrases() -> None:
    text = "The city council will vote on the budget, in May."
    assert spelled(text, phrases(text)) == ["The city council", "will vote", "on the budget", ",", "in May", "."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three", ["One.", "Two!", "Three"]),
        ('He said "no." Then he left...', ['He said "no."', "Then he left..."]),
        ("A title\nand text.", ["A title", "and text."]),
        ("今天。明天！", ["今天。", "明天！"]),
        ("他说“今天。”明天", ["他说“今天。”", "明天"]),
        ("See os.path.join (v1.2.3) on a.com. It is new!", ["See os.path.join (v1.2.3) on a.com.", "It is new!"]),
        ('"Why?" he asked.Then (so...) he left.', ['"Why?"', "he asked.Then (so...)", "he left."]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert spelled(text, sentences(text)) == expected


@given(st.text(alphabet='ab the.,!"\n会。', max_size=60))
def test_units_hold_every_word_once(text: str) -> None:
    for split in (phrases, sentences):
        inside = [word for unit in split(text) for word in words_of(text) if unit.start <= word.start < unit.end]
        assert inside == words_of(text)
