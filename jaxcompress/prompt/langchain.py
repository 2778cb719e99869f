"""A document compressor for LangChain: `pip install "jaxcompress[langchain]"`.

from langchain_classic.retrievers import ContextualCompressionRetriever

shorter = DocumentCompressor(compressor=Compressor.load(FOLDER, unit="sentence"))
retriever = ContextualCompressionRetriever(base_compressor=shorter, base_retriever=vectors.as_retriever())
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcompress._extras import extra
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.retrieved import RELEVANCE, compress_retrieved

with extra("langchain"):
    from langchain_core.callbacks import Callbacks  # pyright: ignore[reportMissingImports]
    from langchain_core.documents import (  # pyright: ignore[reportMissingImports]
        BaseDocumentCompressor,
        Document,
    )
    from pydantic import ConfigDict, Field


class DocumentCompressor(BaseDocumentCompressor):
    """Shortens the documents that a retriever found; those of which nothing is left are dropped.

    Metadata and ids stay. With an encoder that reads a question, the metadata get a `relevance_score`.

    Attributes:
      compressor: scores the words or sentences.
      rate, tokens, threshold: as for `compress_retrieved`, of all documents of a query together.
      options: further arguments of `Compressor.compress` or `Compressor.prune`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    compressor: Compressor
    rate: float | None = None
    tokens: int | None = None
    threshold: float | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The shorter documents, in their order. See `compress_retrieved`."""
        budget = dict(rate=self.rate, tokens=self.tokens, threshold=self.threshold)
        texts = [document.page_content for document in documents]
        result = compress_retrieved(self.compressor, texts, query, **budget, **self.options)
        shorter = []
        for document, kept in zip(documents, result.documents, strict=True):
            told = {} if kept.scored.relevance is None else {RELEVANCE: kept.scored.relevance}
            if kept.text:
                metadata = {**document.metadata, **told}
                shorter.append(document.model_copy(update=dict(page_content=kept.text, metadata=metadata)))
        return shorter
