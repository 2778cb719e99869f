"""Weights in int8: products with them, and embeddings and scores from them.

A matrix is a `qwix.QArray`: numbers in int8 and a scale for each output channel. Products convert the numbers to the
dtype of the activations and apply the scale to the result, so only the weights are rounded, not the activations.

`jaxcompress.load(..., dtype="int8")` makes such weights. Nothing here imports qwix: only making them needs it.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

NUMBERS_AT_ONCE = 2**20
"""Numbers of the output projection that are converted at a time, so that they stay in a CPU's cache."""


@runtime_checkable
class Int8Matrix(Protocol):
    """What is used of a `qwix.QArray`: `qvalue * scale` is the matrix."""

    qvalue: Int[Array, "..."]
    scale: Float[Array, "..."]


def is_int8(weights: Any) -> TypeGuard[Int8Matrix]:
    """Whether a matrix is held in int8."""
    return hasattr(weights, "qvalue")


def holds_int8(model: Any) -> bool:
    """Whether a module has any weights in int8."""
    return any(map(is_int8, jax.tree.leaves(model, is_leaf=is_int8)))


def check_float(model: Any, purpose: str) -> None:
    """Raises ValueError if a module holds weights in int8, which cannot be used for the purpose."""
    if holds_int8(model):
        raise ValueError(f"weights in int8 cannot be {purpose}: load the model with dtype='float32' or another float")


def product(
    x: Float[Array, "*n E"], matrix: Float[Array, "E F"] | Int8Matrix, returns: DTypeLike | None = None
) -> Float[Array, "*n F"]:
    """x @ matrix, summed in float32. `returns` is the dtype of the result, that of x by default."""
    if is_int8(matrix):
        sums = jnp.matmul(x, matrix.qvalue.astype(x.dtype), preferred_element_type=jnp.float32)
        return (sums * matrix.scale.astype(jnp.float32)).astype(returns or x.dtype)
    return jnp.matmul(x, jnp.asarray(matrix), preferred_element_type=returns)


def as_float(matrix: Any) -> Float[Array, "..."]:
    """The matrix itself, or the numbers that int8 stands for."""
    return matrix.qvalue.astype(matrix.scale.dtype) * matrix.scale if is_int8(matrix) else matrix


def part_of(matrix: Any, index: Any) -> Any:
    """`matrix[index]` along its first axis, such as the matrix of one expert."""
    return jax.tree.map(lambda x: x[index], matrix)


class Linear(nnx.Linear):
    """A projection whose kernel may be held in int8."""

    def __call__(self, inputs: Float[Array, "*n E"], out_sharding: Any = None) -> Float[Array, "*n F"]:
        kernel = self.kernel[...]
        if not is_int8(kernel):
            return super().__call__(inputs, out_sharding)
        out = product(inputs, kernel)
        return out if self.bias is None else out + self.bias[...]


def scores_of_all(x: Float[Array, "*n E"], head: Int8Matrix, *, axis: int) -> Float[Array, "*n V"]:
    """Scores of all V tokens, float32. A part of the vocabulary at a time is converted.

    Args:
      axis: the axis of tokens in `head`: 0 for an embedding [V, E], 1 for an output projection [E, V].
    """
    size, width = head.qvalue.shape[axis], head.qvalue.shape[1 - axis]
    many = min(size, max(1, NUMBERS_AT_ONCE // width))

    def write(scores: Array, start: Array) -> tuple[Array, None]:
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, many, axis), head)
        part = part if axis else jax.tree.map(jnp.matrix_transpose, part)
        return jax.lax.dynamic_update_slice_in_dim(scores, product(x, part, jnp.float32), start, -1), None

    # The last part ends at the last token, and may begin within the part before it.
    starts = jnp.minimum(jnp.arange(0, size, many), size - many)
    return jax.lax.scan(write, jnp.zeros((*x.shape[:-1], size), jnp.float32), starts)[0]
