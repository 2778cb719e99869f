"""Tokens of what is left of a text are counted part by part, and are what the tokenizer says of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.embedded import decoder_folder
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.prompt.counting import WORDS, FunctionCounter, SubwordCounter, TokenizerCounter, counter_of
from jaxcompress.prompt.joining import join
from jaxcompress.prompt.units import sentences
from jaxcompress.prompt.words import segment

FIXTURES = Path(__file__).parents[1] / "fixtures" / "prompt"
TOKENIZERS = [EncoderTokenizer(FIXTURES / name) for name in ("bert", "xlm-roberta")]
PIECES = st.sampled_from(
    ["the", "Budget", "(", ")", ",", ".", " ", "  ", "\n", "\u00a0", "\u3000", "\u2581", "<s>", "[SEP]", "<mask>",
     "4,200", "\u0301", "e\u0301", "\u0600", "\x00", "会", "東京", "カー", "한국어", "\U0001f469\u200d\U0001f469",
     "don't", "##ing"]
)  # fmt: skip
texts = st.lists(st.one_of(PIECES, st.just(" "), st.characters()), max_size=14).map("".join)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bert", "xlm-roberta"])
@given(st.data())
def test_as_the_tokenizer_counts(tokenizer: EncoderTokenizer, data: st.DataObject) -> None:
    text = data.draw(texts)
    units = np.array(sentences(text), np.int64).reshape(-1, 2)  # a span may hold many parts
    spans, counter = data.draw(st.sampled_from([segment(text), units])), SubwordCounter(tokenizer)
    costs, tokens = counter.price(text, spans)
    assert tokens == len(tokenizer.encode(text).ids)
    assert not len(spans) or costs.sum() == tokens  # every subword is some word's cost
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans))), bool)
    for short in (join(text, spans, kept), text, data.draw(texts), join(text, spans, ~kept, ["\n"])):
        assert counter(short) == tokenizer.count(short)


def test_what_was_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all of what is left would count the same, only slower: so what the tokenizer is given is noted."""
    read: list[str] = []
    encode = EncoderTokenizer.encode
    monkeypatch.setattr(EncoderTokenizer, "encode", lambda self, text: read.append(text) or encode(self, text))
    counter = SubwordCounter(TOKENIZERS[0], {"the phase, the": TOKENIZERS[0].encode("the phase, the")})
    read.clear()
    costs, tokens = counter.price("the phase, the", segment("the phase, the"))
    assert (costs.tolist(), tokens) == ([1, 2, 1, 1], 5)
    assert counter("the phase, the phase,") == 8
    assert read == []
    counter("the phase the phase")
    assert read == [" phase"]


DECODERS = [Tokenizer(decoder_folder())]


@given(texts)
def test_tokens_of_a_decoder(text: str) -> None:
    """Each token is some word's cost, and the begin token is none."""
    (tokenizer,), spans = DECODERS, segment(text)
    counter = counter_of(TokenizerCounter(tokenizer))
    costs, tokens = counter.price(text, spans)
    assert counter(text) == tokens == len(tokenizer.encode(text, add_bos=False))
    assert costs.sum() == (tokens if len(spans) else 0)
    assert counter.total([text, "", text], 0) == counter(f"{text}\n\n{text}" if text else "")


def test_counters() -> None:
    text = "a bcd, a"
    by_length = counter_of(len)
    assert isinstance(by_length, FunctionCounter)
    costs, tokens = by_length.price(text, segment(text))
    assert (costs.tolist(), tokens) == ([1, 4, 1, 2], 8)
    assert by_length.total(["ab", "", "c"], 0) == len("ab\n\nc")
    costs, tokens = WORDS.price(text, segment(text))
    assert (costs.tolist(), tokens, WORDS(text), WORDS.total([text], 3)) == ([1] * 4, 4, 4, 3)


def folder_of(fast: FastTokenizer, to: Path) -> Path:
    fast.save(str(to / "tokenizer.json"))
    return to


def test_tokenizers_that_reach_over_spaces(tmp_path: Path) -> None:
    """A piece of two words, or an added token that takes the space before it along: then a text is one part."""
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("a b", -1.0), ("a", -2.0), (" ", -2.0)]
    fast = FastTokenizer(models.Unigram(vocabulary, unk_id=0))
    assert len(EncoderTokenizer(folder_of(fast, tmp_path)).encode("a b a").ids) == 3  # no token of it is special
    fast.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    reaching = EncoderTokenizer(folder_of(fast, tmp_path))
    assert reaching.apart("a b a") == ["a b a"]
    counter = SubwordCounter(reaching)
    counter.price("a b", segment("a b"))
    assert counter("a b a") == reaching.count("a b a") == 3
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    assert EncoderTokenizer(folder_of(fast, tmp_path)).apart("a b a") == ["a", " b", " a"]
    fast.normalizer = normalizers.Replace(" ", "")
    assert EncoderTokenizer(folder_of(fast, tmp_path)).apart("a b a") == ["a b a"]
    fast.normalizer = normalizers.Lowercase()
    assert EncoderTokenizer(folder_of(fast, tmp_path)).apart("a b a") == ["a", " b", " a"]
    fast.add_tokens([AddedToken("b", lstrip=True)])
    assert EncoderTokenizer(folder_of(fast, tmp_path)).apart("a b a") == ["a b a"]


def test_sentences_that_begin_alike() -> None:
    """Each subword is a cost of the part where it stands, and not of the one where its sentence begins."""
    text = "First. The cat sat on the mat. The dog ran."
    counter = SubwordCounter(TOKENIZERS[0])
    counter.price(text, np.array(sentences(text)))
    assert counter(text) == counter.total([text], 0) == TOKENIZERS[0].count(text)
