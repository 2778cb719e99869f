"""SparseVLM: the words of the question that relate to the picture rate the patches (Zhang et al. 2024).

The raters are the words most similar to the patches. After layers 2, 6 and 15 (in the first release also 19), the
patches that get the most attention from the raters stay. The best third of the dropped patches is clustered, and the
cluster means follow the kept patches ("recycling"). Number of kept patches:

  first release ("v1")   the rank of the raters' attention matrix, scaled; `rank_budget`
  second ("v1.5")        fixed numbers; `KEPT`
  SparseVLM+ ("v2")      fixed numbers `KEPT_PLUS`, no recycling, original positions. Attention is corrected for the
                         preference of RoPE alone and taken from the heads that attend to the picture most
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.vision.choose import ranked_indices, take

LAYERS = (2, 6, 15)
LAYERS_FIRST = (2, 6, 15, 19)
KEPT = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Patches kept after each of `LAYERS`, without clusters, keyed by the mean number over layers (v1.5)."""
KEPT_PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
HEADS = 14
"""Number of heads whose attention SparseVLM+ uses."""


def rater_mass(
    patches: Float[Array, "B V E"], words: Float[Array, "B R E"], seen: Bool[Array, "B V"], present: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """Similarity of the patches to each word: softmax over words of the products, mean over patches (section 3.2).

    Args:
      patches, words: embeddings, before the first layer.
      seen, present: which patches and which words are present.
    """
    products = jnp.einsum("bve,bre->bvr", patches, words, precision="highest", preferred_element_type=jnp.float32)
    share = jax.nn.softmax(jnp.where(present[:, None], products, -1e30), axis=-1)
    share = jnp.where(seen[:, :, None] & present[:, None], share, 0.0)
    return share.sum(1) / jnp.maximum(seen.sum(1), 1)[:, None]


def above_mean(mass: Float[Array, "B R"], present: Bool[Array, "B R"]) -> Bool[Array, "B R"]:
    """The words whose mass is above the mean."""
    mean = jnp.where(present, mass, 0.0).sum(-1, keepdims=True) / jnp.maximum(present.sum(-1, keepdims=True), 1)
    return present & (mass > mean)


def rater_scores(rows: Float[Array, "B H R V"], raters: Bool[Array, "B R"]) -> Float[Array, "B V"]:
    """Scores: attention from the raters to each patch, mean over heads and raters."""
    mean = jnp.where(raters[..., None], rows.mean(1), 0.0)
    return mean.sum(1) / jnp.maximum(raters.sum(1), 1)[:, None]


def rank_budget(
    rows: Float[Array, "B H R V"],
    raters: Bool[Array, "B R"],
    patches: Bool[Array, "B V"],
    scale: float,
    bias: float,
) -> Int[Array, " B"]:
    """Kept patches by the rank of the raters' attention matrix: int(rank * scale + bias), at most all but one.

    All patches stay if the rank equals the number of patches.
    """
    matrix = jnp.where(raters[..., None] & patches[:, None], rows.mean(1), 0.0)
    count, width = raters.sum(1), patches.sum(1)
    singular = jnp.linalg.svd(matrix, compute_uv=False)
    tolerance = singular.max(-1) * jnp.maximum(count, width) * jnp.finfo(jnp.float32).eps
    rank = (singular > tolerance[:, None]).sum(-1)
    table = jnp.asarray([int(r * scale + bias) for r in range(matrix.shape[-1] + 1)])
    return jnp.where(rank == width, width, jnp.clip(table[rank], 0, width - 1))


def without_gravity(
    rows: Float[Array, "B H R V"], at: Int[Array, "B R"], patch_at: Int[Array, "B V"], rope: RopeConfig, head_dim: int
) -> Float[Array, "B H R V"]:
    """Attention divided by the RoPE score of two all-ones vectors at these positions (SparseVLM+, section 4.2)."""
    ones = lambda positions: rotate(jnp.ones((*positions.shape, head_dim)), jnp.maximum(positions, 0), rope)
    gravity = jnp.einsum("brd,bvd->brv", ones(at), ones(patch_at), precision="highest") * head_dim**-0.5
    return rows / gravity[:, None]


def of_best_heads(
    rows: Float[Array, "B H R V"], raters: Bool[Array, "B R"], patches: Bool[Array, "B V"], n: int = HEADS
) -> Float[Array, "B h R V"]:
    """The n heads whose raters attend to the patches most (SparseVLM+, section 4.3); at most all heads."""
    mass = jnp.where(raters[:, None, :, None] & patches[:, None, None], rows, 0.0).sum((2, 3))
    return take(rows, ranked_indices(mass, min(n, rows.shape[1])))


def recycled(gone: int) -> tuple[int, int]:
    """For `gone` dropped patches: (number that is clustered, number of clusters)."""
    candidates = int(gone * 0.3) + 1
    return min(candidates, gone), int(min(candidates, gone) / 10) + 1


class Clustered(NamedTuple):
    """Result of `cluster`.

    Attributes:
      x: [B, n, E], means of the clusters, zero for an unused cluster.
      centres: [B, n], the central token of each cluster, in order of score.
      group: [B, N], the cluster of each token.
      score: [B, N], density times distance to the next denser token.
    """

    x: Float[Array, "B n E"]
    centres: Int[Array, "B n"]
    group: Int[Array, "B N"]
    score: Float[Array, "B N"]


def cluster(
    x: Float[Array, "B N E"],
    n: int,
    *,
    present: Bool[Array, "B N"] | None = None,
    count: Int[Array, " B"] | None = None,
    noise: Float[Array, "B N"] | None = None,
) -> Clustered:
    """Density-peak clustering (Rodriguez and Laio 2014): centres are dense and far from all denser tokens.

    Args:
      n: number of clusters.
      present: tokens to cluster; all by default.
      count: number of clusters in each row, at most n; n by default. The density uses the same number of neighbours.
      noise: added to the densities. The authors add 1e-6 times random numbers to break ties. Without noise, the
        earlier of two equal tokens counts as denser.
    """
    b, total, width = x.shape
    present = jnp.ones((b, total), bool) if present is None else present
    count = jnp.full((b,), n) if count is None else count
    x = x.astype(jnp.float32)
    apart = jnp.sqrt(jnp.square(x[:, :, None] - x[:, None]).sum(-1)) / math.sqrt(width)
    both = present[:, :, None] & present[:, None]
    near = jnp.sort(jnp.where(both, apart, jnp.inf), axis=-1)[:, :, :n]
    counted = (jnp.arange(n) < count[:, None])[:, None] & jnp.isfinite(near)
    mean = jnp.where(counted, jnp.square(jnp.where(counted, near, 0.0)), 0.0).sum(-1) / count[:, None]
    density = jnp.exp(-mean) + (0.0 if noise is None else noise)
    place = jnp.arange(total)
    denser = density[:, None] > density[:, :, None]
    if noise is None:
        denser |= (density[:, None] == density[:, :, None]) & (place < place[:, None])
    furthest = jnp.where(both, apart, 0.0).max((1, 2))
    distance = jnp.where(denser & both, apart, furthest[:, None, None]).min(-1)
    score = jnp.where(present, distance * density, -jnp.inf)
    centres = ranked_indices(score, n)
    real = jnp.arange(n) < count[:, None]
    group = jnp.where(real[..., None], take(apart, centres), jnp.inf).argmin(1)
    rows = jnp.arange(b)[:, None]
    # A centre belongs to its own cluster, even if another centre is equally near.
    group = group.at[rows, jnp.where(real, centres, total)].set(jnp.arange(n), mode="drop").astype(jnp.int32)
    share = (present[:, None] & (group[:, None] == jnp.arange(n)[:, None])).astype(jnp.float32)
    share /= share.sum(-1, keepdims=True) + 1e-6  # as in the authors' code
    return Clustered(jnp.einsum("bcn,bne->bce", share, x, precision="highest"), centres, group, score)
