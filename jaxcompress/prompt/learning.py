"""Trains a token classifier on labelled words with the project's trainer (LLMLingua-2, section 3.3).

Every subword of a word has the word's label. Padding, special tokens and white space do not count. (The authors' script
counts padding as deleted words, and moves the last label.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress._extras import extra
from jaxcompress.prompt.dataset import Example
from jaxcompress.training.data import Batch
from jaxcompress.training.trainer import Metrics, Objective

with extra("train"):
    import grain


class Labelled(NamedTuple):
    """What a `Batch` holds as tokens when a classifier is trained; `Batch.weights` [B, T] says which labels count.

    Attributes:
      ids: [B, T] int32.
      valid: [B, T], False for padding.
      labels: [B, T] int32, 1: kept.
    """

    ids: Any
    valid: Any
    labels: Any


@runtime_checkable
class Classifier(Protocol):
    """Logits of two classes per token, [B, T, 2], from ids and validity [B, T]."""

    def __call__(self, ids: Array, valid: Array, /) -> Array: ...


@dataclass(frozen=True)
class PackedRows:
    """Examples as rows of equal length, for `grain`.

    Short examples follow each other in a row, as sentences do in a text, and long ones are cut: padding is
    rare, and every position is trained. A row begins and ends with the tokenizer's special tokens.

    Attributes:
      tokens, labels: of each row, without special tokens; a label of -1 does not count.
      length: T.
      opening, closing: ids around every row ([CLS] and [SEP]).
      pad: id of padding.
    """

    tokens: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    length: int
    opening: int
    closing: int
    pad: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        """Row `index` with no batch axis."""
        tokens, labels = self.tokens[index], self.labels[index]
        n, fill = len(tokens), self.length - len(tokens) - 2
        ids = np.concatenate([[self.opening], tokens, [self.closing], np.full(fill, self.pad)]).astype(np.int32)
        wide = lambda x: np.pad(x, (1, fill + 1))
        counted = wide((labels >= 0).astype(np.float32))
        return Batch(Labelled(ids, np.arange(self.length) < n + 2, wide(np.maximum(labels, 0))), counted)


def rows_of(examples: Sequence[Example], tokenizer: FastTokenizer, length: int) -> PackedRows:
    """Tokenizes examples and packs them into rows, in order.

    Raises:
      ValueError: no examples, a length below 3, or the tokenizer lacks [CLS], [SEP] or [PAD] (or <s>, </s>, <pad>).
    """
    if not examples:
        raise ValueError("there are no examples to train on")
    if length < 3:
        raise ValueError(f"a row has room for a token and two special ones: at least 3, not {length}")
    opening, closing, pad = special_ids(tokenizer)
    room = length - 2
    tokens, labels, ids, kept = [], [], np.zeros(0, np.int32), np.zeros(0, np.int32)
    for example in examples:
        new, marks = tokenized(example, tokenizer)
        while len(new):
            if len(ids) and len(ids) + len(new) > room:
                tokens.append(ids)
                labels.append(kept)
                ids, kept = ids[:0], kept[:0]
            ids, kept = np.concatenate([ids, new[:room]]), np.concatenate([kept, marks[:room]])
            new, marks = new[room:], marks[room:]
    return PackedRows((*tokens, ids), (*labels, kept), length, opening, closing, pad)


def tokenized(example: Example, tokenizer: FastTokenizer) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Ids [T] without special tokens, and the label of the word that each token ends in, -1 where it is in none."""
    encoding = tokenizer.encode(example.text, add_special_tokens=False)
    starts = np.array([word.start for word in example.words], np.int64)
    ends = np.array([word.end for word in example.words], np.int64)
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    # A token may begin with the white space before its word: what counts is its last character.
    word = np.searchsorted(starts, places[:, 1] - 1, side="right") - 1
    inside = (word >= 0) & (places[:, 1] > places[:, 0])
    if len(starts):
        inside &= places[:, 1] - 1 < ends[word]
    given = np.array([*example.labels, False], np.int32)
    return np.array(encoding.ids, np.int32), np.where(inside, given[word], -1).astype(np.int32)


def special_ids(tokenizer: FastTokenizer) -> tuple[int, int, int]:
    """The ids that open a text, close it and pad it: [CLS], [SEP] and [PAD], or <s>, </s> and <pad>.

    Raises:
      ValueError: the tokenizer lacks one.
    """
    found = []
    for names in (("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[PAD]", "<pad>")):
        ids = [index for name in names if (index := tokenizer.token_to_id(name)) is not None]
        if not ids:
            raise ValueError(f"the tokenizer has neither {names[0]} nor {names[1]}; a classifier needs it")
        found.append(ids[0])
    return found[0], found[1], found[2]


def batches(*sources: PackedRows, batch: int, seed: int, shares: Sequence[float] = ()) -> grain.DatasetIterator[Batch]:
    """Endless batches. Each source is shuffled anew in each of its epochs.

    `get_state` and `set_state` of the iterator resume the order exactly.

    Args:
      shares: of the rows, one for each source; equal by default.

    Raises:
      ValueError: there are fewer rows than a batch, or not one share per source.
    """
    rows = sum(map(len, sources))
    if rows < batch:
        raise ValueError(f"{rows} rows are less than one batch of {batch}: give more data or a smaller batch")
    if shares and len(shares) != len(sources):
        raise ValueError(f"{len(shares)} shares were given for {len(sources)} sources")
    each = [grain.MapDataset.source(source).seed(seed).shuffle().repeat() for source in sources]
    dataset = grain.MapDataset.mix(each, weights=list(shares) or [1.0] * len(each)).batch(batch, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def classification(*, mask: int | None = None, masked: Any = 0.1) -> Objective:
    """Cross-entropy of the labels that count. The parameters are a `Classifier`.

    Metrics: loss, and accuracy over the same labels.

    Args:
      mask: id of the mask token. If given, it replaces a share `masked` of the tokens, so a small model has to use the
        words around them.
    """

    def loss(model: Classifier, batch: Batch, key: Any) -> tuple[Array, Array]:
        ids, valid, labels = batch.tokens
        if mask is not None:
            hidden = jax.random.bernoulli(key, masked, ids.shape) & (batch.weights > 0)
            ids = jnp.where(hidden, mask, ids)
        return label_losses(model(ids, valid), labels, batch.weights)

    def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        (value, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return {"loss": value, "accuracy": accuracy}, gradient

    return objective


def label_losses(
    logits: Float[Array, "B T 2"], labels: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted mean of cross-entropy and of accuracy; 0 if no label counts."""
    margin = (logits[..., 1] - logits[..., 0]).astype(jnp.float32)
    losses = jax.nn.softplus(jnp.where(labels == 1, -margin, margin))
    total = jnp.maximum(weights.sum(), 1e-9)
    right = (margin > 0) == (labels == 1)
    return (losses * weights).sum() / total, (right * weights).sum() / total
