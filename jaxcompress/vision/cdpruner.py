"""CDPruner: a diverse set of patches that are relevant to the question (Zhang et al. 2025).

A determinantal point process with kernel L_ij = q_i cos(x_i, x_j) q_j, maximised greedily: each step takes the patch
with the largest gain of the determinant (Chen et al. 2018, "Fast Greedy MAP Inference").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.state.vectors import unit
from jaxcompress.vision.choose import EPS, check_budget, cosine


def question_relevance(image: Float[Array, "B N D"], text: Float[Array, "M D"]) -> Float[Array, "B N"]:
    """Negative similarity of each patch's CLIP embedding to the question's, scaled to 0..1 in each picture.

    The minus sign is the authors'. They scale over all pictures of a batch together; to do so, flatten the batch.
    """
    like = jnp.einsum(
        "bnd,md->bnm", unit(image.astype(jnp.float32), EPS), unit(text.astype(jnp.float32), EPS), precision="highest"
    )
    score = -like.mean(-1)
    low, high = score.min(-1, keepdims=True), score.max(-1, keepdims=True)
    return (score - low + 1e-6) / jnp.maximum(high - low, 1e-12)


class Diverse(NamedTuple):
    """Result of `diverse`.

    Attributes:
      order: [B, n], the chosen patches in the order in which they were chosen.
      gain: [B, N], the remaining gain of each patch, -inf for chosen patches.
      quality: [B, N], the kernel's diagonal.
    """

    order: Int[Array, "B n"]
    gain: Float[Array, "B N"]
    quality: Float[Array, "B N"]


def diverse(x: Float[Array, "B N E"], relevance: Float[Array, "B N"], n: int) -> Diverse:
    """Greedily chooses the n patches with the largest determinant.

    If n is above the kernel's rank, the last gains are rounding errors, and the last patches are arbitrary.

    Raises:
      ValueError: n above N.
    """
    b, total, _ = x.shape
    check_budget(n, total)
    kernel = relevance[:, :, None] * cosine(x, x) * relevance[:, None]
    rows = jnp.arange(b)
    # Take the self-cosine as exactly 1: its rounding error would break ties, differently in each batch.
    diagonal = jnp.square(relevance) * x.any(-1)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        factors, gain = carry  # factors: [n, B, N], rows of the Cholesky factor so far, then zeros
        chosen = gain.argmax(-1)
        before = jnp.einsum("tb,tbn->bn", factors[:, rows, chosen], factors, precision="highest")
        most = gain[rows, chosen][:, None]
        row = (kernel[rows, chosen] - before) / jnp.sqrt(jnp.maximum(most, 1e-10))
        row = jnp.where(most > 1e-10, row, 0.0)  # no gain is left beyond the kernel's rank
        gain = (gain - jnp.square(row)).at[rows, chosen].set(-jnp.inf)
        return (factors.at[i].set(row), gain), chosen

    start = jnp.zeros((n, b, total)), diagonal
    (_, gain), order = jax.lax.scan(step, start, jnp.arange(n))
    return Diverse(order.T.astype(jnp.int32).reshape(b, n), gain, diagonal)
