"""Labels of words from a compression: the authors' own, and what must hold for any pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt.annotation import Annotation, annotate, faithful, rough_lemma

OFFICIAL = json.loads((Path(__file__).parents[1] / "fixtures/prompt_data/annotations.json").read_text("utf-8"))
RATES = {"comp_rate": "compression_rate"} | {
    name: name for name in ("variation_rate", "hitting_rate", "matching_rate", "alignment_gap")
}


def split(text: str) -> list[str]:
    """As the official script does it: at spaces, without commas."""
    return [word for word in text.split(" ") if word not in ("", ",")]


@pytest.mark.parametrize("case", OFFICIAL["cases"], ids=lambda case: f"{case['name']}/{case['window']}")
def test_official_labels_and_rates(case: dict) -> None:
    original, compressed = map(split, OFFICIAL["pairs"][case["pair"]])
    found = annotate(original, compressed, window=case["window"])
    assert "".join("01"[label] for label in found.labels) == case["labels"]
    for theirs, ours in RATES.items():
        assert getattr(found, ours) == case[theirs], theirs


@pytest.mark.parametrize("case", OFFICIAL["filter"])
def test_official_filter(case: dict) -> None:
    pairs = zip(case["variation_rate"], case["alignment_gap"], strict=True)
    annotations = [Annotation([], 0.0, variation, 0.0, 0.0, gap) for variation, gap in pairs]
    assert faithful(annotations, variation=90.0, gap=90.0, spare_perfect=False) == case["kept"]


def test_perfect_pairs_are_not_left_out() -> None:
    perfect = Annotation([True], 1.0, 0.0, 1.0, 1.0, 0.0)
    worse = perfect._replace(variation_rate=0.5)
    assert faithful([perfect] * 5) == [0, 1, 2, 3, 4]
    assert faithful([perfect] * 5, spare_perfect=False) == []  # the authors' rule leaves nothing
    assert faithful([perfect, worse, perfect]) == [0, 2]
    assert faithful([]) == []


WORDS = st.lists(st.sampled_from(["a", "b", "c", "A", "ä"]), min_size=1, max_size=30)


def reference(original: list[str], compressed: list[str], window: int) -> list[bool]:
    """The definition, word by word and distance by distance."""
    labels, place, last = [False] * len(original), 0, len(original) - 1
    same = lambda at, word: original[at].lower() == word.lower() and not labels[at]
    for word in compressed:
        for distance in range(window):
            ahead, behind = min(place + distance, last), max(place - distance, 0)
            if same(ahead, word):
                labels[ahead] = True
                place = place + window // 2 if ahead - place > window // 2 else ahead
                break
            if same(behind, word):
                labels[behind] = True
                place = behind
                break
    return labels


@given(WORDS, WORDS, st.integers(1, 12))
def test_is_the_definition(original: list[str], compressed: list[str], window: int) -> None:
    found = annotate(original, compressed, window=window)
    assert found.labels == reference(original, compressed, window)
    assert sum(found.labels) <= len(compressed)
    assert found.alignment_gap >= 0


@given(WORDS, st.data())
def test_deleting_words_is_found_exactly(original: list[str], data: st.DataObject) -> None:
    words = [f"{word}{at}" for at, word in enumerate(original)]  # none twice
    kept = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    found = annotate(words, [word for word, stays in zip(words, kept, strict=True) if stays])
    assert found.labels == kept
    assert found.alignment_gap == 0
    assert found.variation_rate == (0 if any(kept) else 1)


def test_rough_lemma_forgives_inflection() -> None:
    for group in ("vote votes voted voting", "city cities", "run runs running", "pass passed passes", "is", "class"):
        assert len({rough_lemma(word) for word in group.split()}) == 1, group
    found = annotate(["She", "was", "making", "plans", "."], ["She", "makes", "plan", "."], key=rough_lemma)
    assert found.labels == [True, False, True, True, True]


@pytest.mark.parametrize(("original", "compressed"), [([], []), ([], ["a"])])
def test_empty_original(original: list[str], compressed: list[str]) -> None:
    with pytest.raises(ValueError, match="no words"):
        annotate(original, compressed)


def test_window_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        annotate(["a"], ["a"], window=0)
