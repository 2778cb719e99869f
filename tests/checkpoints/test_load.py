"""Loading: parity with PyTorch, configs, and what is said when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxcompress.checkpoints import decoder_config, load, save
from jaxcompress.models.rope import RopeConfig

from .folders import NAMES, PARITY, ROOT, assert_same_bits, changed, split, tensors_of

MINIMAL = dict(vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4)


def raw(architecture: str = "LlamaForCausalLM", **entries: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **MINIMAL, **entries}


def io(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(PARITY / name / "io.npz") as file:
        return file["tokens"], file["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_pytorch(name: str) -> None:
    tokens, logits = io(name)
    np.testing.assert_allclose(load(PARITY / name).model(jnp.asarray(tokens)), logits, atol=1e-4, rtol=0)


PLAIN_ROPE: dict[str, Any] = dict(rope=RopeConfig(theta=100.0), layer_ropes=())


@pytest.mark.parametrize(
    ("name", "without"),
    [
        *[
            (name, PLAIN_ROPE | dict(sliding=()))
            for name in ("llama3_gqa", "llama_linear", "llama_yarn", "mistral_sliding", "qwen2_mixed")
        ],
        ("neox", dict(parallel=False)),
        ("neox_serial", dict(activation="silu")),
        ("gemma2", dict(softcap=None)),
        ("gemma2", dict(logit_softcap=None)),
        ("gemma2", dict(query_pre_attn_scalar=None)),
        ("gemma2", dict(sliding=())),
        ("gemma3", dict(layer_ropes=())),
        ("phi3_long", dict(sliding=())),
        ("phi3_long", PLAIN_ROPE | dict(rope=RopeConfig(theta=100.0, partial=0.75))),
        ("smollm3", dict(layer_ropes=())),
        ("smollm3", dict(sliding=())),
        ("mixtral", dict(sliding=())),
        ("gpt_oss", dict(sinks=False)),
        ("gpt_oss", PLAIN_ROPE | dict(sliding=())),
    ],
    ids=str,
)
def test_fixtures_depend_on_what_they_are_there_for(name: str, without: dict[str, Any]) -> None:
    tokens, logits = io(name)
    model = load(PARITY / name).model
    model.config = replace(model.config, **without)
    assert np.abs(model(jnp.asarray(tokens)) - logits).max() > 0.05


def test_longrope_chooses_its_factors_by_the_context() -> None:
    """transformers looks at the length of each text; here one choice serves all, since cached keys stay as they are."""
    tokens, logits = io("phi3_short")  # read by transformers within its original context of 32 tokens
    short = load(PARITY / "phi3_short").model
    assert (short.config.rope.context, short.config.rope.original_context) == (32, 32)
    short.config = replace(short.config, rope=replace(short.config.rope, context=33))
    assert np.abs(short(jnp.asarray(tokens)) - logits).max() > 0.05


@pytest.mark.parametrize("answer", json.loads((PARITY / "rope.json").read_text()))
def test_rope_frequencies_are_those_of_transformers(answer: dict[str, Any]) -> None:
    config = decoder_config(answer["config"])
    rope = replace(config.rope, context=answer["length"]) if "length" in answer else config.rope
    frequencies, factor = rope.frequencies(config.head_dim)
    np.testing.assert_allclose(frequencies, answer["frequencies"], rtol=1e-6)
    assert factor == pytest.approx(answer["factor"], rel=1e-12)


# Configs


def test_old_and_new_layout_of_rope_mean_the_same() -> None:
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    old = raw(rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **scaling}, max_position_embeddings=131072)
    oldest = old | {"rope_scaling": {"type": "llama3", **scaling}}
    new = raw(
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling}, max_position_embeddings=131072
    )
    assert decoder_config(old) == decoder_config(oldest) == decoder_config(new)
    assert decoder_config(new).rope.theta == 500000.0


def test_original_context_is_the_full_one_unless_given() -> None:
    rope = dict(rope_type="yarn", factor=2.0)
    assert decoder_config(raw(rope_parameters=rope, max_position_embeddings=640)).rope.original_context == 640


def test_missing_entries_are_what_transformers_takes_them_for() -> None:
    llama = decoder_config(raw())
    assert (llama.head_dim, llama.num_kv_heads, llama.rope.theta, llama.norm_eps) == (8, 4, 10000.0, 1e-6)
    assert decoder_config(raw(head_dim=None, num_key_value_heads=None)) == llama
    assert decoder_config(raw(head_dim=16)).head_dim == 16
    assert decoder_config(raw("Qwen3ForCausalLM", num_key_value_heads=2)).head_dim == 128
    by_type = {k: v for k, v in raw(model_type="llama").items() if k != "architectures"}
    assert decoder_config(by_type) == llama


def test_biases_by_architecture() -> None:
    kv = dict(num_key_value_heads=2)
    biases = lambda config: (config.qkv_bias, config.out_bias, config.mlp_bias)
    assert biases(decoder_config(raw(attention_bias=True, mlp_bias=True))) == (True, True, True)
    assert biases(decoder_config(raw("MistralForCausalLM", attention_bias=True, **kv))) == (False, False, False)
    assert biases(decoder_config(raw("Qwen2ForCausalLM", **kv))) == (True, False, False)
    assert biases(decoder_config(raw("Qwen3ForCausalLM", attention_bias=True, **kv))) == (True, True, False)


def test_sliding_layers() -> None:
    mistral = lambda **e: decoder_config(raw("MistralForCausalLM", num_key_value_heads=2, **e)).sliding
    qwen = lambda **e: decoder_config(raw("Qwen2ForCausalLM", num_key_value_heads=2, sliding_window=9, **e)).sliding
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert mistral(sliding_window=9) == (9, 9, 9, 9)
    assert mistral() == (4096,) * 4
    assert mistral(sliding_window=None) == ()
    assert qwen(max_window_layers=1) == ()
    assert qwen(use_sliding_window=True) == ()
    assert qwen(use_sliding_window=True, max_window_layers=1) == (None, 9, 9, 9)
    assert qwen(use_sliding_window=True, layer_types=types) == (9, None, 9, None)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (dict(architectures=["GPT2LMHeadModel"]), ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        (dict(rope_scaling=dict(type="axial")), ["axial", "default, linear, dynamic, llama3, yarn, longrope"]),
        (dict(rope_parameters=dict(rope_type="longrope")), ["longrope", "short_factor, long_factor"]),
        (dict(rope_parameters=dict(rope_type="longrope", short_factor=[1], long_factor=[1, 2])), ["1 numbers for 4"]),
        (dict(rope_parameters=dict(rope_type="longrope", short_factor=[0], long_factor=1)), ["short_factor", "0"]),
        (dict(rope_scaling=dict(type="dynamic")), ["dynamic", "factor"]),
        (dict(rope_parameters=dict(rope_type="linear")), ["linear", "factor"]),
        (dict(rope_parameters=dict(rope_type="llama3", factor=2.0)), ["low_freq_factor", "high_freq_factor"]),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1.0))), ["by layer type", "full_attention"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor", "0.5"]),
        (dict(hidden_act="relu"), ["relu", "silu", "gelu_pytorch_tanh"]),
        (dict(architectures=["Gemma2ForCausalLM"], use_bidirectional_attention=True), ["use_bidirectional_attention"]),
        (dict(architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1]), ["no_rope_layers", "1 entries for 4 layers"]),
        (dict(architectures=["SmolLM3ForCausalLM"], no_rope_layers=[2] * 4), ["no_rope_layers", "0 (no RoPE)"]),
        (dict(architectures=["GPTNeoXForCausalLM"], rotary_pct=0.1), ["rotates no even number", "8 channels"]),
        (dict(vocab_size=None, hidden_size=None), ["vocab_size, hidden_size"]),
        (dict(quantization_config=dict(quant_method="gptq")), ["quantised"]),
    ],
)
def test_what_the_decoder_does_not_have_is_refused(entries: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        decoder_config(raw() | entries)
    assert all(word in str(error.value) for word in words)


def test_layer_types_that_make_no_sense_are_refused() -> None:
    qwen = raw("Qwen2ForCausalLM", num_key_value_heads=2)
    with pytest.raises(ValueError, match="chunked_attention.*full_attention"):
        decoder_config(qwen | dict(layer_types=["chunked_attention"] * 4))
    with pytest.raises(ValueError, match="use_sliding_window is false"):
        decoder_config(qwen | dict(layer_types=["sliding_attention"] * 4))


# Folders


def test_what_comes_with_the_model() -> None:
    loaded = load(str(PARITY / "qwen3"))
    assert loaded.config is loaded.model.config
    assert loaded.folder == PARITY / "qwen3"
    assert loaded.settings["transformers_version"] == "5.23.0"


@pytest.mark.parametrize("source", ["/no/such/folder", "./no_such_folder", "a/b/c", Path("no_such_folder")])
def test_missing_folder(source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(source)


def test_folder_without_config_or_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load(tmp_path)
    shutil.copy(PARITY / "qwen2" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json$"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="it has pytorch_model.bin"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path)


def test_several_files(tmp_path: Path) -> None:
    folder = changed(tmp_path / "split", "qwen2")
    split(folder, files=3)
    assert_same_bits(load(folder).model, load(PARITY / "qwen2").model)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks files .*: model-00002-of-00003.safetensors"):
        load(folder)


def test_damaged_file(tmp_path: Path) -> None:
    folder = changed(tmp_path / "damaged", "qwen2")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file, or damaged"):
        load(folder)


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((24, 32), np.float32)
        tensors["score.weight"] = np.zeros(3, np.float32)
        up = tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.ascontiguousarray(up.T)
        tensors["lm_head.weight"] = np.zeros((97, 32), np.int8)

    with pytest.raises(ValueError) as error:
        load(changed(tmp_path / "spoilt", "qwen2", tensors=spoil))
    _, missing, surplus, shape, kind = str(error.value).splitlines()
    assert missing.split(": ")[1].split(", ") == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    assert surplus.split(": ")[1].split(", ") == ["model.layers.7.mlp.up_proj.weight", "score.weight"]
    assert shape.endswith("model.layers.0.mlp.up_proj.weight [32, 24], not [24, 32]")
    assert kind.endswith("lm_head.weight (I8)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.self_attn.k_proj.bias"][3] = value
        tensors["model.embed_tokens.weight"][5, 6] = value

    with pytest.raises(
        ValueError, match=r"not finite as float32: model.embed_tokens.weight, model.layers.1[\w.]*bias$"
    ):
        load(changed(tmp_path / "spoilt", "qwen2", tensors=spoil))


def test_overflow_of_a_narrow_dtype_is_named(tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][0] = 1e6

    folder = changed(tmp_path / "large", "qwen2", tensors=enlarge)
    with pytest.raises(ValueError, match="not finite as float16: model.norm.weight"):
        load(folder, dtype=jnp.float16)


# The output projection: what the files hold counts

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def heads(tensors: dict[str, np.ndarray], scale: float) -> None:
    tensors[HEAD] = tensors[EMBEDDING] * np.float32(scale)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)


@pytest.mark.parametrize("files", [1, 2, 5])
@pytest.mark.parametrize("tie", [True, False, None])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_head_in_the_files_is_used(tmp_path: Path, scale: int, tie: bool | None, files: int) -> None:
    """None: config.json is silent, and Llama's default is not tied."""
    folder = changed(
        tmp_path / "own",
        "llama_tied",
        config=dict(tie_word_embeddings=tie),
        tensors=lambda tensors: heads(tensors, scale),
    )
    if files > 1:
        split(folder, files)
    model = load(folder).model
    assert model.config.tied == (scale == 1 and bool(tie))
    if not model.config.tied:
        np.testing.assert_array_equal(model.head, scale * tensors_of("llama_tied")[EMBEDDING].T)
    again = load(save(model, tmp_path / "saved", tokenizer_from=None))
    assert again.config == model.config
    assert_same_bits(again.model, model)


def test_a_head_that_is_the_embedding_is_left_out(tmp_path: Path) -> None:
    expected = load(PARITY / "llama_tied").model
    twice = changed(tmp_path / "twice", "llama_tied", tensors=lambda tensors: heads(tensors, 1))
    assert_same_bits(load(twice).model, expected)
    alone = lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)})
    assert_same_bits(load(changed(tmp_path / "alone", "llama_tied", tensors=alone)).model, expected)


def test_heads_are_compared_as_the_model_will_have_them(tmp_path: Path) -> None:
    folder = changed(tmp_path / "near", "llama_tied", tensors=lambda tensors: heads(tensors, 1 + 2.0**-20))
    assert not load(folder).config.tied
    assert load(folder, dtype=jnp.bfloat16).config.tied


@pytest.mark.parametrize(
    "head", [np.zeros((97, 16), np.float32), np.zeros(97, np.float32), np.zeros((97, 32), np.int8)]
)
def test_a_head_that_does_not_fit_is_no_embedding(tmp_path: Path, head: np.ndarray) -> None:
    folder = changed(tmp_path / "odd", "llama_tied", tensors=lambda tensors: tensors.update({HEAD: head}))
    with pytest.raises(ValueError, match=HEAD):
        load(folder)


@pytest.mark.parametrize("name", ["llama_tied", "mistral_sliding", "qwen2", "qwen3"])
@pytest.mark.parametrize("tie", [False, None])
def test_no_head_where_the_config_promises_one(tmp_path: Path, name: str, tie: bool | None) -> None:
    lack = lambda tensors: tensors.pop(HEAD, None)
    with pytest.raises(ValueError, match="(?s)missing: lm_head.weight.*set tie_word_embeddings to true"):
        load(changed(tmp_path / "none", name, config=dict(tie_word_embeddings=tie), tensors=lack))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_silent_config_is_tied_as_transformers_has_it(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    given = {"model_type": kind, **MINIMAL, "num_key_value_heads": 2}
    assert decoder_config(given).tied == transformers.AutoConfig.for_model(**given).tie_word_embeddings


def test_dtype(tmp_path: Path) -> None:
    dtypes = lambda model: {leaf.dtype.name for leaf in jax.tree.leaves(model)}
    old = changed(tmp_path / "old", "qwen2", config=dict(dtype=None, torch_dtype="bfloat16"))
    silent = changed(tmp_path / "silent", "qwen2", config=dict(dtype=None))
    assert dtypes(load(PARITY / "qwen2").model) == {"float32"}
    assert dtypes(load(old).model) == dtypes(load(silent).model) == {"bfloat16"}
    assert dtypes(load(old, dtype="float16").model) == {"float16"}
    assert_same_bits(load(old, dtype=jnp.float32).model, load(PARITY / "qwen2").model)
    with pytest.raises(ValueError, match="not int16"):
        load(old, dtype=jnp.int16)


def test_cast_rounds_as_jax_does() -> None:
    narrow = load(PARITY / "llama2_mha", dtype=jnp.float16).model
    cast = jax.tree.map(lambda x: x.astype(jnp.float16), load(PARITY / "llama2_mha").model)
    assert_same_bits(narrow, cast)


# Devices


def test_sharding_by_name() -> None:
    mesh = jax.make_mesh((2,), ("model",))
    specs = {
        "layers.mlp.up.kernel": (None, None, "model"),
        "layers.mlp.down.kernel": (None, "model"),
        "layers.attention.query.bias": (None, "model"),
        "layers.mlp_norm.scale": ("model",),
        "embedding": (None, "model"),
        "head": ("model",),
    }
    where = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}
    shapes: dict[str, tuple[int, ...]] = {}

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        shapes[name] = shape
        return where.get(name, NamedSharding(mesh, PartitionSpec()))

    model = load(PARITY / "qwen2", sharding=sharding).model
    assert_same_bits(model, load(PARITY / "qwen2").model)
    assert model.layers.mlp.up.kernel[...].sharding == where["layers.mlp.up.kernel"]
    assert model.layers.mlp.up.kernel[...].addressable_shards[0].data.shape == (2, 32, 12)
    assert model.layers.mlp.down.kernel[...].addressable_shards[1].data.shape == (2, 12, 32)
    assert model.layers.mlp_norm.scale[...].addressable_shards[1].data.shape == (1, 32)
    assert model.head[...].addressable_shards[1].data.shape == (16, 97)
    assert shapes["layers.mlp.up.kernel"] == (2, 32, 24)
    assert shapes["head"] == (32, 97)


def test_one_sharding_for_all() -> None:
    whole = NamedSharding(jax.make_mesh((2,), ("model",)), PartitionSpec())
    model = load(PARITY / "qwen3", sharding=whole).model
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(model))
    tokens, logits = io("qwen3")
    np.testing.assert_allclose(model(jax.device_put(tokens, whole)), logits, atol=1e-4, rtol=0)


# The hub

HUB = """
import sys
from jaxcompress.checkpoints import load
print(load("some/model").folder)
assert not {"transformers", "orbax", "torch"} & set(sys.modules)
try:
    load("no/such-model")
except FileNotFoundError as error:
    print(error)
"""


def test_hub(tmp_path: Path) -> None:
    """A repository in the hub's cache, and one that nothing can be fetched of; without a network."""
    cached = tmp_path / "hub" / "models--some--model"
    changed(cached / "snapshots" / "0123", "llama_tied")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    env = os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    run = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found, error = run.stdout.splitlines()
    assert found == str(cached / "snapshots" / "0123")
    assert error.startswith("'no/such-model' is neither a folder nor a .gguf file")
    assert "a repository of the Hugging Face hub" in error


def test_left_over_file_does_not_matter(tmp_path: Path) -> None:
    folder = changed(tmp_path / "both", "qwen2")
    save_file({"x": tensors_of("qwen2")["model.norm.weight"]}, folder / "consolidated.safetensors")
    assert_same_bits(load(folder).model, load(PARITY / "qwen2").model)
