"""Retrieved documents, shortened before a model reads them: the rule of the classes for LangChain and LlamaIndex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcompress.inputs.scalars import Number
from jaxcompress.prompt.compressor import THRESHOLD, Compressor
from jaxcompress.prompt.keeping import Compressed

RELEVANCE = "relevance_score"
"""The entry of a document's metadata that says how relevant it is, from encoders that read a question."""


def compress_retrieved(
    compressor: Compressor,
    texts: Sequence[str],
    query: str | None = None,
    *,
    rate: Number | None = None,
    tokens: Number | None = None,
    threshold: Number | None = None,
    **options: Any,
) -> Compressed:
    """Shortens documents that were found for a query. Of some nothing may be left.

    An encoder that reads a question reads the query with each; one that reads none shortens them alike for every query.

    Args:
      rate, tokens: of all documents together, as for `Compressor.compress`.
      threshold: keep what scores above it instead, as `Compressor.prune`. If none of the three is given: 0.1 for an
        encoder that reads a question, else half of the tokens.
      options: as for `Compressor.compress` or `Compressor.prune`.

    Raises:
      ValueError: a threshold and a budget are given, or no query for an encoder that reads one; and as they.
    """
    if threshold is not None and (rate is not None or tokens is not None):
        raise ValueError("give a threshold, or a rate or a number of tokens, not both")
    reads = compressor.encoder.reads_question
    if reads and query is not None:
        compressor = compressor.asking(query)
    if threshold is None and rate is None and tokens is None and reads:
        threshold = THRESHOLD
    if threshold is not None:
        return compressor.prune(texts, threshold=threshold, **options)
    return compressor.compress(texts, rate=rate, tokens=tokens, **options)
