"""The encoder against PyTorch's logits, and in batches of any shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxcompress.checkpoints import (
    encoder_config,
    hugging_face_encoder_config,
    load_backbone,
    load_encoder,
    save_encoder,
    store_in_int8,
)
from jaxcompress.models.encoder import Encoder, EncoderConfig
from jaxcompress.models.modernbert import ModernBertClassifier, ModernBertConfig
from jaxcompress.prompt.scoring import LENGTHS, TOKENS, _batches, _of_leaves, score

FIXTURES = Path(__file__).parents[1] / "fixtures" / "prompt"
FOLDERS = {"bert": FIXTURES / "bert", "xlmr": FIXTURES / "xlm-roberta"}
NAMES = sorted(FOLDERS)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def encoder(name: str) -> Encoder:
    return load_encoder(FOLDERS[name]).model


def test_logits_equal_pytorch(name: str, encoder: Encoder) -> None:
    with np.load(FIXTURES / "logits.npz") as saved:
        tokens, mask, logits = (saved[f"{name}/{part}"] for part in ("input_ids", "mask", "logits"))
    ours = jax.jit(lambda encoder, tokens, mask: encoder(tokens, mask))(encoder, tokens, mask)
    np.testing.assert_allclose(np.asarray(ours)[mask], logits[mask], atol=2e-5, rtol=0)


def test_hidden_states_equal_pytorch(name: str, encoder: Encoder) -> None:
    with np.load(FIXTURES / "logits.npz") as saved:
        tokens, mask = (jnp.asarray(saved[f"{name}/hidden/{part}"]) for part in ("input_ids", "mask"))
        theirs = [saved[f"{name}/hidden/{layer}"] for layer in range(3)]
    np.testing.assert_allclose(encoder.embed(tokens)[:, :40], theirs[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(encoder.hidden(tokens, mask)[:, :40], theirs[2], atol=5e-5, rtol=0)


def test_a_row_does_not_depend_on_its_company(encoder: Encoder) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 2000, n).astype(np.int32) for n in (3, 60, 31, 1, 33)]
    together = score(encoder, rows)
    for row, scores in zip(rows, together, strict=True):
        assert scores.shape == row.shape
        np.testing.assert_allclose(score(encoder, [row])[0], scores, atol=2e-6)


def test_masked_tokens_are_seen_by_nobody(encoder: Encoder) -> None:
    rng = np.random.default_rng(1)
    row = rng.integers(5, 2000, 20).astype(np.int32)
    valid = np.arange(20) != 7
    other = np.where(valid, row, 1234).astype(np.int32)
    one, two = score(encoder, [row, other], [valid, valid])
    np.testing.assert_allclose(one[valid], two[valid], atol=1e-6)
    assert np.abs(one - score(encoder, [row])[0]).max() > 1e-3


def test_shapes_are_few() -> None:
    """Any prompts, whatever their lengths, share a bounded number of compiled programs."""
    config = EncoderConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    encoder = Encoder(config, rngs=nnx.Rngs(0))
    _of_leaves.clear_cache()
    rng = np.random.default_rng(0)
    for _ in range(12):
        score(encoder, [np.ones(n, np.int32) for n in rng.integers(1, 65, rng.integers(1, 5))])
    assert _of_leaves._cache_size() <= 2 * 3  # lengths up to 32 and 64; 1, 2 or 4 rows
    assert all(length <= TOKENS for length in LENGTHS)


@pytest.mark.parametrize("count", range(1, 20))
def test_batches_are_hardly_padded(count: int) -> None:
    """All rows once, in few calls of few shapes, with one row of padding in eight at most."""
    cuts = list(_batches(np.full(count, 500), 512))
    assert sorted(np.concatenate([rows for rows, _ in cuts]).tolist()) == list(range(count))
    sizes = [1 << (len(rows) - 1).bit_length() for rows, _ in cuts]
    assert sum(sizes) <= count + count // 7
    assert max(sizes) * 512 <= TOKENS
    assert len(sizes) <= count // 8 + 2


def test_too_long_a_row(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="513 tokens; the encoder takes at most 512"):
        score(encoder, [np.ones(513, np.int32)])
    assert score(encoder, []) == []
    with pytest.raises(
        ValueError, match=f"rows have 513 tokens; the encoder takes at most {encoder.config.max_length}"
    ):
        encoder(jnp.ones((1, 513), int), jnp.ones((1, 513), bool))
    unknown = encoder.config.vocab_size
    with pytest.raises(ValueError, match=f"token id {unknown} at index 1 is outside the vocabulary"):
        encoder(jnp.array([[1, unknown]]), jnp.ones((1, 2), bool))


def test_what_cannot_be_saved(tmp_path: Path, as_users_call_it: None) -> None:
    other = ModernBertClassifier(ModernBertConfig(9, 4, 4, 1, (True,)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"only an Encoder \(BERT, RoBERTa\) can be saved, not ModernBertClassifier"):
        save_encoder(other, tmp_path / "new")


def test_saved_and_loaded(tmp_path: Path, name: str, encoder: Encoder) -> None:
    again = load_encoder(save_encoder(encoder, tmp_path / "saved", tokenizer_from=FOLDERS[name]))
    assert again.model.config == encoder.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.model, encoder))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@pytest.mark.parametrize("prefix", [True, False])
def test_a_checkpoint_of_another_task_is_a_backbone(tmp_path: Path, name: str, encoder: Encoder, prefix: bool) -> None:
    """The same encoder with a new head, whether its tensors have a prefix or not; it trains, and is saved."""
    theirs = load_file(FOLDERS[name] / "model.safetensors")
    start = "bert." if name == "bert" else "roberta."
    own = {tensor if prefix else tensor.removeprefix(start): x for tensor, x in theirs.items() if tensor[0] != "c"}
    pooler = {f"{start if prefix else ''}pooler.dense.weight": np.zeros((3, 3), np.float32)}
    config = json.loads((FOLDERS[name] / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(own | pooler | {"lm_head.bias": np.zeros(2000, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | dict(architectures=["AnyForMaskedLM"])))
    (folder / "tokenizer.json").write_text((FOLDERS[name] / "tokenizer.json").read_text())
    loaded = load_backbone(folder, num_labels=3)
    assert loaded.config == replace(encoder.config, num_labels=3)
    tokens, valid = jnp.arange(5, 25)[None], jnp.ones((1, 20), bool)
    np.testing.assert_array_equal(loaded.model.hidden(tokens, valid), encoder.hidden(tokens, valid))
    assert not np.asarray(loaded.model(tokens, valid)).any()
    again = load_encoder(save_encoder(loaded.model, tmp_path / "saved", tokenizer_from=folder)).model
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, loaded.model))


def test_stored_in_int8(tmp_path: Path, name: str, encoder: Encoder) -> None:
    """A quarter of the size, and each number within half a step of its row."""
    folder = store_in_int8(FOLDERS[name], tmp_path / "small")
    small, large = (one / "model.safetensors" for one in (folder, FOLDERS[name]))
    assert small.stat().st_size < 0.4 * large.stat().st_size
    loaded = load_encoder(folder)
    assert loaded.tokenizer.count("a few words") == load_encoder(FOLDERS[name]).tokenizer.count("a few words")
    for one, other in zip(jax.tree.leaves(loaded.model), jax.tree.leaves(encoder), strict=True):
        assert np.abs(one - other).max() <= np.abs(other).max() / 127 / 2 + 1e-6
    again = load_encoder(store_in_int8(folder, tmp_path / "again")).model
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.allclose(a, b, atol=1e-6)), again, loaded.model))
    row = np.random.default_rng(2).integers(5, 2000, 40).astype(np.int32)
    assert np.abs(score(loaded.model, [row])[0] - score(encoder, [row])[0]).max() < 0.05
    with pytest.raises(FileExistsError, match="not empty"):
        store_in_int8(FOLDERS[name], folder)
    tensors = load_file(small)
    scale = next(tensor for tensor in tensors if tensor.endswith("_scale"))
    save_file(tensors | {scale: tensors[scale][:1]}, small)
    with pytest.raises(ValueError, match="needs one number for each row"):
        load_encoder(folder)


def test_what_is_no_backbone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'; known: bert"):
        load_backbone(tmp_path)


def test_what_a_folder_says_beside_goes_back(tmp_path: Path) -> None:
    """RoBERTa stays RoBERTa, and classes keep their names."""
    model = load_encoder(FOLDERS["xlmr"]).model
    theirs = json.loads((FOLDERS["xlmr"] / "config.json").read_text()) | {"my_own": 1, "classifier_dropout": 0.25}
    theirs |= {"architectures": ["RobertaForTokenClassification"], "model_type": "roberta"}
    theirs |= {"id2label": {"0": "drop", "1": "keep"}, "label2id": {"drop": 0, "keep": 1}}
    source = tmp_path / "source"
    source.mkdir()
    for name, content in {"config.json": json.dumps(theirs), "vocab.json": "{}", "merges.txt": "a b"}.items():
        (source / name).write_text(content)
    folder = save_encoder(model, tmp_path / "saved", tokenizer_from=source)
    written = json.loads((folder / "config.json").read_text())
    assert {k: v for k, v in written.items() if k != "dtype"} == {k: v for k, v in theirs.items() if k != "dtype"}
    assert (folder / "merges.txt").read_text() == "a b"
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), load_encoder(folder).model, model))


def test_bfloat16(name: str, encoder: Encoder) -> None:
    half = load_encoder(FOLDERS[name], dtype="bfloat16").model
    row = np.random.default_rng(2).integers(5, 2000, 40).astype(np.int32)
    assert jax.tree.leaves(half)[0].dtype == jnp.bfloat16
    assert np.abs(score(half, [row])[0] - score(encoder, [row])[0]).max() < 2e-2
    assert half(jnp.array([row]), jnp.ones((1, 40), bool)).dtype == jnp.float32


def test_transformers_reads_the_config(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    raw = json.loads((FOLDERS[name] / "config.json").read_text())
    ours = hugging_face_encoder_config(encoder_config(raw))
    assert encoder_config(ours) == encoder_config(raw)
    read = transformers.AutoConfig.for_model(**ours)
    assert (read.num_labels, read.pad_token_id, read.layer_norm_eps) == (2, raw["pad_token_id"], raw["layer_norm_eps"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(architectures=["BertForMaskedLM"]), "unknown architecture 'BertForMaskedLM'"),
        (dict(hidden_size=None), "lacks hidden_size"),
        (dict(position_embedding_type="relative_key"), "only 'absolute' is known"),
        (dict(hidden_act="swiglu"), "unknown activation 'swiglu'"),
        (dict(num_attention_heads=3), r"hidden_size \(32\) must be a multiple of num_heads \(3\)"),
    ],
)
def test_configs_that_are_not_known(change: dict, message: str) -> None:
    raw = json.loads((FOLDERS["bert"] / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        encoder_config(raw)


def test_positions_of_roberta() -> None:
    config = EncoderConfig(9, 4, 4, 1, 1, max_position=10, padding_id=1)
    encoder = Encoder(config, rngs=nnx.Rngs(0))
    assert encoder.positions(jnp.array([[5, 1, 6, 3, 1]])).tolist() == [[2, 1, 3, 4, 1]]
    assert config.max_length == 8
    with pytest.raises(ValueError, match="no token fits"):
        replace(config, max_position=2)
