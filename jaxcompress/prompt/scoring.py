"""Probabilities of subwords from an encoder: rows of any length, a fixed number of compiled shapes.

Rows are padded to one of `LENGTHS`, and rows of one padded length go through the encoder together. The result of a row
does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.models.encoder import Encoder
from jaxcompress.state.shapes import Tokens, Valid

LENGTHS = (32, 64, 128, 192, 256, 384, 512)
TOKENS = 4096  # at most, of one call, padding included


@jax.jit
def keep_probability(encoder: Encoder, tokens: Tokens, valid: Valid) -> Float[Array, "B T"]:
    """The probability of the last class, "keep", for every token."""
    return jax.nn.softmax(encoder(tokens, valid), axis=-1)[..., -1]


@partial(jax.jit, static_argnums=0)
def _of_leaves(structure: Any, leaves: list[Array], tokens: Tokens, valid: Valid) -> Float[Array, "B T"]:
    """`keep_probability` for a module in parts. Taking it apart is slower than a call, so it is done once for many."""
    return keep_probability(jax.tree.unflatten(structure, leaves), tokens, valid)


def score(
    encoder: Encoder,
    rows: Sequence[Int[np.ndarray, "..."]],
    valid: Sequence[Bool[np.ndarray, "..."]] | None = None,
) -> list[np.ndarray]:
    """The probability of "keep" for every token of every row: float32 [T] for a row of T tokens.

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
    scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    for at, result in running:
        for row, values in zip(at, np.asarray(result, np.float32), strict=False):
            scores[row] = values[: lengths[row]]
    return scores


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
