"""The default compressor: the budget is met to the token, and what comes out are words of the text in their order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.prompt import (
    BudgetTooSmall,
    Compressed,
    Compressor,
    Contexts,
    KeyRule,
    ScoredWords,
    Segment,
    compress_json,
    compress_stream,
    compress_structured,
    keep,
    keep_above,
)
from jaxcompress.prompt.budget import apportion, choose_words
from jaxcompress.prompt.chunks import chunks
from jaxcompress.prompt.counting import SubwordCounter
from jaxcompress.prompt.joining import join
from jaxcompress.prompt.protect import protected
from jaxcompress.prompt.words import segment

FIXTURES = Path(__file__).parents[1] / "fixtures" / "prompt"
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
TEXT = (
    "John: So, um, I've been looking at the budget, and I think we can't afford the second phase until 2025.\n"
    "Maria: I don't agree. We've already spent $4,200 on permits; it's cheaper to finish than to wait!\n"
    f"회의는 3시에 시작합니다. 会议将于三点开始。 会議は三時に始まります。 Die Straßen {FAMILY} sind cafe\u0301 😀😀."
)
OTHER = "The harbor was quiet that night. Ships, ships, and more ships lay at anchor; nobody spoke."


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return Compressor.load(FIXTURES / request.param)


@pytest.fixture(scope="module")
def bert() -> Compressor:
    return Compressor.load(FIXTURES / "bert")


def counted(text: str) -> int:
    return len(re.findall(r"\w{1,4}|\W", text))


def is_made_of(result: Compressed) -> None:
    """Every text is its kept words in their order with nothing but white space added, and cuts no grapheme."""
    for document in result.documents:
        kept = [word for word, label in zip(document.scored.words, document.labels, strict=True) if label]
        assert "".join(document.text.split()) == "".join("".join(kept).split())
        whole = regex.findall(r"\X", document.scored.text)
        assert set(regex.findall(r"\X", document.text)) <= {*whole, " ", "\n"}


@pytest.mark.parametrize("n", [1, 2, 7, 30, 55, 80])
@pytest.mark.parametrize("scope", ["chunk", "document", "corpus"])
def test_exactly_as_many_tokens_as_asked(compressor: Compressor, n: int, scope: Any) -> None:
    result = compressor.compress([TEXT, OTHER], tokens=n, scope=scope)
    assert result.asked == result.tokens_after == n
    assert sum(compressor.tokenizer.count(document.text) for document in result.documents) == n
    is_made_of(result)


@pytest.mark.parametrize("n", [4, 19, 50, 101])
def test_exactly_as_many_of_another_model(bert: Compressor, n: int) -> None:
    result = replace(bert, count=counted).compress([TEXT, OTHER], tokens=n)
    assert counted(result.text) == result.tokens_after == n
    assert result.tokens_before == counted(f"{TEXT}\n\n{OTHER}")


def test_what_stands_between_texts_counts() -> None:
    """Before, in between and after, whatever the budget: each text is two tokens, and so is an empty line."""
    count = lambda text: len(re.findall(r"\w+|\n", text))
    spans = lambda text: segment(text)
    texts = [ScoredWords(t, spans(t), np.array([0.2, 0.9], np.float32), "fixed") for t in ("42 17", "9 8", "5 6")]
    whole = "42 17\n\n9 8\n\n5 6"
    six = keep(texts, count, tokens=6)
    assert count(six.text) == six.tokens_after <= six.asked == 6
    for budget in (dict(rate=1.0), dict(tokens=10), dict(rate=[1.0, 1, 1]), dict(rate=[0.9, 1, 1])):
        result = keep(texts, count, protect=["numbers"], **budget)  # pyright: ignore[reportArgumentType]
        assert (result.text, result.forced) == (whole, 10)
        assert result.tokens_before == result.tokens_after == result.asked == 10
    above = keep_above(texts, count, 0.5)
    assert (above.text, above.tokens_before, above.tokens_after) == ("17\n\n8\n\n6", 10, 7)
    each = keep(texts, count, rate=[0.5] * 3)
    assert (each.text, each.asked, each.tokens_after) == (above.text, 7, 7)
    with pytest.raises(BudgetTooSmall, match="needs 10 of 10 tokens, more than the 9 asked for"):
        keep(texts, count, tokens=9, protect=["numbers"])


def test_everything_stays_at_rate_1() -> None:
    """Also where the words alone have more tokens than the text."""
    text = "\u4f1a" * 300
    scored = ScoredWords(text, segment(text), np.zeros(300, np.float32), "fixed")
    count = lambda text: (len(text) + 1) // 2
    assert keep(scored, count, rate=1.0).text == text
    half = keep([scored, scored], count, rate=1.0, filter=Contexts(count=1))
    assert (half.text, half.tokens_after, half.asked) == (text, 150, 301)


@pytest.mark.parametrize(("rate", "kept"), [(0.5, 0.5), (0.33, 0.33), (1, 1.0), (1e-9, 1 / 140)])
def test_rates(compressor: Compressor, rate: float, kept: float) -> None:
    result = compressor.compress(TEXT, rate=rate)
    assert result.tokens_after == max(1, int(kept * result.tokens_before + 0.5))
    assert result.saved == result.tokens_before - result.tokens_after
    if rate == 1:
        assert result.text == TEXT


def test_the_best_words_stay(compressor: Compressor) -> None:
    """No dropped word is better than a kept one, but for those that close the last gap."""
    (document,) = compressor.compress(TEXT, rate=0.5).documents
    kept, p = document.labels, document.scored.scores
    worse = [n for n in np.flatnonzero(kept) if p[n] < p[~kept].max()]
    assert len(worse) <= 4
    assert p[kept].mean() > p[~kept].mean() + 0.2


def test_each_context_may_have_a_rate(compressor: Compressor) -> None:
    result = compressor.compress([TEXT, OTHER], rate=[0.3, 1.0])
    alone = compressor.compress(TEXT, rate=0.3)
    assert result.documents[0].text == alone.text
    assert result.documents[1].text == OTHER


def test_a_context_does_not_depend_on_its_company(compressor: Compressor) -> None:
    together = compressor.compress([OTHER, TEXT, TEXT], rate=[0.5, 0.5, 0.4])
    for text, rate, document in zip([OTHER, TEXT, TEXT], [0.5, 0.5, 0.4], together.documents, strict=True):
        assert compressor.compress(text, rate=rate).text == document.text


def test_forced_words_stay_and_count(compressor: Compressor) -> None:
    result = compressor.compress(TEXT, tokens=40, force=[".", "I think", "\n", "no such words"], protect=["numbers"])
    (document,) = result.documents
    assert result.tokens_after == 40
    forced = [word for word, must in zip(document.scored.words, document.forced, strict=True) if must]
    assert forced.count(".") == 4 - TEXT[-1:].count("!")
    assert {"I", "think", "2025", "4,200"} <= set(forced)
    assert all(document.labels[document.forced])
    assert "2025.\n" in result.text
    is_made_of(result)


def test_too_much_is_forced(compressor: Compressor) -> None:
    (document,) = compressor.compress(TEXT, force=[".", ","], protect=["numbers"]).documents
    needed = compressor.tokenizer.count(join(TEXT, document.scored.spans, document.forced))
    budgets: list[dict[str, Any]] = [dict(tokens=3), dict(rate=0.03)]
    for budget in budgets:
        with pytest.raises(BudgetTooSmall, match=rf"needs {needed} of \d+ tokens, more than the 3 asked for") as caught:
            compressor.compress(TEXT, force=[".", ","], protect=["numbers"], **budget)
        assert caught.value.needed == needed
    result = compressor.compress(TEXT, tokens=needed, force=[".", ","], protect=["numbers"])
    assert result.documents[0].labels.tolist() == document.forced.tolist()
    with pytest.raises(BudgetTooSmall, match="protected of context 1 needs"):
        compressor.compress([OTHER, TEXT], rate=[0.5, 0.03], protect=["numbers"])


def test_repeats_of_forced_words(compressor: Compressor) -> None:
    text = "One. Two. Three. Four. Five. Six seven eight nine ten."
    plain = compressor.compress(text, tokens=8, force=["."])
    once = compressor.compress(text, tokens=8, force=["."], drop_consecutive=True)
    words = [word for word, label in zip(once.words, once.labels, strict=True) if label]
    assert once.tokens_after == 8
    assert all(pair != (".", ".") for pair in pairwise(words))
    assert plain.text.count(".") == 6 > once.text.count(".")


def test_whole_contexts_are_dropped_first(compressor: Compressor) -> None:
    contexts = [TEXT, OTHER, TEXT[:100], OTHER[:50]]
    means = [d.scored.scores.mean() for d in compressor.compress(contexts).documents]
    two = compressor.compress(contexts, tokens=20, filter=Contexts(count=2))
    left = [n for n, document in enumerate(two.documents) if document.text]
    assert left == sorted(np.argsort(means)[-2:].tolist())
    assert two.tokens_after == 20
    worst = int(np.argmin(means))
    forced = compressor.compress(contexts, rate=0.2, filter=Contexts(rate=0.25, force=(worst,)))
    assert [n for n, document in enumerate(forced.documents) if document.text] == [worst]
    few = compressor.compress(contexts, rate=1, filter=Contexts(tokens=150))
    assert 0 < few.tokens_after <= 150
    assert few.text == "\n\n".join(d.scored.text for d in few.documents if d.text)
    with pytest.raises(ValueError, match="no context 4: there are 4"):
        compressor.compress(contexts, filter=Contexts(count=1, force=(4,)))
    with pytest.raises(ValueError, match="one of rate, count and tokens"):
        compressor.compress(contexts, filter=Contexts())


@pytest.mark.parametrize("text", ["", " ", " \n\t "])
def test_nothing(compressor: Compressor, text: str) -> None:
    for rate in (0.5, 1):
        result = compressor.compress(text, rate=rate)
        assert (result.text, result.tokens_after, result.words, result.ratio) == ("", 0, [], 1.0)
    assert compressor.compress([]).text == ""
    assert compressor.compress([text, OTHER], tokens=9).tokens_after == 9


def test_one_huge_word(compressor: Compressor) -> None:
    """Longer than a chunk: scored in parts, kept or dropped as one."""
    huge = "ab" * 1500
    result = compressor.compress(f"Here is {huge} now.", tokens=3)
    assert result.tokens_after == 3
    is_made_of(result)
    whole = compressor.compress(huge, rate=0.5)
    assert whole.text in ("", huge)  # no set of whole words has half of it


def test_a_long_text_is_cut_between_sentences(compressor: Compressor) -> None:
    text = (OTHER + "\n") * 40
    pieces, spans = compressor.tokenizer.encode(text), segment(text)
    cuts = chunks(text, pieces.offsets, spans, 510)
    assert cuts[0, 0] == 0
    assert cuts[-1, 1] == len(pieces.ids)
    assert (cuts[1:, 0] == cuts[:-1, 1]).all()
    assert ((cuts[:, 1] - cuts[:, 0]) <= 510).all()
    assert all(text[pieces.offsets[end - 1, 0]] == "." for _, end in cuts)
    result = compressor.compress(text, rate=0.3, scope="chunk")
    assert result.tokens_after == int(result.tokens_before * 0.3 + 0.5)
    (document,) = result.documents
    shares = [document.costs[document.labels & (document.scored.chunks == n)].sum() for n in range(len(cuts))]
    assert np.abs(np.array(shares) - 0.3 * (cuts[:, 1] - cuts[:, 0])).max() < 2


def test_names_of_special_tokens_are_text(compressor: Compressor) -> None:
    text = "a [SEP] b [PAD] c <s> d </s> e <pad> f"
    assert compressor.compress(text, rate=1).text == text
    special = {compressor.tokenizer.opening, compressor.tokenizer.closing, compressor.tokenizer.padding}
    assert not special & set(compressor.tokenizer.encode(text).ids.tolist())


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"rate must be in \(0, 1\]", dict(rate=0)),
        (ValueError, r"rate must be in \(0, 1\]", dict(rate=1.5)),
        (ValueError, r"rate must be in \(0, 1\]", dict(rate=float("nan"))),
        (ValueError, r"rate must be in \(0, 1\]", dict(rate=np.float32("nan"))),
        (ValueError, r"rate must be in \(0, 1\]", dict(rate=True)),
        (ValueError, r"rate must be in \(0, 1\]", dict(rate=np.array([[0.5]]))),
        (ValueError, "tokens must be a whole number", dict(tokens=7.0)),
        (ValueError, "tokens must be a whole number", dict(tokens=True)),
        (ValueError, "2 rates for 1 contexts", dict(rate=[0.5, 0.5])),
        (ValueError, "tokens must be a whole number, at least 1, not 0", dict(tokens=0)),
        (ValueError, "not both", dict(tokens=5, rate=0.5)),
        (ValueError, "empty string", dict(force=["."  , ""])),
        (TypeError, "list of strings", dict(force=".")),
    ],
)  # fmt: skip
def test_refused(bert: Compressor, error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        bert.compress(TEXT, **options)


def test_scores_of_first_subwords(bert: Compressor) -> None:
    assert (replace(bert, word="first")(TEXT).scores != bert(TEXT).scores).any()
    with pytest.raises(ValueError, match="'mean' of its subwords' or the 'first' one, not 'max'"):
        replace(bert, word="max").compress(TEXT)


def test_one_way_to_keep(bert: Compressor) -> None:
    """Scored first and kept after, by whatever numbers: the same words, and a score of +inf is a forced word."""
    whole = bert.compress([TEXT, OTHER], rate=0.4, force=["."])
    kept = keep(bert.score([TEXT, OTHER]), SubwordCounter(bert.tokenizer), rate=0.4, force=["."])
    assert (kept.text, kept.asked, kept.tokens_after) == (whole.text, whole.asked, whole.tokens_after)
    scored = bert(OTHER)
    protected = np.where([word == "." for word in scored.words], np.inf, scored.scores).astype(np.float32)
    mine = keep(scored._replace(scores=protected), bert.tokenizer.count, tokens=9)
    assert mine.text == bert.compress(OTHER, tokens=9, force=["."]).text


def test_no_compressor(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Compressor.load(tmp_path)


PIECES = st.sampled_from(
    ["the ", "budget", ", ", "\n", "4,200 ", ". ", "don't ", "cafe\u0301 ", FAMILY, "\U0001f1e9\U0001f1ea", "한국어 ",
     "\u1112\u1161\u11ab", "会議は", "カー", "Straße ", "\u0301", "\u200b", "unbelievably ", "$", "鑫鑫"]
)  # fmt: skip


@settings(max_examples=25)
@given(st.lists(PIECES, min_size=1, max_size=30).map("".join), st.integers(1, 30))
def test_any_text(bert: Compressor, text: str, n: int) -> None:
    result = bert.compress(text, tokens=n)
    assert result.tokens_after <= n
    assert bert.tokenizer.count(result.text) == result.tokens_after
    is_made_of(result)


STRANGE = st.lists(
    st.sampled_from(["[CLS]", "[SEP] ", "[PAD]", "</s>", "<mask>", "<|endoftext|>", "\0", "\ufeff", "\u200b", "\u200d",
                     "\u2060", "\u202e", "\x1b[31m", "\u3000", "\r\n", "\t", " ", "x" * 200, "\u0301" * 40,
                     "\u115f\u1160", "\U000e0001", "\ud800", "a\udfffb"])
    | st.text(st.characters(exclude_categories=()), max_size=4),
    max_size=8,
).map("".join)  # fmt: skip
WAYS: dict[str, Any] = {
    "rate": lambda c, text: c.compress(text, rate=0.4).text,
    "all": lambda c, text: c.compress(text, rate=1).text,
    "corpus": lambda c, text: c.compress([text, "", text], tokens=1, scope="corpus", filter=Contexts(count=2)).text,
    "chunk": lambda c, text: (
        c.compress(text, scope="chunk", force=["x", " "], protect=["numbers"], drop_consecutive=True).text
    ),
    "another count": lambda c, text: replace(c, count=len).compress(text).text,
    "stream": lambda c, text: "".join(part.text for part in compress_stream(c, [text, "", text], window=5)),
    "parts": lambda c, text: compress_structured(c, [Segment(text, 0.3), Segment(text, 1)]).text,
    "json": lambda c, text: compress_json(c, {text: [text, None, {"": text}]}, {text: KeyRule(remove=True)})[0],
}


@pytest.mark.parametrize("way", WAYS)
@given(STRANGE)
def test_strange_text_is_compressed(bert: Compressor, way: str, text: str) -> None:
    WAYS[way](bert, text)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.float32(0.5)], ids=repr)
def test_rates_of_every_type(bert: Compressor, number: Any) -> None:
    expected = bert.compress(OTHER, rate=0.5).text
    assert bert.compress(OTHER, rate=number).text == bert.compress([OTHER], rate=[number]).text == expected
    assert "".join(part.text for part in compress_stream(bert, [OTHER], rate=number)) == expected
    kept = bert.compress([OTHER, TEXT], filter=Contexts(rate=number)).documents
    assert sum(bool(document.labels.any()) for document in kept) == 1
    for tokens in (np.int64(7), np.array(7), jnp.int32(7)):
        assert bert.compress(OTHER, tokens=tokens).tokens_after == 7


def test_nothing_to_compress(bert: Compressor) -> None:
    for scope in ("chunk", "document", "corpus"):
        for nothing in ([], [""], ["", " \n"], ""):
            result = bert.compress(nothing, scope=scope)
            assert (result.text, result.tokens_after, result.ratio, result.saved) == ("", 0, 1.0, 0)
    assert list(compress_stream(bert, [])) == list(compress_stream(bert, ["", " "])) == []
    assert compress_structured(bert, "").text == compress_structured(bert, []).text == ""
    for value in ({}, [], None, 3.5, "", {"": [[]]}):
        assert compress_json(bert, value)[0] == value


@pytest.mark.parametrize("text", [f"{OTHER}\n" * 40, f"{OTHER} " * 40, "x" * 4000], ids=["lines", "line", "word"])
def test_a_stream_holds_a_window_and_a_half(bert: Compressor, text: str) -> None:
    """What was read and not yet written does not grow with the text."""
    read = written = 0
    held: list[int] = []

    def pieces() -> Iterator[str]:
        nonlocal read
        for start in range(0, len(text), 50):
            held.append(read - written)
            read += len(text[start : start + 50])
            yield text[start : start + 50]

    for part in compress_stream(bert, pieces(), rate=0.5, window=400, protect=["numbers", "quotes"]):
        written += len(part.documents[0].scored.text)
    white = text.count(" \n") + text.count("\n") + 10  # between windows
    assert max(held) <= 400 + 200 + 50 + white
    assert read == len(text)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(1, 5)), min_size=1, max_size=12), st.integers(0, 40))
def test_choice_against_all_subsets(words: list[tuple[float, int]], n: int) -> None:
    """As many tokens as any subset has within the budget; the best such subset where all words cost the same."""
    scores, costs = np.array([w[0] for w in words], np.float32), np.array([w[1] for w in words])
    kept = choose_words(scores, costs, n)
    sums = {0}
    for cost in costs.tolist():
        sums |= {s + cost for s in sums}
    assert costs[kept].sum() == max(s for s in sums if s <= n)
    same = choose_words(scores, np.ones_like(costs), n)
    best = sorted(range(len(words)), key=lambda i: (-scores[i], i))[:n]
    assert np.flatnonzero(same).tolist() == sorted(best)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 1))
def test_shares(units: list[tuple[int, float]], where: float) -> None:
    weights = np.array([w for w, _ in units])
    least = np.array([int(w * f) for w, f in units])
    total = int(least.sum() + where * (weights - least).sum())
    shares = apportion(total, weights, least)
    assert shares.sum() == total
    assert ((least <= shares) & (shares <= weights)).all()


def test_joining() -> None:
    text = "So, um, the cat sat, mat no. 22-0417 is $4,200.\nNext 会议は東京で。"
    spans = segment(text)
    kept = np.array([text[a:b] in ("So", ",", "cat", "mat", "22", "0417", "Next", "会", "は", "京") for a, b in spans])
    assert join(text, spans, kept) == "So,, cat, mat 22 0417 Next 会は京"
    assert join(text, spans, kept, ["\n"]) == "So,, cat, mat 22 0417\nNext 会は京"
    assert join(text, spans, np.ones(len(spans), bool)) == text


@pytest.mark.parametrize(
    ("text", "kept", "joined"),
    [
        ("the file (/etc/hosts) x", "the file / etc / hosts", "the file /etc/hosts"),
        ("Reading temp=-5 today", "Reading - 5", "Reading -5"),
        ("temp=-5 today", "temp - 5", "temp -5"),
        ("in my folder [$HOME], or", "folder $ HOME ,", "folder $HOME,"),
        ("a branch (--force) too", "branch - - force", "branch --force"),
        ("go (../a) now", "go . . / a", "go ../a"),
        ("he waits for it... and", "waits . . .", "waits..."),
        ("he said (so). Then", "said ) .", "said)."),
        ("９時〜１０時", "９ １０", "９ １０"),
        ("第１、２、３条", "１ ２ ３", "１ ２ ３"),
        ("서울(삼)부산", "서울 부산", "서울 부산"),
        ("会（東）カー（京）は", "会 カー は", "会カーは"),
        ("Ａ（Ｂ）Ｃ", "Ａ Ｃ", "Ａ Ｃ"),
    ],
)
def test_what_is_joined_keeps_its_sense(text: str, kept: str, joined: str) -> None:
    """No sign is taken from the word that it opens, and no new number or word is made."""
    spans, left = segment(text), kept.split()
    labels = [bool(left) and text[start:end] == left[0] and bool(left.pop(0)) for start, end in spans.tolist()]
    assert not left
    assert join(text, spans, np.array(labels)) == joined


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("Run this now:\n```sh\nrm -rf x\n```\nThen look at 5", "```sh\nrm -rf x\n```\n5"),
        ("1. Step one\r\n\r\n    ~~~\r\n    x\r\n    ~~~\r\nand 2", "1\r\n~~~\r\n    x\r\n    ~~~\r\n2"),
        ("1 then\n> ```\n> x\n> ```\n> and 2", "1\n> ```\n> x\n> ```\n2"),
        ("1 use\nthis ```rm``` and 2", "1 ```rm``` 2"),
    ],
)
def test_fences_stay_on_lines_of_their_own(text: str, joined: str) -> None:
    spans = segment(text)
    assert join(text, spans, protected(text, spans, ["code", "numbers"])) == joined
