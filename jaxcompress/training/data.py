"""Text for training: documents from files, packed into rows, in an order that can be resumed.

    documents -> one stream of tokens -> rows of equal length -> batches

Documents are joined into one stream, with end and begin tokens between them, and cut into rows, so there is no padding.
Rows, not documents, are shuffled, anew in every epoch, so the rows of a batch come from the whole data. The rows of the
n-th batch depend only on the seed and n, so the state of the iterator is one number.

The stream stays in memory and takes 5 bytes per token. For a larger corpus, build a `grain` dataset of `Batch` over
your own source and pass its iterator to `jaxcompress.training.fit`.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcompress._extras import extra
from jaxcompress.generation.text import Tokenizer, encode_stream
from jaxcompress.inputs.scalars import whole
from jaxcompress.inputs.text import clean, json_lines, read_text
from jaxcompress.inputs.token_ids import token_ids

with extra("train"):
    import grain

Document = str | np.ndarray
"""A text, or token ids [n]."""

_JSON_LINES = (".jsonl", ".ndjson")
_LONG = 1 << 20  # characters; longer texts are tokenized in pieces


class Batch(NamedTuple):
    """Rows of tokens and how much each prediction counts.

    Attributes:
      tokens: [B, T + 1] int32. All but the last are read; all but the first are predicted.
      weights: [B, T] float32, the weight of predicting each of tokens[:, 1:]; 0 for padding, and for what `TokenStream`
        does not count.
    """

    tokens: Any
    weights: Any


def read_documents(source: str | Path, *, field: str = "text", split: str = "train") -> list[Document]:
    """The documents of a file, a folder, or a dataset of the Hugging Face hub, in a fixed order.

    Args:
      source: a text file of UTF-8, which is one document; a JSONL file (.jsonl, .ndjson), one document per line: an
        object with a text under `field`, or token ids under "tokens"; a folder, whose files, hidden ones left out, are
        read in the same way in the order of their paths; else the name of a dataset, `name` or `name:configuration`,
        which needs the `datasets` library.
      field: the key of the text in JSON lines and datasets.
      split: which split of a dataset to read.

    Raises:
      FileNotFoundError: nothing has that name.
      ValueError: a file is not UTF-8, a line is not such an object, or there is no text at all. Names file and line.
      ImportError: a dataset is named and `datasets` is not installed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        documents = [document for file in files for document in _read_file(file, field)]
    elif path.is_file():
        documents = list(_read_file(path, field))
    else:
        documents = list(_read_dataset(str(source), field, split))
    documents = [document for document in documents if len(document)]
    if not documents:
        raise ValueError(f"{source} has no text")
    return documents


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(path: Path, field: str) -> Iterator[Document]:
    if path.suffix not in _JSON_LINES:
        yield read_text(path)
        return
    for _, where, value in json_lines(path):
        yield _document(value, field, where)


def _document(value: Any, field: str, where: str) -> Document:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, not a {type(value).__name__}")
    if isinstance(value.get(field), str):
        return value[field]
    tokens = value.get("tokens")
    if field not in value and isinstance(tokens, list) and all(type(token) is int for token in tokens):
        try:
            return np.array(tokens, np.int64)  # `pack` checks later that they fit into int32
        except OverflowError:
            raise ValueError(f"{where}: token id {max(tokens, key=abs)} is outside every vocabulary") from None
    raise ValueError(f"{where}: no text under {field!r}; it has {', '.join(value) or 'nothing'}")


def _read_dataset(name: str, field: str, split: str) -> Iterator[Document]:
    if name.startswith(("/", ".", "~")) or name.endswith((".txt", *_JSON_LINES)) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no file or folder {name}")
    with extra("data", f"{name!r} is no file or folder; reading a dataset of the Hugging Face hub"):
        import datasets  # pyright: ignore[reportMissingImports]
    repository, _, configuration = name.partition(":")
    try:
        rows: Any = datasets.load_dataset(repository, configuration or None, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name!r} is neither a file or folder nor a dataset that could be fetched: {reason}"
        ) from error
    if field not in rows.column_names:
        raise ValueError(f"the dataset {name} has no column {field!r}; it has {', '.join(rows.column_names)}")
    for number, text in enumerate(rows[field]):
        if not isinstance(text, str):
            raise ValueError(f"the dataset {name}, row {number}: {field!r} is a {type(text).__name__}, not a text")
        yield clean(text)


class TokenStream(NamedTuple):
    """Documents joined into one stream of tokens.

    Attributes:
      tokens: [N] int32: each document, followed by the tokenizer's end token and begin token, if it has them; one token
        if both are the same.
      predicted: [N] bool, whether the loss counts a token. False for the begin token if there is an end token before
        it, and for the first token of a document if the tokenizer has neither. With one of them, or one that is both,
        every token counts.
      bos: the token that every row begins with, or None.
    """

    tokens: np.ndarray
    predicted: np.ndarray
    bos: int | None

    @property
    def checksum(self) -> int:
        """CRC-32 of the tokens, to check whether two data sets are the same."""
        return zlib.crc32(self.tokens.tobytes())


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> TokenStream:
    """Tokenizes documents and joins them.

    Args:
      vocab_size: of the model.
      progress: called after each document with its number of tokens.

    Raises:
      ValueError: no documents, the tokenizer has more tokens than the model, or a document of token ids has one that
        the model lacks.
    """
    check_vocabulary(tokenizer, vocab_size)
    bos, eos = tokenizer.bos_id, next(iter(tokenizer.eos_ids), None)
    marks = list(dict.fromkeys(mark for mark in (eos, bos) if mark is not None))
    # If there are both marks, only the end is predicted. A single mark is the end. Without marks, the first word of the
    # next document stands for both.
    of_marks = np.arange(len(marks)) < 1
    tokens, predicted = [], []
    for number, document in enumerate(documents):
        ids = token_ids(_encode(document, tokenizer), vocab_size, f"document {number}")
        tokens += [ids, np.array(marks, np.int32)]
        predicted += [np.ones(len(ids), bool), of_marks]
        if not marks and len(ids):
            predicted[-2][0] = False
        progress(len(ids))
    if not tokens:
        raise ValueError("no documents were given: there is nothing to train on")
    return TokenStream(np.concatenate(tokens), np.concatenate(predicted), bos)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if a tokenizer has more tokens than a model. A model may have more, for padding."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer.folder} has {tokenizer.vocab_size:,} tokens, the model's vocabulary only "
            f"{vocab_size:,}; use the tokenizer that the model was trained with"
        )


def _encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    if isinstance(document, np.ndarray):
        return document
    if len(document) <= _LONG:
        return tokenizer.encode(document, add_bos=False)
    pieces = list(encode_stream(io.StringIO(document, newline=""), tokenizer, add_bos=False))
    return np.concatenate(pieces)


@dataclass(frozen=True)
class PackedRows:
    """A stream cut into rows: a random-access source for `grain`.

    Row i is BOS and tokens i T to (i + 1) T of the stream. Tokens at the end that do not fill a row are dropped.
    Without BOS, a row begins with the token before it. Attention and states continue across documents.

    Attributes:
      length: T, tokens predicted per row.
    """

    stream: TokenStream
    length: int

    def __len__(self) -> int:
        return (len(self.stream.tokens) - (self.stream.bos is None)) // self.length

    def __getitem__(self, index: int) -> Batch:
        """Row `index` without a batch axis: tokens [T + 1], weights [T]."""
        start = index * self.length + (self.stream.bos is None)
        span = slice(start, start + self.length)
        first = self.stream.tokens[start - 1] if self.stream.bos is None else self.stream.bos
        tokens = np.concatenate([[np.int32(first)], self.stream.tokens[span]])
        return Batch(tokens, self.stream.predicted[span].astype(np.float32))


class Split(NamedTuple):
    """Rows to train on and rows that are never trained on.

    Attributes:
      train: the number of rows to train on, counted from the first.
      held_out: the last rows, in batches; the last batch is padded with rows of weight 0.
    """

    train: int
    held_out: list[Batch]


def split(rows: PackedRows, *, batch: int, held_out: int, held_out_batch: int | None = None) -> Split:
    """Sets the last rows aside: at most a tenth of all, but at least one, unless `held_out` is 0.

    Args:
      batch: rows per training step.
      held_out: rows to set aside; 0: none.
      held_out_batch: rows per held-out batch; `batch` by default.

    Raises:
      ValueError: fewer rows than a batch are left for training; says how much data there is. A negative number, or a
        batch without rows.
    """
    batch, held_out = whole(batch, "batch", least=1), whole(held_out, "held_out")
    held_out_batch = batch if held_out_batch is None else whole(held_out_batch, "held_out_batch", least=1)
    total = len(rows)
    aside = min(held_out, max(1, total // 10), total)
    if total - aside < batch:
        raise ValueError(
            f"the data has {len(rows.stream.tokens):,} tokens, {total} row{'s' * (total != 1)} of {rows.length}"
            f"{f', {aside} of them held out' if aside else ''}; one step needs {batch}: give more data, shorter rows "
            "(--length) or fewer (--rows)"
        )
    parts = [
        [rows[j] for j in range(i, min(i + held_out_batch, total))] for i in range(total - aside, total, held_out_batch)
    ]  # fmt: skip
    return Split(total - aside, [_stack(part, held_out_batch) for part in parts])


def _stack(rows: Sequence[Batch], size: int) -> Batch:
    fill = [(0, size - len(rows)), (0, 0)]
    return Batch(*(np.pad(np.stack(arrays), fill) for arrays in zip(*rows, strict=True)))


def batches(rows: PackedRows, *, batch: int, seed: int, train: int | None = None) -> grain.DatasetIterator[Batch]:
    """An endless iterator of batches, shuffled anew in every epoch.

    With its `get_state` and `set_state`, the order can be resumed exactly.

    Args:
      batch: rows per batch.
      train: how many rows to use, counted from the first; all by default.
    """
    dataset = grain.MapDataset.source(rows)[: len(rows) if train is None else train]
    # Endless data has no remainder, but for batches of 1 grain's count of batches overflows if a remainder is allowed.
    dataset = dataset.seed(seed).shuffle().repeat().batch(batch, drop_remainder=True)
    # A row is a slice of an array in memory, so threads that read ahead would cost more than they save.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
