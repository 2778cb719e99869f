"""PruMerge: outliers of the class token's attention, each with its neighbours added (Shang et al. 2024).

Each kept token gets the sum of a_i x_i over its 32 nearest tokens added. Nearest is by the cosine of keys, and a is the
attention of the class token. One more token is the same sum over all dropped tokens. As in the authors' code, the sums
are not divided by the sum of their weights. PruMerge+ also keeps tokens at even steps over the picture.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.vision.choose import complement, cosine, ranked_indices, take

NEIGHBOURS = 32


def single_head_attention(q: Float[Array, "B N E"], k: Float[Array, "B N E"]) -> Float[Array, "B n"]:
    """The class token's attention to all other tokens. As in the authors' code, one head spans the tower's width.

    Args:
      q, k: queries and keys of the tower's last layer, heads concatenated, class token first.
    """
    products = jnp.einsum("be,bne->bn", q[:, 0], k, precision="highest", preferred_element_type=jnp.float32)
    return jax.nn.softmax(products * q.shape[-1] ** -0.5, axis=-1)[:, 1:]


def outliers(attention: Float[Array, "B N"]) -> Int[Array, " B"]:
    """Number of tokens more than 1.5 interquartile ranges above the third quartile."""
    low, high = jnp.percentile(attention.astype(jnp.float32), jnp.array([25.0, 75.0]), axis=1)
    return (attention > (high + 1.5 * (high - low))[:, None]).sum(1)


class PruMerged(NamedTuple):
    """Result of `prumerge`.

    Attributes:
      x: [B, n + 1, E]: the kept tokens with their neighbours added, in the order of `kept`, then the dropped ones' sum.
      present: [B, n + 1], False for unused places of an adaptive rule, which may keep fewer.
    """

    x: Float[Array, "B n E"]
    present: Bool[Array, "B n"]


def prumerge(
    x: Float[Array, "B N E"],
    attention: Float[Array, "B N"],
    keys: Float[Array, "B N E"],
    kept: Int[Array, "B n"],
    gone: Int[Array, "B m"],
    present: Bool[Array, "B n"] | None = None,
    left: Bool[Array, "B m"] | None = None,
) -> PruMerged:
    """Adds to each kept token its nearest other tokens, kept or dropped, and sums the dropped tokens.

    Args:
      attention, keys: attention of the class token; keys of each token, heads concatenated.
      kept: usually `ranked_indices(attention, n)`.
      gone: usually `complement(kept, N)`.
      present, left: which entries of `kept` and of `gone` are used; all by default.
    """
    present = jnp.ones(kept.shape, bool) if present is None else present
    left = jnp.ones(gone.shape, bool) if left is None else left
    index, counts = jnp.concatenate([kept, gone], axis=1), jnp.concatenate([present, left], axis=1)
    like = cosine(take(keys, kept), take(keys, index))
    own = jnp.arange(kept.shape[1])[:, None] == jnp.arange(index.shape[1])
    like = jnp.where(own | ~counts[:, None], -jnp.inf, like)
    value, near = jax.lax.top_k(like, min(NEIGHBOURS, index.shape[1]))
    weight = take(attention, index).astype(jnp.float32)
    rows = jnp.arange(x.shape[0])[:, None, None]
    share = jnp.where(jnp.isfinite(value), weight[rows, near], 0.0)
    mixing = jnp.zeros(like.shape, jnp.float32).at[rows, jnp.arange(kept.shape[1])[:, None], near].add(share)
    tokens = take(x, index).astype(jnp.float32)
    added = jnp.einsum("bkn,bne->bke", mixing, tokens, precision="highest")
    extra = jnp.where(left, weight[:, kept.shape[1] :], 0.0)
    extra = jnp.einsum("bn,bne->be", extra, tokens[:, kept.shape[1] :], precision="highest")[:, None]
    out = jnp.concatenate([tokens[:, : kept.shape[1]] + added, extra], axis=1).astype(x.dtype)
    return PruMerged(out, jnp.concatenate([present, jnp.ones_like(present[:, :1])], axis=1))


def prumerge_adaptive(
    x: Float[Array, "B N E"], attention: Float[Array, "B N"], keys: Float[Array, "B N E"], *, stepped: bool = False
) -> tuple[PruMerged, Int[Array, "B N"]]:
    """The published adaptive rule with fixed shapes. Also returns the kept tokens in their order, N for an empty place.

    As many tokens stay as there are outliers, or one less where the authors' int(N * (count / N)) rounds down.

    Args:
      stepped: use PruMerge+.
    """
    n = x.shape[1]
    found = outliers(attention)[:, None]
    count = jnp.asarray([int(n * (c / n)) for c in range(n + 1)])[found]
    kept, place = ranked_indices(attention, n), jnp.arange(n)
    if stepped:
        kept, count = _with_steps(kept, count, jnp.asarray(_strides(n))[found])
    present = place < count
    # Dropped tokens follow the kept ones in `kept`. Their order does not matter, since they are only summed.
    done = prumerge(x, attention, keys, kept, kept, present, ~present)
    return done, jnp.where(present, kept, n)


def _with_steps(kept: Array, count: Array, stride: Array) -> tuple[Array, Array]:
    """The outliers, then every stride-th token that is not an outlier."""
    n = kept.shape[1]
    place = jnp.arange(n)
    order = jnp.put_along_axis(
        kept, kept, jnp.broadcast_to(place.astype(kept.dtype), kept.shape), axis=1, inplace=False
    )
    outlier = order < count
    # The authors' range ends before the last token.
    stepped = ~outlier & (place % stride == 0) & (place < n - 1)
    order_key = jnp.where(outlier, order, jnp.where(stepped, n + place, 2 * n + order))
    return jnp.argsort(order_key, axis=1).astype(jnp.int32), (outlier | stepped).sum(1, keepdims=True)


def _strides(n: int) -> np.ndarray:
    """Table of strides by the number of outliers: a third of N / outliers, both divisions rounded down.

    The stride is at least 1; the authors' code fails where it would be 0.
    """
    return np.array([n] + [max(1, int(int(1 / (c / n)) / 3)) for c in range(1, n + 1)])


def even_steps(patches: int, ratio: float) -> Int[np.ndarray, " n"]:
    """The tokens that PruMerge+ adds to a fixed share: every (1 / ratio)-th, starting at half a step."""
    step = int(1 / ratio)
    return np.arange(step // 2, patches - 1, step)


def as_released(kept: Int[Array, "B n"], total: int) -> Int[Array, "B m"]:
    """Dropped tokens by the authors' `complement_idx`. Each duplicate in `kept` makes one other token get lost."""
    rows = jnp.arange(kept.shape[0])[:, None]
    place = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (kept.shape[0], total))
    return jnp.sort(place.at[rows, kept].set(0), axis=1)[:, kept.shape[1] :]


def stepped_order(attention: Float[Array, "B N"], n: int) -> Int[Array, "B n"]:
    """n tokens for PruMerge+ with an exact budget: half by attention, half at even steps over the other tokens."""
    top = ranked_indices(attention, n - n // 2)
    rest = complement(top, attention.shape[1])
    m = n // 2
    even = (np.arange(m) * rest.shape[1] + rest.shape[1] // 2) // max(m, 1)
    return jnp.concatenate([top, rest[:, even]], axis=1)
