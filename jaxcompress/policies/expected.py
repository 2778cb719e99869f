"""Expected attention: what the queries to come will look at (Devoto et al. 2025)."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.geometry import for_set
from jaxcompress.policies.policy import Candidates, Incoming, Policy
from jaxcompress.shapes import SlotScores
from jaxcompress.state import Stats


class Moments(NamedTuple):
    """Of all queries so far, before RoPE.

    Attributes:
      count: [B] how many.
      mean: [B, H, D].
      spread: [B, H, D, D], the sum of (q - mean) (q - mean)^T.
    """

    count: Float[Array, " B"]
    mean: Float[Array, "B H D"]
    spread: Float[Array, "B H D D"]


@cache
def expected_attention(
    future: int = 512, sinks: int = 4, covariance: bool = True, value_norm: bool = True, epsilon: float = 0.0,
    scope: Literal["layer", "kv_head"] = "kv_head",
) -> Policy:  # fmt: skip
    """Keeps the tokens that Gaussian queries at the next `future` positions are expected to attend to.

    Queries so far have mean m and covariance C before RoPE; R is the mean of the rotations to the next positions. Then
    score[n] = (softmax_n(k.Rm / sqrt(d) + k^T R C R^T k / 2d) + epsilon) |v_n|, averaged over the query heads of a kv
    head; the first `sinks` tokens are protected, and their queries are not counted. Needs keys at absolute positions. A
    selection costs a product with the covariance per key: combine with `every` for decoding.

    Raises:
      ValueError: fewer than 1 future position; where keys are re-indexed, when it is used.
    """
    if future < 1 or sinks < 0:
        raise ValueError(f"future must be at least 1 position and sinks 0 or more, not {future} and {sinks}")

    def memory(held: Candidates) -> Moments:
        rows, d, heads = held.keys.shape[0], held.keys.shape[-1], held.around.heads[0]
        return Moments(jnp.zeros(rows), jnp.zeros((rows, heads, d)), jnp.zeros((rows, heads, d, d)))

    def remember(so_far: Moments, incoming: Incoming) -> Moments:
        here = (incoming.positions >= sinks)[:, :, None, None].astype(jnp.float32)
        q = incoming.q.astype(jnp.float32)
        more = here.sum((1, 2, 3))
        count = so_far.count + more
        mean = (q * here).sum(1) / jnp.maximum(more, 1)[:, None, None]
        rest = (q - mean[:, None]) * here
        share = (more / jnp.maximum(count, 1))[:, None, None]
        apart = mean - so_far.mean
        between = jnp.einsum("bhi,bhj->bhij", apart, apart) * (so_far.count[:, None, None] * share)[..., None]
        spread = so_far.spread + jnp.einsum("bthi,bthj->bhij", rest, rest) + between  # Chan et al. 1979
        return Moments(count, so_far.mean + apart * share, spread)

    def score(stats: Stats, held: Candidates) -> SlotScores:
        around, moments = held.around, held.memory
        if around.placement != "absolute":
            raise ValueError(
                f"expected_attention needs keys at absolute positions, not placement {around.placement!r}: it foresees "
                "how queries at the next positions will be rotated"
            )
        heads, d = moments.mean.shape[1:]
        basis = jnp.eye(d)
        size = around.rotate(basis, jnp.zeros(d))[0, 0]  # 1, or the temperature that YaRN puts into its rotations
        ahead = around.rotate(basis, jnp.arange(future, dtype=jnp.float32)[:, None]).mean(0) / size
        start = (held.positions.max((1, 2)) + 1).astype(jnp.float32)

        def turn(x: Array) -> Array:
            """To the mean of the next positions, along the last axis."""
            return around.rotate(x @ ahead, jnp.broadcast_to(start.reshape(-1, *[1] * (x.ndim - 2)), x.shape[:-1]))

        keys = held.keys.astype(jnp.float32)
        grouped = lambda x: x.reshape(x.shape[0], keys.shape[1], -1, *x.shape[2:])
        exponent = jnp.einsum("bkgd,bknd->bkgn", grouped(turn(moments.mean)), keys) * d**-0.5
        if covariance:
            spread = moments.spread / jnp.maximum(moments.count, 1)[:, None, None, None]
            spread = turn(turn(spread).swapaxes(-1, -2))
            exponent += jnp.einsum("bkni,bkgij,bknj->bkgn", keys, grouped(spread), keys) / (2 * d)
        judged = held.occupied & (held.positions >= sinks)
        exponent = jnp.where(judged[:, :, None], exponent, -jnp.inf)
        weights = jnp.nan_to_num(jax.nn.softmax(exponent, axis=-1)).mean(2)
        if value_norm:
            weights = (weights + epsilon) * jnp.linalg.norm(held.values.astype(jnp.float32), axis=-1)
        return jnp.where(held.positions < sinks, jnp.inf, for_set(weights, held))

    name = "expected_attention" if scope == "kv_head" else f"expected_attention-{scope}"
    return Policy(name, score=score, memory=memory, remember=remember, scope=scope, needs=sinks + 1)
