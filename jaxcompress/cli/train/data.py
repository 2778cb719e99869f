"""From the documents of `train` to rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxcompress.cli.runtime import progress

if TYPE_CHECKING:
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.training.data import Document, PackedRows


def packed_rows(documents: Sequence[Document], tokenizer: Tokenizer, vocab_size: int, length: int) -> PackedRows:
    """Documents, tokenized and cut into rows of `length` tokens. Raises ValueError for a tokenizer with other tokens
    than the model's, or too little data."""
    from jaxcompress.training.data import PackedRows, check_vocabulary, pack

    check_vocabulary(tokenizer, vocab_size)
    with progress(None, "tokenizing") as told:
        return PackedRows(pack(documents, tokenizer, vocab_size=vocab_size, progress=told), length)
