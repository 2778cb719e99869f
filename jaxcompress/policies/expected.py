"""Expected attention: what the queries to come will look at (Devoto et al. 2025)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import CacheView, IncomingTokens
from jaxcompress.policies.checks import check_epsilon
from jaxcompress.policies.geometry import for_set
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.policies.protect import protected
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.placement import rotation_factors
from jaxcompress.state.shapes import SlotScores


class Moments(NamedTuple):
    """Of all queries so far, before RoPE.

    Attributes:
      count: [B] how many.
      mean: [B, H, D].
      spread: [B, H, D, D], the sum of (q - mean) (q - mean)^T.
    """

    count: Float[Array, " B"]  # pyright: ignore[reportIncompatibleMethodOverride]  nobody counts its fields
    mean: Float[Array, "B H D"]
    spread: Float[Array, "B H D D"]


@policy
class ExpectedAttention(Policy):
    """Keeps the tokens that Gaussian queries at the next `future` positions are expected to attend to.

        score[n] = (softmax_n(k.Rm / sqrt(d) + k^T R C R^T k / 2d) + epsilon) |v_n|

    Queries so far have mean m and covariance C before RoPE; R is the mean of the rotations to the next positions. The
    softmax is averaged over the query heads of a kv head. A soft cap of the model's scores does not enter. The first
    `sinks` tokens are protected, and their queries are not counted. Keys must stand at absolute positions. A selection
    multiplies every key by the covariance: combine with `every` for decoding.

    Raises:
      ValueError: fewer than 1 future position, a negative number; where keys are re-indexed, when it is used.
    """

    label = "expected_attention"

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float | int = 0.0
    scope: Literal["layer", "kv_head"] = "kv_head"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen

    def check(self) -> None:
        if self.future < 1 or self.sinks < 0:
            raise ValueError(
                f"future must be at least 1 position and sinks 0 or more, not {self.future} and {self.sinks}"
            )
        check_epsilon(self.epsilon)

    def shields(self, capacity: int) -> tuple[int, int]:
        return self.sinks, 0

    def memory(self, held: CacheView) -> Moments:
        rows, d, heads = held.keys.shape[0], held.keys.shape[-1], held.context.heads[0]
        return Moments(jnp.zeros(rows), jnp.zeros((rows, heads, d)), jnp.zeros((rows, heads, d, d)))

    def remember(self, memory: Moments, incoming: IncomingTokens) -> Moments:
        here = (incoming.positions >= self.sinks)[:, :, None, None].astype(jnp.float32)
        q = incoming.q.astype(jnp.float32)
        more = here.sum((1, 2, 3))
        count = memory.count + more
        mean = (q * here).sum(1) / jnp.maximum(more, 1)[:, None, None]
        rest = (q - mean[:, None]) * here
        share = (more / jnp.maximum(count, 1))[:, None, None]
        apart = mean - memory.mean
        between = (
            jnp.einsum("bhi,bhj->bhij", apart, apart, precision="highest")
            * (memory.count[:, None, None] * share)[..., None]
        )
        spread = (
            memory.spread + jnp.einsum("bthi,bthj->bhij", rest, rest, precision="highest") + between
        )  # Chan et al. 1979
        return Moments(count, memory.mean + apart * share, spread)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        context, moments = held.context, held.memory
        if context.placement != "absolute":
            raise ValueError(
                f"expected_attention needs keys at absolute positions, not placement {context.placement!r}: it "
                "foresees how queries at the next positions will be rotated"
            )
        heads, d = moments.mean.shape[1:]
        basis = jnp.eye(d)
        ahead = context.rotate(basis, jnp.arange(self.future, dtype=jnp.float32)[:, None]).mean(0)
        ahead = ahead / rotation_factors(context.rotate, d)  # which turning to the next positions multiplies by
        start = (held.positions.max((1, 2)) + 1).astype(jnp.float32)

        def turn(x: Array) -> Array:
            """To the mean of the next positions, along the last axis."""
            ahead_of = jnp.matmul(x, ahead, precision="highest")
            return context.rotate(ahead_of, jnp.broadcast_to(start.reshape(-1, *[1] * (x.ndim - 2)), x.shape[:-1]))

        keys = held.keys.astype(jnp.float32)
        grouped = lambda x: x.reshape(x.shape[0], keys.shape[1], -1, *x.shape[2:])
        exponent = jnp.einsum("bkgd,bknd->bkgn", grouped(turn(moments.mean)), keys, precision="highest") * d**-0.5
        if self.covariance:
            spread = moments.spread / jnp.maximum(moments.count, 1)[:, None, None, None]
            spread = turn(turn(spread).swapaxes(-1, -2))
            exponent += jnp.einsum("bkni,bkgij,bknj->bkgn", keys, grouped(spread), keys, precision="highest") / (2 * d)
        judged = held.occupied & (held.positions >= self.sinks)
        exponent = jnp.where(judged[:, :, None], exponent, -jnp.inf)
        weights = jnp.nan_to_num(jax.nn.softmax(exponent, axis=-1)).mean(2)
        if self.value_norm:
            weights = (weights + self.epsilon) * jnp.linalg.norm(held.values.astype(jnp.float32), axis=-1)
        return protected(for_set(weights, held), held, first=self.sinks)
