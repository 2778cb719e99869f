"""CriticalKV: what a token writes counts, not only how much it is read (Feng et al. 2025)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import CacheView, Observation
from jaxcompress.policies.checks import check_epsilon
from jaxcompress.policies.geometry import for_set
from jaxcompress.policies.policy import policy
from jaxcompress.policies.wrapper import wrapper
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.select import keep_top
from jaxcompress.state.shapes import SlotScores


@policy
class critical(wrapper):
    """Keeps a share of the slots by score, and fills the others by score times the size of what values write.

    Tokens that are not chosen by score compete by (score + epsilon) |W_o v_n|_1, averaged over the query heads of the
    group, where W_o is the layer's output projection. A negative score is divided by the size, so that it counts for a
    token there too. |W_o v| is computed once, when the token enters, at the cost of one output projection per kv head.
    Use it around policies without a value norm of their own.

    Raises:
      ValueError: a share outside 0..1, a negative epsilon, a policy that never evicts; when used without a model
        (`advance(project=...)`).
    """

    share: float | int = 0.5
    epsilon: float | int = 1e-4

    def check(self) -> None:
        super().check()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in 0..1, not {self.share}")
        check_epsilon(self.epsilon)
        if self.policy.reduction:
            raise ValueError(
                f"critical: reduce it, not the policy in it: with_reduce(critical(...), ...), not {self.policy.name}"
            )

    def init(self, incoming: CacheView) -> Stats:
        return self.policy.init(incoming), _written(incoming)

    @property
    def watches(self) -> int | None:
        return self.policy.watches

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return self.policy.observe(stats[0], seen), stats[1]

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        scores = self.policy.score(stats[0], held)
        sure = keep_top(scores, held.positions, int(round(held.capacity * self.share, 6)))
        raised, size = scores + self.epsilon, stats[1]
        weighed = jnp.where(raised > 0, raised * size, raised / jnp.maximum(size, 1e-30))
        return jnp.where(sure | jnp.isposinf(scores), jnp.inf, weighed)


def _written(held: CacheView) -> Float[Array, "B P N"]:
    """|W_o v|_1 of each token, the mean over the query heads that read it."""
    out = held.context.out
    if out is None:
        raise ValueError("critical weighs values by the output projection: call advance with project=, or read a model")
    values = held.values.astype(jnp.float32)
    out = out.astype(jnp.float32)
    group = out.shape[1]
    if values.shape[1] == out.shape[0] * group and group > 1:  # a set per query head
        out = out.reshape(-1, 1, *out.shape[2:])
    size = lambda v, w: jnp.abs(jnp.einsum("bnd,gde->bgne", v, w, precision="highest")).sum(-1).mean(1)
    if held.owner is None:
        return for_set(jnp.stack([size(values[:, k], out[k]) for k in range(out.shape[0])], axis=1), held)
    every = jnp.stack([size(values[:, 0], w) for w in out], axis=-1)  # [B, N, K]
    return jnp.take_along_axis(every[:, None], held.owner[..., None], axis=-1)[..., 0]
