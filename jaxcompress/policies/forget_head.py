"""The network behind learned policies: it reads each token's key and value once, when the token enters.

It is a pytree of arrays, a leaf of the policies that use it: other weights compile nothing. It is trained by
`jaxcompress.training` and `jaxcompress.training.merging`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KEEP_EVERYTHING = (5.0, 0.0)
"""What `DMS` starts from: a keep logit of 5 for every token (Łańcucki et al. 2025, section 3.1)."""


class ForgetHead(NamedTuple):
    """A network per layer and kv head: one hidden layer of M units (SiLU), R numbers for each token.

    It reads 2 D + 2 numbers: key and value, each divided by its root mean square, and the logarithms of both.

    Attributes:
      inner: [L, K, 2D + 2, M].
      inner_bias: [L, K, M].
      outer: [L, K, M, R].
      outer_bias: [L, K, R].
    """

    inner: Float[Array, "L K I M"]
    inner_bias: Float[Array, "L K M"]
    outer: Float[Array, "L K M R"]
    outer_bias: Float[Array, "L K R"]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.inner.shape[-2] // 2 - 1


def init_forget_head(
    key: Array, *, layers: int, kv_heads: int, head_dim: int, hidden: int = 64, start: Sequence[float] = KEEP_EVERYTHING
) -> ForgetHead:
    """A fresh network. It gives every token the numbers `start`.

    Raises:
      ValueError: a hidden layer of no units.
    """
    if hidden < 1:
        raise ValueError(f"a hidden layer has at least 1 unit, not {hidden}")
    size = 2 * head_dim + 2
    inner = jax.random.normal(key, (layers, kv_heads, size, hidden)) * size**-0.5
    outer_bias = jnp.broadcast_to(jnp.array(start, jnp.float32), (layers, kv_heads, len(start)))
    return ForgetHead(
        inner, jnp.zeros((layers, kv_heads, hidden)), jnp.zeros((layers, kv_heads, hidden, len(start))), outer_bias
    )


def check_head(head: ForgetHead, *, layers: int, kv_heads: int, head_dim: int) -> None:
    """Raises ValueError if a network was made for a model of another shape; names both."""
    mine, theirs = (*head.inner.shape[:2], head.head_dim), (layers, kv_heads, head_dim)
    if mine != theirs:
        words = "{} layers of {} kv heads of width {}"
        raise ValueError(f"the weights are for {words.format(*mine)}, the model has {words.format(*theirs)}")


def check_used(head: ForgetHead, which: tuple[int, ...], head_dim: int, layers: int | None) -> None:
    """Raises ValueError if a network is not for the layers and heads that it is used in.

    Args:
      which: indices of kv heads.
      layers: how many the model has; None if that is not known here.
    """
    of, kv_heads = head.inner.shape[:2]
    if layers not in (None, of):
        raise ValueError(f"the weights are for {of} layers, the model has {layers}")
    if max(which) >= kv_heads or head_dim != head.head_dim:
        raise ValueError(
            f"the weights are for {kv_heads} kv heads of width {head.head_dim}, the model has heads "
            f"{min(which)} to {max(which)} of width {head_dim}"
        )


def token_numbers(
    head: ForgetHead, keys: Float[Array, "B K N D"], values: Float[Array, "B K N D"]
) -> Float[Array, "B K N R"]:
    """The numbers of tokens in one layer, float32.

    Args:
      head: of this layer, without the axis L.
      keys: before RoPE.
    """
    hidden = (
        jnp.einsum("bkni,kim->bknm", _features(keys, values), head.inner, precision="highest")
        + head.inner_bias[:, None]
    )
    return jnp.einsum("bknm,kmr->bknr", jax.nn.silu(hidden), head.outer, precision="highest") + head.outer_bias[:, None]


def _features(keys: Float[Array, "B K N D"], values: Float[Array, "B K N D"]) -> Float[Array, "B K N I"]:
    parts, sizes = [], []
    for x in (keys, values):
        x = x.astype(jnp.float32)
        size = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        parts.append(x / size)
        sizes.append(jnp.log(size))
    return jnp.concatenate([*parts, *sizes], axis=-1)
