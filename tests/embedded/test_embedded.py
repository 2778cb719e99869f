"""The embedded model, and what it may and may not have been trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxcompress import embedded
from jaxcompress.checkpoints import load_embedded
from jaxcompress.embedded import corpus
from jaxcompress.embedded.corpus import Document, documents, held_out

LONG = 160  # characters of a paragraph that no two documents have in common by chance


@pytest.fixture(scope="module")
def everything() -> list[Document]:
    return documents()


def paragraphs(text: str) -> set[str]:
    whole = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in whole if len(paragraph) >= LONG}


def test_documents_are_the_same_every_time(everything: list[Document]) -> None:
    assert everything == documents()
    names = [document.name for document in everything]
    assert len(set(names)) == len(names) > 300
    assert all(document.text.strip() for document in everything)


def test_documents_are_topics_and_sources_without_tests(everything: list[Document]) -> None:
    names = {document.name for document in everything}
    assert {"topics/assignment", "topics/lambda", "json/decoder.py", "argparse.py"} <= names
    assert not [name for name in names if "/test" in name or "site-packages" in name or name.startswith("test/")]
    assert "pydoc_data/topics.py" not in names


def test_a_part_is_held_out(everything: list[Document], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "documents", lambda: everything)  # reading them takes a second
    apart = [document for document in everything if document.held_out]
    share = sum(len(document.text) for document in apart) / sum(len(document.text) for document in everything)
    assert 0.02 < share < 0.2
    assert held_out() == apart
    topics = held_out("topics/")
    assert "topics/assignment" in {document.name for document in topics}
    assert [document for document in apart if document.name.startswith("topics/")] == topics
    assert 0 < len(topics) < len(apart)
    assert {document.name for document in held_out("pdb")} == {"pdb.py"}
    assert held_out("nothing") == []


def test_no_training_document_quotes_a_held_out_topic(everything: list[Document]) -> None:
    topics = [topic for topic in everything if topic.held_out and topic.name.startswith("topics/")]
    secret = {paragraph: topic.name for topic in topics for paragraph in paragraphs(topic.text)}
    assert len(secret) > 50
    for document in everything:
        if not document.held_out:
            told = secret.keys() & paragraphs(document.text)
            assert not told, f"{document.name} quotes {secret[next(iter(told))]}"


class TestModel:
    """What ships."""

    @pytest.fixture(scope="class")
    def loaded(self) -> Any:
        return load_embedded()

    def test_is_small(self) -> None:
        files = [path for path in embedded.decoder_folder().rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 10 * 2**20

    def test_fits_its_tokenizer(self, loaded: Any) -> None:
        model, tokenizer = loaded.model, loaded.tokenizer
        assert tokenizer.vocab_size == model.config.vocab_size
        assert sorted(tokenizer.vocabulary().values()) == list(range(tokenizer.vocab_size))
        assert tokenizer.bos_id is not None
        assert model.dtype == np.float32
        assert model.config.max_position == 2048

    @pytest.mark.parametrize(
        "text",
        ["def f(x):\n    return x ** 2\n", "Grüße aus Köln 😀🇰🇷 你好", "\t\r\n  \x00 two  spaces ", "👩‍👩‍👧 é é"],
    )
    def test_tokenizer_gives_text_back(self, loaded: Any, text: str) -> None:
        tokenizer = loaded.tokenizer
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.max() < tokenizer.vocab_size

    def test_has_learnt_from_documents_like_those_held_out(self, loaded: Any) -> None:
        from jaxcompress.evaluation.perplexity import perplexity
        from jaxcompress.policies import Full

        model, tokenizer = loaded.model, loaded.tokenizer
        (document,) = held_out("topics/assignment")
        ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(document.text, add_bos=False)])[None, :512]
        assert 2 < perplexity(model, ids, Full(), 512, mode="chunked", chunk=128).perplexity < 60
