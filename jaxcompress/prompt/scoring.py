"""Probabilities of subwords from an encoder: rows of any length, a fixed number of compiled shapes.

Rows are padded to one of `LENGTHS`, and rows of one padded length go through the encoder together. The result of a row
does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.state.shapes import Tokens, Valid

LENGTHS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
TOKENS = 4096  # at most, of one call, padding included


@runtime_checkable
class TokenScorer(Protocol):
    """A module that says how probable it is that each token of a row stays, as `load_encoder` gives them.

    Attributes:
      reads_question: whether a row holds a question before the text. Such a module also has `keep_and_relevance`, which
        says in the same pass how relevant the text is: [B, T] and [B].
      config: has `max_length`, the most tokens of a row, including special tokens.
    """

    reads_question: ClassVar[bool]
    config: Any

    def keep_probability(self, tokens: Any, valid: Any, /) -> Any:
        """[B, T] float32, of ids [B, T] and their validity, False for padding."""
        ...


class RowScores(NamedTuple):
    """What an encoder says of a row.

    Attributes:
      keep: [T] float32, the probability that each token stays.
      relevance: of the text for the question in the row, in (0, 1); None from an encoder that reads no question.
    """

    keep: Float[np.ndarray, " T"]
    relevance: float | None


@partial(jax.jit, static_argnums=0)
def _of_leaves(
    structure: Any, leaves: list[Array], tokens: Tokens, valid: Valid
) -> tuple[Float[Array, "B T"], Float[Array, " B"] | None]:
    """Reads rows with a module in parts. Taking it apart is slower than a call, so it is done once for many."""
    encoder = jax.tree.unflatten(structure, leaves)
    if encoder.reads_question:
        return encoder.keep_and_relevance(tokens, valid)
    return encoder.keep_probability(tokens, valid), None


def score(
    encoder: TokenScorer,
    rows: Sequence[Int[np.ndarray, "..."]],
    valid: Sequence[Bool[np.ndarray, "..."]] | None = None,
) -> list[np.ndarray]:
    """The probability that each token stays, float32 [T] for a row of T tokens; otherwise as `read_rows`."""
    return [row.keep for row in read_rows(encoder, rows, valid)]


def read_rows(
    encoder: TokenScorer,
    rows: Sequence[Int[np.ndarray, "..."]],
    valid: Sequence[Bool[np.ndarray, "..."]] | None = None,
) -> list[RowScores]:
    """What the encoder says of each row.

    Args:
      rows: ids, special tokens included.
      valid: False for tokens that are masked in attention; none are by default.

    Raises:
      ValueError: a row has more tokens than the encoder has positions.
    """
    lengths = np.array([len(row) for row in rows], int)
    if len(rows) and lengths.max() > encoder.config.max_length:
        raise ValueError(f"a row has {lengths.max()} tokens; the encoder takes at most {encoder.config.max_length}")
    leaves, structure = jax.tree.flatten(encoder)
    running = []
    for at, length in _batches(lengths, encoder.config.max_length):
        size = 1 << (len(at) - 1).bit_length()
        tokens, seen = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
        for n, row in enumerate(at):
            tokens[n, : lengths[row]] = rows[row]
            seen[n, : lengths[row]] = True if valid is None else valid[row]
        running.append((at, _of_leaves(structure, leaves, tokens, seen)))
    found = [RowScores(np.zeros(0, np.float32), None)] * len(rows)
    for at, (keep, relevance) in running:
        told = [None] * len(at) if relevance is None else np.asarray(relevance, np.float32).tolist()
        for row, values, one in zip(at, np.asarray(keep, np.float32), told, strict=False):
            found[row] = RowScores(values[: lengths[row]], one)
    return found


def _batches(lengths: np.ndarray, longest: int) -> Iterator[tuple[np.ndarray, int]]:
    """Indices of rows that go through together, and the length that they are padded to."""
    shapes = np.array([n for n in LENGTHS if n < longest] + [longest])
    order = np.argsort(lengths, kind="stable")
    padded = shapes[np.searchsorted(shapes, lengths[order])]
    for length in np.unique(padded).tolist():
        rows = order[padded == length]
        most = _power_of_two(max(1, TOKENS // length))
        while len(rows):
            size = min(most, len(rows))
            if size < most and size % 8 != 7:  # 5 rows are 4 and 1, rather than 8 of which 3 are padding
                size = _power_of_two(size)
            yield rows[:size], length
            rows = rows[size:]


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above n."""
    return 1 << (n.bit_length() - 1)
