"""Selection by chunks of text."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.policies.cache_view import CacheView
from jaxcompress.policies.policy import policy
from jaxcompress.policies.wrapper import wrapper
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.order import NEVER, order_by, rank_within
from jaxcompress.state.shapes import SlotScores


@policy
class _chunked(wrapper):
    length: int = 20

    def check(self) -> None:
        super().check()
        if self.length < 1:
            raise ValueError(f"a chunk has at least 1 token, not {self.length}")
        if self.policy.scope == "pool":
            raise ValueError(f"chunks need a policy that scores the tokens of a layer or head; not {self.policy.name}")

    def chunk(self, held: CacheView) -> Int[Array, "B P N"]:
        """The chunk of each candidate; free ones come after all others."""
        return jnp.where(held.occupied, held.positions // self.length, NEVER)


@policy
class by_chunks(_chunked):
    """ChunkKV: keeps whole chunks of `length` tokens, so that what stays can be read (Liu et al. 2025).

    Chunk c holds positions c * length to (c + 1) * length - 1. score[n] = mean score of the tokens held of n's chunk.
    If the capacity is no multiple of the length, the last chunk chosen keeps its oldest tokens. Protected tokens
    never go, and their chunks are chosen first. The paper selects for all heads of a layer together: use a policy of
    scope `layer`. Costs a sort.

    Raises:
      ValueError: a length below 1, a pool, or a policy that never evicts.
    """

    label = "by_chunks{length}"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = self.policy.score(stats, held)
        chunk = self.chunk(held)
        order = order_by(chunk)
        part = _segments(jnp.take_along_axis(chunk, order, axis=-1))
        mine = jnp.where(held.occupied, scores, 0.0)
        sums = _sum(jnp.take_along_axis(mine, order, axis=-1), part)
        counts = _sum(jnp.take_along_axis(held.occupied.astype(jnp.float32), order, axis=-1), part)
        mean = jnp.take_along_axis(sums / jnp.maximum(counts, 1), part, axis=-1)
        return jnp.put_along_axis(jnp.zeros_like(mean), order, mean, axis=-1, inplace=False)


@policy
class within_chunks(_chunked):
    """Keeps equally many tokens of every chunk of `length` tokens (Corallo and Papotti 2024, FINCH).

    score[n] = - rank of token n within its chunk, by the policy's scores. Protected tokens (+inf) stay protected. Costs
    a sort.

    Raises:
      ValueError: a length below 1, a pool, or a policy that never evicts.
    """

    label = "within_chunks{length}"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = self.policy.score(stats, held).astype(jnp.float32)
        rank = rank_within(self.chunk(held), -scores, held.positions).astype(jnp.float32)
        return jnp.where(jnp.isposinf(scores), jnp.inf, -rank)


def _segments(chunk: Array) -> Array:
    """0, 0, 1, 1, 1, ... along sorted chunks."""
    return jnp.cumsum(jnp.diff(chunk, axis=-1, prepend=-1) != 0, axis=-1) - 1


def _sum(x: Array, part: Array) -> Array:
    rows, sets = jnp.indices(x.shape[:2], sparse=True)
    return jnp.zeros_like(x).at[rows[..., None], sets[..., None], part].add(x)
