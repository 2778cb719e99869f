"""Builds the tokenizer that the files of a folder describe, as `transformers` does, without importing `transformers`.

tokenizer.json defines how text becomes tokens. tokenizer_config.json may add tokens (`added_tokens_decoder`, or any
special token that it names). In older folders, added_tokens.json and special_tokens_map.json add tokens. Chat templates
are in one of four places. Only the `tokenizers` library is imported, which takes milliseconds; importing
`transformers` takes a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.inputs.json import read_object_if_there
from jaxcompress.inputs.text import read_text

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LARGEST = 2**31 - 1

_ROBERTA = dict(
    bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>", unk_token="<unk>", pad_token="<pad>",
    mask_token="<mask>",
)  # fmt: skip
_GPT2 = dict(unk_token="<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
# The special tokens of each tokenizer class if tokenizer_config.json does not name them.
_OF_CLASS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
    "Qwen2Tokenizer": dict(unk_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"),
    "GPT2Tokenizer": _GPT2,
    "BertTokenizer": dict(
        unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]"
    ),
    "RobertaTokenizer": _ROBERTA,
    "XLMRobertaTokenizer": _ROBERTA,
}


class TokenizerFiles(NamedTuple):
    """The tokenizer, special tokens and chat templates of a folder.

    Attributes:
      fast: the `tokenizers` object; it neither truncates nor pads.
      named: special tokens by role: "bos_token", "eos_token", "pad_token", ..., including the model's own
        ("image_token").
      templates: chat templates, in Jinja, by name; the usual one is "default".
      ids: ids of special tokens in the model's configs, by key: "eos_token_id", ...
    """

    fast: FastTokenizer
    named: dict[str, str]
    templates: dict[str, str]
    ids: dict[str, tuple[int, ...]]


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Reads a folder's tokenizer.json and the files beside it.

    Raises:
      FileNotFoundError: the folder has no tokenizer.json.
      ValueError: a file cannot be read, or does not hold a tokenizer.
    """
    fast = _read_fast(folder / "tokenizer.json")
    path, by_name = folder / "tokenizer_config.json", folder / "added_tokens.json"
    config = read_object_if_there(path)
    with _tokens_of(path):
        added = _added_by_id(config)
    if added is None:  # older folders: other files name the tokens and take precedence
        older = read_object_if_there(folder / "special_tokens_map.json")
        config |= older
        path = folder / "special_tokens_map.json" if older else path
    with _tokens_of(path):
        special = dict(_special(config))
    if added is None:
        with _tokens_of(by_name):
            added = _added_by_name(read_object_if_there(by_name), {token.content for token in special.values()})
        path = by_name
    with _tokens_of(path):
        _add(fast, added, [*special.values()], path)
    named = dict(_named_of_class(config, fast))
    named |= {name: token.content for name, token in special.items() if not name.isdigit()}
    fast.encode_special_tokens = config.get("split_special_tokens") is True
    ids = {key: _said(folder, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return TokenizerFiles(fast, named, _templates(folder, config), ids)


def id_array(ids: Iterable[int]) -> Int[np.ndarray, " T"]:
    """Token ids as int32 [T].

    Raises:
      ValueError: an id exceeds int32.
    """
    try:
        return np.array(list(ids), np.int32)
    except OverflowError:
        raise ValueError(f"the vocabulary in tokenizer.json has ids above {_LARGEST}, the largest known") from None


@contextmanager
def _tokens_of(path: Path) -> Iterator[None]:
    """Puts the file's path in front of errors about its tokens."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:  # the tokenizers library raises the last two
        raise ValueError(f"{path} holds what is no token: {error}") from error


def _read_fast(path: Path) -> FastTokenizer:
    if not path.is_file():
        folder = path.parent
        there = sorted(
            p.name for p in folder.glob("*") if p.name.endswith((".model", ".tiktoken")) or "vocab" in p.name
        )
        if not there:
            raise FileNotFoundError(
                f"{path} does not exist: {folder} has no tokenizer. Open the tokenizer of another folder with "
                "jaxcompress.Tokenizer(folder)"
            )
        raise FileNotFoundError(
            f"{path} does not exist (it has {', '.join(there)}). Only fast tokenizers (tokenizer.json) are "
            "read; a folder with a SentencePiece model or a vocabulary alone is converted by "
            f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        fast = FastTokenizer.from_file(str(path))
    except BaseException as error:  # an Exception, or a Rust panic, which is not an Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
        raise
    fast.no_truncation()
    fast.no_padding()
    return fast


def _added_by_id(config: Mapping[str, Any]) -> dict[int, AddedToken] | None:
    """`added_tokens_decoder`, in the order of its ids; None if it is absent."""
    given = config.get("added_tokens_decoder")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"added_tokens_decoder must be an object, not a {type(given).__name__}")
    added = {_id(key): _token(value) for key, value in given.items()}
    return {index: added[index] for index in sorted(added)}


def _added_by_name(given: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json, in the order of its ids."""
    added = {
        _id(index): AddedToken(name, normalized=name not in special, special=name in special)
        for name, index in given.items()
    }
    return {index: added[index] for index in sorted(added)}


def _id(value: Any) -> int:
    index = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 12 else value
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= _LARGEST:
        raise ValueError(f"the id of a token must be a whole number from 0 to {_LARGEST}, not {value!r:.80}")
    return index


def _token(value: Any) -> AddedToken:
    """Parses a token of a config: a string, or an object with flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"a token must be a string or an object with 'content', not {value!r:.80}")
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(value["content"], **flags)


def _special(config: Mapping[str, Any]) -> Iterator[tuple[str, AddedToken]]:
    """The special tokens that a config names, by role. Tokens without a role have a number as key."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise ValueError(f"extra_special_tokens must be a list or an object, not a {type(extra).__name__}")
    for name, value in {**config, **(extra if isinstance(extra, dict) else {})}.items():
        marked = isinstance(value, dict) and value.get("__type") == "AddedToken"
        own = name.endswith("_token") and (isinstance(value, str) or marked)
        if value is not None and (name in _NAMED or own or (isinstance(extra, dict) and name in extra)):
            yield name, _as_special(value)
    for number, value in enumerate(extra if isinstance(extra, list) else []):
        yield str(number), _as_special(value)


def _as_special(value: Any) -> AddedToken:
    return _token({**value, "special": True} if isinstance(value, dict) else value)


def _named_of_class(config: Mapping[str, Any], fast: FastTokenizer) -> Iterator[tuple[str, str]]:
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    for name, token in _OF_CLASS.get(kind, {}).items():
        if name not in config and fast.token_to_id(token) is not None:
            yield name, token


def _add(fast: FastTokenizer, added: Mapping[int, AddedToken], special: list[AddedToken], path: Path) -> None:
    known = {token.content for token in fast.get_added_tokens_decoder().values()} | {t.content for t in added.values()}
    fast.add_tokens([*added.values(), *(token for token in special if token.content not in known)])
    for index, token in added.items():
        if (found := fast.token_to_id(token.content)) != index:
            warnings.warn(
                f"{path} gives the token {token.content!r} the id {index}; with tokenizer.json it has {found}",
                stacklevel=4,
            )


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    alone = folder / "chat_template.jinja"
    files |= {"default": alone} if alone.is_file() else {}
    if files:
        return {name: read_text(path) for name, path in files.items()}
    path = folder / "tokenizer_config.json"
    given = config.get("chat_template")
    if not given:
        path = folder / "chat_template.json"
        given = read_object_if_there(path).get("chat_template")
    if not given:
        return {}
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {str(one.get("name")): one.get("template") for one in given}
    if not isinstance(given, dict) or not all(isinstance(template, str) for template in given.values()):
        raise ValueError(f"{path}: chat_template must be a string, or several with their names, not {given!r:.80}")
    return given


def _said(folder: Path, key: str) -> tuple[int, ...]:
    """The ids of a special token in generation_config.json, else in config.json, else in the decoder's config there."""
    for name in ("generation_config.json", "config.json"):
        entries = read_object_if_there(folder / name)
        nested = entries.get("text_config")
        for given in (entries, nested if isinstance(nested, dict) else {}):
            if (value := given.get(key)) is not None:
                return _ids(value, f"{folder / name}: {key}")
    return ()


def _ids(value: Any, what: str) -> tuple[int, ...]:
    """Parses an id or a list of ids of a config. Older configs write -1 for "no token"."""
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index < 2**31 for index in ids):
        raise ValueError(f"{what} must be the id of a token or a list of ids, not {value!r:.80}")
    return tuple(index for index in ids if index >= 0)
