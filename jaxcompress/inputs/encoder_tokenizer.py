"""The tokenizer of an encoder: subwords with their offsets in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.inputs.paths import path_of
from jaxcompress.inputs.text import masked
from jaxcompress.inputs.tokenizer_files import id_array, read_tokenizer

Offsets = Int[np.ndarray, "T 2"]
Kind = Literal["wordpiece", "sentencepiece", "bytes"]
_MODELS: dict[str, Kind] = {"WordPiece": "wordpiece", "Unigram": "sentencepiece", "BPE": "bytes"}
_MOST_IDS = 2**24  # the largest size of the table that marks special tokens
_OPENING, _CLOSING = ("[CLS]", "<s>"), ("[SEP]", "</s>")
_PART = re.compile(r" *[^ ]+| +")
_UNKNOWN, _PADDING = ("[UNK]", "<unk>"), ("[PAD]", "<pad>")


class Subwords(NamedTuple):
    """The subwords of a text.

    Attributes:
      ids: token ids, without special tokens.
      offsets: start and end of each subword in the text, in characters.
    """

    ids: Int[np.ndarray, " T"]
    offsets: Offsets


class EncoderTokenizer:
    """The tokenizer of a BERT, XLM-RoBERTa or RoBERTa folder, as `transformers` reads it.

    Attributes:
      folder: the folder that it was read from.
      fast: the `tokenizers` object; it treats the names of special tokens in a text as ordinary text.
      kind: "wordpiece" (BERT: `##` continues a word), "sentencepiece" (XLM-RoBERTa: `▁` begins one) or "bytes"
        (RoBERTa: `Ġ` does).
      opening, closing, padding, unknown: ids of special tokens.
    """

    def __init__(self, folder: str | Path):
        """Reads tokenizer.json and the files beside it.

        Raises:
          FileNotFoundError: the folder has no tokenizer.json.
          ValueError: tokenizer.json cannot be read, or is of none of the known kinds.
        """
        self.folder = path_of(folder, "the folder of a tokenizer")
        self.fast, named, *_ = read_tokenizer(self.folder)
        self.fast.encode_special_tokens = True
        model = type(self.fast.model).__name__
        if model not in _MODELS:
            raise ValueError(f"{self.folder} has a {model} tokenizer; known for encoders: {', '.join(_MODELS)}")
        self.kind: Kind = _MODELS[model]
        one_of = lambda name, usual: self._one_of((*([named[name]] if name in named else []), *usual))
        self.opening, self.closing = one_of("cls_token", _OPENING), one_of("sep_token", _CLOSING)
        self.padding, self.unknown = one_of("pad_token", _PADDING), one_of("unk_token", _UNKNOWN)
        # For "bytes", the text before it decides whether white space at a line's beginning is one token or several.
        self._cuts_at_spaces = self.kind != "bytes" and _cuts_at_spaces(self.fast)
        special = [n for n, token in self.fast.get_added_tokens_decoder().items() if token.special]
        if max(special, default=0) >= _MOST_IDS:
            raise ValueError(
                f"{self.folder} has special tokens with ids up to {max(special)}; known: below {_MOST_IDS}"
            )
        self._special = np.zeros(max(special, default=-1) + 2, bool)  # the last entry stands for all larger ids
        self._special[special] = True

    def __repr__(self) -> str:
        return f"EncoderTokenizer({str(self.folder)!r})"

    def encode(self, text: str) -> Subwords:
        """Subwords of a text, without special tokens. Each surrogate is read as one U+FFFD, also within a pair."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Subwords]:
        """The subwords of several texts, computed in parallel. See `encode`."""
        encodings = self.fast.encode_batch([masked(text) for text in texts], add_special_tokens=False)
        return [Subwords(self._plain(e.ids), _array(e.offsets)) for e in encodings]

    def count(self, text: str) -> int:
        """The number of subwords in a text."""
        return len(self.fast.encode_batch_fast([masked(text)], add_special_tokens=False)[0])

    def apart(self, text: str) -> list[str]:
        """Cuts a text into parts that have the same subwords as the whole text.

        The text is cut before every space. If this tokenizer has subwords that span a space, it is not cut.
        """
        return _PART.findall(text) if self._cuts_at_spaces else [text]

    def _plain(self, ids: Sequence[int]) -> Int[np.ndarray, " T"]:
        """Token ids of a text, with special tokens replaced by the unknown token.

        SentencePiece has the names of special tokens among its pieces, so a text that contains such a name would
        otherwise yield the special token.
        """
        plain = id_array(ids)
        plain[self._special[np.minimum(plain, len(self._special) - 1)]] = self.unknown
        return plain

    def _one_of(self, names: Sequence[str]) -> int:
        for name in names:
            if (token := self.fast.token_to_id(name)) is not None:
                return token
        raise ValueError(f"the tokenizer in {self.folder} has none of the special tokens {', '.join(names)}")


def _cuts_at_spaces(fast: FastTokenizer) -> bool:
    if fast.pre_tokenizer is None:
        return False
    text = "a b" if fast.normalizer is None else fast.normalizer.normalize_str("a b")
    # Added tokens that are not special may include spaces.
    plain = all(token.special for token in fast.get_added_tokens_decoder().values())
    return plain and len(fast.pre_tokenizer.pre_tokenize_str(text)) == 2


def _array(offsets: Sequence[tuple[int, int]]) -> Offsets:
    """The same array as `np.array` of a list of pairs, in a third of the time."""
    return np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)
