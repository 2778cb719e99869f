"""Counting the tokens of what is left of texts, without reading all of it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.prompt.words import Costs, Spans


class Counts:
    """How many subwords texts have that share most of their words with others.

    No subword reaches over a space: what stands between two spaces costs the same everywhere, and is read once.
    """

    def __init__(self, tokenizer: EncoderTokenizer, read: Iterable[tuple[str, Spans, Costs]]):
        """Texts that were read before, their words and what those cost, all their subwords together."""
        self.tokenizer = tokenizer
        self._known: dict[str, int] = {}
        for text, spans, costs in read:
            self._learn(tokenizer.apart(text), spans[:, 0], costs)

    def of(self, text: str) -> int:
        """Subwords of a text."""
        parts = self.tokenizer.apart(text)
        if new := list(dict.fromkeys(part for part in parts if part not in self._known)):
            places = self.tokenizer.encode("".join(new)).offsets[:, 0]
            self._learn(new, places, np.ones(len(places), int))
        return sum(map(self._known.__getitem__, parts))

    def _learn(self, parts: Sequence[str], places: Int[np.ndarray, " N"], costs: Int[np.ndarray, " N"]) -> None:
        """Parts of a text in a row, with costs at places in it."""
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        sums = np.bincount(np.searchsorted(ends, places, side="right"), costs, len(parts))
        self._known.update(zip(parts, sums.astype(int).tolist(), strict=True))
