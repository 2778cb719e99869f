"""Retention: every number against counting by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from jaxcompress.evaluation.lifetimes import (
    KINDS,
    ages,
    held,
    occupancy,
    overlap,
    survival,
    survival_by_kind,
    token_kinds,
    token_texts,
)
from jaxcompress.generation import Tokenizer


@st.composite
def some_deaths(draw: Any, *axes: int, most: int = 12) -> np.ndarray:
    """[*axes, T] death times."""
    total = draw(st.integers(1, most))
    age = draw(hnp.arrays(np.int32, (*axes, total), elements=st.integers(1, most)))
    return np.minimum(np.arange(total) + age, total).astype(np.int32)


def window(total: int, slots: int) -> np.ndarray:
    return np.minimum(np.arange(total) + slots, total)


def sets_held(death: np.ndarray, step: int) -> list[set[int]]:
    """Of every set, the positions that a step sees."""
    rows = death.reshape(-1, death.shape[-1])
    return [{j for j, d in enumerate(row) if j <= step < d} for row in rows]


@pytest.mark.slow
@given(some_deaths(2, 3))
def test_occupancy_is_the_number_held(death: np.ndarray) -> None:
    counted = occupancy(death)
    assert counted.shape == death.shape
    for step in range(death.shape[-1]):
        sets = sets_held(death, step)
        assert counted[..., step].ravel().tolist() == [len(one) for one in sets]
        assert [set(np.flatnonzero(row)) for row in held(death, step).reshape(6, -1)] == sets


def test_occupancy_of_a_window() -> None:
    assert occupancy(window(6, 3)).tolist() == [1, 2, 3, 3, 3, 3]


@given(some_deaths(2), st.lists(st.floats(0, 1), max_size=3))
def test_ages_against_counting(death: np.ndarray, quantiles: list[float]) -> None:
    steps = range(death.shape[-1])
    told = ages(death, steps, quantiles)
    assert told.quantiles.shape == (2, len(steps), len(quantiles))
    for step in steps:
        for n, positions in enumerate(sets_held(death, step)):
            expected = [step - j for j in positions]
            assert told.mean[n, step] == pytest.approx(np.mean(expected))
            np.testing.assert_allclose(told.quantiles[n, step], np.quantile(expected, quantiles), atol=1e-9)


def test_ages_of_nothing() -> None:
    told = ages(np.array([0, 1, 2]), [1])  # each token goes before its own query
    assert np.isnan(told.mean).all()
    assert np.isnan(told.quantiles).all()
    assert ages(window(5, 2)[None], []).quantiles.shape == (1, 0, 3)


class TestSurvival:
    """The Kaplan-Meier estimate."""

    def test_by_hand(self) -> None:
        """Ages 2 and 1; then 3, 2 and 1 at the end of the text, whose next step nobody watched."""
        told = survival(np.array([[2, 2, 5, 5, 5]]))
        assert told.age.tolist() == [1, 2, 3, 4, 5]
        assert told.watched.tolist() == [4, 2, 0, 0, 0]
        np.testing.assert_allclose(told.share, [3 / 4, 3 / 8, *[np.nan] * 3])

    @given(some_deaths(3))
    def test_against_the_product_over_ages(self, death: np.ndarray) -> None:
        total = death.shape[-1]
        tokens = [(int(d) - j, j) for row in death for j, d in enumerate(row)]
        told, alive = survival(death), 1.0
        for n in range(1, total + 1):
            watched = [age for age, j in tokens if age >= n and j + n < total]
            assert told.watched[n - 1] == len(watched)
            if watched:
                alive *= 1 - watched.count(n) / len(watched)
            elif alive:
                alive = math.nan
            np.testing.assert_allclose(told.share[n - 1], alive, atol=1e-12)

    def test_a_window_lasts_as_long_as_its_slots(self) -> None:
        np.testing.assert_array_equal(survival(window(40, 3)).share, [1, 1, *[0] * 38])

    def test_where_nothing_dies(self) -> None:
        np.testing.assert_array_equal(survival(np.full((1, 8), 8)).share, [*[1] * 7, np.nan])

    def test_the_end_of_the_text_does_not_bias_it(self) -> None:
        """Tokens that go with probability 0.02 at every step, in texts of 50 tokens."""
        age = np.random.default_rng(0).geometric(0.02, (2000, 50))
        death = np.minimum(np.arange(50) + age, 50)
        np.testing.assert_allclose(survival(death).share[:40], 0.98 ** np.arange(1, 41), atol=0.01)

    def test_of_some_tokens(self) -> None:
        death = np.stack([window(9, 2), window(9, 4)])
        chosen = np.arange(9) % 3 == 1
        told = survival(death, chosen)
        assert told.watched.tolist() == [6, 4, 2, 2, 0, 0, 0, 0, 0]
        np.testing.assert_allclose(told.share, [1, 0.5, 0.5, *[0] * 6])


NAMED_BY_HAND = [
    ("<s>", "first"),
    ("The", "first"),
    (" cat", "first"),
    (" sat", "first"),
    (".", "punctuation"),
    ("\n\n", "whitespace"),
    (" \t", "whitespace"),
    ("The", "common words"),
    (" c", "common words"),  # of cat, which comes twice
    ("at", "common words"),
    (" s", "rare words"),  # of sits
    ("its", "rare words"),
    (" 3", "digits"),
    (".5", "digits"),
    (" +=", "punctuation"),
    (" x1", "rare words"),
    ("", "other"),
    ("😀", "punctuation"),
    ("\ufffd", "other"),
    (" नमस्ते", "rare words"),
    ("</s>", "other"),
]


class TestKinds:
    """What a token is."""

    def test_by_hand(self) -> None:
        texts, expected = zip(*NAMED_BY_HAND, strict=True)
        marks = [text in ("<s>", "</s>") for text in texts]
        assert [KINDS[kind] for kind in token_kinds(texts, marks=marks)] == list(expected)

    def test_words_are_told_by_counts(self) -> None:
        texts = ["The", " THE", " retention"]
        counts = dict(the=500, retention=2, of=1498)
        assert [KINDS[kind] for kind in token_kinds(texts, first=0, counts=counts)] == [
            "common words", "common words", "rare words",
        ]  # fmt: skip
        assert (token_kinds(texts, first=0, rare=0.25, counts=counts) == KINDS.index("rare words")).all()
        assert (token_kinds(texts, first=0, counts={}) == KINDS.index("rare words")).all()

    def test_rare_is_a_share_of_the_words(self) -> None:
        texts = [" a"] * 3000 + [" b"] * 3 + [" c"] * 4
        kinds = token_kinds(texts, first=0)
        assert [KINDS[kinds[i]] for i in (0, 3000, 3003)] == ["common words", "rare words", "common words"]

    @given(st.lists(st.text(max_size=5), max_size=30), st.integers(0, 5))
    def test_every_token_has_one(self, texts: list[str], first: int) -> None:
        kinds = token_kinds(texts, first=first)
        assert kinds.shape == (len(texts),)
        assert all((kind == KINDS.index("first")) == (i < first) for i, kind in enumerate(kinds))

    @given(st.text(st.sampled_from("ab é1_-. \n"), max_size=40), st.data())
    def test_where_a_word_is_cut_makes_no_difference(self, text: str, data: Any) -> None:
        """A token in which a word begins is as rare as the word alone."""
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        whole = token_kinds(list(text), first=0)
        rare, common = KINDS.index("rare words"), KINDS.index("common words")
        for kind, start, piece in zip(token_kinds(pieces, first=0), cuts, pieces, strict=False):
            letters = [whole[start + i] for i, character in enumerate(piece) if character.isalpha()]
            assert (kind in (rare, common)) == bool(letters)
            assert not letters or kind == letters[0]


def test_survival_by_kind_by_hand() -> None:
    death = np.array([[9, 9, 3, 4, 9, 6, 9, 9, 9], [9, 5, 3, 9, 9, 6, 9, 9, 9]])
    kinds = np.array([0, 0, 5, 5, 5, 3, 3, 3, 3])
    first, punctuation, common, everything = survival_by_kind(death, kinds, after=(1, 4, 8, 100))
    assert (first.kind, first.tokens, first.end) == ("first", 2, 3 / 4)
    assert first.after == (1, 3 / 4, 3 / 4, pytest.approx(math.nan, nan_ok=True))
    assert (punctuation.kind, punctuation.tokens, punctuation.end) == ("punctuation", 4, 3 / 4)
    assert punctuation.after[0] == pytest.approx(4 / 6)
    assert (common.kind, common.tokens, common.end) == ("common words", 3, 3 / 6)
    assert common.after == (3 / 6, 3 / 6, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True))
    assert (everything.kind, everything.tokens, everything.end) == ("all", 9, 12 / 18)


def test_after_the_end_of_the_text_only_the_dead_are_known() -> None:
    (only, _) = survival_by_kind(window(5, 2), np.zeros(5, int), after=(4, 5, 99))
    assert only.after == (0, 0, 0)


@given(some_deaths(2, 2), st.data())
def test_survival_by_kind_is_survival_of_the_kind(death: np.ndarray, data: Any) -> None:
    total = death.shape[-1]
    kinds = data.draw(hnp.arrays(np.int8, total, elements=st.integers(0, len(KINDS) - 1)))
    rows = survival_by_kind(death, kinds, after=range(1, total + 1))
    assert [row.kind for row in rows] == [kind for i, kind in enumerate(KINDS) if i in kinds] + ["all"]
    assert sum(row.tokens for row in rows[:-1]) == rows[-1].tokens == total
    for row in rows[:-1]:
        np.testing.assert_array_equal(row.after, survival(death, kinds == KINDS.index(row.kind)).share)
    assert rows[-1].end == pytest.approx(np.mean([row.end * row.tokens for row in rows[:-1]]) * (len(rows) - 1) / total)


class TestOverlap:
    """Two policies."""

    @given(st.data(), st.sampled_from([(1, 1), (2, 2), (1, 4), (4, 2)]))
    def test_against_sets(self, data: Any, sets: tuple[int, int]) -> None:
        layers, heads = 2, max(sets)
        first = data.draw(some_deaths(layers, sets[0]))
        total = first.shape[-1]
        age = data.draw(hnp.arrays(np.int32, (layers, sets[1], total), elements=st.integers(1, 12)))
        second = np.minimum(np.arange(total) + age, total)
        told = overlap(first, second)
        assert told.jaccard.shape == told.shared.shape == (layers, total)
        for layer in range(layers):
            forgot = []
            for step in range(total):
                ours, theirs = sets_held(first[layer], step), sets_held(second[layer], step)
                pairs = [(ours[h * sets[0] // heads], theirs[h * sets[1] // heads]) for h in range(heads)]
                jaccard = np.mean([len(a & b) / len(a | b) for a, b in pairs])
                shared = np.mean([len(a & b) / max(len(a), len(b)) for a, b in pairs])
                assert told.jaccard[layer, step] == pytest.approx(jaccard)
                assert told.shared[layer, step] == pytest.approx(shared)
                if any(len(one) <= step for pair in pairs for one in pair):
                    forgot.append(step)
            assert told.since[layer] == (forgot[0] if forgot else total)
            means = [told.jaccard[layer, step] for step in range(forgot[0], total)] if forgot else [1]
            assert told.means()[0][layer] == pytest.approx(np.mean(means))

    def test_of_windows(self) -> None:
        told = overlap(window(6, 2)[None, None], window(6, 4)[None, None])
        assert told.since.tolist() == [2]
        np.testing.assert_allclose(told.jaccard[0], [1, 1, 2 / 3, 2 / 4, 2 / 4, 2 / 4])
        np.testing.assert_allclose(told.means(), [[13 / 24], [13 / 24]])

    @given(some_deaths(2, 3))
    def test_with_itself(self, death: np.ndarray) -> None:
        for values in overlap(death, death)[:2]:
            np.testing.assert_array_equal(values, np.ones_like(values))


DEATH = window(5, 2)[None, None]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: occupancy(np.ones(3)), r"must be integers \[..., T\], not float64 \[3\]"),
        (lambda: occupancy(np.zeros((2, 0), int)), r"not int64 \[2, 0\]"),
        (
            lambda: survival(np.array([[1, 2, 4]])),
            r"death\[0, 2\] is 4; the death of token 2 of 3 lies between 2 and 3",
        ),
        (lambda: survival(np.array([1, 0, 3])), r"death\[1\] is 0; .* between 1 and 3"),
        (lambda: survival(DEATH, np.ones(4, bool)), r"bool \[5\], one for each token .* not bool \[4\]"),
        (lambda: survival(DEATH, np.ones(5)), r"not float64 \[5\]"),
        (lambda: held(DEATH, 5), "between 0 and 4 for 5 tokens, not 5"),
        (lambda: ages(DEATH, [-1]), "not -1"),
        (lambda: ages(DEATH, [1], [1.5]), "quantiles must be a list of numbers between 0 and 1"),
        (lambda: token_kinds("one string"), "not one string 'one string'"),
        (lambda: token_kinds(["a"], first=-1), "first and rare must not be negative, not -1 and 0.001"),
        (lambda: token_kinds(["a"], marks=[True, False]), "one for each of 1 tokens, not 2"),
        (lambda: survival_by_kind(DEATH, np.zeros(4, int)), r"kinds must be \[5\], .* not \[4\]"),
        (lambda: survival_by_kind(DEATH, np.full(5, 9)), "indices into the 7 KINDS, not 9"),
        (lambda: survival_by_kind(DEATH, np.zeros(5, int), after=[0]), r"at least 1, not \(0,\)"),
        (lambda: overlap(DEATH[0], DEATH), r"must be \[L, P, T\], not \[1, 5\]; of a trace, take one row"),
        (lambda: overlap(DEATH, DEATH.repeat(2, 0)), r"one text, not \[1, 1, 5\] and \[2, 1, 5\]"),
        (lambda: overlap(DEATH.repeat(2, 1), DEATH.repeat(3, 1)), "2 sets per layer cannot be matched with 3"),
    ],
)
def test_what_is_refused(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level, with no merges but one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet, "Ġa"])}
    fast = FastTokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def test_token_texts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<s>x a é😀\r\n")
    texts = token_texts(tokenizer, ids)
    assert texts == ["<s>", "x", " a", " ", "", "é", "", "", "", "😀", "\r", "\n"]
    assert token_texts(tokenizer, ids[:8])[-2:] == ["", "\ufffd"]
    assert token_texts(tokenizer, ids[:0]) == []


@given(text=st.text(max_size=20))
def test_token_texts_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special=False)
