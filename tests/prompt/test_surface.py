"""Words as they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt.surface import words_of


def words(text: str) -> list[str]:
    return [text[start:end] for start, end in words_of(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("don't stop, part-time 3.14 at 10:30.", "don't|stop|,|part-time|3.14|at|10:30|."),
        ("Grüße aus Köln (naïve cafe\u0301)!", "Grüße|aus|Köln|(|naïve|cafe\u0301|)|!"),
        ("会议于10月。", "会|议|于|10|月|。"),
        ("회의는 월요일에 열린다", "회의는|월요일에|열린다"),
        ("カ\u3099 हिन्दी ที่นี่", "カ\u3099|हिन्दी|ที่นี่"),
        ("👩\u200d👩\u200d👧🇰🇷🇩🇪👍🏽ok", "👩\u200d👩\u200d👧|🇰🇷|🇩🇪|👍🏽|ok"),
        (" \n\t", ""),
        ("", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert words(text) == [word for word in expected.split("|") if word]


@given(st.text(max_size=60))
def test_only_white_space_lies_between(text: str) -> None:
    end = 0
    for word in words_of(text):
        assert word.start >= end
        assert word.end > word.start
        assert not text[end : word.start].strip()
        end = word.end
    assert not text[end:].strip()
