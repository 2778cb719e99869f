"""Scores from keys and values alone. No attention is watched, so any attention kernel serves."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import CacheView, Scope
from jaxcompress.policies.order import by_age
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.policies.protect import protected
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.order import order_by, rank_of
from jaxcompress.state.shapes import SlotScores
from jaxcompress.state.vectors import unit


@policy
class KNorm(Policy):
    """Keeps the keys of smallest norm (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy").

        score[n] = -|k_n|

    Measured once, when the token enters. RoPE does not change it: repeated tokens tie in layer 0. The authors leave the
    first two layers alone (`per_layer`).
    """

    label = "knorm"

    scope: Scope = "kv_head"

    def init(self, incoming: CacheView) -> Stats:
        return for_set(-jnp.linalg.norm(incoming.keys.astype(jnp.float32), axis=-1), incoming)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return stats


@policy
class KeyDiff(Policy):
    """Keeps keys that point away from the mean direction (Park et al. 2025, "KeyDiff").

        score[n] = -cos(k_n, mean of k / |k| over the tokens held)

    Every selection reads all keys once more: combine with `every` for decoding.
    """

    label = "keydiff"

    scope: Scope = "kv_head"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        keys = unit(held.keys.astype(jnp.float32), 1e-12)
        mine = whose(held)  # [B, K, N, heads]
        anchors = jnp.einsum("bknd,bknh->bkhd", keys, mine, precision="highest")
        anchor = jnp.einsum("bkhd,bknh->bknd", unit(anchors, 1e-8), mine, precision="highest")
        return for_set(-(keys * anchor).sum(-1), held)


@policy
class LagKV(Policy):
    """Keeps tokens whose channels spread widely within the range of the chunk after theirs (Liang et al. 2025).

        x = (k - min) / (max - min), per channel, with the range of the next chunk
        score[n] = mean over keys and values of (softmax over the chunk of (std over channels of x))

    The tokens after the first `sinks` are cut into chunks of `lag` by age. A channel that has no range there (repeated
    tokens) gives x = 0. With `cross=False` ranks within a chunk are compared, so that every chunk gives equally many;
    else the scores themselves. The sinks and the last `lag` to `2 * lag - 1` tokens are protected. A selection costs a
    sort and a pass over keys and values.

    Raises:
      ValueError: a lag below 2 tokens, or a pool, in which tokens of different heads have no common order.
    """

    label = "lagkv+{lag}"

    lag: int = 128
    sinks: int = 4
    cross: bool = False
    scope: Scope = "kv_head"

    def check(self) -> None:
        if self.lag < 2 or self.sinks < 0:
            raise ValueError(f"lag must be at least 2 tokens and sinks 0 or more, not {self.lag} and {self.sinks}")
        _no_pool("lagkv", self.scope)

    def shields(self, capacity: int) -> tuple[int, int]:
        return self.sinks, 2 * self.lag - 1

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        lag, sinks, order = self.lag, self.sinks, by_age(held)
        n = held.positions.shape[-1]
        count = order.occupied.sum(-1)[..., None]  # [B, P, 1]
        chunks = max(-(-(n - sinks) // lag), 2)
        parts = []
        for x in (held.keys, held.values):
            x = order.take(x.astype(jnp.float32))[:, :, sinks:]
            x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * lag - x.shape[2]), (0, 0)])
            x = x.reshape(*x.shape[:2], chunks, lag, x.shape[-1])
            after = jnp.roll(x, -1, axis=2)
            low, high = after.min(3, keepdims=True), after.max(3, keepdims=True)
            spread = jnp.where(high > low, (x - low) / jnp.where(high > low, high - low, 1.0), 0.0).std(-1, ddof=1)
            parts.append(jnp.exp(spread - spread.max(-1, keepdims=True)))
            parts[-1] /= parts[-1].sum(-1, keepdims=True)
        part = for_set((parts[0] + parts[1]) / 2, held)  # [B, P, chunks, lag]
        if not self.cross:
            part = rank_of(order_by(part)) / lag
        part = jnp.pad(part.reshape(*part.shape[:2], -1), [(0, 0), (0, 0), (sinks, 0)], constant_values=jnp.inf)[
            ..., :n
        ]
        rank = jnp.arange(n)
        judged = (rank >= sinks) & (sinks + ((rank - sinks) // lag + 2) * lag <= count)
        scores = order.put(jnp.where(judged, part, jnp.inf))
        newest_first = protected(-(held.newest - held.positions).astype(jnp.float32), held, first=sinks)
        return jnp.where(count < sinks + 2 * lag, newest_first, scores)


@policy
class CUR(Policy):
    """Keeps tokens of large keys and values, relative to their surroundings (Sengupta et al. 2025, "CurDKV").

        score[n] = share(|k_n|^2) * share(|v_n|^2)

    A share is that of the sum over windows of `local` tokens by age: cheap leverage scores of a CUR decomposition. The
    first `sinks` tokens are protected. A selection costs a sort and a pass over keys and values.

    Raises:
      ValueError: a window below 1 token, or a pool, in which tokens of different heads have no common order.
    """

    label = "cur"

    local: int = 16
    sinks: int = 4
    scope: Scope = "kv_head"

    def check(self) -> None:
        if self.local < 1 or self.sinks < 0:
            raise ValueError(f"local must be at least 1 token and sinks 0 or more, not {self.local} and {self.sinks}")
        _no_pool("cur", self.scope)

    def shields(self, capacity: int) -> tuple[int, int]:
        return self.sinks, 0

    def init(self, incoming: CacheView) -> Stats:
        square = lambda x: jnp.square(x.astype(jnp.float32)).sum(-1)
        return for_set(square(incoming.keys), incoming), for_set(square(incoming.values), incoming)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        order = by_age(held)
        n = held.positions.shape[-1]

        def share(x: Array) -> Array:
            x = jnp.where(order.occupied, order.take(x), 0.0)
            wide = jnp.pad(x, [(0, 0), (0, 0), (0, -n % self.local)]).reshape(*x.shape[:2], -1, self.local)
            return (wide / jnp.maximum(wide.sum(-1, keepdims=True), 1e-30)).reshape(*x.shape[:2], -1)[..., :n]

        product = share(stats[0]) * share(stats[1])
        scores = order.put(product / jnp.maximum(product.sum(-1, keepdims=True), 1e-30))
        return protected(scores, held, first=self.sinks)


def for_set(x: Float[Array, "B K ..."], held: CacheView) -> Float[Array, "B P ..."]:
    """Numbers of each head -> of each set: the mean where all heads of a layer share one."""
    return x if x.shape[1] == held.positions.shape[1] else x.mean(1, keepdims=True)


def whose(held: CacheView) -> Float[Array, "B K N heads"]:
    """1 where a head holds a candidate, 0 elsewhere. `heads` is 1, or in a pool the number of kv heads."""
    if held.owner is None:
        occupied = jnp.broadcast_to(held.occupied, held.keys.shape[:3])
        return occupied[..., None].astype(jnp.float32)
    return ((held.owner[..., None] == jnp.arange(held.context.heads[1])) & held.occupied[..., None]).astype(jnp.float32)


def _no_pool(name: str, scope: Scope) -> None:
    if scope == "pool":
        raise ValueError(
            f"{name} orders the tokens of a head by age; it cannot be used in a pool, only per head or layer"
        )
