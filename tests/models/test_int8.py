"""Weights in int8: products equal those of the numbers that int8 stands for, and little is lost by rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

from jaxcompress import generate, get_policy, load, save
from jaxcompress._extras import MissingExtra
from jaxcompress.checkpoints._int8 import in_int8
from jaxcompress.models import int8
from jaxcompress.models.decoder import Decoder
from jaxcompress.training.lora import init_lora
from jaxcompress.training.trainer import init_train_state

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
CHECKPOINTS = ("llama_tied", "neox", "gemma2", "mixtral", "gpt_oss")
"""Tied and untied, with biases and without, scaled embeddings, experts."""


def as_floats(model: Decoder) -> Decoder:
    """The model with the numbers that its weights stand for."""
    return jax.tree.map(int8.as_float, model, is_leaf=int8.is_int8)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_the_rounded_weights(name: str) -> None:
    model, exact = load(PARITY / name, dtype="int8").model, load(PARITY / name, dtype="float32").model
    tokens = jnp.arange(1, 25, dtype=jnp.int32).reshape(2, 12) % model.config.vocab_size
    run = jax.jit(lambda model: model(tokens))
    got, rounded, whole = run(model), run(as_floats(model)), run(exact)
    np.testing.assert_allclose(got, rounded, atol=2e-5 * float(jnp.abs(whole).max()))
    assert 0 < jnp.abs(got - whole).mean() < 0.03 * jnp.abs(whole).max()
    matrices = [x for x in jax.tree.leaves(model, is_leaf=int8.is_int8) if int8.is_int8(x)]
    assert all(x.qvalue.dtype == jnp.int8 for x in matrices)
    assert sum(x.qvalue.size for x in matrices) > 0.9 * sum(x.size for x in jax.tree.leaves(exact))
    assert model.dtype == jnp.float32


@pytest.mark.slow
def test_it_decodes_as_the_rounded_weights_do() -> None:
    model = load(PARITY / "llama_tied", dtype="int8").model
    answers = [
        np.concatenate(list(generate(m, [[5, 6, 7, 8]], get_policy("tova"), 4, max_new_tokens=8)), axis=1)
        for m in (model, as_floats(model))
    ]
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("many", [1, 5, 7, 64])
def test_scores_of_parts_of_the_vocabulary(axis: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "NUMBERS_AT_ONCE", many * 6)
    x, head = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 6), (11, 6)]))
    held = in_int8("embedding", head) if axis == 0 else in_int8("head", head.T)
    whole = int8.as_float(held)
    expected = x @ (whole if axis else whole.T)
    np.testing.assert_allclose(int8.scores_of_all(x, held, axis=axis), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_rounds_only_the_weights(dtype: str) -> None:
    x, matrix = (jax.random.normal(jax.random.key(i), s).astype(dtype) for i, s in enumerate([(4, 32), (32, 8)]))
    held = in_int8("layers.mlp.up.kernel", matrix)
    assert held.scale.shape == (1, 8)
    got, expected = int8.product(x, held), x.astype(jnp.float32) @ int8.as_float(held).astype(jnp.float32)
    assert got.dtype == x.dtype
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=1e-5 if dtype == "float32" else 2e-2, atol=0.05)


def test_small_arrays_and_routers_stay_as_they_are() -> None:
    for name in ("layers.mlp.router.kernel", "layers.mlp.up.bias", "norm.scale", "layers.attention.sinks"):
        array = jnp.ones((3, 4))
        assert in_int8(name, array) is array


@pytest.mark.parametrize(
    ("use", "purpose"),
    [
        (lambda model, folder: save(model, folder), "saved"),
        (lambda model, folder: init_train_state(model, optax.sgd(0.1)), "trained"),
        (lambda model, folder: init_lora(model, jax.random.key(0)), "adapted"),
    ],
)
def test_what_it_cannot_be_used_for(use: Any, purpose: str, tmp_path: Path) -> None:
    model = load(PARITY / "llama_tied", dtype="int8").model
    with pytest.raises(ValueError, match=f"weights in int8 cannot be {purpose}: load the model with dtype='float32'"):
        use(model, tmp_path / "new")


def test_without_qwix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(MissingExtra, match=r'pip install "jaxcompress\[int8\]"'):
        load(PARITY / "llama_tied", dtype="int8")


def test_qwix_rounds_to_nearest_with_the_largest_number_at_127() -> None:
    matrix = jnp.array([[1.0, -2.0], [0.26, 2.0]])
    held = qwix.quantize(matrix, jnp.int8, channelwise_axes=(1,))
    np.testing.assert_array_equal(held.qvalue, [[127, -127], [33, 127]])
