"""Prompt compression by a token classifier (LLMLingua-2, Pan et al. 2024), with budgets that are met.

    compressor = Compressor.load("folder or hub id")
    shorter = compressor.compress(text, rate=0.5, force=[".", "\\n"], protect=["numbers"])
    shorter.text, shorter.tokens_before, shorter.tokens_after

score: an encoder gives each subword the probability that it stays; a word's score is the mean over its subwords. keep:
the best words, as many as fit the budget exactly (`jaxcompress.prompt.keeping`). reduce: the others are dropped. The
published arithmetic is in `official`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress import embedded
from jaxcompress.checkpoints import load_encoder
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer, Subwords
from jaxcompress.inputs.scalars import Number
from jaxcompress.inputs.text import clean
from jaxcompress.models.encoder import Encoder
from jaxcompress.prompt.chunks import chunks
from jaxcompress.prompt.contexts import Contexts
from jaxcompress.prompt.counting import Count, Counter, SubwordCounter, counter_of
from jaxcompress.prompt.keeping import Compressed, checked_budget, checked_force, keep
from jaxcompress.prompt.kinds import Kind, checked_kinds
from jaxcompress.prompt.official import OfficialCompressor
from jaxcompress.prompt.scoring import score
from jaxcompress.prompt.selection import BudgetScope
from jaxcompress.prompt.word_scores import ScoredWords
from jaxcompress.prompt.words import Spans, align, of_words, segment


@dataclass(frozen=True)
class Compressor:
    """A token classifier: it scores words (a `Scorer`) and drops those of a prompt that it would not miss.

    Attributes:
      encoder, tokenizer: from the same folder.
      count: tokens of a text for its reader, the model that will read it; None counts the encoder's subwords.
      word: a word's score is the "mean" of its subwords' probabilities or that of the "first".
      name: of the scorer, for tables and reports.
    """

    encoder: Encoder
    tokenizer: EncoderTokenizer
    count: Count | None = None
    word: str = "mean"
    name: str = "classifier"

    @classmethod
    def load(
        cls,
        source: str | Path | None = None,
        *,
        dtype: str | None = None,
        count: Count | None = None,
        word: str = "mean",
    ) -> Compressor:
        """From a Hugging Face folder or hub id; the compressor that ships with the package if None.

        Args:
          dtype: of the weights; the checkpoint's if None.
          count, word: see `Compressor`.

        Raises:
          FileNotFoundError, ValueError: as `load_encoder` and `EncoderTokenizer`.
        """
        loaded = load_encoder(embedded.compressor_folder() if source is None else source, dtype=dtype)
        name = "embedded classifier" if source is None else "classifier"
        return cls(loaded.model, loaded.tokenizer, count, word, name)

    @property
    def tokens(self) -> Callable[[str], int]:
        """Counts the tokens of a text: `count`, or the encoder's subwords."""
        return self.tokenizer.count if self.count is None else self.count

    @property
    def counter(self) -> Counter:
        """The same for `keep`."""
        return SubwordCounter(self.tokenizer) if self.count is None else counter_of(self.count)

    @cached_property
    def official(self) -> OfficialCompressor:
        """The published algorithm with the same encoder and count, for comparing with published numbers."""
        return OfficialCompressor(self.encoder, self.tokenizer, self.tokens)

    def compress(  # nine parameters: those of `keep`
        self,
        contexts: str | Sequence[str],
        *,
        rate: Number | Sequence[Number] | None = None,
        tokens: Number | None = None,
        scope: BudgetScope = "document",
        force: Sequence[str] = (),
        protect: Sequence[Kind] = (),
        drop_consecutive: bool = False,
        filter: Contexts | None = None,
    ) -> Compressed:
        """Scores texts and keeps exactly as many tokens as asked for.

        Args:
          contexts: one text or several. Halves of characters, as a cut emoji leaves them, are read as U+FFFD.
          rate: the share of the reader's tokens that stays, 0.5 by default; this and the other arguments, the results
            and the errors are those of `jaxcompress.prompt.keep`.

        Raises:
          ValueError, TypeError: as `keep`; a context is no string; an unknown `word`.
        """
        texts = [contexts] if isinstance(contexts, str) else list(contexts)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a context is a string; give one or a list of them")
        checked_budget(len(texts), rate, tokens)  # before anything is computed
        options: dict[str, Any] = dict(scope=scope, force=checked_force(scope, force), protect=checked_kinds(protect))
        scored, encoded = self._scored(texts)
        count = SubwordCounter(self.tokenizer, encoded) if self.count is None else self.count
        return keep(
            scored, count, rate=rate, tokens=tokens, drop_consecutive=drop_consecutive, filter=filter, **options
        )

    def __call__(self, text: str) -> ScoredWords:
        """The words of a text, each with the probability that it stays."""
        return self.score([text])[0]

    def score(self, texts: Sequence[str]) -> list[ScoredWords]:
        """The same for several texts, whose chunks go through the encoder together."""
        return self._scored(texts)[0]

    def _scored(self, texts: Sequence[str]) -> tuple[list[ScoredWords], dict[str, Subwords]]:
        texts = [clean(text) for text in texts]
        with ThreadPoolExecutor(1) as beside:  # the tokenizer runs outside of Python
            encoded = beside.submit(self.tokenizer.encode_batch, texts)
            spans = [segment(text) for text in texts]
        pieces = encoded.result()
        most = self.encoder.config.max_length - 2
        cuts = [chunks(*item, most) for item in zip(texts, (p.offsets for p in pieces), spans, strict=True)]
        opening, closing = [self.tokenizer.opening], [self.tokenizer.closing]
        rows = [
            np.concatenate([opening, piece.ids[start:end], closing]).astype(np.int32)
            for piece, cut in zip(pieces, cuts, strict=True)
            for start, end in cut
        ]
        scores = iter(score(self.encoder, rows))
        scored = [
            self._of_words(text, piece, own, [next(scores)[1:-1] for _ in cut])
            for text, piece, own, cut in zip(texts, pieces, spans, cuts, strict=True)
        ]
        return scored, dict(zip(texts, pieces, strict=True))

    def _of_words(self, text: str, piece: Subwords, spans: Spans, scores: list[np.ndarray]) -> ScoredWords:
        groups = align(spans, piece.offsets)
        chunk = np.append(np.repeat(np.arange(len(scores)), [len(s) for s in scores]), max(len(scores) - 1, 0))
        of_subwords = np.concatenate([np.zeros(0, np.float32), *scores])
        return ScoredWords(text, spans, of_words(of_subwords, groups, self.word), self.name, chunk[groups.first])
