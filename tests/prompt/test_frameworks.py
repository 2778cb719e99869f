"""The classes for LangChain and LlamaIndex, against the installed packages, and the rule behind both."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from jaxcompress.prompt import Compressor
from jaxcompress.prompt.retrieved import compress_retrieved

FIXTURES = Path(__file__).parents[1] / "fixtures"
QUERY = "Who signed the contract?"
TEXTS = [
    "The mayor signed it on Monday. Rain fell all night. Nobody knew why the lights went out!",
    "",
    "Ships lay at anchor. The harbour master did not agree.",
]


@pytest.fixture(scope="module")
def words() -> Compressor:
    return Compressor.load(FIXTURES / "prompt" / "bert")


@pytest.fixture(scope="module")
def pruner() -> Compressor:
    return Compressor.load(FIXTURES / "modernbert" / "provence", unit="sentence")


def test_the_rule(words: Compressor, pruner: Compressor) -> None:
    assert compress_retrieved(words, TEXTS, QUERY).text == words.compress(TEXTS, rate=0.5).text
    assert compress_retrieved(words, TEXTS, tokens=9).tokens_after == 9
    assert compress_retrieved(pruner, TEXTS, QUERY).text == pruner.asking(QUERY).prune(TEXTS).text
    assert compress_retrieved(pruner, TEXTS, QUERY, tokens=40).tokens_after <= 40
    with pytest.raises(ValueError, match="not both"):
        compress_retrieved(words, TEXTS, QUERY, rate=0.5, threshold=0.2)
    with pytest.raises(ValueError, match="give it with `asking`"):
        compress_retrieved(pruner, TEXTS)


def test_langchain(words: Compressor, pruner: Compressor) -> None:
    pytest.importorskip("langchain_core", reason='pip install "jaxcompress[langchain]"')
    from langchain_core.documents import Document

    from jaxcompress.prompt.langchain import DocumentCompressor

    documents = [Document(text, metadata={"source": n}, id=str(n)) for n, text in enumerate(TEXTS)]
    expected = words.compress(TEXTS, rate=0.4, protect=["negations"]).documents
    half = DocumentCompressor(compressor=words, rate=0.4, options={"protect": ["negations"]})
    found = half.compress_documents(documents, QUERY)
    assert [one.page_content for one in found] == [one.text for one in expected if one.text]
    assert [(one.id, one.metadata) for one in found] == [("0", {"source": 0}), ("2", {"source": 2})]
    assert [one.page_content for one in documents] == TEXTS
    pruned = asyncio.run(DocumentCompressor(compressor=pruner).acompress_documents(documents, QUERY))
    result = pruner.asking(QUERY).prune(TEXTS).documents
    assert [one.page_content for one in pruned] == [one.text for one in result if one.text]
    assert all(0 < one.metadata["relevance_score"] < 1 for one in pruned)
    with pytest.raises(ValueError, match="share"):
        DocumentCompressor(compressor=words, share=0.5)  # pyright: ignore[reportCallIssue]


def test_llama_index(words: Compressor, pruner: Compressor) -> None:
    pytest.importorskip("llama_index.core", reason='pip install "jaxcompress[llama-index]"')
    from llama_index.core.schema import ImageNode, IndexNode, NodeWithScore, TextNode

    from jaxcompress.prompt.llama_index import NodeCompressor

    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(n)), score=n / 4) for n, text in enumerate(TEXTS)]
    assert issubclass(IndexNode, TextNode)
    picture = NodeWithScore(node=ImageNode(image_path="a.png"), score=1.0)
    short = NodeCompressor(compressor=words, tokens=12)
    found = short.postprocess_nodes([*nodes, picture], query_str=QUERY)
    first, third = (one.text for one in words.compress([TEXTS[0], TEXTS[2]], tokens=12).documents)
    assert [one.node.get_content() for one in found] == [first, "", third, ""]
    assert [one.score for one in found] == [0.0, 0.25, 0.5, 1.0]
    assert found[3] is picture
    assert short.postprocess_nodes([picture], query_str=QUERY) == [picture]
    assert [one.node.get_content() for one in nodes] == TEXTS
    with_text = [nodes[0], nodes[2]]
    pruned = NodeCompressor(compressor=pruner).postprocess_nodes(with_text, query_str=QUERY)
    result = pruner.asking(QUERY).prune([TEXTS[0], TEXTS[2]]).documents
    assert [one.node.get_content() for one in pruned] == [one.text for one in result if one.text]
    assert all("relevance_score" in one.node.excluded_llm_metadata_keys for one in pruned)
    assert "compressor" not in NodeCompressor(compressor=words).to_dict()
