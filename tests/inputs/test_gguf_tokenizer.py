"""Tokenizers of GGUF files against those that they were made from."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

gguf = pytest.importorskip("gguf")

from jaxcompress.embedded.corpus import held_out  # noqa: E402
from jaxcompress.inputs.gguf_splits import SPLITS  # noqa: E402
from jaxcompress.inputs.tokenizer import Tokenizer  # noqa: E402

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "", "hello", " two  spaces ", "a\n\n  b\r\n\tc ", "it's WE'LL don't", "12345 3.14 ٣٤٥ Ⅷ ½", "café cafe\u0301 你好",
    "<|im_start|>user\nhi<|im_end|>\n", "<think>x</think>", "f(x)[0] += 'a'/\"b\"", "HelloWorld fooBar ABCdef",
]  # fmt: skip
ANY = st.text(st.sampled_from("ab 1,\n\t'sLl٣½é\u0301你😀<|>") | st.characters(exclude_categories=["Cs"]), max_size=20)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), whole])


# Pre-tokenizer and normalizer as in tokenizer.json of the models that these names stand for.
PUBLISHED: dict[str, tuple[Any, Any]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        None,
    ),
    "llama-bpe": (_regex(_LLAMA3), None),
    "qwen2": (_regex(_LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
}


@pytest.fixture(scope="module")
def prose() -> str:
    return held_out("topics/")[0].text


@pytest.fixture(scope="module")
def learnt(prose: str) -> tuple[dict[str, int], list[Sequence[str]]]:
    """A small vocabulary of bytes, with merges across digits and letters with accents, and marks at its end."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rare = ["12345 1234 3.14 99", "café cafe\u0301", "it's we'll 'S", "   indented"]
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator([*rare * 50, *prose.splitlines()], trainer)
    made = json.loads(fast.to_str())["model"]
    return made["vocab"], made["merges"]


def file_of(path: Path, learnt: tuple[dict[str, int], list[Sequence[str]]], pre: str, **more: Any) -> Path:
    vocabulary, merges = learnt
    tokens = [*sorted(vocabulary, key=lambda token: vocabulary[token]), *MARKS, "<think>", "[PAD604]"]
    kinds = [1] * len(vocabulary) + [3] * len(MARKS) + [4, 5]
    return write(
        path,
        ggml__model="gpt2", ggml__pre=pre, ggml__tokens=tokens, ggml__token_type=kinds,
        ggml__merges=[" ".join(pair) for pair in merges],
        ggml__bos_token_id=len(vocabulary), ggml__eos_token_id=len(vocabulary) + 2, **more,
    )  # fmt: skip


def write(path: Path, **metadata: Any) -> Path:
    """A file with a tokenizer and no weights; keys are those behind `tokenizer.`, with `__` for a full stop."""
    writer = gguf.GGUFWriter(path, "llama")
    adds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        adds[type(value)]("tokenizer." + key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def published(learnt: tuple[dict[str, int], list[Sequence[str]]], pre: str) -> FastTokenizer:
    vocabulary, merges = learnt
    fast = FastTokenizer(models.BPE(vocabulary, [tuple(pair) for pair in merges], ignore_merges=pre == "llama-bpe"))
    fast.pre_tokenizer, normalizer = PUBLISHED[pre]
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(MARKS)
    fast.add_tokens(["<think>"])
    return fast


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, learnt: Any) -> dict[str, tuple[Tokenizer, FastTokenizer]]:
    folder = tmp_path_factory.mktemp("gguf")
    files = {pre: file_of(folder / f"{pre}.gguf", learnt, pre, ggml__add_bos_token=False) for pre in PUBLISHED}
    return {pre: (Tokenizer(path), published(learnt, pre)) for pre, path in files.items()}


@pytest.mark.parametrize("pre", PUBLISHED)
@settings(max_examples=100)
@given(text=ANY)
def test_ids_of_any_text(pairs: dict[str, tuple[Tokenizer, FastTokenizer]], pre: str, text: str) -> None:
    ours, theirs = pairs[pre]
    ids = ours.encode(text).tolist()
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_ids(pairs: dict[str, tuple[Tokenizer, FastTokenizer]], pre: str, prose: str) -> None:
    ours, theirs = pairs[pre]
    for text in (*TEXTS, prose):
        assert ours.encode(text).tolist() == theirs.encode(text).ids, text
    assert ours.vocab_size == theirs.get_vocab_size()  # rows of the embedding that no token has do not count
    assert set(ours.special_tokens()) == set(MARKS)


def test_the_names_differ(pairs: dict[str, tuple[Tokenizer, FastTokenizer]]) -> None:
    """Else the tests above would show nothing."""
    text = " ".join(TEXTS) + " 12345 café cafe\u0301"
    assert len({tuple(ours.encode(text).tolist()) for ours, _ in pairs.values()}) == len(PUBLISHED)


def test_what_begins_and_ends_a_text(tmp_path: Path, learnt: Any) -> None:
    first = len(learnt[0])
    tokenizer = Tokenizer(file_of(tmp_path / "m.gguf", learnt, "llama-bpe", ggml__padding_token_id=2**32 - 1))
    assert tokenizer.bos_id == first
    assert tokenizer.eos_ids == (first + 2, first)  # the file's, and one known by its name
    assert tokenizer.pad_id == first + 2
    assert tokenizer.encode("a").tolist()[0] == first  # Llama 3 begins with it where the file does not say
    assert not Tokenizer(file_of(tmp_path / "n.gguf", learnt, "smollm")).adds_bos
    turns = Tokenizer(file_of(tmp_path / "o.gguf", learnt, "smollm", ggml__eot_token_id=first + 1))
    assert turns.eos_ids == (first + 2, first + 1, first)


def test_templates(tmp_path: Path, learnt: Any) -> None:
    more = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "chat_template__tool_use": "tools"}
    tokenizer = Tokenizer(file_of(tmp_path / "m.gguf", learnt, "smollm", **more))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<|endoftext|>hi"
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(file_of(tmp_path / "n.gguf", learnt, "smollm")).apply_chat_template([{"role": "user"}])


def test_files_that_do_not_say_how_a_text_is_split(tmp_path: Path, learnt: Any) -> None:
    path = file_of(tmp_path / "m.gguf", learnt, "default")
    with pytest.warns(UserWarning, match="taken as gpt-2"):
        tokenizer = Tokenizer(path)
    assert tokenizer.encode("12345").tolist() == published(learnt, "gpt-2").encode("12345").ids


# SentencePiece


@pytest.fixture(scope="module")
def sentencepiece() -> dict[str, Any]:
    return json.loads((Path(__file__).parents[1] / "fixtures" / "gguf" / "sentencepiece.json").read_text("utf-8"))


def pieces(path: Path, fixture: dict[str, Any], **more: Any) -> Path:
    parts = dict(ggml__tokens=fixture["tokens"], ggml__scores=fixture["scores"], ggml__token_type=fixture["kinds"])
    return write(path, ggml__model="llama", **parts, **more)


def test_ids_are_those_of_sentencepiece(tmp_path: Path, sentencepiece: dict[str, Any]) -> None:
    tokenizer = Tokenizer(pieces(tmp_path / "m.gguf", sentencepiece))
    for text, ids in sentencepiece["texts"].items():
        assert tokenizer.encode(text, add_bos=False).tolist() == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("hello").tolist()[0] == tokenizer.bos_id == 1
    assert tokenizer.eos_ids == (2,)


def test_no_space_before_a_text(tmp_path: Path, sentencepiece: dict[str, Any]) -> None:
    tokenizer = Tokenizer(pieces(tmp_path / "m.gguf", sentencepiece, ggml__add_space_prefix=False))
    for text in sentencepiece["texts"]:
        spaced = sentencepiece["texts"].get(" " + text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert spaced is None or tokenizer.encode(" " + text, add_bos=False).tolist() != spaced
    assert tokenizer.encode(" hello", add_bos=False).tolist() == sentencepiece["texts"]["hello"]


# What is no tokenizer


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({}, "no tokenizer"),
        ({"ggml__tokens": ["a"], "ggml__model": "bert"}, "'bert'; known: 'gpt2', 'llama'"),
        ({"ggml__tokens": [1, 2], "ggml__model": "gpt2"}, "must be a list of strings"),
        ({"ggml__tokens": "a", "ggml__model": "gpt2"}, "must be a list of strings"),
        ({"ggml__tokens": ["a"], "ggml__model": 3}, "model must be a string"),
        ({"ggml__tokens": ["a"], "ggml__model": "gpt2", "ggml__pre": "nobody"}, "'nobody'; known: gpt-2"),
        ({"ggml__tokens": ["a"], "ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__merges": ["a"]}, "must be pairs"),
        ({"ggml__tokens": ["a"], "ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__merges": ["a b"]}, "no tokenizer"),
        ({"ggml__tokens": ["a"], "ggml__model": "gpt2", "ggml__bos_token_id": 1}, "bos_token_id is 1, but there are 1"),
        ({"ggml__tokens": ["a"], "ggml__model": "gpt2", "ggml__token_type": [1, 1]}, "has 2 entries for 1 tokens"),
        ({"ggml__tokens": ["a"], "ggml__model": "llama"}, "needs tokenizer.ggml.scores"),
        ({"ggml__tokens": ["a", "b" * 9999], "ggml__model": "llama", "ggml__scores": [0.0, 0.0]}, "9,999 characters"),
        ({"ggml__tokens": ["a"], "ggml__model": "llama", "ggml__scores": [float("nan")]}, "a finite number"),
        (
            {"ggml__tokens": ["a"], "ggml__model": "gpt2", "ggml__pre": "gpt-2", "chat_template": 3},
            "chat_template must",
        ),
    ],
)
def test_metadata_of_no_tokenizer(tmp_path: Path, metadata: dict[str, Any], why: str) -> None:
    path = write(tmp_path / "m.gguf", **metadata)
    with pytest.raises(ValueError, match=why) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("pre", SPLITS)
def test_every_split_can_be_made(tmp_path: Path, pre: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    path = write(tmp_path / "m.gguf", ggml__model="gpt2", ggml__pre=pre, ggml__tokens=alphabet)
    tokenizer = Tokenizer(path)
    for text in TEXTS:
        kept = unicodedata.normalize("NFC", text) if SPLITS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text)) == kept


@pytest.mark.filterwarnings("ignore:.*does not say how a text is split")
@settings(max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["gpt2", "llama"]))
def test_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, sentencepiece: dict[str, Any], data: st.DataObject, kind: str
) -> None:
    """A tokenizer, or an error that names the file."""
    path = tmp_path_factory.getbasetemp() / f"{kind}.gguf"
    if not path.exists():
        few = {name: sentencepiece[name][250:300] for name in ("tokens", "scores", "kinds")}
        more = {"ggml__merges": ["t h"], "ggml__pre": "smollm"} if kind == "gpt2" else {}
        shutil.copy(pieces(path, few, **more), path.with_suffix(".whole"))
    content = bytearray(
        path.with_suffix(".whole").read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\4\0\0\0\0\0\0\0gpt2")
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(24, len(content) - 9))
        size = data.draw(st.sampled_from([None, 0, 1, 2**31, 2**32 - 1, 2**63]))
        content[at : at + 8] = content[at : at + 8] if size is None else size.to_bytes(8, "little")
        content[at] = data.draw(st.integers(0, 255)) if size is None else content[at]
    path.write_bytes(content)
    told = str(path)
    try:
        Tokenizer(path).encode("the 12 é")
    except ValueError as error:
        told = str(error)
    assert str(path) in told
