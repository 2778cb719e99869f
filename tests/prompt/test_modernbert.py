"""ModernBERT and its heads against PyTorch, in rows of any length, and what is said of other checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.checkpoints import load_encoder
from jaxcompress.checkpoints._modernbert import modernbert_config
from jaxcompress.models.modernbert import Kompress, ModernBertClassifier, Provence
from jaxcompress.prompt.scoring import score
from jaxcompress.recurrence.block_attention import local_attention
from jaxcompress.recurrence.softmax import MASKED

FIXTURES = Path(__file__).parents[1] / "fixtures" / "modernbert"
KINDS = {"classifier": ModernBertClassifier, "provence": Provence, "kompress": Kompress}


@pytest.fixture(scope="module")
def outputs() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "outputs.npz") as saved:
        return dict(saved)


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def encoder(kind: str) -> Any:
    return load_encoder(FIXTURES / kind).model


def test_probabilities_equal_pytorch(kind: str, encoder: Any, outputs: dict[str, np.ndarray]) -> None:
    """The row is padded here, and not there: nothing that is computed for it depends on padding."""
    assert type(encoder) is KINDS[kind]
    np.testing.assert_allclose(score(encoder, [outputs["tokens"]])[0], outputs[f"{kind}/keep"], atol=2e-5, rtol=0)


def test_logits_and_relevance_equal_pytorch(outputs: dict[str, np.ndarray]) -> None:
    row = outputs["tokens"]
    tokens = np.pad(row, (0, 9))[None]
    valid = jnp.arange(tokens.shape[1])[None] < len(row)
    logits = load_encoder(FIXTURES / "classifier").model(jnp.asarray(tokens), valid)
    np.testing.assert_allclose(logits[0, : len(row)], outputs["classifier/logits"], atol=1e-4, rtol=0)
    _, relevance = load_encoder(FIXTURES / "provence").model.keep_and_relevance(jnp.asarray(tokens), valid)
    np.testing.assert_allclose(relevance[0], outputs["provence/relevance"], atol=1e-5)


def test_a_row_does_not_depend_on_its_company(encoder: Any) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 400, n).astype(np.int32) for n in (3, 60, 31, 1, 33)]
    for row, scores in zip(rows, score(encoder, rows), strict=True):
        np.testing.assert_allclose(score(encoder, [row])[0], scores, atol=2e-6)


def test_local_attention_sees_so_far_and_no_further() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 21, 2, 8)), jnp.float32) for _ in range(3))
    valid = np.arange(21) < np.array([[21], [13]])
    near = np.abs(np.arange(21)[:, None] - np.arange(21)) <= 4
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
    weights = np.exp(np.where(near & valid[:, None, None], scores, -np.inf))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True).clip(1e-30), v)
    found = jax.jit(local_attention, static_argnums=4)(q, k, v, jnp.where(valid, 0.0, MASKED), 4)
    np.testing.assert_allclose(np.asarray(found)[valid], expected[valid], atol=1e-6)


def test_transformers_4_wrote_other_entries() -> None:
    raw = json.loads((FIXTURES / "classifier" / "config.json").read_text())
    older = {key: value for key, value in raw.items() if key not in ("layer_types", "rope_parameters")}
    older |= dict(global_attn_every_n_layers=3, global_rope_theta=160000.0, local_rope_theta=10000.0)
    assert modernbert_config(older) == modernbert_config(raw)
    assert modernbert_config(raw).attends_to_all == (True, False, False, True)


def test_older_provence_names(tmp_path: Path, outputs: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(FIXTURES / "provence", tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    save_file({name.removeprefix("ranking_model."): tensor for name, tensor in load_file(file).items()}, file)
    found = score(load_encoder(tmp_path / "old").model, [outputs["tokens"]])[0]
    np.testing.assert_allclose(found, outputs["provence/keep"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm_bias=True), "norm_bias: a ModernBERT with such biases"),
        (dict(classifier_pooling="max"), "known: 'cls', 'mean'"),
        (dict(layer_types=["full_attention"]), "for each of 4 layers"),
        (dict(hidden_size=None), "lacks hidden_size"),
        (dict(rope_parameters={"full_attention": {"rope_type": "yarn"}}), "rope type 'yarn'"),
    ],
)
def test_configs_that_are_not_known(change: dict[str, Any], message: str) -> None:
    raw = json.loads((FIXTURES / "classifier" / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        modernbert_config(raw)


def test_a_modernbert_that_says_nothing_about_tokens(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "classifier", tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace("ForTokenClassification", "ForMaskedLM"))
    with pytest.raises(ValueError, match="OpenProvence or a Kompress checkpoint"):
        load_encoder(tmp_path / "other")
