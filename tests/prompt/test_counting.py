"""Tokens of what is left of a text are counted part by part, and are what the tokenizer says of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.prompt.counting import Counts
from jaxcompress.prompt.joining import join
from jaxcompress.prompt.words import align, owners, segment

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
    pieces, spans = tokenizer.encode(text), segment(text)
    costs = np.bincount(owners(align(spans, pieces.offsets), len(pieces.ids)) + 1, minlength=len(spans) + 1)[1:]
    assert not len(spans) or costs.sum() == len(pieces.ids)  # every subword is some word's cost
    counts = Counts(tokenizer, [(text, spans, costs)] if len(spans) else [])
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans))), bool)
    for short in (join(text, spans, kept), text, data.draw(texts), join(text, spans, ~kept, ["\n"])):
        assert counts.of(short) == tokenizer.count(short)


def test_what_was_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all of what is left would count the same, only slower: so what the tokenizer is given is noted."""
    read: list[str] = []
    encode = EncoderTokenizer.encode
    monkeypatch.setattr(EncoderTokenizer, "encode", lambda self, text: read.append(text) or encode(self, text))
    spans = np.array([[0, 3], [4, 10], [10, 11], [12, 15]])
    counts = Counts(TOKENIZERS[0], [("the budget, the", spans, np.array([1, 2, 1, 1]))])
    assert counts.of("the budget, the budget,") == 8
    assert read == []
    counts.of("the budget the budget")
    assert read == [" budget"]


def folder_of(fast: Tokenizer, to: Path) -> Path:
    fast.save(str(to / "tokenizer.json"))
    return to


def test_tokenizers_that_reach_over_spaces(tmp_path: Path) -> None:
    """A piece of two words, or an added token that takes the space before it along: then a text is one part."""
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("a b", -1.0), ("a", -2.0), (" ", -2.0)]
    fast = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    assert len(EncoderTokenizer(folder_of(fast, tmp_path)).encode("a b a").ids) == 3  # no token of it is special
    fast.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    reaching = EncoderTokenizer(folder_of(fast, tmp_path))
    assert reaching.apart("a b a") == ["a b a"]
    counts = Counts(reaching, [("a b", np.array([[0, 1], [2, 3]]), np.array([1, 0]))])
    assert counts.of("a b a") == reaching.count("a b a") == 3
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    assert EncoderTokenizer(folder_of(fast, tmp_path)).apart("a b a") == ["a", " b", " a"]
    fast.normalizer = normalizers.Replace(" ", "")
    assert EncoderTokenizer(folder_of(fast, tmp_path)).apart("a b a") == ["a b a"]
    fast.normalizer = normalizers.Lowercase()
    assert EncoderTokenizer(folder_of(fast, tmp_path)).apart("a b a") == ["a", " b", " a"]
    fast.add_tokens([AddedToken("b", lstrip=True)])
    assert EncoderTokenizer(folder_of(fast, tmp_path)).apart("a b a") == ["a b a"]
