"""GGUF files: the same decoder as from safetensors, and what is said of files that are none."""

from __future__ import annotations

import itertools
import struct
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

gguf = pytest.importorskip("gguf")

from jaxcompress.checkpoints import KNOWN_MODELS, load, save  # noqa: E402
from jaxcompress.checkpoints._gguf import read_gguf  # noqa: E402
from jaxcompress.checkpoints._gguf_config import _llama3  # noqa: E402
from jaxcompress.cli import main  # noqa: E402
from jaxcompress.models.rope import RopeConfig  # noqa: E402

from .folders import NAMES, PARITY, assert_same_bits, tensors_of  # noqa: E402
from .gguf_files import KINDS, dequantised, llama3_factors, write  # noqa: E402
from .test_any_bytes import answers  # noqa: E402

# GGUF has no word for `truncate`, which this one has as false.
FOLDERS_ONLY = ("neox", "gemma", "phi3", "olmo", "smollm3", "mixtral", "qwen3_moe", "gpt_oss")
CONVERTIBLE = [
    name for name in NAMES if name not in ("llama_yarn_mscale", "llama_dynamic") and not name.startswith(FOLDERS_ONLY)
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "llama.gguf", "llama3_gqa")


# The same model


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_fixture_is_the_same_model(tmp_path: Path, name: str) -> None:
    found = load(write(tmp_path / "m.gguf", name))
    other = load(PARITY / name)
    assert found.config == other.config
    assert_same_bits(found.model, other.model)


@pytest.mark.parametrize("name", ["llama3_gqa", "qwen2_mixed"])
def test_logits_are_those_of_pytorch(tmp_path: Path, name: str) -> None:
    with np.load(PARITY / name / "io.npz") as file:
        tokens, logits = file["tokens"], file["logits"]
    model = load(write(tmp_path / "m.gguf", name)).model
    np.testing.assert_allclose(model(jnp.asarray(tokens)), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
@pytest.mark.parametrize("name", ["llama3_gqa", "qwen2"])
def test_quantised_weights_are_those_of_the_package(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / "m.gguf", name, KINDS[kind])
    folder = dequantised(tmp_path / "m", path, name)
    for dtype in ("float32", "bfloat16"):
        assert_same_bits(load(path, dtype=dtype).model, load(folder, dtype=dtype).model)
    assert load(path).settings["dtype"] == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")


BLOCKS = [kind for kind in KINDS if kind in gguf.quants._type_traits and gguf.GGML_QUANT_SIZES[kind][0] <= 256]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_of_every_kind(tmp_path: Path, kind: KINDS) -> None:
    """Any bytes, since the package writes few of these: whole, by part, and back in order, as it reads them."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {
        "block_count": 1,
        "embedding_length": 256,
        "feed_forward_length": 256,
        "context_length": 8,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    # Without the second highest bit no scale, float16 or float8, is infinite or NaN.
    some = lambda rows: rng.integers(0, 256, (rows, 256 // numbers * size), np.uint8) & 0xBF
    rows = dict(attn_q=256, attn_k=128, attn_v=128, attn_output=256, ffn_gate=256, ffn_up=256, ffn_down=256)
    whole = {"token_embd": some(24)} | {f"blk.0.{name}": some(count) for name, count in rows.items()}
    for name, data in whole.items():
        writer.add_tensor(name + ".weight", data, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(name + ".weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    with np.errstate(all="ignore"):
        for name, data in whole.items():
            expected, tensor = gguf.dequantize(data, kind), tensors[name + ".weight"]
            if (heads := {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(name)) is not None:
                expected = expected.reshape(heads, 32, 2, 256).swapaxes(1, 2).reshape(expected.shape)
            np.testing.assert_array_equal(tensor[(slice(None), slice(None))], expected)
            np.testing.assert_array_equal(tensor[(slice(3, 20, 5), slice(32, 200))], expected[3:20:5, 32:200])


def test_parts_for_devices(llama: Path) -> None:
    """Each device reads its own part, which for a llama's queries is not in one piece."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    assert_same_bits(load(llama, sharding=sharding).model, load(PARITY / "llama3_gqa").model)
    query = read_gguf(llama).tensors["blk.0.attn_q.weight"]
    whole = query[(slice(None), slice(None))]
    np.testing.assert_array_equal(query[(slice(5, 20), slice(3, 9))], whole[5:20, 3:9])


# What the metadata says


WINDOW = "attention.sliding_window"
CONTEXT = "original_max_position_embeddings"


def rope(**changes: Any) -> dict[str, Any]:
    usual = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, CONTEXT: 8192}
    return {"rope_type": "llama3", "rope_theta": 500000.0, **usual, **changes}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_of_llama3(tmp_path: Path, factor: float) -> None:
    """Llama 3's files have the factors, and no settings."""
    settings = rope(factor=factor)
    path = write(tmp_path / "m.gguf", "llama3_gqa", config={"rope_parameters": settings})
    path.write_bytes(path.read_bytes().replace(b"original_context_length", b"original_context_ignore"))
    assert load(path).config.rope == RopeConfig(500000.0, "llama3", factor, 8192)


@pytest.mark.parametrize("changes", [{"low_freq_factor": 1.5, "high_freq_factor": 6.0}, {CONTEXT: 4096}])
def test_other_settings_that_have_the_same_factors(changes: dict[str, Any]) -> None:
    wanted = rope(factor=16.0, **changes)
    factors = llama3_factors(wanted, 128)
    found = _llama3(500000.0, 128, factors, None)
    assert found[CONTEXT] == 8192
    np.testing.assert_allclose(llama3_factors({"rope_theta": 500000.0, **found}, 128), factors, rtol=1e-5)


@pytest.mark.parametrize("factors", [np.linspace(1, 8, 64), np.full(64, np.nan), np.ones(63), -np.ones(64)])
def test_factors_of_no_known_scaling(factors: np.ndarray) -> None:
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        _llama3(500000.0, 128, factors.astype(np.float32), None)


def test_factor_on_attention(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama_yarn", metadata={"llama.rope.scaling.attn_factor": 2.0})
    usual = load(PARITY / "llama_yarn").config
    implied = usual.rope.frequencies(8)[1]
    assert load(path).config == replace(usual, rope=replace(usual.rope, attention_factor=2.0 * implied))


@pytest.mark.parametrize("kind", [None, "linear"])
def test_linear_scaling_of_older_files(tmp_path: Path, kind: str | None) -> None:
    said = {"llama.rope.scale_linear": 4.0} | ({} if kind is None else {"llama.rope.scaling.type": kind})
    path = write(tmp_path / "m.gguf", "llama_tied", metadata=said)
    usual = load(PARITY / "llama_tied").config
    assert usual.rope.kind == "default"
    assert load(path).config == replace(usual, rope=replace(usual.rope, kind="linear", factor=4.0))
    newer = write(tmp_path / "n.gguf", "llama_tied", metadata=said | {"llama.rope.scaling.factor": 2.0})
    assert load(newer).config.rope.factor == 2.0


def test_every_nth_layer_is_full(tmp_path: Path) -> None:
    config = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    path = write(tmp_path / "m.gguf", "qwen2_mixed", config=config)
    assert load(path).config.sliding == (5, 5, None)


@pytest.mark.parametrize(
    ("name", "metadata", "why"),
    [
        ("llama3_gqa", {"llama.expert_count": 8}, "llama.expert_count is 8"),
        ("llama3_gqa", {"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ("llama3_gqa", {"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope'"),
        ("llama3_gqa", {"llama.rope.scaling.type": "linear"}, "rope_freqs.weight beside it"),
        ("llama_tied", {f"llama.{WINDOW}": 4, f"llama.{WINDOW}_pattern": 2}, "in some layers"),
        ("qwen2", {f"qwen2.{WINDOW}": 4, f"qwen2.{WINDOW}_pattern": [True]}, "has 1 entries"),
        ("qwen2", {"split.count": 3}, "one of 3 files"),
    ],
)  # fmt: skip
def test_what_is_not_known(tmp_path: Path, name: str, metadata: dict[str, Any], why: str) -> None:
    path = write(tmp_path / "m.gguf", name, metadata=metadata)
    assert not answers(load, path, says=why)
    assert not answers(load, path, says=str(path))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    tensors = tensors_of("qwen2")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    path = write(tmp_path / "m.gguf", "qwen2", tensors=tensors)
    assert not answers(load, path, says="do not fit its metadata:\n  missing: blk.1.ffn_up.weight")
    huge = write(tmp_path / "huge.gguf", "qwen2", config={"intermediate_size": 2**31 - 1})
    assert not answers(load, huge, says="fewer than it takes for intermediate_size")


# Around it


@pytest.fixture
def words() -> dict[str, Any]:
    """The metadata of a tokenizer of three words and two marks."""
    marks = {"eos_token_id": 3, "bos_token_id": 4, "add_bos_token": True, "token_type": [1, 1, 1, 3, 3]}
    tokens = ["a", "b", "ab", "<|im_end|>", "<|endoftext|>"]
    of_text = {"model": "gpt2", "pre": "qwen2", "merges": ["a b"], "tokens": tokens, **marks}
    chat = {"tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>"}
    return chat | {f"tokenizer.ggml.{key}": value for key, value in of_text.items()}


def test_saved_as_a_folder(tmp_path: Path, words: dict[str, Any]) -> None:
    words["tokenizer.chat_template.tool_use"] = "{{ tools[0] }}"
    path = write(tmp_path / "m.gguf", "qwen2", KINDS.Q8_0, metadata=words)
    found = load(path)
    again = load(save(found.model, tmp_path / "folder", tokenizer_from=found.folder))
    assert_same_bits(found.model, again.model)
    assert (found.config, found.policy) == (again.config, again.policy)
    assert again.settings["eos_token_id"] == [3, 4]
    for tokenizer in (found.tokenizer, again.tokenizer):
        assert tokenizer.eos_ids == (3, 4)
        assert tokenizer.bos_id == 4
        assert tokenizer.encode("abb<|im_end|>").tolist() == [4, 2, 1, 3]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}]) == "a<|im_end|>"
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tools=["look"]) == "look"


def test_known_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not answers(load, "smollm2", says="python experiments/real_model.py --fetch")
    path = KNOWN_MODELS["smollm2"].path
    path.parent.mkdir(parents=True)
    write(path, "llama_tied")
    assert load("smollm2").folder == path


def test_paths(tmp_path: Path, llama: Path) -> None:
    assert not answers(load, "none.gguf", says="there is no file none.gguf")
    (tmp_path / "config.json").write_text((PARITY / "qwen2" / "config.json").read_text())
    (tmp_path / "a.gguf").write_bytes(llama.read_bytes())
    assert not answers(load, tmp_path, says=f"by its own path, {tmp_path / 'a.gguf'}")


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "jaxcompress\[gguf\]"'):
        load(llama)


# Any bytes


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def header(*entries: bytes, tensors: int = 0, count: int | None = None, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(tensors) + u64(len(entries) if count is None else count) + b"".join(entries)


def tensor(*shape: int, kind: int = 0, start: int = 0) -> bytes:
    return text(b"t") + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(start)


ARCHITECTURE = text(b"general.architecture") + u32(8) + text(b"llama")
TENSOR = tensor(32)
CASES = {
    "empty": (b"", "empty"),
    "another format": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "one byte": (b"G", "not a GGUF file"),
    "magic alone": (b"GGUF", "cut off"),
    "first version": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "no architecture": (header(), "general.architecture"),
    "another architecture": (header(ARCHITECTURE.replace(b"llama", b"gemma")), "unknown architecture 'gemma'"),
    "nothing but the architecture": (header(ARCHITECTURE), "embedding_length"),
    "entries without end": (header(ARCHITECTURE, count=2**60), "number of entries"),
    "more entries than there are": (header(ARCHITECTURE, count=9), "cut off"),
    "tensors without end": (header(ARCHITECTURE, tensors=2**60), "number of tensors"),
    "more tensors than there are": (header(ARCHITECTURE, tensors=9), "cut off"),
    "a long string": (header(text(b"a") + u32(8) + u64(2**63)), "the length of 'a'"),
    "a longer string than the file": (header(text(b"a") + u32(8) + u64(2**20)), "cut off"),
    "a long array": (header(text(b"a") + u32(9) + u32(4) + u64(2**61)), "cut off"),
    "many strings": (header(text(b"a") + u32(9) + u32(8) + u64(2**40)), "list of 1,099,511,627,776"),
    "more strings than there are": (header(text(b"a") + u32(9) + u32(8) + u64(9)), "cut off"),
    "arrays of arrays": (header(text(b"a") + u32(9) + (u32(9) + u64(1)) * 50), "within many others"),
    "an unknown type of value": (header(text(b"a") + u32(13)), "unknown type, 13"),
    "not UTF-8": (header(text(b"a") + u32(8) + text(b"\xff")), "not UTF-8"),
    "a key not UTF-8": (header(text(b"\xff") + u32(8) + text(b"a")), "not UTF-8"),
    "a token not UTF-8": (header(text(b"a") + u32(9) + u32(8) + u64(1) + text(b"\xff")), "not UTF-8"),
    "a key twice": (header(ARCHITECTURE, ARCHITECTURE), "there twice"),
    "no alignment": (header(text(b"general.alignment") + u32(4) + u32(0)), "power of two"),
    "another type of architecture": (header(text(b"general.architecture") + u32(4) + u32(0)), "must be a string"),
    "many axes": (header(ARCHITECTURE, tensors=1) + text(b"t") + u32(9), "number of axes"),
    "a tensor twice": (header(ARCHITECTURE, tensors=2) + TENSOR * 2, "there twice"),
    "an unknown type of tensor": (header(tensors=1) + tensor(1, kind=99), "unknown type, 99"),
    "half a block": (header(tensors=1) + tensor(33, kind=2), "blocks of 32"),
    "a large tensor": (header(tensors=1) + tensor(2**62, 2**62), "cut off"),
    "a far tensor": (header(tensors=1) + tensor(1, start=2**63), "cut off"),
    "tensors that overlap": (header(tensors=2) + TENSOR + TENSOR.replace(b"t", b"s") + bytes(300), "overlap"),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_files_that_are_none(tmp_path: Path, what: str) -> None:
    content, why = CASES[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    assert not answers(load, path, says=why)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert not answers(load, path, says=str(path))


def test_cut_off_anywhere(tmp_path: Path, llama: Path) -> None:
    data, path = llama.read_bytes(), tmp_path / "m.gguf"
    for end in itertools.chain(range(0, 2000, 97), range(2000, len(data), 4001)):
        path.write_bytes(data[:end])
        assert not answers(load, path, says=str(path))


@given(data=st.binary(max_size=200), begins=st.booleans())
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, begins: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes((b"GGUF" + u32(3) if begins else b"") + data)
    assert not answers(load, path, says=str(path))


SIZES = [2**63, 2**64 - 1, 2**40, 2**31, 10**6, 0, 1, 3, 200]


@settings(max_examples=200)
@given(data=st.data())
def test_any_bytes_in_a_header(tmp_path_factory: pytest.TempPathFactory, llama: Path, data: st.DataObject) -> None:
    """Bytes, or eight at once, which may be a count or a length."""
    content = bytearray(llama.read_bytes())
    end = read_end(llama)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 9))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            content[at : at + 8] = u64(data.draw(st.sampled_from(SIZES)))
    path = tmp_path_factory.getbasetemp() / "header.gguf"
    path.write_bytes(content)
    answers(load, path, says=str(path))


def read_end(path: Path) -> int:
    return min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)


# The command line


def test_a_command_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: dict[str, Any]) -> None:
    path = write(tmp_path / "m.gguf", "qwen2", metadata=words)
    given = ("--prompt", "abb", "--policy", "full", "--slots", "8", "--max-new-tokens", "2")
    assert main(("generate", "--model", str(path), *given)) == 0
    (tmp_path / "none.gguf").write_bytes(path.read_bytes()[:999])
    capsys.readouterr()
    assert main(("generate", "--model", str(tmp_path / "none.gguf"), *given)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_path / "none.gguf") in said
