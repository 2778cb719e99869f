"""LLMLingua-2 as it was published, with its quirks (Pan et al. 2024; `compress_prompt_llmlingua2` of llmlingua 0.2.2).

Use this to compare with published numbers, and `Compressor` for everything else: it meets its budget, keeps the text's
own characters and line breaks, and knows documents and corpora. These quirks are copied:

- The budget is a percentile for each chunk, of word probabilities repeated by the target model's token counts, at
  `int(100 * reduce + 1)`. A word stays if it is strictly greater: usually too few words, and none of a text of one
  word. Forced words are added, but are lost if only a part of their subwords is forced.
- XLM-RoBERTa gets BERT's names of special tokens, which it does not know: every chunk stands between two `<unk>`.
- Words with unknown subwords vanish, and white space is lost. A chunk is tokenised again from its detokenised text; if
  it then has more than 512 tokens, its end is lost.
- Chunks without the end of a sentence are 511 subwords, and may begin inside a word.
- A context's probability takes a word's first subword for all of them, whatever `token_to_word` says.
- `force_tokens` are replaced inside words too; "#" cannot be forced with BERT; a string is taken as its characters.
- Empty input raises ZeroDivisionError, words that are all unknown IndexError, and a rate of 0 ValueError.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken

from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.inputs.text import clean
from jaxcompress.inputs.tokenizer_files import read_tokenizer
from jaxcompress.models.encoder import Encoder
from jaxcompress.prompt.scoring import score

MAX_TOKENS = 512
MAX_FORCED = 100
_SPECIAL = {
    "wordpiece": ("[UNK]", "[SEP]", "[CLS]", "[MASK]"),
    "sentencepiece": ("<s>", "</s>", "<unk>", "<pad>", "<mask>"),
}
_WORDS = re.compile(r'\b\w+\b|[<>=/!@#$%^&*()?":{}|\\`~;_+-]')


class OfficialResult(NamedTuple):
    """What the published code returns, and its intermediate results.

    Attributes:
      output: the dictionary that it returns.
      words, labels: of every kept context.
      chunks: of every context, the strings that the encoder gets.
      probabilities: of every kept context, chunk by chunk, the words' probabilities, forced words included. Empty if
        nothing is dropped, since then nothing is computed.
      context_probabilities: of every context; None without the filter of contexts.
    """

    output: dict[str, Any]
    words: list[list[str]]
    labels: list[list[int]]
    chunks: list[list[str]]
    probabilities: list[list[np.ndarray]]
    context_probabilities: list[float] | None


class _Tokens(NamedTuple):
    """Facts about every token of the vocabulary, for given force tokens."""

    starts: np.ndarray  # whether it starts a word
    forced: np.ndarray  # whether it is forced where it starts a word
    digit: np.ndarray  # whether it has a digit
    text: dict[int, str]  # the force string that it stands for


@dataclass(frozen=True)
class OfficialCompressor:
    """The published LLMLingua-2 with this library's encoder; the module's docstring lists its quirks.

    Attributes:
      encoder, tokenizer: from the same folder.
      count: how many tokens a text has for the model that will read the prompt. The published code counts with
        tiktoken's `gpt-3.5-turbo`: `encoding = tiktoken.encoding_for_model("gpt-3.5-turbo")`, `count=lambda text:
        len(encoding.encode(text))`.

    Raises:
      ValueError: a byte-level tokenizer (RoBERTa's), for which there is no published algorithm.

    Examples:
      >>> official = OfficialCompressor(encoder, tokenizer, count)  # doctest: +SKIP
      >>> official.compress(text, rate=0.33, force_tokens=["\\n", "?"]).output["compressed_prompt"]  # doctest: +SKIP
    """

    encoder: Encoder
    tokenizer: EncoderTokenizer
    count: Callable[[str], int]

    def __post_init__(self) -> None:
        if self.tokenizer.kind not in _SPECIAL:
            raise ValueError(
                f"the published algorithm puts words together for {' and '.join(_SPECIAL)} tokenizers, not for "
                f"{self.tokenizer.kind!r}; use Compressor.compress"
            )

    def compress(  # eighteen parameters: those of the published function
        self,
        context: str | Sequence[str],
        rate: float | int = 0.5,
        target_token: float | int = -1,
        use_context_level_filter: bool = False,
        use_token_level_filter: bool = True,
        target_context: int = -1,
        context_level_rate: float | int = 1.0,
        context_level_target_token: float | int = -1,
        force_context_ids: Sequence[int] | None = (),
        return_word_label: bool = False,
        word_sep: str = "\t\t|\t\t",
        label_sep: str = " ",
        token_to_word: str = "mean",
        force_tokens: Sequence[str] = (),
        force_reserve_digit: bool = False,
        drop_consecutive: bool = False,
        chunk_end_tokens: Sequence[str] = (".", "\n"),
    ) -> OfficialResult:
        """Arguments, defaults, results and exceptions are those of `compress_prompt_llmlingua2`.

        Raises:
          AssertionError: more than 100 force tokens.
          ValueError: a percentile above 100 (a rate of 0).
          ZeroDivisionError: no tokens where a target number is given; an empty context with the filter of contexts.
          IndexError: a chunk without known words, or which begins inside a word.
          NotImplementedError: `token_to_word` is neither "mean" nor "first".
        """
        assert len(force_tokens) <= MAX_FORCED, f"{len(force_tokens)} force tokens; at most {MAX_FORCED}"
        mapped = {t: f"[NEW{i}]" for i, t in enumerate(force_tokens) if len(self._pieces([t])[0]) != 1}
        ends = list(chunk_end_tokens)
        for end in ends:  # which grows meanwhile
            if end in mapped:
                ends.append(mapped[end])
        contexts = [clean(text) for text in ([context] if isinstance(context, str) else context)]
        filters = use_context_level_filter and len(contexts) != 1
        origin = sum(self.count(text) for text in contexts)
        chunks = self._chunks([_replaced(text, mapped.items()) for text in contexts], set(ends))
        run = _Run(self, token_to_word, force_tokens, mapped, force_reserve_digit, drop_consecutive)

        kept, context_probabilities, context_words = list(range(len(contexts))), None, []
        if filters:
            context_rate = _context_rate(
                len(contexts), origin, rate=rate, target_token=target_token, filters_tokens=use_token_level_filter,
                target_context=target_context, context_rate=context_level_rate,
                context_target=context_level_target_token,
            )  # fmt: skip
            context_words, context_probabilities = run.contexts(chunks)
            threshold = np.percentile(context_probabilities, int(100 * (1 - context_rate)))
            forced = force_context_ids or ()
            kept = [i for i, p in enumerate(context_probabilities) if p >= threshold or i in forced]
            reserved = sum(self.count(chunk) for i in kept for chunk in chunks[i])
            if target_token >= 0:
                rate = min(target_token / reserved, 1.0)
        elif target_token > 0:
            rate = min(target_token / origin, 1.0)
        reduce_rate = max(0, 1 - rate) if use_token_level_filter else 0

        texts, words, labels, probabilities = run.compress([chunks[i] for i in kept], reduce_rate)
        output = _told(texts, origin, sum(self.count(text) for text in texts))
        if return_word_label:
            place = {context: n for n, context in enumerate(kept)}
            dropped = lambda i: ((word, 0) for word in context_words[i])
            pairs = lambda i: zip(words[place[i]], labels[place[i]], strict=True) if i in place else dropped(i)
            lines = [f"{word}{label_sep}{label}" for i in range(len(contexts)) for word, label in pairs(i)]
            output["fn_labeled_original_prompt"] = word_sep.join(lines)
        return OfficialResult(output, words, labels, chunks, probabilities, context_probabilities)

    @cached_property
    def _fast(self) -> Any:
        fast = read_tokenizer(self.tokenizer.folder).fast
        fast.add_special_tokens([AddedToken(f"[NEW{i}]", normalized=False, special=True) for i in range(MAX_FORCED)])
        return fast

    @cached_property
    def _vocabulary(self) -> list[str]:
        return [self._fast.id_to_token(i) or "" for i in range(self._fast.get_vocab_size())]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return self._fast.get_vocab()

    @cached_property
    def _pure(self) -> list[str]:
        return [token.lstrip("#" if self.tokenizer.kind == "wordpiece" else "▁") for token in self._vocabulary]

    @cached_property
    def _special(self) -> np.ndarray:
        special = np.zeros(len(self._vocabulary), bool)
        special[[self._ids[name] for name in _SPECIAL[self.tokenizer.kind] if name in self._ids]] = True
        return special

    @cached_property
    def _starts(self) -> np.ndarray:
        if self.tokenizer.kind == "wordpiece":
            return np.array([not token.startswith("##") for token in self._vocabulary])
        return np.array([token.startswith("▁") or token in string.punctuation for token in self._vocabulary])

    @cached_property
    def _digit(self) -> np.ndarray:
        return np.array([re.search(r"\d", token) is not None for token in self._vocabulary])

    def _facts(self, forced: Sequence[str], mapped: dict[str, str]) -> _Tokens:
        if not forced:
            return _Tokens(self._starts, np.zeros(len(self._starts), bool), self._digit, {})
        holds = forced if isinstance(forced, str) else set(forced)
        new = set(mapped.values())
        pure = np.array([text in holds or text in new for text in self._pure])
        starts, digit = self._starts.copy(), self._digit.copy()
        if self.tokenizer.kind == "wordpiece":
            starts |= pure
        else:
            starts |= [token in holds or token in new for token in self._vocabulary]
        undone = [(token, force) for force, token in mapped.items()]
        text = {self._ids[token]: _replaced(token, undone) for token in new}
        for token, replaced in text.items():
            digit[token] = re.search(r"\d", replaced) is not None
        return _Tokens(starts, pure, digit, text)

    def _pieces(self, texts: Sequence[str]) -> list[list[str]]:
        return [encoding.tokens for encoding in self._fast.encode_batch(list(texts), add_special_tokens=False)]

    def _chunks(self, texts: Sequence[str], ends: set[str]) -> list[list[str]]:
        return [self._cut(pieces, ends) for pieces in self._pieces(texts)]

    def _cut(self, pieces: list[str], ends: set[str]) -> list[str]:
        last = np.array([n for n, piece in enumerate(pieces) if piece in ends], int)
        chunks, start, most = [], 0, MAX_TOKENS - 2
        while start < len(pieces):
            end = len(pieces) - 1
            if start + most <= end:
                end = start + most
                before = np.searchsorted(last, end, side="right") - 1
                if before >= 0 and last[before] > start:
                    end = int(last[before])
            chunks.append(self._fast.decoder.decode(pieces[start : end + 1]))
            start = end + 1
        return chunks


@dataclass
class _Run:
    """One call. The probabilities of a chunk are computed once, for the filter of contexts and for its words."""

    owner: OfficialCompressor
    how: str
    forced: Sequence[str]
    mapped: dict[str, str]
    digits: bool
    drop: bool
    scored: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @cached_property
    def facts(self) -> _Tokens:
        return self.owner._facts(self.forced, self.mapped)

    def contexts(self, chunks: list[list[str]]) -> tuple[list[list[str]], list[Any]]:
        """Words of every context, and its probability."""
        self._score(chunks)
        words, probabilities = [], []
        for context in chunks:
            merged = [self._merge(chunk) for chunk in context]
            words.append([word.lstrip("▁") if self._sentencepiece else word for one in merged for word in one.words])
            own = [self._word(one.unforced, one.first) for one in merged]
            own = np.concatenate([np.zeros(0, np.float32), *own])
            if not len(own):
                raise ZeroDivisionError("division by zero")  # the mean over no words
            probabilities.append(np.cumsum(own, dtype=np.float32)[-1] / np.float32(len(own)))
        return words, probabilities

    def compress(
        self, chunks: list[list[str]], reduce_rate: float | int
    ) -> tuple[list[str], list[list[str]], list[list[int]], list[list[np.ndarray]]]:
        """Text, words, labels and probabilities of every context."""
        texts, words, labels, probabilities = [], [], [], []
        if reduce_rate <= 0:
            undone = [(token, force) for force, token in self.mapped.items()]
            for context in chunks:
                plain = [_replaced(chunk, undone) for chunk in context]
                texts.append("".join(plain))
                words.append([word for chunk in plain for word in _WORDS.findall(chunk)])
                labels.append([1] * len(words[-1]))
                probabilities.append([])
            return texts, words, labels, probabilities
        self._score(chunks)
        for context in chunks:
            done = [self._compress_chunk(chunk, reduce_rate) for chunk in context]
            texts.append("".join(text for text, _, _, _ in done))
            words.append([word for _, own, _, _ in done for word in own])
            labels.append([label for _, _, own, _ in done for label in own])
            probabilities.append([own for _, _, _, own in done])
        return texts, words, labels, probabilities

    def _compress_chunk(self, chunk: str, reduce_rate: float | int) -> tuple[str, list[str], list[int], np.ndarray]:
        merged = self._merge(chunk)
        words, w = merged.words, self._word(merged.forced, merged.first)
        if not words:
            raise IndexError("index -1 is out of bounds for axis 0 with size 0")  # the percentile of nothing
        probabilities = w
        # A list with a plain 1.0 or 0.0 in it is made float64 by numpy, and the percentile with it.
        plain = (
            merged.is_plain[merged.first]
            if self.how == "first"
            else np.logical_and.reduceat(merged.is_plain, merged.first)
        )
        plain = bool(plain.any())
        if self.drop:
            w, zeroed = self._without_repeats(words, w.astype(np.float64 if plain else np.float32), reduce_rate)
            plain |= zeroed
        w = w.astype(np.float64 if plain else np.float32)
        repeats = np.array([self._count(word) for word in words])
        threshold = np.percentile(np.repeat(w, repeats), int(100 * reduce_rate + 1))
        keep = w > threshold
        if threshold == 1.0:
            keep |= w == threshold
        labels, kept = keep.astype(int).tolist(), []
        for n in np.flatnonzero(keep).tolist():
            if self.drop and words[n] in self.forced and kept and kept[-1] == words[n]:
                labels[n] = 0
            else:
                kept.append(words[n])
        text = self.owner._fast.decoder.decode(kept) if kept else ""
        if self._sentencepiece:
            words = [word.lstrip("▁") for word in words]
        return text, words, labels, probabilities

    def _without_repeats(self, words: list[str], w: np.ndarray, reduce_rate: float | int) -> tuple[np.ndarray, bool]:
        threshold, w, zeroed = np.percentile(w, int(100 * reduce_rate)), w.copy(), False
        between, previous = False, None
        for n, word in enumerate(words):
            if word in self.forced:
                if between:
                    between = False
                elif word == previous:
                    w[n], zeroed = 0.0, True
                previous = word
            else:
                between = between or bool(w[n] > threshold)
        return w, zeroed

    def _score(self, chunks: list[list[str]]) -> None:
        new = list(dict.fromkeys(chunk for context in chunks for chunk in context if chunk not in self.scored))
        owner, rows, valid = self.owner, [], []
        unknown, get = owner.tokenizer.unknown, owner._ids.get
        masked = get("[PAD]", -1)
        ends = [get("[CLS]", unknown)], [get("[SEP]", unknown)]
        for pieces in owner._pieces(new):
            row = ends[0] + [get(piece, unknown) for piece in pieces] + ends[1]
            rows.append(np.array(row[:MAX_TOKENS], np.int32))
            valid.append(rows[-1] != masked)
        for chunk, row, seen, scores in zip(new, rows, valid, score(owner.encoder, rows, valid), strict=True):
            self.scored[chunk] = row[seen], scores[seen]

    def _merge(self, chunk: str) -> _Merged:
        ids, probabilities = self.scored[chunk]
        own = ~self.owner._special[ids]
        ids, probabilities = ids[own], probabilities[own]
        starts = self.facts.starts[ids]
        if len(ids) and not starts[0]:
            raise IndexError("list index out of range")  # nothing to continue
        first = np.flatnonzero(starts)
        pure, vocabulary, text = self.owner._pure, self.owner._vocabulary, self.facts.text
        words: list[str] = []
        for token, begins in zip(ids.tolist(), starts.tolist(), strict=True):
            if begins:
                words.append(text[token] if token in text else vocabulary[token])
            else:
                words[-1] += pure[token]
        is_plain = self.facts.forced[ids] & starts
        if self.digits:
            is_plain |= np.where(starts, self.facts.digit[ids], self.owner._digit[ids])
        forced = np.where(is_plain, np.float32(1), probabilities)
        unforced = probabilities[np.repeat(first, np.diff(np.append(first, len(ids))))]
        return _Merged(words, first, forced, unforced, is_plain)

    def _word(self, numbers: np.ndarray, first: np.ndarray) -> np.ndarray:
        """One number for each word from those of its subwords, added one after the other in float32."""
        if self.how == "first":
            return numbers[first]
        if self.how != "mean":
            raise NotImplementedError(f"token_to_word {self.how!r}; known: 'mean', 'first'")
        lengths = np.diff(np.append(first, len(numbers)))
        sums = numbers[first]
        for n in range(1, int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > n)
            sums[longer] += numbers[first[longer] + n]
        return sums / lengths.astype(np.float32)

    def _count(self, word: str) -> int:
        if word not in self.counts:
            self.counts[word] = self.owner.count(word)
        return self.counts[word]

    @property
    def _sentencepiece(self) -> bool:
        return self.owner.tokenizer.kind == "sentencepiece"


class _Merged(NamedTuple):
    """A chunk's words, the place of each word's first subword, and the subwords' numbers."""

    words: list[str]
    first: np.ndarray
    forced: np.ndarray
    unforced: np.ndarray
    is_plain: np.ndarray  # 1.0 by force


def _context_rate(
    contexts: int,
    origin: int,
    *,
    rate: float | int,
    target_token: float | int,
    filters_tokens: bool,
    target_context: int,
    context_rate: float | int,
    context_target: float | int,
) -> float | int:
    """The share of contexts that stays, from what was asked for; `origin` tokens in all."""
    if target_context <= 0 and context_rate >= 1.0 and context_target <= 0:
        if target_token < 0 and rate < 1.0:
            context_rate = (rate + 1.0) / 2 if filters_tokens else rate
        if target_token >= 0:
            context_target = target_token * 2 if filters_tokens else target_token
    if target_context >= 0:
        context_rate = min(target_context / contexts, 1.0)
    if context_target >= 0:
        context_rate = min(context_target / origin, 1.0)
    return context_rate


def _told(texts: list[str], origin: int, compressed: int) -> dict[str, Any]:
    """The published dictionary: the texts, their tokens before and after, and ratios as strings."""
    ratio = 1 if compressed == 0 else origin / compressed
    return {
        "compressed_prompt": "\n\n".join(texts),
        "compressed_prompt_list": texts,
        "origin_tokens": origin,
        "compressed_tokens": compressed,
        "ratio": f"{ratio:.1f}x",
        "rate": f"{1 / ratio * 100:.1f}%",
        "saving": f", Saving ${(origin - compressed) * 0.06 / 1000:.1f} in GPT-4.",
    }


def _replaced(text: str, pairs: Any) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text
