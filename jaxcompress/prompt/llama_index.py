"""A node postprocessor for LlamaIndex: `pip install "jaxcompress[llama-index]"`.

shorter = NodeCompressor(compressor=Compressor.load(FOLDER, unit="sentence"))
engine = index.as_query_engine(node_postprocessors=[shorter])
"""

from __future__ import annotations

from typing import Any

from jaxcompress._extras import extra
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.retrieved import RELEVANCE, compress_retrieved

with extra("llama-index"):
    from llama_index.core.bridge.pydantic import Field  # pyright: ignore[reportMissingImports]
    from llama_index.core.postprocessor.types import BaseNodePostprocessor  # pyright: ignore[reportMissingImports]
    from llama_index.core.schema import (  # pyright: ignore[reportMissingImports]
        MetadataMode,
        NodeWithScore,
        QueryBundle,
        TextNode,
    )


class NodeCompressor(BaseNodePostprocessor):
    """Shortens the texts of nodes; those of which nothing is left are dropped. Nodes without a text, such as those of
    pictures, stay as they are.

    Ids, metadata, relationships and the retriever's scores stay. With an encoder that reads a question, the metadata
    get a `relevance_score`, which neither embeddings nor the language model see.

    Attributes:
      compressor: scores the words or sentences.
      rate, tokens, threshold: as for `compress_retrieved`, of all nodes of a query together.
      options: further arguments of `Compressor.compress` or `Compressor.prune`.
    """

    compressor: Compressor = Field(exclude=True)
    rate: float | None = None
    tokens: int | None = None
    threshold: float | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def class_name(cls) -> str:
        return "NodeCompressor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        budget = dict(rate=self.rate, tokens=self.tokens, threshold=self.threshold)
        texts = {
            at: text
            for at, node in enumerate(nodes)
            if isinstance(node.node, TextNode) and (text := node.node.get_content(metadata_mode=MetadataMode.NONE))
        }
        query = None if query_bundle is None else query_bundle.query_str
        result = compress_retrieved(self.compressor, [*texts.values()], query, **budget, **self.options)
        shorter = dict(zip(texts, result.documents, strict=True))
        found = []
        for at, node in enumerate(nodes):
            if at not in shorter:
                found.append(node)
            elif shorter[at].text:
                found.append(NodeWithScore(node=_with(node.node, shorter[at]), score=node.score))
        return found


def _with(node: Any, kept: Any) -> Any:
    """A copy of a text node with the words that were kept."""
    copy = node.model_copy(deep=True)
    copy.set_content(kept.text)
    if kept.scored.relevance is not None:
        copy.metadata[RELEVANCE] = kept.scored.relevance
        for hidden in (copy.excluded_embed_metadata_keys, copy.excluded_llm_metadata_keys):
            hidden.append(RELEVANCE)
    return copy
