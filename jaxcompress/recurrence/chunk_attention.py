"""Attention of a chunk of tokens over the slots and over each other: causal attention, and what a policy watches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcompress.recurrence.attention import Extra
from jaxcompress.recurrence.softmax import Exponentials, exponentials
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.precision import weighted
from jaxcompress.state.shapes import Positions, Weights

QUERY_BLOCK = 128
"""Maximum number of queries that attend at once. It bounds the memory of a one-shot prompt."""

_PREFIXES = 16
"""Maximum number of different lengths of the part of a chunk that blocks of queries meet."""


class ChunkKeys(NamedTuple):
    """Keys and values that a chunk of T queries attends to: those in the slots, then the chunk's own.

    Attributes:
      keys, values: [B, K, N, D] float32, so that gradients of many queries are summed in float32; codes if quantised.
      key_scale, value_scale: [B, K, N], the factors of the codes; None if not quantised.
      dtypes: the dtypes in which keys and values are stored.
      slots: the number of slots, S. The chunk's own keys follow in the order of its tokens, the same number for each.
      occupied: whether any slot holds a token. If not, queries meet only the chunk.
    """

    keys: Float[Array, "B K N D"]
    values: Float[Array, "B K N D"]
    key_scale: Float[Array, "B K N"] | None
    value_scale: Float[Array, "B K N"] | None
    dtypes: tuple[Any, Any]
    slots: int
    occupied: Bool[Array, ""]

    def part(self, columns: slice) -> ChunkKeys:
        """Some of the keys and values."""
        pick = lambda x: x if x is None else x[:, :, columns]
        return self._replace(
            keys=pick(self.keys), values=pick(self.values),
            key_scale=pick(self.key_scale), value_scale=pick(self.value_scale),
        )  # fmt: skip


class Watch(NamedTuple):
    """What the policy and the layer say about a chunk's attention.

    Attributes:
      visible: positions of queries, and a range of the N keys -> the keys of the range that each query sees.
      extra: stats of all N tokens -> the terms that the policy adds to attention, and the traits of the layer.
      observe: stats of some tokens; the probabilities that some queries give them; positions of these queries; what
        they see -> the stats.
      newest: the number of newest queries that `observe` needs to see; None: all of them.
    """

    visible: Callable[[Positions, slice], Bool[Array, "#B #K #G T N"]]
    extra: Callable[[Stats], Extra]
    observe: Callable[[Stats, Weights, Positions, Array], Stats]
    newest: int | None


def chunk_attention(
    q: Float[Array, "B T K G D"], at: Positions, given: ChunkKeys, stats: Stats, watch: Watch
) -> tuple[Stats, Float[Array, "B T K G D"]]:
    """Attention of a chunk of queries over the slots and the chunk's own tokens.

    Queries are taken in blocks of at most `QUERY_BLOCK`. Each block meets the slots, if any is occupied, and only the
    tokens of the chunk up to the end of its sixteenth of the chunk. Probabilities exist for one block at a time, and
    are computed again for the gradient. So memory grows with T, not T squared, and the cost is that of causal
    attention. To it comes what the policy watches: nothing, its newest queries again, or a pass over all probabilities.

    Args:
      at: [B, T], positions of the queries, growing along T; -1 for padding.
      stats: the policy's statistics of all N tokens.

    Returns:
      The stats after all queries, and the output.
    """
    t = at.shape[1]
    watched = t if watch.newest is None else min(watch.newest, t)
    each = partial(_attend, given=given, watch=watch, watched=watched == t)
    blocks = _blocks(q, at)

    def over(first: int, stats: Stats) -> tuple[Stats, Array]:
        """All queries, over the keys from `first` on."""
        n, size = blocks[1].shape[0], blocks[1].shape[2]
        per_token, outs = (given.keys.shape[2] - given.slots) // t, []
        for start in range(0, n, many := -(-n // _PREFIXES)):
            columns = slice(first, given.slots + min((start + many) * size, t) * per_token)
            some = slice(start, start + many)
            stats, out = jax.lax.scan(partial(each, columns), stats, (blocks[0][some], blocks[1][some]))
            outs.append(out)
        out = jnp.concatenate(outs)  # [n, B, K, G, size, D]
        return stats, out.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape[0], -1, *q.shape[2:])[:, :t]

    stats, out = jax.lax.cond(given.occupied, partial(over, 0), partial(over, given.slots), stats)
    if 0 < watched < t:
        stats = _newest(q, at, given, stats, watch, watched)
    return stats, out


def _blocks(q: Float[Array, "B T K G D"], at: Positions) -> tuple[Array, Array]:
    """Queries [n, B, K, G, size, D] and their positions [n, B, size], in blocks of equal size with little padding."""
    b, t, k, g, d = q.shape
    n = -(-t // QUERY_BLOCK)
    size = -(-t // n)
    pad = [(0, 0), (0, n * size - t)]
    at = jnp.pad(at, pad, constant_values=-1).reshape(b, n, size).swapaxes(0, 1)
    q = jnp.pad(q, [*pad, (0, 0), (0, 0), (0, 0)]).reshape(b, n, size, k, g, d)
    return q.transpose(1, 0, 3, 4, 2, 5), at


def _attend(
    columns: slice, stats: Stats, block: tuple[Array, Array], *, given: ChunkKeys, watch: Watch, watched: bool
) -> tuple[Stats, Float[Array, "B K G T D"]]:
    """One block of queries over some of the keys. Its weights are computed again for the gradient."""

    @jax.checkpoint
    def attend(stats: Stats, q: Array, at: Array) -> tuple[Stats, Array]:
        part, seen, extra = given.part(columns), watch.visible(at, columns), watch.extra(stats)
        parts = _exponentials(q, part, seen, extra, columns)
        share = (at >= 0)[:, None, None, :, None] / parts.total
        out = weighted_sum(parts.visible, part)
        if extra.summary is not None and parts.others is not None:
            out += weighted("bkgtm,bkmd->bkgtd", parts.others, extra.summary.values)
        if watched:
            some = watch.observe(_some(stats, columns), parts.visible * share, at, seen)
            stats = jax.tree.map(lambda x, y: x.at[:, :, columns].set(y), stats, some)
        return stats, (out * share).astype(q.dtype)

    return attend(stats, *block)


def _newest(
    q: Float[Array, "B T K G D"], at: Positions, given: ChunkKeys, stats: Stats, watch: Watch, count: int
) -> Stats:
    """The stats after the newest queries, whose probabilities are computed again."""
    index = jnp.sort(jax.lax.top_k(at, count)[1], axis=-1)
    newest = jnp.take_along_axis(q, index[:, :, None, None, None], axis=1), jnp.take_along_axis(at, index, axis=1)
    every = slice(0, given.keys.shape[2])

    def observe(stats: Stats, block: tuple[Array, Array]) -> tuple[Stats, None]:
        q, at = block
        seen = watch.visible(at, every)
        parts = _exponentials(q, given, seen, watch.extra(stats), every)
        return watch.observe(stats, parts.visible * ((at >= 0)[:, None, None, :, None] / parts.total), at, seen), None

    return jax.lax.scan(observe, stats, _blocks(*newest))[0]


def _exponentials(
    q: Float[Array, "B K G T D"], keys: ChunkKeys, seen: Array, extra: Extra, columns: slice
) -> Exponentials:
    scores = extra.traits.capped(chunk_scores(q, keys))
    if extra.bias is not None:
        scores += extra.bias[:, :, None, None, columns]
    others = None if extra.summary is None else extra.summary.scores(q.transpose(0, 3, 1, 2, 4), extra.traits)
    return exponentials(scores, seen, others, extra.traits.sinks_beside(scores))


def chunk_scores(q: Float[Array, "B K G T D"], keys: ChunkKeys) -> Float[Array, "B K G T N"]:
    """Scores of a block of queries before a soft cap and the softmax, float32."""
    b, k, g, t, d = q.shape
    # The query heads of a group are rows of one product: larger products, and keys are never repeated.
    scores = scores_of("bkqd,bknd->bkqn", q.reshape(b, k, g * t, d), keys.keys, keys.dtypes[0])
    scores = scores.reshape(b, k, g, t, -1)
    return scores if keys.key_scale is None else scores * keys.key_scale[:, :, None, None]


def weighted_sum(weights: Float[Array, "B K G T N"], keys: ChunkKeys) -> Float[Array, "B K G T D"]:
    """The values, weighted and summed, float32."""
    b, k, g, t, n = weights.shape
    if keys.value_scale is not None:
        weights = weights * keys.value_scale[:, :, None, None]
    out = weighted("bkqn,bknd->bkqd", weights.reshape(b, k, g * t, n), keys.values, keys.dtypes[1])
    return out.reshape(b, k, g, t, -1)


def _some(stats: Stats, columns: slice) -> Stats:
    return jax.tree.map(lambda x: x[:, :, columns], stats)
