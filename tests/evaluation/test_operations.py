"""Operations against what they are by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny import tiny_decoder

from jaxcompress.evaluation.operations import matmul_flops
from jaxcompress.models.decoder import Decoder

A, B = jax.ShapeDtypeStruct((3, 5), "float32"), jax.ShapeDtypeStruct((5, 7), "float32")
ONE = 2 * 3 * 5 * 7


def test_a_product() -> None:
    assert matmul_flops(jnp.matmul, A, B) == ONE
    assert matmul_flops(jax.jit(jnp.matmul), A, B) == ONE
    assert matmul_flops(lambda a: a + 1, A) == 0


def test_a_loop_counts_as_often_as_it_runs() -> None:
    square = jax.ShapeDtypeStruct((6, 6), "float32")

    def loop(x: Any) -> Any:
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=9)[0]

    assert matmul_flops(loop, square) == 9 * 2 * 6**3
    # XLA's count, for which this one is there:
    assert jax.jit(loop).lower(square).compile().cost_analysis()["flops"] < 2 * 2 * 6**3


def test_a_gradient_and_what_is_computed_again() -> None:
    value = lambda a, b: (a @ b).sum()
    assert matmul_flops(jax.grad(value, argnums=(0, 1)), A, B) == pytest.approx(3 * ONE)


def test_the_dearest_branch() -> None:
    branches = lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b @ b.T @ b, lambda: a @ b)
    assert matmul_flops(branches, A, B) == 3 * ONE


def test_a_while_loop_is_an_error() -> None:
    with pytest.raises(ValueError, match="while"):
        matmul_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), jnp.eye(3))


def test_layers_count_one_by_one() -> None:
    config, tokens = tiny_decoder().config, jnp.zeros((2, 4), jnp.int32)

    def count(layers: int) -> int:
        model = Decoder(replace(config, num_layers=layers), rngs=nnx.Rngs(0))
        return matmul_flops(lambda tokens: model.hidden(tokens), tokens)

    assert count(3) == 3 * count(1) > 0
