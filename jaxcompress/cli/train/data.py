"""From the files of `train` to rows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcompress.cli.runtime import progress
from jaxcompress.cli.train.arguments import TrainFlags

if TYPE_CHECKING:
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.training.data import PackedRows


def packed_rows(how: TrainFlags, tokenizer: Tokenizer, vocab_size: int) -> PackedRows:
    """All documents, tokenized and cut into rows of --length tokens.

    Raises:
      ValueError: a tokenizer with other tokens than the model's, or data that is no text.
      ImportError: a dataset needs a package that is not installed.
      OSError: a file cannot be read.
    """
    from jaxcompress.training.data import PackedRows, check_vocabulary, pack, read_documents

    check_vocabulary(tokenizer, vocab_size)
    documents = read_documents(how.data, field=how.field, split=how.split)
    with progress(None, "tokenizing") as told:
        return PackedRows(pack(documents, tokenizer, vocab_size=vocab_size, progress=told), how.length)
