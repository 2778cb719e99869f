"""Files that others wrote may hold anything: what is read is a model, or an error that names the file."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.test_tokenizer_files import made, roberta

from jaxcompress.checkpoints import (
    decoder_config,
    encoder_config,
    llava_config,
    load,
    load_encoder,
    load_llava,
    load_policy,
    load_tower,
    tower_config,
)
from jaxcompress.checkpoints._processor import image_processor
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.inputs.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
READERS: dict[str, tuple[Callable[[Any], Any], Callable[[Path], Any], Path]] = {
    "qwen2": (decoder_config, load, FIXTURES / "parity" / "qwen2_mixed"),
    "llama": (decoder_config, load, FIXTURES / "parity" / "llama3_gqa"),
    "mistral": (decoder_config, load, FIXTURES / "parity" / "mistral_sliding"),
    "mixtral": (decoder_config, load, FIXTURES / "parity" / "mixtral"),
    "gpt_oss": (decoder_config, load, FIXTURES / "parity" / "gpt_oss"),
    "yarn": (decoder_config, load, FIXTURES / "parity" / "llama_yarn_mscale"),
    "bert": (encoder_config, load_encoder, FIXTURES / "prompt" / "bert"),
    "xlm-roberta": (encoder_config, load_encoder, FIXTURES / "prompt" / "xlm-roberta"),
    "llava": (llava_config, load_llava, FIXTURES / "vision_models" / "llava_next"),
    "vit": (tower_config, load_tower, FIXTURES / "vision_models" / "vit"),
}
# Entries that a config may have, beside those of the fixtures.
MORE = {
    "head_dim": 8, "sliding_window": 4, "layer_types": None, "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_theta": 1.0, "partial_rotary_factor": 1.0, "tie_word_embeddings": False, "num_labels": 2, "id2label": None,
    "original_max_position_embeddings": 5, "dtype": "float32", "use_sliding_window": True, "max_window_layers": 1,
    "image_grid_pinpoints": None, "quantization_config": None, "pad_token_id": 1, "image_token_index": 3,
}  # fmt: skip
SIMPLE = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.0, math.nan, math.inf, 1e308, 10**12, 2**31 - 1, 10**400, "x", "",
        "8", "\ud800", "default", "full", "bfloat16", "int8", "mistral", "LlamaForCausalLM",
    ]
)  # fmt: skip
VALUES = (
    SIMPLE | st.lists(SIMPLE, max_size=3) | st.dictionaries(st.sampled_from(["a", "0", "type"]), SIMPLE, max_size=2)
)
NO_JSON = {
    "empty": b"", "a list": b"[]", "null": b"null", "cut off": b'{"a": ', "not UTF-8": b'{"\xff": 1}',
    "UTF-16": "{}".encode("utf-16"), "deep": b'{"a":' * 10_000, "deep lists": b"[" * 100_000,
    "many digits": b'{"a": ' + b"1" * 5000 + b"}",
}  # fmt: skip


def answers(read: Callable[..., Any], *given: Any, says: str = "") -> bool:
    """Whether something was read; else the error is of a promised kind, and its message has `says` in it."""
    try:
        read(*given)
    except (ValueError, FileNotFoundError) as error:
        told = str(error)
    else:
        return True
    assert says in told
    return False


def places(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a JSON object may be changed: everywhere but within a vocabulary."""
    yield at
    if isinstance(value, dict) and at[-1:] != ("vocab",):
        for key in value:
            yield from places(value[key], (*at, key))


def put(value: Any, at: tuple[str, ...], new: Any) -> Any:
    return {**value, at[0]: put(value.get(at[0]) or {}, at[1:], new)} if at else new


def config_of(name: str) -> dict[str, Any]:
    return json.loads((READERS[name][2] / "config.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {name: shutil.copytree(source, root / name) for name, (_, _, source) in READERS.items()}


# config.json


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=150)
@given(data=st.data())
def test_any_entries_of_a_config(name: str, data: st.DataObject) -> None:
    config = {**MORE, **config_of(name)}
    at = data.draw(st.sampled_from([at for at in places(config) if at]))
    answers(READERS[name][0], put(config, at, data.draw(VALUES)))


@pytest.mark.parametrize("name", READERS)
def test_absurd_sizes_cost_no_memory(folders: dict[str, Path], name: str) -> None:
    """Each size of a config, against files that have another."""
    folder, config = folders[name], config_of(name)
    weights = (folder / "model.safetensors").stat().st_size
    part = ("text_config",) if name == "llava" else ()
    sizes = [key for key in (config[part[0]] if part else config) if key in SIZES]
    assert len(sizes) >= 5
    tracemalloc.start()
    for key, value in itertools.product(sizes, [10**12, 2**31 - 1, 10**6, 9999, 0, -1, 1.5, "8", True]):
        (folder / "config.json").write_text(json.dumps(put(config, (*part, key), value)))
        tracemalloc.reset_peak()
        assert not answers(READERS[name][1], folder, says=str(folder)), (key, value)
        assert tracemalloc.get_traced_memory()[1] < 2 * weights + 2**23, (key, value)
    tracemalloc.stop()


SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "type_vocab_size", "image_size", "patch_size", "num_channels",
}  # fmt: skip


@pytest.mark.parametrize("what", NO_JSON)
@pytest.mark.parametrize("name", ["llama", "bert", "llava", "vit"])
def test_a_config_that_is_none(folders: dict[str, Path], name: str, what: str) -> None:
    (folders[name] / "config.json").write_bytes(NO_JSON[what])
    assert not answers(READERS[name][1], folders[name], says="config.json")


def test_a_byte_order_mark_and_an_entry_twice(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    twice = json.dumps(config_of("llama"))[:-1] + ', "vocab_size": 5, "vocab_size": 97}'
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + twice.encode())
    assert load(folder).config.vocab_size == 97


@pytest.mark.parametrize("dtype", [1, "8", ["float32"], {"a": 1}, "int8", 1e999])
def test_a_dtype_that_is_none(folders: dict[str, Path], dtype: Any) -> None:
    (folders["llama"] / "config.json").write_text(json.dumps(config_of("llama") | {"dtype": dtype}))
    assert not answers(load, folders["llama"], says="config.json: dtype must be")


# Weights


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


WRONG = [
    ("dtype", "F8_E4M3"), ("dtype", "I8"), ("dtype", "F64"), ("dtype", 3), ("shape", []), ("shape", [0]),
    ("shape", [2**62, 4]), ("shape", [-1]), ("shape", [2**70]), ("shape", "x"), ("shape", [1] * 10_000),
    ("data_offsets", [0, 0]), ("data_offsets", [10, 5]), ("data_offsets", [-1, 4]), ("data_offsets", [0, 2**63]),
    ("data_offsets", [2**64, 2**65]), ("data_offsets", [0]), ("data_offsets", None),
]  # fmt: skip


def test_headers_of_safetensors(folders: dict[str, Path]) -> None:
    """Lengths, shapes and offsets that are outside of the file, overlap, or are absurd."""
    folder = folders["qwen2"]
    header, body = parts(READERS["qwen2"][2])
    tensor = "model.layers.0.mlp.up_proj.weight"
    cases = [b"", b"\0" * 8, b"\xff" * 64, packed({}, b""), packed({}, body), packed(b"[" * 100_000, body)]
    cases += [packed(header, body, length) for length in (1, 10**8 + 1, 2**40, 2**63)]
    cases += [packed(header, body[:-1]), packed(header, body + b"x"), packed(b"null", body)]
    cases += [packed(put(header, (tensor, field), value), body) for field, value in WRONG]
    cases += [packed({name: entry for name, entry in header.items() if name != tensor}, body)]
    for content in cases:
        (folder / "model.safetensors").write_bytes(content)
        assert not answers(load, folder, says=str(folder)), content[:200]


@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_in_a_header(folders: dict[str, Path], places: list[tuple[float, int]]) -> None:
    data = bytearray((READERS["mistral"][2] / "model.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for at, byte in places:
        data[int(at * end)] = byte
    (folders["mistral"] / "config.json").write_text(json.dumps(config_of("mistral")))
    (folders["mistral"] / "model.safetensors").write_bytes(data)
    answers(load, folders["mistral"], says=str(folders["mistral"]))


def test_indices(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, index = (
        shutil.copytree(READERS["llama"][2], tmp_path / "m"),
        tmp_path / "m" / "model.safetensors.index.json",
    )
    whole = (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(whole, tmp_path / "b.safetensors")
    names = list(parts(READERS["llama"][2])[0])
    maps = [
        None, [], 3, {"a": 3}, {"a": None}, {"a": "../b.safetensors"}, {"a": str(whole.absolute())}, {"a": "."},
        {"a": ""}, {"a": "x" * 5000}, {"a": "\0"}, {"a": "\ud800"}, {"a": "none"}, {"a": "config.json"}, {},
    ]  # fmt: skip
    for where in maps:
        index.write_text(json.dumps({"weight_map": where}))
        assert not answers(load, folder, says=str(folder)), where
    for content in NO_JSON.values():
        index.write_bytes(content)
        assert not answers(load, folder, says="index.json")
    # Of a tensor that two files hold, the one that the index names counts; what is in neither index nor model is named.
    shutil.copy(whole, folder / "c.safetensors")
    index.write_text(json.dumps({"weight_map": {name: "ac"[i % 2] + ".safetensors" for i, name in enumerate(names)}}))
    assert answers(load, folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "a.safetensors", names[1]: "c.safetensors"}}))
    assert not answers(load, folder, says="two tensors")


# Text, pictures, policies


def of_text(folder: Path, encoder: bool) -> Path:
    roberta(folder, False) if encoder else made(folder, "chat_list")
    for name, content in {
        "added_tokens.json": {"<x>": 264 if encoder else 258}, "special_tokens_map.json": {"cls_token": "<s>"},
        "generation_config.json": {"eos_token_id": [1, 2], "pad_token_id": 0, "bos_token_id": 1},
        "chat_template.json": {"chat_template": "{{ messages }}"},
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {encoder: of_text(tmp_path_factory.mktemp("text"), encoder) for encoder in (True, False)}


def speak(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    if tokenizer.has_chat_template:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.filterwarnings("ignore:.*gives the token")
@pytest.mark.parametrize("encoder", [True, False])
@settings(max_examples=100)
@given(data=st.data())
def test_any_entries_of_a_tokenizer(texts: dict[bool, Path], encoder: bool, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(texts[encoder].glob("*.json"))))
    whole = path.read_text()
    content = json.loads(whole)
    at = data.draw(st.sampled_from(list(places(content))))
    path.write_text(json.dumps(put(content, at, data.draw(VALUES))))
    try:
        answers(EncoderTokenizer if encoder else speak, texts[encoder])
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("what", NO_JSON)
def test_files_of_a_tokenizer_that_are_none(texts: dict[bool, Path], what: str) -> None:
    for name in ("tokenizer", "tokenizer_config", "generation_config", "added_tokens", "special_tokens_map"):
        path = texts[False] / f"{name}.json"
        whole = path.read_bytes()
        path.write_bytes(NO_JSON[what])
        assert not answers(speak, texts[False], says=path.name)
        path.write_bytes(whole)


PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 36}, "do_resize": True, "resample": 3,
    "crop_size": {"height": 36, "width": 36}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 0.1,
}  # fmt: skip


@given(data=st.data())
def test_any_entries_of_an_image_processor(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    at = data.draw(st.sampled_from(list(places(PROCESSOR))))
    (folder / "preprocessor_config.json").write_text(json.dumps(put(PROCESSOR, at, data.draw(VALUES))))
    answers(image_processor, folder, says="preprocessor_config.json")


def test_image_processors_that_are_none(tmp_path: Path) -> None:
    assert not answers(image_processor, tmp_path, says="has no preprocessor_config.json")
    for content in [*NO_JSON.values(), b'{"image_processor_type": "Nobody"}', b"{}"]:
        (tmp_path / "preprocessor_config.json").write_bytes(content)
        assert not answers(image_processor, tmp_path, says="preprocessor_config.json")


@pytest.mark.parametrize("what", NO_JSON)
def test_a_policy_that_is_none(tmp_path: Path, what: str) -> None:
    (tmp_path / "policy.json").write_bytes(NO_JSON[what])
    assert not answers(load_policy, tmp_path, says="policy.json")
