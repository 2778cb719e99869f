"""Saving: what was saved comes back, whole or not at all, and transformers opens it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxcompress.checkpoints import decoder_config, hugging_face_config, load, save
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder

from .folders import NAMES, PARITY, ROOT, assert_same_bits

CONFIG = DecoderConfig(
    vocab_size=17, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4
)


def tiny(**changes: Any) -> Decoder:
    """Filled by numpy: initialising compiles, which takes longer than all else here."""
    abstract = jax.eval_shape(lambda: Decoder(replace(CONFIG, **changes), rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), abstract)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path: Path, name: str, dtype: str) -> None:
    model = load(PARITY / name, dtype=dtype).model
    again = load(save(model, tmp_path / "saved"))
    assert again.config == model.config
    assert_same_bits(again.model, model)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_config(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    wrote = json.loads((PARITY / name / "config.json").read_text())["transformers_version"]
    as_numbers = lambda version: [int(part) for part in version.split(".")[:2]]
    if as_numbers(transformers.__version__) < as_numbers(wrote):
        pytest.skip(f"the fixture was written by transformers {wrote}: older ones misread some of its fields")
    save(load(PARITY / name).model, tmp_path / "saved")
    ours = transformers.AutoConfig.from_pretrained(tmp_path / "saved").to_dict()
    theirs = transformers.AutoConfig.from_pretrained(PARITY / name).to_dict()
    # What says the same in other words (yarn's mscale becomes attention_factor), or nothing about the model.
    free = {"max_window_layers", "rope_parameters", "head_dim", "hidden_act"}
    free |= {"sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval"}  # layer_types says it
    free |= {"initializer_range", "transformers_version", "_name_or_path"}
    free |= {"intermediate_size"} if name.startswith("qwen3_moe") else set()  # of layers without experts
    assert {k: v for k, v in ours.items() if k not in free} == {k: v for k, v in theirs.items() if k not in free}
    assert decoder_config(ours) == decoder_config(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch", reason="transformers runs models with PyTorch, which is not installed")
    transformers = pytest.importorskip("transformers")
    save(load(PARITY / name).model, tmp_path / "saved", shard_bytes=20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    with np.load(PARITY / name / "io.npz") as io, torch.no_grad():
        logits = theirs(torch.from_numpy(io["tokens"]).long()).logits.numpy()
        np.testing.assert_allclose(logits, io["logits"], atol=1e-5, rtol=0)


def test_files(tmp_path: Path) -> None:
    folder = save(tiny(tied=True), tmp_path / "new" / "saved")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_large_models_are_split(tmp_path: Path) -> None:
    model = tiny()
    folder = save(model, tmp_path / "saved", shard_bytes=1000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = {}
    for name in files:
        tensors = load_file(folder / name)
        assert {index["weight_map"][key] for key in tensors} == {name}
        sizes[name] = sum(tensor.nbytes for tensor in tensors.values())
    assert max(sizes.values()) <= 1000
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert_same_bits(load(folder).model, model)


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        (dict(), "LlamaForCausalLM"),
        (dict(qkv_bias=True, out_bias=True, mlp_bias=True), "LlamaForCausalLM"),
        (dict(sliding=(4, 4, 4)), "MistralForCausalLM"),
        (dict(qkv_bias=True), "Qwen2ForCausalLM"),
        (dict(qkv_bias=True, sliding=(4, None, 4)), "Qwen2ForCausalLM"),
        (dict(qk_norm=True, hidden_size=9), "Qwen3ForCausalLM"),
        (dict(qk_norm=True, qkv_bias=True, out_bias=True, sliding=(None, 4, 4)), "Qwen3ForCausalLM"),
    ],
)
def test_architecture_follows_from_the_config(changes: dict[str, Any], architecture: str) -> None:
    config = replace(CONFIG, **changes)
    written = hugging_face_config(config)
    assert written["architectures"] == [architecture]
    assert decoder_config(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(sliding=(4, None, 4)), "LlamaForCausalLM, has no sliding windows in some layers only"),
        (dict(sliding=(4, 5, 4)), "MistralForCausalLM, has no sliding windows of different lengths"),
        (dict(sliding=(4, 4, 4), qkv_bias=True, out_bias=True), "has no biases on query, key, value and output"),
        (dict(sliding=(4, 4, 4), mlp_bias=True), "has no biases in the MLP"),
        (dict(out_bias=True), "has no bias on the output without"),
        (dict(qk_norm=True, qkv_bias=True), "Qwen3ForCausalLM, has no biases on query, key and value without"),
        (dict(qk_norm=True, mlp_bias=True, sliding=(4, 5, None)), "different lengths, no biases in the MLP"),
        (dict(hidden_size=9), "not a multiple of num_heads"),
    ],
)
def test_combinations_that_no_architecture_has(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        save(tiny(**changes), tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    model = tiny()
    model.norm.scale = nnx.Param(model.norm.scale[...].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="bfloat16, float32"):
        save(model, tmp_path / "saved")


@pytest.mark.usefixtures("as_users_call_it")
def test_what_is_no_model_or_no_path(tmp_path: Path) -> None:
    loaded = load(PARITY / "qwen2")
    written, opened, tokenizer = cast(tuple[Any, Any, Any], (save, load, Tokenizer))
    model, out = loaded.model, tmp_path / "out"
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: written(loaded, out), r"must be a Decoder, not Loaded; give its \.model"),
        (lambda: written(None, out), "must be a Decoder, not None"),
        (lambda: written(model, None), "the folder to save into must be a path, .* not None"),
        (lambda: written(model, out, tokenizer_from=loaded), r"tokenizer_from must be .* not Loaded; .*\.folder"),
        (lambda: opened(None), "the source of a checkpoint must be a path, a str or a pathlib.Path, not None"),
        (lambda: opened(loaded), r"must be a path, a str or a pathlib.Path, not Loaded; give its \.folder"),
        (lambda: opened(3), "must be a path, a str or a pathlib.Path, not 3"),
        (lambda: tokenizer(loaded), r"the folder of a tokenizer must be a path, .*give its \.folder"),
    ]
    for call, says in wrong:
        with pytest.raises(ValueError, match=says):
            call()
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save(tiny(), tmp_path)  # empty
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty"):
        save(tiny(tied=True), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_tokenizer_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "other.txt").write_text("not a tokenizer's")
    with pytest.raises(FileNotFoundError, match="tokenizer_from"):
        save(tiny(), tmp_path / "saved", tokenizer_from=source)
    (source / "tokenizer.json").write_text("{}")
    (source / "config.json").write_text('{"eos_token_id": [3, 4], "vocab_size": 5}')
    folder = save(tiny(), tmp_path / "saved", tokenizer_from=source)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["vocab_size"]) == (None, [3, 4], 17)


# What a folder says beside its weights goes back into a folder

SAID = {
    "tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}', "tokenizer.model": "spm",
    "tokenizer.1.0.0.json": "{}", "spiece.model": "spm", "special_tokens_map.json": "{}",
    "added_tokens.json": '{"<x>": 9}', "vocab.json": "{}", "vocab.txt": "a", "merges.txt": "a b",
    "chat_template.jinja": "{{ x }}", "chat_template.json": '{"chat_template": "x"}',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "generation_config.json": '{"eos_token_id": [2, 7, 9], "temperature": 0.6, "stop_strings": ["x"]}',
    "preprocessor_config.json": '{"size": 5}', "processor_config.json": '{"patch_size": 14}',
}  # fmt: skip
NOT_SAID = ("README.md", "optimizer.bin", "training_args.json", "policy.json", "model.safetensors.index.json")


def says(folder: Path, config: dict[str, Any]) -> Path:
    for name, content in SAID.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for name in NOT_SAID:
        (folder / name).write_text("{}")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def files(folder: Path) -> dict[str, str]:
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_text() for name, path in found.items() if path.suffix != ".safetensors"}


def test_files_are_carried_over(tmp_path: Path) -> None:
    source = says(tmp_path / "source", {})
    written = files(save(tiny(), tmp_path / "saved", tokenizer_from=source))
    assert {name: content for name, content in written.items() if name != "config.json"} == SAID


@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_the_same_model_stays(tmp_path: Path, name: str) -> None:
    """Layouts of RoPE, names of architectures, and all that nothing here reads."""
    theirs = json.loads((PARITY / name / "config.json").read_text())
    theirs |= {"eos_token_id": [2, 7], "my_own": {"a": [1]}, "attention_dropout": 0.25, "torch_dtype": "float16"}
    source = says(tmp_path / "source", theirs)
    written = files(save(load(PARITY / name).model, tmp_path / "saved", tokenizer_from=source))["config.json"]
    assert json.loads(written) == {k: v for k, v in theirs.items() if k != "torch_dtype"} | {"dtype": "float32"}


def test_a_config_of_a_model_that_has_changed_is_ours_and_the_rest_theirs(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5.0}
    theirs = hugging_face_config(CONFIG) | rope | {"vocab_size": 99, "eos_token_id": 2, "my_own": [1]}
    del theirs["rope_parameters"]
    ours = json.loads(files(save(tiny(), tmp_path / "a", tokenizer_from=says(tmp_path / "b", theirs)))["config.json"])
    assert decoder_config(ours) == CONFIG
    assert (ours["eos_token_id"], ours["my_own"], ours["vocab_size"]) == (2, [1], 17)
    assert "rope_scaling" not in ours


def test_of_a_config_of_another_architecture_only_special_tokens_are_taken(tmp_path: Path) -> None:
    theirs = hugging_face_config(replace(CONFIG, qk_norm=True)) | {"eos_token_id": 2, "my_own": [1]}
    ours = json.loads(files(save(tiny(), tmp_path / "a", tokenizer_from=says(tmp_path / "b", theirs)))["config.json"])
    assert decoder_config(ours) == CONFIG
    assert (ours["eos_token_id"], "my_own" in ours) == (2, False)


def test_what_the_files_untie_is_said_in_the_config(tmp_path: Path) -> None:
    theirs = hugging_face_config(replace(CONFIG, tied=True)) | {"my_own": 1, "architectures": ["MistralForCausalLM"]}
    theirs |= {"sliding_window": None, "model_type": "mistral"}
    folder = save(tiny(), tmp_path / "a", tokenizer_from=says(tmp_path / "b", theirs))
    ours = json.loads(files(folder)["config.json"])
    assert ours == theirs | {"tie_word_embeddings": False, "dtype": "float32"}
    assert load(folder).config == CONFIG


INTERRUPTED = """
import resource, signal, sys
import jax, jax.numpy as jnp
from flax import nnx
from jaxcompress.checkpoints import save
from jaxcompress.models.decoder import Decoder, DecoderConfig
abstract = jax.eval_shape(lambda: Decoder(DecoderConfig(97, 32, 24, 2, 4, 2, 8), rngs=nnx.Rngs(0)))
model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL if sys.argv[2] == "killed" else signal.SIG_IGN)
save(model, sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs POSIX limits on the size of files")
@pytest.mark.parametrize("how", ["killed", "failing"])
def test_interrupted_save_leaves_nothing_half_done(tmp_path: Path, how: str) -> None:
    """The kernel ends the process, or fails the write, in the middle of the weights."""
    target = tmp_path / "saved"
    env = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", INTERRUPTED, str(target), how]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    left = [p.name for p in tmp_path.iterdir()]
    if how == "killed":
        assert run.returncode == -signal.SIGXFSZ, run.stderr
        (partial,) = left
        assert partial.startswith(".saved.")
        assert partial.endswith(".partial")
    else:
        assert run.returncode == 1
        assert "File too large" in run.stderr
        assert left == []
    save(tiny(), target)
    load(target)
