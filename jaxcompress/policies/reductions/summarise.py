"""Reductions that keep stand-ins for what was evicted, which every query sees beside the slots."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import Absorbed, CacheView, Evicted, LayerContext
from jaxcompress.policies.reduction import Reduction
from jaxcompress.policies.summary import Summary
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.placement import unrotated
from jaxcompress.state.values import value
from jaxcompress.state.vectors import unit


class MeanSlots(NamedTuple):
    """Stand-ins of `mean_slots`.

    Attributes:
      keys, values: [B, K, n, D], means; keys before rotation.
      position: [B, K, n], mean.
      count: [B, K, n], how many tokens each stands for.
    """

    keys: Float[Array, "B K n D"]
    values: Float[Array, "B K n D"]
    position: Float[Array, "B K n"]
    count: Float[Array, "B K n"]  # pyright: ignore[reportIncompatibleMethodOverride]  nobody counts its fields


@value
class mean_slots(Reduction):
    """Summarises what was evicted by n means per kv head, which every query sees beside the slots.

    An online k-means. An evicted token joins the stand-in whose mean key, before rotation, has the largest cosine to
    its own; empty ones are filled first. A stand-in is the running mean of un-rotated keys, values and positions.
    Queries see it at its mean position, with log(how many it stands for) added to its score. This is exact where all of
    its keys are equal and stand in one place.

    Tokens that are evicted together join one after the other, the oldest first. Costs n * (2 D + 2) float32 numbers per
    row and kv head, as much as about n slots of float32.
    """

    label = "mean_slots{n}"

    n: int = 4
    summarises = True

    def check(self) -> None:
        if self.n < 1:
            raise ValueError(f"mean_slots needs at least 1 stand-in, not {self.n}")

    def memory(self, rows: int, heads: int, width: int) -> MeanSlots:
        vectors, numbers = jnp.zeros((rows, heads, self.n, width)), jnp.zeros((rows, heads, self.n))
        return MeanSlots(vectors, vectors, numbers, numbers)

    def absorb(self, numbers: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        context, there = held.context, gone.positions >= 0
        bare = unrotated(context.rotate, gone.keys, gone.positions)

        def join(old: MeanSlots, token: Any) -> Any:
            key, value, position, there = token  # [B, K, D], [B, K]
            like = jnp.einsum("bknd,bkd->bkn", unit(old.keys), unit(key), precision="highest")
            to = jnp.where(old.count == 0, jnp.inf, jax.lax.stop_gradient(like)).argmax(-1)
            here = (jnp.arange(self.n) == to[..., None]) & there[..., None]
            count = old.count + here
            share = jnp.where(here, 1 / jnp.maximum(count, 1.0), 0.0)
            means = old.keys, old.values, old.position[..., None]
            new = zip(means, (key, value, position[..., None]), strict=True)
            keys, values, position = (x + share[..., None] * (y[:, :, None] - x) for x, y in new)
            return MeanSlots(keys, values, position[..., 0], count), ()

        # The newest come first in what goes.
        tokens = bare, gone.values, gone.positions.astype(jnp.float32), there
        if gone.positions.shape[-1] == 1:
            new, _ = join(held.memory, tuple(x[:, :, 0] for x in tokens))
        else:
            new, _ = jax.lax.scan(join, held.memory, tuple(jnp.moveaxis(x, 2, 0) for x in tokens), reverse=True)
        return Absorbed(held.values, jnp.zeros(held.positions.shape, bool), numbers, new)

    def summary(self, memory: MeanSlots, context: LayerContext) -> Summary:
        bias = jnp.where(memory.count > 0, jnp.log(jnp.maximum(memory.count, 1.0)), -jnp.inf)
        return Summary(context.rotate(memory.keys, memory.position), memory.values, bias[:, :, None])


class LowRank(NamedTuple):
    """State of `low_rank`.

    Attributes:
      values: [B, K, r, D], means weighted by the feature.
      log_mass: [B, K, r], logarithm of the sum of the feature.
      started: [B, K], 1.0 if there is anything.
    """

    values: Float[Array, "B K r D"]
    log_mass: Float[Array, "B K r"]
    started: Float[Array, "B K"]


@value
class low_rank(Reduction):
    """Summarises what was evicted by linear attention with r positive random features (Choromanski et al. 2021).

      phi_i(x) = exp(w_i . x / D^(1/4) - |x|^2 / (2 sqrt D)) / sqrt(r)     w_i ~ N(0, 1), orthogonal in blocks of D
      out = (A + sum_i phi_i(q) H_i) / (Z + sum_i phi_i(q) z_i)            H = sum phi(k) v, z = sum phi(k) of what went

    A / Z is attention over the slots, and phi(q) . phi(k) is exp(q . k / sqrt D) on average over w. Each feature is a
    stand-in with score log(phi_i(q) z_i) and value H_i / z_i: attention over the slots and r more. The estimate is
    unbiased before the division, and of scores without a soft cap. Its variance grows as exp(|q + k|^2 / sqrt D), so a
    few features say little at the norms of trained models.

    Costs r * (D + 1) + 1 float32 numbers per row and kv head.
    """

    label = "low_rank{rank}"

    rank: int = 8
    seed: int = 0
    summarises = True

    def check(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1 feature, not {self.rank}")

    def memory(self, rows: int, heads: int, width: int) -> LowRank:
        return LowRank(
            jnp.zeros((rows, heads, self.rank, width)), jnp.zeros((rows, heads, self.rank)), jnp.zeros((rows, heads))
        )

    def absorb(self, numbers: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        old, there, d = held.memory, (gone.positions >= 0)[..., None], gone.keys.shape[-1]
        features = jnp.einsum(
            "bkmd,rd->bkmr", gone.keys, random_features(self.rank, d, self.seed) * d**-0.25, precision="highest"
        )
        features -= jnp.square(gone.keys).sum(-1, keepdims=True) * (d**-0.5 / 2)
        # Sums of exponentials, relative to the largest: shares of old and new in what is held then.
        nothing = -1e30
        before = jnp.where(old.started[..., None] > 0, old.log_mass, nothing)
        features = jnp.where(there, features, nothing)
        mass = jnp.logaddexp(before, jax.nn.logsumexp(features, axis=2))
        some = (old.started > 0) | there.any((2, 3))
        kept = jnp.where(old.started[..., None] > 0, jnp.exp(before - mass), 0.0)
        share = jnp.where(there, jnp.exp(features - mass[:, :, None]), 0.0)
        values = kept[..., None] * old.values
        values += jnp.einsum("bkmr,bkmd->bkrd", share, gone.values, precision="highest")
        new = LowRank(values, jnp.where(some[..., None], mass, 0.0), some.astype(jnp.float32))
        return Absorbed(held.values, jnp.zeros(held.positions.shape, bool), numbers, new)

    def summary(self, memory: LowRank, context: LayerContext) -> Summary:
        b, k, r, d = memory.values.shape
        bias = jnp.where(memory.started[..., None] > 0, memory.log_mass - math.log(self.rank), -jnp.inf)
        keys = jnp.broadcast_to(
            random_features(self.rank, d, self.seed) * d**0.25, (b, k, r, d)
        )  # Summary divides by sqrt(d)
        return Summary(keys, memory.values, bias[:, :, None], norm=d**-0.5 / 2)


def random_features(rank: int, width: int, seed: int) -> Float[Array, "r D"]:
    """Directions of the features: orthogonal within blocks of D, each distributed as a standard normal vector."""
    rng = np.random.default_rng(seed)
    blocks = []
    for _ in range(-(-rank // width)):
        q, r = np.linalg.qr(rng.standard_normal((width, width)))
        blocks.append((q * np.sign(np.diag(r))).T)  # without the signs directions would not be uniform
    lengths = np.sqrt(rng.chisquare(width, (rank, 1)))
    return jnp.asarray(np.concatenate(blocks)[:rank] * lengths, jnp.float32)
