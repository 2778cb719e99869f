"""Words: in any text they cover what is not white space, and never cut a grapheme."""

from __future__ import annotations

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt.teacher import cut_for_teacher
from jaxcompress.prompt.words import align, of_words, owners, segment

PIECES = st.sampled_from(
    ["a", "don't", " ", "\n", "\r\n", "\u3000", "4,200", "7", "1", ".", "_", "ß", "e\u0301", "\u0301", "\u0600",
     "1\ufe0f\u20e3", "\u200b", "\u00ad", "\u2060", "\U0001f469\u200d\U0001f469", "\U0001f1e9\U0001f1ea", "\U0001f1e9",
     "\U0001f44d\U0001f3fd", "한국어", "\u1112\u1161\u11ab", "会", "東京", "は", "カー", "ﾊﾞ", "\uff9e", "ไทย", "क्षि"]
)  # fmt: skip
texts = st.lists(st.one_of(PIECES, st.characters()), max_size=12).map("".join)


@given(texts)
def test_words_of_any_text(text: str) -> None:
    spans = segment(text)
    assert (spans[:, 0] < spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    covered = np.zeros(len(text), bool)
    for start, end in spans:
        covered[start:end] = True
    assert all(char.isspace() for char, inside in zip(text, covered, strict=True) if not inside)
    boundaries = {0} | {match.end() for match in regex.finditer(r"\X", text)}
    assert set(spans.ravel().tolist()) <= boundaries


@pytest.mark.parametrize("white", [" ", "\n", "\x1c"])
def test_white_space_takes_no_time(white: str) -> None:
    """At the end of a text, a rule that tried every place anew would take minutes."""
    text = "a" + white * 100_000
    assert segment(text)[0].tolist() == [0, 1]
    assert "".join(cut_for_teacher(text)) == text


def test_what_is_a_word() -> None:
    text = "We don't know: 4,200? 会议は東京でカタカナー。 한국어 Straßen-Bau 👩‍👩‍👧‍👦🇩🇪 1️⃣"
    assert [text[a:b] for a, b in segment(text)] == [
        "We", "don't", "know", ":", "4,200", "?", "会", "议", "は", "東", "京", "で", "カタカナー", "。",
        "한국어", "Straßen", "-", "Bau", "👩‍👩‍👧‍👦", "🇩🇪", "1️⃣",
    ]  # fmt: skip
    soft = "un\u00adsafe in\u00ad\u2060active a\u200db a\u00ad x\ufeffy ไท\u200bย"
    assert [soft[a:b] for a, b in segment(soft)] == [
        "un\u00adsafe", "in\u00ad\u2060active", "a\u200db", "a", "\u00ad", "x\ufeffy", "ไท", "\u200b", "ย",
    ]  # fmt: skip
    assert segment("").shape == segment(" \n\t ").shape == (0, 2)


def test_subwords_belong_to_words() -> None:
    """Pieces that continue a word, that cover two, that stand between words, and a word without any."""
    spans = np.array([[0, 3], [3, 4], [5, 9], [9, 10], [11, 12]])
    offsets = np.array([[0, 1], [1, 4], [4, 5], [5, 5], [5, 7], [7, 9], [11, 12]])
    groups = align(spans, offsets)
    assert owners(groups, 8).tolist() == [0, 0, 2, 2, 2, 2, 4, 4]  # 2, 3 and 7 are in no word
    assert [list(range(*pair)) for pair in zip(*groups, strict=True)] == [[0, 1], [1], [4, 5], [], [6]]
    numbers = np.array([0.5, 1.0, 9.0, 9.0, 0.25, 0.75, 0.125])
    assert of_words(numbers, groups).tolist() == [0.75, 1.0, 0.5, 0.0, 0.125]
    assert of_words(numbers, groups, "first").tolist() == [0.5, 1.0, 0.25, 0.0, 0.125]
    with pytest.raises(ValueError, match="'mean' of its subwords' or the 'first' one, not 'max'"):
        of_words(numbers, groups, "max")


def test_nothing() -> None:
    groups = align(segment(""), np.zeros((0, 2), int))
    assert owners(groups, 0).shape == of_words(np.zeros(0), groups).shape == (0,)
