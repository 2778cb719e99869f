"""Scissorhands: tokens that were pivotal stay pivotal (Liu et al. 2023)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt16

from jaxcompress.policies.cache_view import CacheView, Observation
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.policies.protect import protected
from jaxcompress.state.shapes import SlotScores

BITS = 16

Bits = UInt16[Array, "B P N words"]


@policy
class Scissorhands(Policy):
    """Keeps the `recent` newest tokens and, of the others, those that were pivotal most often of late.

        score[n] = number of the last `history` queries q with p(q -> n) >= 1 / t(q)
        score[n] = +inf for the `recent` newest tokens

    p is the attention probability, t(q) the number of keys that q saw (algorithm 2 of the paper counts the complement).
    If heads share a set, their mean probability is compared. The history costs one bit per slot and query. The paper
    drops half of the budget at once: `every(Scissorhands(), capacity // 2)`.

    Raises:
      ValueError: a history below 1 or a negative number of recent tokens.
    """

    label = "scissorhands"

    history: int = 400
    recent: int = 10
    scope: Literal["layer", "kv_head", "query_head"] = "kv_head"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen

    def check(self) -> None:
        if self.history < 1 or self.recent < 0:
            raise ValueError(
                f"history must be at least 1 query and recent 0 or more, not {self.history} and {self.recent}"
            )

    def shields(self, capacity: int) -> tuple[int, int]:
        return 0, self.recent

    @property
    def words(self) -> int:
        """Of history, per slot."""
        return -(-self.history // BITS) + 1

    def init(self, incoming: CacheView) -> Bits:
        return jnp.zeros((*incoming.positions.shape, self.words), jnp.uint16)

    def observe(self, stats: Bits, seen: Observation) -> Bits:
        words = self.words
        at = seen.queries if seen.present is None else seen.present  # a word is begun by whatever query comes first
        pivotal = (seen.per_set(self.scope) * seen.visible[..., None] >= 1) & (seen.visible > 0)[..., None]
        last = (at >= 0) & (at // BITS > at.max(-1, keepdims=True) // BITS - words)
        mine = ((at // BITS % words)[..., None] == jnp.arange(words)) & last[..., None]  # [B, T, words]
        worth = jnp.where(mine, (1 << at % BITS)[..., None], 0).astype(jnp.float32)
        new = jnp.einsum("bptn,btw->bpnw", pivotal.astype(jnp.float32), worth).astype(jnp.uint16)
        first = jnp.where(mine, at[..., None], jnp.iinfo(jnp.int32).max).min(1)  # [B, words]
        lap = mine.any(1) & (first % BITS == 0)  # a word is begun anew: what it held is `words` words old
        return jnp.where(lap[:, None, None], 0, stats) | new

    def score(self, stats: Bits, held: CacheView) -> SlotScores:
        newest = held.newest[..., None]
        oldest = newest - self.history + 1
        word = newest // BITS - (newest // BITS - jnp.arange(self.words)) % self.words  # of the sequence, by place
        young = jnp.where(word == oldest // BITS, (0xFFFF << (oldest % BITS)) & 0xFFFF, 0xFFFF)
        young = jnp.where((word < oldest // BITS) | (word < 0), 0, young).astype(jnp.uint16)
        count = jax.lax.population_count(stats & young).astype(jnp.float32).sum(-1)
        return protected(count, held, recent=self.recent)
