"""What a decoder expects: against plain forward passes with nothing cached."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxcompress.checkpoints import load_embedded
from jaxcompress.policies import Full
from jaxcompress.prompt.counting import WORDS, TokenizerCounter
from jaxcompress.prompt.information import Reader, per_unit, self_information, surprise
from jaxcompress.prompt.keeping import keep, tokens_at
from jaxcompress.prompt.llmlingua import contrastive, llmlingua
from jaxcompress.prompt.long_llmlingua import (
    arranged,
    dynamic_rates,
    long_llmlingua,
    recover,
    relevance,
)
from jaxcompress.prompt.selective_context import selective_context
from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.word_scores import ScoredWords
from jaxcompress.prompt.words import segment
from jaxcompress.training.loss import token_losses

TEXT = (
    "The list is sorted in place. If the key function raises an error, the list may be left changed; it is not "
    "restored.\n\nDictionaries keep the order of insertion since version 3.7, and sets do not: 会议 👍🏽 end."
)
WIDTH = 192
SEGMENT = 16


@pytest.fixture(scope="module")
def reader() -> Reader:
    loaded = load_embedded()
    model, tokenizer = loaded.model, loaded.tokenizer
    return Reader(model, tokenizer, Full(), slots=256, segment=SEGMENT)


@cache
def _plain() -> Any:
    return jax.jit(lambda model, tokens: token_losses(model(tokens[:, :-1]), tokens[:, 1:]))


def uncached(reader: Reader, prefix: list[int], tokens: list[int]) -> np.ndarray:
    """Losses of tokens after BOS and a prefix, from one forward pass over all of it."""
    assert reader.tokenizer.bos_id is not None
    whole = [reader.tokenizer.bos_id, *prefix, *tokens]
    losses = _plain()(reader.model, np.array([whole + [0] * (WIDTH + 1 - len(whole))], np.int32))
    return np.asarray(losses)[0, len(prefix) : len(whole) - 1]


def test_surprise_is_that_of_one_forward_pass(reader: Reader) -> None:
    read = surprise(reader, TEXT)
    assert SEGMENT * 2 < len(read.ids) < WIDTH
    np.testing.assert_allclose(read.nats, uncached(reader, [], read.ids.tolist()), atol=2e-4)
    assert reader.tokenizer.decode(read.ids) == TEXT


def test_rows_are_independent(reader: Reader) -> None:
    ids = surprise(reader, TEXT).ids
    rows = np.full((2, 40), -1, np.int32)
    rows[0, :21], rows[1] = ids[:21], ids[30:70]
    both, context = reader.losses(reader.begin(2), rows)
    alone, _ = reader.losses(reader.begin(1), rows[:1, :21])
    np.testing.assert_allclose(both[0, :21], alone[0], atol=2e-4)
    assert (both[0, 21:] == 0).all()
    further, _ = reader.losses(context, np.stack([ids[21:30], ids[70:79]]))
    np.testing.assert_allclose(further[0], uncached(reader, ids[:21].tolist(), ids[21:30].tolist()), atol=2e-4)
    np.testing.assert_allclose(further[1], uncached(reader, ids[30:70].tolist(), ids[70:79].tolist()), atol=2e-4)


def by_hand(text: str, read: Any) -> np.ndarray:
    """The mean over the tokens that touch each word, one by one."""
    scores = []
    for start, end in words_of(text):
        touching = (read.places[:, 1] > start) & (read.places[:, 0] < end)
        scores.append(read.nats[touching].mean())
    return np.array(scores, np.float32)


def test_a_word_has_the_mean_of_its_tokens(reader: Reader) -> None:
    read = surprise(reader, TEXT)
    np.testing.assert_allclose(per_unit(segment(TEXT), read), by_hand(TEXT, read), rtol=1e-5)
    found = self_information(reader)(TEXT)
    np.testing.assert_allclose(found.scores, by_hand(TEXT, read), rtol=1e-5)
    assert found.by == "self-information"
    np.testing.assert_array_equal(found.spans, segment(TEXT))


def test_long_texts_fit_into_few_slots(reader: Reader) -> None:
    bounded = Reader(reader.model, reader.tokenizer, slots=32, segment=SEGMENT)
    found = self_information(bounded)(" ".join([TEXT] * 3))
    assert np.isfinite(found.scores).all()
    once = self_information(bounded)(TEXT)
    np.testing.assert_allclose(found.scores[: len(once.words) - 1], once.scores[:-1], atol=5e-4)


def llmlingua_by_hand(reader: Reader, prefixes: list[list[int]], rate: float) -> np.ndarray:
    """Segment by segment, forward passes over prefix and segment, nothing kept in between."""
    ids, places = reader.tokenizer.encode_with_places(TEXT)
    words = words_of(TEXT)
    touching = [np.flatnonzero((places[:, 1] > word.start) & (places[:, 0] < word.end)) for word in words]
    scores, begin = np.zeros(len(words)), 0
    while begin < len(words):
        end = begin + 1
        while end < len(words) and touching[end][-1] + 1 - touching[begin][0] <= SEGMENT:
            end += 1
        low, high = touching[begin][0], touching[end - 1][-1] + 1
        per_prefix = []
        for prefix in prefixes:
            nats = uncached(reader, prefix, ids[low:high].tolist())
            per_prefix.append([nats[touching[at] - low].mean() for at in range(begin, end)])
        mine = np.array(per_prefix[0]) - (np.array(per_prefix[1]) if len(prefixes) > 1 else 0)
        scores[begin:end] = mine
        n = int(np.floor((end - begin) * rate + 0.5))
        best = sorted(range(end - begin), key=lambda at: (-mine[at], at))[:n]
        kept = sorted({token for at in best for token in touching[begin + at].tolist()})
        prefixes = [prefix + ids[kept].tolist() for prefix in prefixes]
        begin = end
    return scores


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_llmlingua_is_conditioned_on_what_was_kept(reader: Reader, rate: float) -> None:
    found = llmlingua(reader, word_rate=rate)(TEXT)
    np.testing.assert_allclose(found.scores, llmlingua_by_hand(reader, [[]], rate), atol=5e-4)
    assert not np.allclose(found.scores, self_information(reader)(TEXT).scores, atol=0.05)


def test_llmlingua_without_loss_is_self_information(reader: Reader) -> None:
    """But for white space between segments, which belongs to no word."""
    text = TEXT[: TEXT.index("\n")]
    np.testing.assert_allclose(
        llmlingua(reader, word_rate=1.0)(text).scores, self_information(reader)(text).scores, atol=5e-4
    )


def test_contrast_with_a_question(reader: Reader) -> None:
    question = "In which version do dictionaries keep order?"
    asked = reader.tokenizer.encode_with_places(question + "\n")[0].tolist()
    found = contrastive(reader, question, word_rate=0.5)(TEXT)
    np.testing.assert_allclose(found.scores, llmlingua_by_hand(reader, [[], asked], 0.5), atol=1e-3)


def test_nothing_is_compiled_for_another_length(reader: Reader) -> None:
    from jaxcompress.prompt.information import _read_segment

    llmlingua(reader, word_rate=0.5)(TEXT)
    before = _read_segment._cache_size()
    for text in (TEXT[:50], TEXT[20:111], TEXT[:150]):
        llmlingua(reader, word_rate=0.4)(text)
    assert _read_segment._cache_size() == before


@pytest.mark.parametrize("unit", ["word", "phrase", "sentence"])
def test_selective_context_reads_sentences_apart(reader: Reader, unit: Any) -> None:
    text = "The list is sorted in place. If the key raises an error, it is left changed."
    found = selective_context(reader, unit)(text)
    second = text.index("If")
    ids, places = reader.tokenizer.encode_with_places(text[second:])
    nats = uncached(reader, [], ids.tolist())
    last = [word for word in words_of(text) if word.start >= second]
    if unit == "sentence":
        expected = np.full(len(last), nats.mean())
    else:
        where = places + second
        word = lambda start, end: nats[(where[:, 1] > start) & (where[:, 0] < end)].mean()
        if unit == "word":
            expected = np.array([word(*one) for one in last])
        else:
            groups = ["If the key raises", "an error", ",", "it is left changed", "."]
            expected, at = [], second
            for group in groups:
                start = text.index(group, at)
                at = start + len(group)
                expected += [word(start, at)] * len(words_of(group))
    np.testing.assert_allclose(found.scores[-len(last) :], expected, atol=5e-4)
    assert selective_context(reader, unit)("").words == []
    unbegun = copy(reader.tokenizer)
    unbegun.bos_id = None  # then the first token of each sentence has no prediction
    assert np.isfinite(selective_context(replace(reader, tokenizer=unbegun), unit)(text).scores).all()


DOCUMENTS = [
    "Sets do not keep any order, and frozen sets cannot be changed once they are made.",
    "Dictionaries keep the order of insertion since version 3.7 of the language.",
    "The list is sorted in place, and nothing is returned.",
]
QUESTION = "Since which version do dictionaries keep the order of insertion?"


class TestLong:
    def test_relevance_is_the_likelihood_of_the_question(self, reader: Reader) -> None:
        found = relevance(reader, DOCUMENTS, QUESTION, restrict=" Yes.")
        ids = lambda text: reader.tokenizer.encode_with_places(text)[0].tolist()
        asked = ids(f"\n{QUESTION} Yes.")
        expected = [-uncached(reader, ids(document), asked).mean() for document in DOCUMENTS]
        np.testing.assert_allclose(found, expected, atol=5e-4)
        assert found.argmax() == 1

    @pytest.mark.parametrize("rate", [0.2, 0.5, 0.9, 1.0])
    def test_keeps_exactly_the_rate(self, reader: Reader, rate: float) -> None:
        short = long_llmlingua(reader, DOCUMENTS, QUESTION, rate=rate)
        count = TokenizerCounter(reader.tokenizer)
        total = sum(map(count, DOCUMENTS))
        assert sum(count(one.text) for one in short.kept) == tokens_at(rate, total)
        by_words = long_llmlingua(reader, DOCUMENTS, QUESTION, rate=rate, count=WORDS)
        assert sum(one.labels.sum() for one in by_words.kept) == tokens_at(rate, sum(map(WORDS, DOCUMENTS)))
        assert short.order[0] == 1
        assert short.documents[0] == 1

    def test_with_another_scorer(self, reader: Reader) -> None:
        short = long_llmlingua(reader, DOCUMENTS, QUESTION, rate=0.5, scorer=self_information(reader), order="original")
        assert short.documents == sorted(short.documents)
        assert {one.scored.by for one in short.kept} == {"self-information"}

    def test_rates_by_rank(self) -> None:
        assert dynamic_rates([2, 0, 1], 0.5, 0.3).tolist() == pytest.approx([0.5, 0.2, 0.8])
        assert dynamic_rates([0, 1], 0.9, 0.3).tolist() == pytest.approx([1.0, 0.6])
        assert dynamic_rates([0], 0.4, 0.3).tolist() == pytest.approx([0.4])

    def test_arranged(self) -> None:
        assert arranged([3, 1, 4, 0, 2], "original") == [0, 1, 2, 3, 4]
        assert arranged([3, 1, 4, 0, 2], "ranked") == [3, 1, 4, 0, 2]
        assert arranged([3, 1, 4, 0, 2], "ends") == [3, 4, 2, 0, 1]

    def test_recovers_what_was_between(self, reader: Reader) -> None:
        text = "Dictionaries keep the order of insertion since version 3.7."
        scores = np.array([1, 1, 0, 1, 0, 1, 0, 0, 1, 0], np.float32)
        (kept,) = keep(ScoredWords(text, segment(text), scores, "test"), WORDS, tokens=5).documents
        assert kept.text == "Dictionaries keep order insertion 3.7"
        assert recover([kept], "They say: keep order insertion, I think.") == (
            "They say: keep the order of insertion, I think."
        )
        assert recover([kept], "Nothing order of it") == "Nothing order of it"
        assert recover([], "as it is") == "as it is"

    @pytest.mark.parametrize(
        "wrong", [dict(documents=[]), dict(question=" "), dict(rate=0.0), dict(rate=2.0), dict(room=0.5)]
    )
    def test_what_cannot_be_asked(self, reader: Reader, wrong: dict) -> None:
        given: dict[str, Any] = dict(documents=DOCUMENTS, question=QUESTION, rate=0.5) | wrong
        with pytest.raises(ValueError):
            long_llmlingua(reader, given.pop("documents"), given.pop("question"), **given)
