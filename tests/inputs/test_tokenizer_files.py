"""Folders read as `transformers` reads them: made by hand, one for each place where a token or a template may stand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.checkpoints._carried import files_beside
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.inputs.tokenizer_files import read_tokenizer

transformers = pytest.importorskip("transformers")

CHAT = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
LONGER = CHAT.replace("<|{{", "<||{{")
TEXTS = [
    "", "hello", " two  spaces ", "a<s>b</s>c", "<|im_start|>user\nhi<|im_end|>", "<tool>x</tool> <tool>", "Hi<x> <X>",
    "grüße 你好 😀", "<s>", "Yes<|im_end|>\n",
]  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "good bye"}]


def flags(content: str, **changes: bool) -> dict[str, Any]:
    plain = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    return {"content": content, **plain, **changes}


def byte_level() -> FastTokenizer:
    """Bytes and nothing else, and two special tokens: 256 and 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return fast


def opening(fast: FastTokenizer, *names: str, closing: str = "") -> FastTokenizer:
    special = [(name, fast.token_to_id(name)) for name in (*names, *([closing] if closing else []))]
    fast.post_processor = processors.TemplateProcessing(
        single=" ".join([*names, "$A", *([closing] if closing else [])]), special_tokens=list(dict.fromkeys(special))
    )
    return fast


def without_text() -> FastTokenizer:
    """One that has no token for most of the texts."""
    fast = FastTokenizer(models.WordLevel({"<s>": 0, "hello": 1}, unk_token="<s>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(["<s>"])
    return fast


def normalized() -> FastTokenizer:
    fast = byte_level()
    fast.normalizer = normalizers.Lowercase()
    return fast


IM_END = {"256": flags("<s>"), "257": flags("</s>"), "258": flags("<|im_end|>")}
# What is in a folder beside tokenizer.json: file names without .json to contents, "tokenizer_config" above all.
FOLDERS: dict[str, tuple[Callable[[], FastTokenizer], dict[str, Any]]] = {
    "bare": (byte_level, {}),
    "bos": (lambda: opening(byte_level(), "<s>"), {}),
    "bos_and_eos": (lambda: opening(byte_level(), "<s>", closing="</s>"), {}),
    "two_tokens_open": (lambda: opening(byte_level(), "</s>", "<s>"), {}),
    "add_bos_token": (byte_level, {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True}}),
    "add_bos_token_false": (
        lambda: opening(byte_level(), "<s>"),
        {"tokenizer_config": {"add_bos_token": False}},
    ),
    "bos_is_not_named": (lambda: opening(byte_level(), "<s>"), {"tokenizer_config": {"bos_token": None}}),
    "decoder": (byte_level, {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": IM_END}}),
    "decoder_without_order": (
        byte_level,
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"259": flags("<tool>"), "258": flags("<|im_end|>", special=False)}
            }
        },
    ),
    "decoder_with_flags": (
        byte_level,
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "258": flags("<|im_end|>", rstrip=True),
                    "259": flags("<|im_start|>", single_word=True, special=False),
                    "260": flags("<tool>", lstrip=True, special=False, normalized=True),
                }
            }
        },
    ),
    "decoder_of_a_token_in_the_vocabulary": (
        byte_level,
        {"tokenizer_config": {"added_tokens_decoder": {"39": flags("H")}}},
    ),
    "decoder_makes_the_map_old": (
        byte_level,
        {"tokenizer_config": {"added_tokens_decoder": IM_END}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
    ),
    "added_tokens": (
        byte_level,
        {"added_tokens": {"<|im_start|>": 259, "<|im_end|>": 258}, "tokenizer_config": {"eos_token": "<|im_end|>"}},
    ),
    "added_tokens_normalized": (normalized, {"added_tokens": {"<X>": 258}}),
    "map": (byte_level, {"special_tokens_map": {"eos_token": "<|im_end|>", "pad_token": flags("<pad>")}}),
    "map_wins": (byte_level, {"special_tokens_map": {"bos_token": "</s>"}, "tokenizer_config": {"bos_token": "<s>"}}),
    "map_extra": (byte_level, {"special_tokens_map": {"additional_special_tokens": ["<tool>", "<x>"]}}),
    "named_only": (byte_level, {"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<pad>"}}),
    "objects": (byte_level, {"tokenizer_config": {"eos_token": {**flags("<|im_end|>"), "__type": "AddedToken"}}}),
    "extra_list": (byte_level, {"tokenizer_config": {"additional_special_tokens": ["<tool>", "</tool>"]}}),
    "extra_objects": (
        byte_level,
        {"tokenizer_config": {"extra_special_tokens": [{**flags("<tool>"), "__type": "AddedToken"}]}},
    ),
    "extra_dict": (byte_level, {"tokenizer_config": {"extra_special_tokens": {"image_token": "<x>"}}}),
    "of_the_model": (byte_level, {"tokenizer_config": {"image_token": "<x>", "boi_token": "<tool>"}}),
    "split_special": (byte_level, {"tokenizer_config": {"split_special_tokens": True}}),
    "generation": (
        byte_level,
        {"generation_config": {"eos_token_id": [256, 7], "pad_token_id": 9}, "config": {"eos_token_id": 5}},
    ),
    "no_text": (lambda: opening(without_text(), "<s>"), {"tokenizer_config": {"eos_token": None}}),
    "chat": (byte_level, {"tokenizer_config": {"chat_template": CHAT}}),
    "chat_list": (
        byte_level,
        {
            "tokenizer_config": {
                "chat_template": [{"name": "tool_use", "template": LONGER}, {"name": "default", "template": CHAT}]
            }
        },
    ),
    "chat_file": (byte_level, {"tokenizer_config": {"chat_template": LONGER}, "chat_template.jinja": CHAT}),
    "chat_files": (
        byte_level,
        {"chat_template.jinja": CHAT, "additional_chat_templates/tool_use.jinja": LONGER},
    ),
    "chat_of_the_model": (
        byte_level,
        {"tokenizer_config": {"image_token": "<x>", "chat_template": "{{ image_token }}" + CHAT}},
    ),
    "chat_generation": (
        byte_level,
        {"tokenizer_config": {"chat_template": "{% generation %}x{{ messages|tojson }}{% endgeneration %}" + CHAT}},
    ),
}


def made(folder: Path, name: str) -> Path:
    make, files = FOLDERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    usual = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    settings = {k: v for k, v in (usual | files.get("tokenizer_config", {})).items() if v is not None}
    for file, content in {**files, "tokenizer_config": settings}.items():
        path = folder / (file if file.endswith(".jinja") else f"{file}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path / name, name)
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.vocabulary() == theirs.get_vocab()
    assert ours.vocab_size == len(theirs)
    assert {i for i in range(ours.vocab_size) if ours.is_special(i)} == {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    closing = theirs("hello").input_ids[-1:] == [257]
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert ids + [257] * closing == theirs(text).input_ids
        plain = ours.encode(text, add_bos=False).tolist()
        assert plain == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id is None or theirs.eos_token_id in ours.eos_ids
    assert theirs.pad_token_id in (None, ours.pad_id)
    assert ours.has_chat_template == bool(theirs.chat_template)
    if ours.has_chat_template:
        for prompt in (True, False):
            text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(MESSAGES, add_generation_prompt=prompt) == text


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_carried_over_reads_the_same(tmp_path: Path, name: str) -> None:
    """By us, and by transformers, which writes it in its own way."""
    folder = made(tmp_path / name, name)
    for file, source in files_beside(folder).items():
        (tmp_path / "copied" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "copied" / file)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    ours = Tokenizer(folder)
    for again in (Tokenizer(tmp_path / "copied"), Tokenizer(tmp_path / "theirs")):
        facts = lambda t: (t.vocabulary(), t.bos_id, t.adds_bos, t.has_chat_template, t.vocab_size)
        assert facts(again) == facts(ours)
        assert [again.encode(text).tolist() for text in TEXTS] == [ours.encode(text).tolist() for text in TEXTS]
    copied = Tokenizer(tmp_path / "copied")
    if "config" not in FOLDERS[name][1] or "generation_config" in FOLDERS[name][1]:
        assert (copied.eos_ids, copied.pad_id) == (ours.eos_ids, ours.pad_id)


@pytest.mark.parametrize(
    ("files", "eos", "pad"),
    [
        ({"generation_config": {"eos_token_id": [7, 9, 7]}, "config": {"eos_token_id": 5}}, (7, 9, 257), 7),
        ({"generation_config": {"temperature": 1.0}, "config": {"eos_token_id": 5, "pad_token_id": -1}}, (5, 257), 5),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [5, 6]}}, (5, 6, 257), 5),
        ({"config": {"text_config": {"eos_token_id": [5], "pad_token_id": 3}}}, (5, 257), 3),
        ({"config": {"eos_token_id": 4, "text_config": {"eos_token_id": 5}}}, (4, 257), 4),
        ({"config": {"eos_token_id": -1}}, (257,), 257),
        ({}, (257,), 257),
    ],
)
def test_what_ends_a_text(tmp_path: Path, files: dict[str, Any], eos: tuple[int, ...], pad: int) -> None:
    folder = made(tmp_path, "bare")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(folder)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == (eos, pad)


def test_the_tokenizers_own_padding_comes_first(tmp_path: Path) -> None:
    folder = made(tmp_path, "map")
    (folder / "generation_config.json").write_text('{"pad_token_id": 3}')
    tokenizer = Tokenizer(folder)
    assert tokenizer.pad_id == tokenizer.vocabulary()["<pad>"]


@pytest.mark.parametrize("template", [CHAT, [{"name": "default", "template": CHAT}], {"default": CHAT}])
def test_a_chat_template_in_a_file_of_its_own_alone(tmp_path: Path, template: Any) -> None:
    """As processors of pictures and text have it; transformers' tokenizers overlook it."""
    folder = made(tmp_path, "bare")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    text = Tokenizer(folder).apply_chat_template(MESSAGES)
    assert text == "<s><|user|>hi</s>\n<|assistant|>good bye</s>\n<|assistant|>"


def test_templates_that_refuse(tmp_path: Path) -> None:
    folder = made(tmp_path, "bare")
    say = lambda template: (folder / "chat_template.jinja").write_text(template)
    for template in ("{{ raise_exception('no system') }}", "{% if %}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"):
        say(template)
        with pytest.raises(ValueError, match="the chat template refuses this conversation: .+"):
            Tokenizer(folder).apply_chat_template(MESSAGES)
    with pytest.raises(ValueError, match="a conversation is a list of one or more messages"):
        Tokenizer(folder).apply_chat_template([])
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(CHAT)
    assert not Tokenizer(folder).has_chat_template
    with pytest.raises(ValueError, match="none of them is the default: rag"):
        Tokenizer(folder).apply_chat_template(MESSAGES)


@pytest.mark.parametrize("names", [["default", "tool_use"], ["default", "rag"], ["tool_use"]])
@pytest.mark.parametrize("tools", [None, [], [{"type": "function", "function": {"name": "look"}}]])
def test_the_template_for_tools(tmp_path: Path, names: list[str], tools: Any) -> None:
    folder = made(tmp_path, "bare")
    templates = [{"name": name, "template": f"{name}:{{{{ tools | length if tools }}}}{CHAT}"} for name in names]
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.has_chat_template == ("default" in names)
    if tools is None and "default" not in names:
        with pytest.raises(ValueError, match=r"none of them is the default: tool_use; tool_use is applied where tools"):
            ours.apply_chat_template(MESSAGES)
        return
    text = ours.apply_chat_template(MESSAGES, tools=tools)
    assert text == theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text.startswith("tool_use:") == ("tool_use" in names and tools is not None)


def test_ids_that_do_not_fit_are_told(tmp_path: Path) -> None:
    folder = made(tmp_path, "bare")
    (folder / "added_tokens.json").write_text('{"<x>": 300}')
    with pytest.warns(UserWarning, match="'<x>' the id 300; with tokenizer.json it has 258"):
        ours = Tokenizer(folder)
    assert ours.encode("<x>").tolist() == transformers.AutoTokenizer.from_pretrained(folder)("<x>").input_ids


def test_ids_beyond_all_models(tmp_path: Path) -> None:
    written = FastTokenizer(models.WordLevel({"hello": 0}, unk_token="hello")).to_str()
    (tmp_path / "tokenizer.json").write_text(
        written.replace('"hello": 0', f'"hello": {2**31}').replace('":0', f'":{2**31}')
    )
    with pytest.raises(ValueError, match="ids above 2147483647"):
        Tokenizer(tmp_path).encode("hello")


def test_folders_that_have_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"spm")
    (tmp_path / "vocab.txt").write_text("a")
    for reader in (Tokenizer, EncoderTokenizer):
        with pytest.raises(FileNotFoundError, match=r"it has tokenizer.model, vocab.txt.*\.save_pretrained\("):
            reader(tmp_path)


# Encoders


def roberta(folder: Path, prefix: bool) -> Path:
    """A byte-level BPE with RoBERTa's special tokens in its vocabulary."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, "Ġa", "Ġab", "ab", "<mask>"])}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "a"), ("Ġ", "ab")], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True)])
    fast.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, prefix)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": prefix}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_encoders_of_bytes(tmp_path: Path, prefix: bool) -> None:
    folder = roberta(tmp_path, prefix)
    ours, theirs = EncoderTokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.kind == "bytes"
    assert (ours.opening, ours.closing) == (theirs.cls_token_id, theirs.sep_token_id)
    assert (ours.padding, ours.unknown) == (theirs.pad_token_id, theirs.unk_token_id)
    for text in ("", "ab ab  ab\n  ab", "grüße 你好 😀 ab", " ab"):
        encoding = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
        subwords = ours.encode(text)
        assert subwords.ids.tolist() == encoding["input_ids"]
        assert subwords.offsets.tolist() == [list(place) for place in encoding["offset_mapping"]]
        assert sum(ours.count(part) for part in ours.apart(text)) == ours.count(text) == len(subwords.ids)
    written = ours.encode("a</s>b")
    assert not np.isin(written.ids, [0, 1, 2]).any()


def test_special_tokens_of_other_names(tmp_path: Path) -> None:
    folder = roberta(tmp_path, False)
    settings = {"cls_token": "<beg>", "added_tokens_decoder": {"264": flags("<beg>")}, "sep_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert EncoderTokenizer(folder).opening == 264 == read_tokenizer(folder).fast.token_to_id("<beg>")
