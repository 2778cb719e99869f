"""The tokenizer that the metadata of a GGUF file describes.

`tokenizer.ggml.model` names the kind; two kinds are read. "gpt2" is BPE on bytes, with merges; `tokenizer.ggml.pre`
names the rule that splits a text first (`jaxcompress.inputs.gguf_splits`). "llama" is SentencePiece's BPE, with scores.
The ids equal those of the tokenizer.json of the original models. `transformers` 5 reads GGUF differently: it neither
splits SmolLM's digits nor normalises Qwen's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.inputs.gguf import entry, read_header
from jaxcompress.inputs.gguf_splits import split_named
from jaxcompress.inputs.tokenizer_files import TokenizerFiles

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_KEY = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_NAMED = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id", "sep_token": "seperator_token_id", "mask_token": "mask_token_id",
}  # fmt: skip
# The ids of special tokens in a SentencePiece vocabulary if the file does not give them.
_USUAL = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
# Special tokens that end a turn. Converters write only one id, so llama.cpp finds the others by these names. Models
# that have these tokens list their ids in generation_config.json.
_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|end_of_turn|>", "<EOT>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
_SPACE = "▁"
MOST_CHARACTERS = 1024
"""The largest length of a SentencePiece token whose merges are searched. The longest known have some hundred."""


class _Vocabulary(NamedTuple):
    """The tokens and their kinds, by id."""

    tokens: list[str]
    kinds: np.ndarray

    def of_kind(self, *kinds: int) -> list[str]:
        return [self.tokens[index] for index in np.flatnonzero(np.isin(self.kinds, kinds))]

    def ids(self) -> dict[str, int]:
        """From tokens to ids. Of equal tokens, the first counts. Embedding rows without a token are left out."""
        padding = {f"[PAD{index}]": index for index in np.flatnonzero(self.kinds == _UNUSED).tolist()}
        ids = {token: index for index, token in reversed([*enumerate(self.tokens)])}
        return {token: index for token, index in sorted(ids.items(), key=lambda one: one[1]) if token not in padding}


def read_gguf_tokenizer(path: Path) -> TokenizerFiles:
    """Reads the tokenizer of a GGUF file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not GGUF or is damaged, or its tokenizer is missing or of an unknown kind; the message
        names the file.
    """
    metadata = read_header(path).metadata
    try:
        vocabulary = _vocabulary(metadata)
        kind = _text(metadata, "model")
        if kind not in _KINDS:
            raise ValueError(f"{_KEY}model is {kind!r:.80}; known: {', '.join(map(repr, _KINDS))}")
        ids = dict(_ids(metadata, vocabulary, _USUAL if kind == "llama" else {}))
        fast = _made(_KINDS[kind], metadata, vocabulary, ids)
        named = {name: vocabulary.tokens[index] for name, index in ids.items()}
        return TokenizerFiles(fast, named, _templates(metadata), dict(_said(metadata, vocabulary, ids)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _text(metadata: Mapping[str, Any], key: str) -> str:
    return entry(metadata, _KEY + key, str, "a string") or ""


def _strings(metadata: Mapping[str, Any], key: str) -> list[str] | None:
    found = entry(metadata, _KEY + key, (list, np.ndarray), "a list of strings")
    if found is not None and len(found) and not (isinstance(found, list) and isinstance(found[0], str)):
        raise ValueError(f"{_KEY}{key} must be a list of strings")
    return None if found is None else list(found)


def _numbers(metadata: Mapping[str, Any], key: str, count: int) -> np.ndarray | None:
    found = entry(metadata, _KEY + key, np.ndarray, "a list of numbers")
    if found is not None and len(found) != count:
        raise ValueError(f"{_KEY}{key} has {len(found):,} entries for {count:,} tokens")
    return found


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _strings(metadata, "tokens")
    if not tokens:
        raise ValueError(f"there is no tokenizer in it ({_KEY}tokens)")
    kinds = _numbers(metadata, "token_type", len(tokens))
    return _Vocabulary(tokens, np.full(len(tokens), _NORMAL) if kinds is None else kinds)


def _ids(metadata: Mapping[str, Any], vocabulary: _Vocabulary, usual: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """The ids of special tokens, by their role ("bos_token", ...)."""
    for name, key in _NAMED.items():
        index = _id(metadata, key, vocabulary)
        if index is None and usual.get(name, len(vocabulary.tokens)) < len(vocabulary.tokens):
            index = usual[name]
        if index is not None:
            yield name, index


def _id(metadata: Mapping[str, Any], key: str, vocabulary: _Vocabulary) -> int | None:
    index = entry(metadata, _KEY + key, int, "the id of a token")
    if index is not None and index in (-1, 2**32 - 1):  # some converters write this for "no token"
        return None
    if index is not None and not 0 <= index < len(vocabulary.tokens):
        raise ValueError(f"{_KEY}{key} is {index:,}, but there are {len(vocabulary.tokens):,} tokens")
    return index


def _said(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, ids: Mapping[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The ids of the begin, end and padding tokens, by their keys in generation_config.json."""
    of = lambda name: (ids[name],) if name in ids else ()
    turns = (_id(metadata, key, vocabulary) for key in ("eot_token_id", "eom_token_id"))
    marks = set(vocabulary.of_kind(_CONTROL, _USER_DEFINED))
    by_name = (vocabulary.tokens.index(token) for token in _ENDS if token in marks)
    ends = dict.fromkeys((*of("eos_token"), *(index for index in turns if index is not None), *by_name))
    yield "bos_token_id", of("bos_token")
    yield "eos_token_id", tuple(ends)
    yield "pad_token_id", of("pad_token")


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    given = {key: entry(metadata, key, str, "a string") for key in metadata if key.startswith(_TEMPLATE)}
    named = {key.removeprefix(_TEMPLATE + "."): text for key, text in given.items() if key.startswith(_TEMPLATE + ".")}
    return named | ({"default": given[_TEMPLATE]} if _TEMPLATE in given else {})


def _made(make: Any, metadata: Mapping[str, Any], vocabulary: _Vocabulary, ids: Mapping[str, int]) -> FastTokenizer:
    try:
        fast, begins = make(metadata, vocabulary, ids)
        _add_tokens(fast, vocabulary, set(ids.values()))
        _surround(fast, metadata, vocabulary, ids, begins)
        return fast
    except ValueError:
        raise
    except BaseException as error:  # an Exception, or a Rust panic, which is not an Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"its tokens and merges are no tokenizer: {error}") from error
        raise


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, ids: Mapping[str, int]
) -> tuple[FastTokenizer, bool]:
    """The tokenizer, and whether a text begins with `bos_token` if the file does not say."""
    split = split_named(_text(metadata, "pre"), entry(metadata, "general.architecture", str, "a string") or "")
    merges = [_pair(merge) for merge in _strings(metadata, "merges") or ()]
    fast = FastTokenizer(models.BPE(vocabulary.ids(), merges, ignore_merges=split.whole_words))
    if split.nfc:
        fast.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_])  # pyright: ignore[reportArgumentType]
    fast.decoder = decoders.ByteLevel()
    return fast, split.begins


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise ValueError(f"{_KEY}merges must be pairs with a space between them, not {merge!r:.80}")
    return left, right


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, ids: Mapping[str, int]
) -> tuple[FastTokenizer, bool]:
    known = vocabulary.ids()
    merges = _strings(metadata, "merges")
    pairs = [_pair(merge) for merge in merges] if merges else _merges(vocabulary, known, _scores(metadata, vocabulary))
    unknown = vocabulary.tokens[ids["unk_token"]] if "unk_token" in ids else None
    by_bytes = len(vocabulary.of_kind(_BYTE)) == 256
    fast = FastTokenizer(models.BPE(known, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=by_bytes))
    given = entry(metadata, _KEY + "add_space_prefix", bool, "true or false")
    opens = given is None or given
    # A space is also put before text that follows a special token, as in llama.cpp and in Llama 2's tokenizer.json.
    replaced = normalizers.Replace(" ", _SPACE)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced]) if opens else replaced
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if opens else [])])
    return fast, True


def _scores(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> np.ndarray:
    scores = _numbers(metadata, "scores", len(vocabulary.tokens))
    if scores is None or not np.isfinite(scores.astype(float)).all():
        raise ValueError(f"a SentencePiece vocabulary needs {_KEY}scores, a finite number for each token")
    return scores


def _merges(vocabulary: _Vocabulary, known: Mapping[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Pairs of tokens that form another token, ordered by descending score of that token.

    SentencePiece has no merges. It joins the two neighbours whose joint token has the highest score. Special tokens are
    never joined.
    """
    joined = np.isin(vocabulary.kinds, (_NORMAL, _USER_DEFINED, _UNUSED))
    places = [index for index in np.flatnonzero(joined).tolist() if known.get(vocabulary.tokens[index]) == index]
    usable = {vocabulary.tokens[index] for index in places}
    if (longest := max(map(len, usable), default=0)) > MOST_CHARACTERS:
        raise ValueError(f"a token has {longest:,} characters, at most {MOST_CHARACTERS:,} are known")
    found: list[tuple[float, int, str, str]] = []
    for index in places:
        token, score = vocabulary.tokens[index], -float(scores[index])
        for cut in range(1, len(token)):
            if (left := token[:cut]) in usable and (right := token[cut:]) in usable:
                found.append((score, -cut, left, right))
    # Of a token's pairs, the one with the longer first part comes first, since it stands further left.
    found.sort(key=lambda one: one[:2])
    return [one[2:] for one in found]


def _add_tokens(fast: FastTokenizer, vocabulary: _Vocabulary, special: set[int]) -> None:
    """Adds special and user-defined tokens, which are matched as a whole in any text."""
    marks = vocabulary.kinds == _CONTROL
    whole = vocabulary.kinds == _USER_DEFINED
    fast.add_tokens(
        [
            AddedToken(vocabulary.tokens[index], normalized=False, special=bool(marks[index]) or index in special)
            for index in np.flatnonzero(marks | whole | np.isin(np.arange(len(marks)), [*special])).tolist()
            if vocabulary.tokens[index]
        ]
    )


def _surround(
    fast: FastTokenizer,
    metadata: Mapping[str, Any],
    vocabulary: _Vocabulary,
    ids: Mapping[str, int],
    begins: bool,
) -> None:
    """Sets the tokens that are put before and after every text."""
    said = lambda key, usual: usual if (found := entry(metadata, _KEY + key, bool, "true or false")) is None else found
    before = [ids["bos_token"]] if said("add_bos_token", begins) and "bos_token" in ids else []
    after = [ids["eos_token"]] if said("add_eos_token", False) and "eos_token" in ids else []
    if not before and not after:
        return
    around = lambda text: [*(vocabulary.tokens[n] for n in before), text, *(vocabulary.tokens[n] for n in after)]
    fast.post_processor = processors.TemplateProcessing(
        single=around("$A"),
        pair=[*around("$A"), *(piece + ":1" for piece in around("$B"))],
        special_tokens=[(vocabulary.tokens[index], index) for index in {*before, *after}],
    )


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
