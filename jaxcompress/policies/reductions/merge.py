"""Reductions that merge evicted tokens into the values of what stays."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.policies.cache_view import Absorbed, CacheView, Evicted
from jaxcompress.policies.draws import per_token
from jaxcompress.policies.reduction import Reduction
from jaxcompress.policies.reductions.nearest import add_shares, in_blocks, nearest, pour
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.order import age_key, oldest_first, rank_of
from jaxcompress.state.values import value
from jaxcompress.state.vectors import norm


@value
class merge_nearest(Reduction):
    """Merges an evicted value into the kept token with the most similar key (kvpress's MergingPress).

    For evicted e and its target t, the kept token whose cached key has the largest cosine to e's:

      w_e = max(cos(k_e, k_t), 0) * |v_e| / (|v_e| + |v_t|)        v_t <- (v_t + sum w_e v_e) / (1 + sum w_e)

    The sums run over all tokens that are evicted into t at once. Tokens less similar than `threshold` are dropped.
    """

    threshold: float | int = 0.0

    def check(self) -> None:
        check_share("threshold", self.threshold, -1.0)

    def absorb(self, numbers: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        near = nearest(held, gone)
        size = norm(gone.values)
        other = norm(jnp.take_along_axis(held.values, near.target[..., None], axis=2))
        passes = near.found & (near.cosine >= self.threshold)
        weight = jnp.where(passes, jnp.maximum(near.cosine, 0.0) * size / (size + other), 0.0)
        total, weights = pour(near.target, weight, gone.values, held.values.shape[2])
        values = (held.values + total) / (1 + weights)[..., None]
        return Absorbed(values, weights > 0, numbers, held.memory)


@value
class merge_weighted(Reduction):
    """Merges an evicted value into the kept token with the most similar key: a mean of all that the slot stands for.

    Each slot carries n, how many tokens it stands for, and attention adds log n to its score (the proportional
    attention of Bolya et al. 2023, "Token Merging"):

      v_t <- (n_t v_t + sum n_e v_e) / (n_t + sum n_e)        n_t <- n_t + sum n_e

    Merging tokens of equal key and value changes nothing, and tokens of equal key are merged without error. The mean of
    all values, weighted by n, stays as it was. A slot that many unlike tokens have joined draws as much attention as
    all of them together, so recall of single facts is lost.
    """

    weighs = True

    def absorb(self, numbers: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        near = nearest(held, gone)
        weight = jnp.where(near.found, gone.stats, 0.0)
        total, weights = pour(near.target, weight, gone.values, held.values.shape[2])
        together = jnp.maximum(numbers + weights, 1.0)[..., None]
        values = jnp.where(weights[..., None] > 0, (numbers[..., None] * held.values + total) / together, held.values)
        return Absorbed(values, weights > 0, numbers + weights, held.memory)

    def init(self, positions: Int[Array, "B K T"]) -> Stats:
        return jnp.ones(positions.shape, jnp.float32)

    def bias(self, numbers: Stats) -> Float[Array, "B K N"]:
        return jnp.log(jnp.maximum(numbers, 1.0))


@value
class cam(Reduction):
    """Spreads an evicted value evenly over the next kept tokens, by chance (Zhang et al. 2024, "CaM: Cache Merging").

    With the m <= `targets` oldest of the kept tokens younger than e, and mass a = all attention that a token received:

      v_t <- v_t + v_e / m  for each of them, with probability min(a_e / mean a_t, 1), else e is dropped

    The draw depends on seed, layer, head and position only. Values are added, not averaged: they grow with every
    eviction, without bound where every step evicts.
    """

    label = "cam{targets}"

    targets: int = 32
    seed: int = 0

    def check(self) -> None:
        if self.targets < 1:
            raise ValueError(f"targets must be at least 1 token, not {self.targets}")

    def absorb(self, numbers: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        kept = held.positions >= 0
        age, rank = age_key(held.positions), rank_of(oldest_first(held.positions))
        draw = per_token(self.seed, held._replace(positions=gone.positions))

        def block(sums: Any, parts: Any) -> Any:
            there, position, own, draw, values = parts
            older = (kept[:, :, None] & (age[:, :, None] <= position[..., None])).sum(-1, keepdims=True)
            nth = rank[:, :, None] - older
            chosen = (kept[:, :, None] & (nth >= 0) & (nth < self.targets)).astype(jnp.float32)  # [B, K, m, N]
            count = jnp.maximum(chosen.sum(-1), 1.0)
            mean = jnp.einsum("bkmn,bkn->bkm", chosen, numbers, precision="highest") / count
            share = jnp.where(there & (draw * mean < own), 1 / count, 0.0)[..., None] * chosen
            return add_shares(sums, share, values), ()

        parts = gone.positions >= 0, gone.positions, gone.stats, draw, gone.values
        (total, weights), _ = in_blocks(block, _no_sums(held), parts)
        return Absorbed(held.values + total, weights > 0, numbers, held.memory)

    def init(self, positions: Int[Array, "B K T"]) -> Stats:
        return jnp.zeros(positions.shape, jnp.float32)

    def observe(self, numbers: Stats, mass: Float[Array, "B K N"]) -> Stats:
        return numbers + mass


class _Limit(NamedTuple):
    """[B, K] each: a running threshold, and whether there is one yet (1.0)."""

    threshold: Float[Array, "B K"]
    started: Float[Array, "B K"]


@value
class d2o(Reduction):
    """Merges an evicted value into the most similar kept token if it is similar enough (Wan et al. 2024, "D2O").

    c_e is the largest cosine between the key of an evicted token and those that stay. The threshold is a running mean
    of c_e, one per row and kv head: the mean of the first eviction, then old * threshold + new * mean at every later
    one. Tokens that reach it are averaged in:

      v_t <- (e v_t + sum exp(c_e) v_e) / (e + sum exp(c_e))

    The weights are the paper's; its code also merges rotated keys, which this does not.
    """

    old: float | int = 0.5
    new: float | int = 0.5

    def check(self) -> None:
        check_share("old", self.old)
        check_share("new", self.new)

    def absorb(self, numbers: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        near, before = nearest(held, gone), held.memory
        cosine = jax.lax.stop_gradient(near.cosine)
        count = near.found.sum(-1)
        mean = jnp.where(near.found, cosine, 0.0).sum(-1) / jnp.maximum(count, 1)
        limit = jnp.where(before.started > 0, self.old * before.threshold + self.new * mean, mean)
        limit = jnp.where(count > 0, limit, before.threshold)
        # A little slack, since the mean of equal numbers may be rounded up.
        weight = jnp.where(near.found & (cosine >= limit[..., None] - 1e-6), jnp.exp(near.cosine), 0.0)
        total, weights = pour(near.target, weight, gone.values, held.values.shape[2])
        values = (math.e * held.values + total) / (math.e + weights)[..., None]
        started = jnp.maximum(before.started, count > 0)
        return Absorbed(values, weights > 0, numbers, _Limit(limit, started))

    def memory(self, rows: int, heads: int, width: int) -> _Limit:
        return _Limit(jnp.zeros((rows, heads)), jnp.zeros((rows, heads)))


def _no_sums(held: CacheView) -> tuple[Array, Array]:
    return jnp.zeros_like(held.values), jnp.zeros_like(held.values[..., 0])


def check_share(name: str, value: float, low: float = 0.0) -> None:
    if not low <= value <= 1:
        raise ValueError(f"{name} must be in {low:g}..1, not {value!r}")
