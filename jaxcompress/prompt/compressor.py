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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

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
from jaxcompress.prompt.keeping import Compressed, checked_budget, checked_force, keep, keep_above
from jaxcompress.prompt.kinds import Kind, checked_kinds
from jaxcompress.prompt.official import OfficialCompressor
from jaxcompress.prompt.scoring import RowScores, TokenScorer, read_rows
from jaxcompress.prompt.selection import BudgetScope
from jaxcompress.prompt.units import sentences
from jaxcompress.prompt.word_scores import ScoredWords
from jaxcompress.prompt.words import Spans, align, of_words, segment

Unit = Literal["word", "sentence"]
"""What is kept or dropped as a whole."""

THRESHOLD = 0.1
"""Provence keeps sentences whose mean probability is above it; 0.05 to 0.5 are sensible."""

_ROOM = 16  # tokens of the text that a row must have room for beside the question


@dataclass(frozen=True)
class Compressor:
    """A token classifier: it scores words (a `Scorer`) and drops those of a prompt that it would not miss.

    Attributes:
      encoder, tokenizer: from the same folder.
      count: tokens of a text for its reader, the model that will read it; None counts the encoder's subwords.
      word: a word's score is the "mean" of its subwords' probabilities or that of the "first".
      name: of the scorer, for tables and reports.
      question: what the text is read for, by encoders that read a question (`Provence`). Set it with `asking`.
      unit: what is scored, and kept or dropped as a whole: each word, or each sentence or line.
      window: tokens that the encoder reads at once, with the question and special tokens; None: as many as it can. A
        longer text is cut after sentences, lines or words.

    Raises:
      ValueError: a question for an encoder that reads none, a question that leaves no room in a window, a window that
        the encoder does not have, or an unknown unit.
    """

    encoder: TokenScorer
    tokenizer: EncoderTokenizer
    count: Count | None = None
    word: str = "mean"
    name: str = "classifier"
    question: str | None = None
    unit: Unit = "word"
    window: int | None = None

    def __post_init__(self) -> None:
        longest = self.encoder.config.max_length
        if self.unit not in ("word", "sentence"):
            raise ValueError(f"a unit is 'word' or 'sentence', not {self.unit!r}")
        if self.window is not None and not 3 <= self.window <= longest:
            raise ValueError(f"a window has 3 to {longest} tokens for this encoder, not {self.window}")
        if self.question is None:
            return
        if not self.encoder.reads_question:
            raise ValueError(
                "this encoder does not read a question; load one that does, such as an OpenProvence checkpoint"
            )
        if not self.question.strip():
            raise ValueError("the question is empty; give one, or a compressor that reads none")
        if self._room < _ROOM:
            raise ValueError(
                f"the question has {len(self._before) - 2} tokens, and a window {self.window or longest}: that leaves "
                f"room for fewer than {_ROOM} tokens of the text; ask a shorter one"
            )

    @classmethod
    def load(
        cls,
        source: str | Path | None = None,
        *,
        dtype: str | None = None,
        count: Count | None = None,
        word: str = "mean",
        unit: Unit = "word",
        window: int | None = None,
    ) -> Compressor:
        """From a Hugging Face folder or hub id; the compressor that ships with the package if None.

        Args:
          dtype: of the weights; the checkpoint's if None.
          count, word, unit, window: see `Compressor`.

        Raises:
          FileNotFoundError, ValueError: as `load_encoder` and `EncoderTokenizer`.
        """
        loaded = load_encoder(embedded.compressor_folder() if source is None else source, dtype=dtype)
        name = "embedded classifier" if source is None else "classifier"
        return cls(loaded.model, loaded.tokenizer, count, word, name, unit=unit, window=window)

    def asking(self, question: str) -> Compressor:
        """The same, which reads texts for this question.

        Raises:
          ValueError: as `Compressor`.
        """
        return replace(self, question=question)

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
        """The published algorithm with the same encoder and count, for comparing with published numbers.

        Raises:
          ValueError: the encoder is neither a BERT nor an XLM-RoBERTa.
        """
        if not isinstance(self.encoder, Encoder):
            raise ValueError(f"the published code knows BERT and XLM-RoBERTa, not {type(self.encoder).__name__}")
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
        self.check_force(force)
        options: dict[str, Any] = dict(scope=scope, force=checked_force(scope, force), protect=checked_kinds(protect))
        scored, encoded = self._scored(texts)
        count = SubwordCounter(self.tokenizer, encoded) if self.count is None else self.count
        return keep(
            scored, count, rate=rate, tokens=tokens, drop_consecutive=drop_consecutive, filter=filter, **options
        )

    def prune(
        self,
        contexts: str | Sequence[str],
        *,
        threshold: Number = THRESHOLD,
        force: Sequence[str] = (),
        protect: Sequence[Kind] = (),
    ) -> Compressed:
        """Keeps what scores above a threshold, however much it is: no budget. See `keep_above`.

        Raises:
          ValueError, TypeError: as `keep_above` and `score`.
        """
        self.check_force(force)
        texts = [contexts] if isinstance(contexts, str) else list(contexts)
        scored, encoded = self._scored(texts)
        count = SubwordCounter(self.tokenizer, encoded) if self.count is None else self.count
        return keep_above(scored, count, threshold, force=force, protect=protect)

    def __call__(self, text: str) -> ScoredWords:
        """The words (or sentences) of a text, each with the probability that it stays.

        Raises:
          ValueError: as `score`.
        """
        return self.score([text])[0]

    def score(self, texts: Sequence[str]) -> list[ScoredWords]:
        """The same for several texts, whose chunks go through the encoder together.

        Raises:
          ValueError: the encoder reads a question, and there is none.
        """
        return self._scored(texts)[0]

    def check_force(self, force: Sequence[str]) -> None:
        """Raises ValueError for words where sentences are kept whole, ValueError and TypeError as `keep`."""
        words = [string for string in checked_force("document", force) if not string.isspace()]
        if self.unit == "sentence" and words:
            raise ValueError(f"force takes white space where sentences are kept whole, not {words[0]!r}; use protect")

    @cached_property
    def _before(self) -> list[int]:
        """The ids before those of the text in each row."""
        if self.question is None:
            return [self.tokenizer.opening]
        return [self.tokenizer.opening, *self.tokenizer.encode(self.question).ids.tolist(), self.tokenizer.closing]

    @property
    def _room(self) -> int:
        """Tokens of the text in a row."""
        return (self.window or self.encoder.config.max_length) - len(self._before) - 1

    def _scored(self, texts: Sequence[str]) -> tuple[list[ScoredWords], dict[str, Subwords]]:
        if self.encoder.reads_question and self.question is None:
            raise ValueError("this encoder reads texts for a question: give it with `asking` (--question)")
        texts = [clean(text) for text in texts]
        with ThreadPoolExecutor(1) as beside:  # the tokenizer runs outside of Python
            encoded = beside.submit(self.tokenizer.encode_batch, texts)
            spans = [segment(text) for text in texts]
        pieces = encoded.result()
        cuts = [chunks(*item, self._room) for item in zip(texts, (p.offsets for p in pieces), spans, strict=True)]
        before, closing = self._before, [self.tokenizer.closing]
        rows = [
            np.concatenate([before, piece.ids[start:end], closing]).astype(np.int32)
            for piece, cut in zip(pieces, cuts, strict=True)
            for start, end in cut
        ]
        found = iter(read_rows(self.encoder, rows))
        if self.unit == "sentence":
            spans = [np.array(sentences(text), np.int64).reshape(-1, 2) for text in texts]
        scored = [
            self._of_units(text, piece, own, [next(found) for _ in cut])
            for text, piece, own, cut in zip(texts, pieces, spans, cuts, strict=True)
        ]
        return scored, dict(zip(texts, pieces, strict=True))

    def _of_units(self, text: str, piece: Subwords, spans: Spans, rows: list[RowScores]) -> ScoredWords:
        """Scores of words or sentences from those of the rows that a text was cut into."""
        scores = [row.keep[len(self._before) : -1] for row in rows]
        relevance = [row.relevance for row in rows if row.relevance is not None]
        groups = align(spans, piece.offsets)
        chunk = np.append(np.repeat(np.arange(len(scores)), [len(s) for s in scores]), max(len(scores) - 1, 0))
        of_subwords = np.concatenate([np.zeros(0, np.float32), *scores])
        return ScoredWords(
            text, spans, of_words(of_subwords, groups, self.word), self.name, chunk[groups.first],
            max(relevance, default=None),
        )  # fmt: skip
