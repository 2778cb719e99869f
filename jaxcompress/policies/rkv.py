"""R-KV: important and not said already (Cai et al. 2025, "R-KV: Redundancy-aware KV Cache Compression")."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import CacheView
from jaxcompress.policies.geometry import for_set
from jaxcompress.policies.policy import policy
from jaxcompress.policies.pooled import neighbours
from jaxcompress.policies.protect import protected
from jaxcompress.policies.recent_queries import RecentQueries, Ring
from jaxcompress.state.shapes import SlotScores
from jaxcompress.state.vectors import unit

_ROWS = 256  # keys compared with all others at once


@policy
class RKV(RecentQueries):
    """Keeps what is important and not redundant; made for long generations, in which models repeat themselves.

        score[n] = mix * importance[n] - (1 - mix) * redundancy[n]
        score[n] = +inf for the last `window` tokens

    Importance is the mean probability from the last `window` queries within the prefix, max-pooled over `kernel`
    tokens. Redundancy is the mean cosine of k_n with the other keys held, softmaxed. For each key, the newest key more
    similar than `threshold` is spared, so that of repeated tokens the last stays.

    The authors compare all keys of a head with each other once per 128 new tokens: combine with `every`. `sketch`
    compares random projections of the keys to so many channels instead (Johnson and Lindenstrauss 1984); cosines err by
    about 1/sqrt(sketch). Two differences from their code. With several query heads per kv head, they take the maximum
    of scores before the softmax; this takes the mean after it. Where no key is similar, they spare the first.

    Raises:
      ValueError: a mix outside 0..1, a window below 1, an even kernel or a sketch below 1.
    """

    label = "rkv"

    mix: float | int = 0.1
    window: int = 8
    kernel: int = 7
    threshold: float | int = 0.5
    sketch: int | None = None
    scope: Literal["layer", "kv_head"] = "kv_head"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen

    def check(self) -> None:
        sketched = self.sketch is None or self.sketch >= 1
        if not 0 <= self.mix <= 1 or self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or not sketched:
            raise ValueError(f"rkv needs mix in 0..1, window >= 1, an odd kernel and sketch >= 1, not {self}")

    def score(self, stats: Ring, held: CacheView) -> SlotScores:
        prefix = held.occupied & (held.positions <= held.newest - self.window)
        mass = jnp.where(prefix[..., None], stats, 0.0)
        mass = (mass / jnp.maximum(mass.sum(2, keepdims=True), 1e-30)).mean(-1)
        importance = neighbours(mass, held, prefix, self.kernel, "max")
        alike = for_set(similarity(_sketched(held.keys, self.sketch), held, self.threshold), held)
        alike = jax.nn.softmax(jnp.where(held.occupied, alike, -jnp.inf), axis=-1)
        return protected(self.mix * importance - (1 - self.mix) * alike, held, recent=self.window)


def similarity(keys: Float[Array, "B K N R"], held: CacheView, threshold: float) -> Float[Array, "B K N"]:
    """Mean cosine of each key with the others held, each other's newest look-alike left out."""
    b, heads, n, _ = keys.shape
    at = jnp.broadcast_to(held.positions, (b, heads, n))
    units = jnp.where(at[..., None] >= 0, unit(keys, 1e-12), 0.0)
    blocks = -(-n // _ROWS)
    pad = [(0, 0), (0, 0), (0, blocks * _ROWS - n)]
    cut = lambda x: jnp.moveaxis(x.reshape(b, heads, blocks, -1, *x.shape[3:]), 2, 0)
    rows = cut(jnp.pad(units, [*pad, (0, 0)])), cut(jnp.pad(at, pad, constant_values=-1))

    def add(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        vector, position = row
        cosine = jnp.einsum("bkmr,bknr->bkmn", vector, units, precision="highest")
        other = (position[..., None] != at[:, :, None]) & (at[:, :, None] >= 0)
        cosine = jnp.where(other, cosine, 0.0)
        like = jnp.where(cosine > threshold, at[:, :, None], -1)
        spared = (like == like.max(-1, keepdims=True)) & (like >= 0)
        return total + jnp.where(spared, 0.0, cosine).sum(2), None

    total, _ = jax.lax.scan(add, jnp.zeros((b, heads, n)), rows)
    return total / jnp.maximum((at >= 0).sum(-1, keepdims=True), 1)


def _sketched(keys: Float[Array, "B K N D"], width: int | None) -> Float[Array, "B K N R"]:
    keys = keys.astype(jnp.float32)
    if width is None:
        return keys
    return jnp.matmul(keys, jax.random.normal(jax.random.key(0), (keys.shape[-1], width)), precision="highest")
