"""Attention over a block of tokens: causal, under death times, and between all tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.recurrence.softmax import MASKED, exponentials
from jaxcompress.state.attention_traits import PLAIN, AttentionTraits
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.precision import weighted, wide
from jaxcompress.state.shapes import AttentionOut, Keys, Positions, Queries, Values

QUERIES = 128
"""Maximum number of queries that attend at once. Larger blocks need more memory and are slower on a CPU: 256 queries
take 1.4 times as long at rows of 4,096."""


def causal_attention(
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    *,
    window: Int[Array, ""] | None = None,
    streaming: tuple[int, int] | None = None,
    traits: AttentionTraits = PLAIN,
) -> AttentionOut:
    """Every query attends to the tokens at its own and earlier positions, at most `window` of them.

    With `streaming=(sinks, recent)` a query sees only the first `sinks` of these positions and the `recent` newest
    ones.

    Positions grow along T. No query attends to padding (-1). The output of a padded query is finite but has no meaning.
    Queries are taken in blocks (`QUERIES`). Each block meets only the keys up to the end of its sixteenth of the row,
    and its weights are recomputed for the gradient. This costs about half the work of a T x T product, and memory grows
    with T, not T squared.
    """
    return _causal(q, k, v, positions, window, streaming, None, 0, traits)


def forgetful_attention(
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    bias: Float[Array, "B K T"],
    *,
    delay: int,
    window: Int[Array, ""] | None = None,
    traits: AttentionTraits = PLAIN,
) -> AttentionOut:
    """Causal attention that forgets softly: once a key is `delay` positions old, its bias is added to its scores.

    Everything else is as in `causal_attention`, including the blocks. The gradient goes through the bias; keep it
    finite.

    Args:
      bias: one number per key, at most 0: the logarithm of the key's remaining weight.
    """
    return _causal(q, k, v, positions, window, None, bias, delay, traits)


def _causal(  # nine parameters: each of them has some that the other lacks
    q: Queries, k: Keys, v: Values, positions: Positions,
    window: Int[Array, ""] | None, streaming: tuple[int, int] | None, bias: Float[Array, "B K T"] | None, delay: int,
    traits: AttentionTraits,
) -> AttentionOut:  # fmt: skip
    """Both of the above."""
    b, t, h, d = q.shape
    kv = k.shape[2]
    n = -(-t // QUERIES)
    some = -(-t // n)  # blocks of equal size, with little padding
    pad = [(0, 0), (0, n * some - t)]
    at = jnp.pad(positions, pad, constant_values=-1).reshape(b, n, some).swapaxes(0, 1)
    q = jnp.pad(q, [*pad, (0, 0), (0, 0)]).reshape(b, n, some, kv, h // kv, d).transpose(1, 0, 3, 4, 2, 5)
    stored = k.dtype, v.dtype
    k, v = wide(k.swapaxes(1, 2)), wide(v.swapaxes(1, 2))
    outs = []
    for start in range(0, n, many := -(-n // 16)):
        end = min((start + many) * some, t)
        keys, values, key = k[:, :, :end], v[:, :, :end], positions[:, None, :end]

        def attend(block: tuple[Array, Array], keys: Array = keys, values: Array = values, key: Array = key) -> Array:
            q, query = block[0], block[1][:, :, None]
            seen = (key <= query) & (key >= 0)
            if window is not None:
                seen &= key > query - window
            if streaming is not None:
                seen &= (key < streaming[0]) | (key > query - streaming[1])
            late = () if bias is None else (bias[:, :, : key.shape[-1]], (key <= query - delay)[:, None])
            return _attend_block(stored, traits, q, keys, values, seen[:, None], *late)

        blocks = q[start : start + many], at[start : start + many]
        outs.append(attend((blocks[0][0], blocks[1][0]))[None] if many == 1 else jax.lax.map(attend, blocks))
    return jnp.concatenate(outs).transpose(1, 0, 4, 2, 3, 5).reshape(b, n * some, h, d)[:, :t]


def lifetime_attention(  # nine parameters: the arrays, and what bounds and changes the attention
    q: Float[Array, "B T K G D"],
    keys: Float[Array, "B K N D"],
    values: Float[Array, "B K N D"],
    positions: Positions,
    born: Int[Array, "*batch #K N"],
    dies: Int[Array, "*batch #K N"],
    *,
    alive: int,
    block: int = 128,
    traits: AttentionTraits = PLAIN,
) -> Float[Array, "B T K G D"]:
    """Every query attends to the tokens that live at its position: `born <= position < dies`.

    The last T of the N keys belong to the queries; the keys before them are older than any query. Queries are taken in
    blocks. Each block gathers the tokens that live when it begins, at most `alive`, and attends to them and to its own
    tokens. The work is T x (alive + block) for any T. A block's weights are recomputed for the gradient.

    Args:
      positions: [B, T], growing along T, -1 for padding.
      born: the position of each token, -1 for no token.
      dies: the first position whose query no longer sees the token.
    """
    b, t, kv, g, d = q.shape
    past = keys.shape[2] - t
    block = min(block, t)
    n = -(-t // block)
    pad = n * block - t
    q = jnp.pad(q, [(0, 0), (0, pad), (0, 0), (0, 0), (0, 0)])
    positions = jnp.pad(positions, [(0, 0), (0, pad)], constant_values=-1)
    stored = keys.dtype, values.dtype
    keys, values = (wide(jnp.pad(x, [(0, 0), (0, 0), (0, pad), (0, 0)])) for x in (keys, values))
    born, dies = (jnp.pad(x, [(0, 0), (0, 0), (0, pad)], constant_values=-1) for x in (born, dies))
    column = jnp.arange(keys.shape[2])
    alive = min(alive, past + (n - 1) * block)

    def attend(inputs: tuple[Array, Array, Array]) -> Array:
        q, at, start = inputs
        first = jnp.where(at >= 0, at, jnp.iinfo(jnp.int32).max).min(-1)[:, None, None]
        lives = (born >= 0) & (dies > first) & (column < past + start)
        nth = jnp.where(lives, jnp.cumsum(lives, axis=-1) - 1, alive)
        rows, sets = jnp.indices((*nth.shape[:2], 1), sparse=True)[:2]
        found = jnp.full((*nth.shape[:2], alive), keys.shape[2]).at[rows, sets, nth].set(column, mode="drop")
        gathered = lambda x, where: jnp.take_along_axis(x, where, axis=2, mode="fill", fill_value=0)
        own = lambda x: jax.lax.dynamic_slice_in_dim(x, past + start, block, axis=2)
        both = lambda x: jnp.concatenate([gathered(x, found[..., None]), own(x)], axis=2)
        from_, to = (jnp.concatenate([jnp.take_along_axis(x, found, 2, mode="fill", fill_value=-1), own(x)], 2)
                     for x in (born, dies))  # fmt: skip
        here = at[:, None, :, None]
        seen = (from_[:, :, None] >= 0) & (from_[:, :, None] <= here) & (here < to[:, :, None])
        return _attend_block(stored, traits, q.transpose(0, 2, 3, 1, 4), both(keys), both(values), seen)

    cut = lambda x: x.reshape(b, n, block, *x.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(attend, (cut(q), cut(positions), jnp.arange(n) * block))  # [n, B, K, G, block, D]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * block, kv, g, d)[:, :t]


CACHED = 2 * 2**20
"""Bytes of probabilities that a CPU computes at once, about the size of a core's own cache. It is 2 to 4 times faster
than computing 8 rows of 512 at once, which allocates memory from the system each time, and up to 1.8 times faster than
one head at a time for short rows."""


def whole_attention(q: Queries, k: Keys, v: Values, bias: Float[Array, "B T"]) -> AttentionOut:
    """Every query attends to every key at any position: the attention of encoders, whose rows are short.

    All T x T probabilities are in memory at once. On a CPU only those of a few heads are, so that they stay in its
    cache (`CACHED`). In a row without visible keys the output is finite but has no meaning.

    Args:
      bias: added to the scores of each key; `MASKED` for a key that no query sees.
    """
    b, t, h, d = q.shape
    kv = k.shape[2]
    heads = lambda x: x.swapaxes(1, 2).reshape(b * kv, t, d)
    # The query heads of a group are rows of one product.
    q = q.reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4).reshape(b * kv, -1, d)
    bias = jnp.repeat(bias.astype(jnp.float32), kv, axis=0)[:, None]
    most = max(1, CACHED // (4 * q.shape[1] * t))
    n = max(n for n in range(1, b * kv + 1) if b * kv % n == 0 and n <= most)

    def some(*all_heads: Array) -> Array:
        if n == b * kv:
            return _whole(*all_heads)
        cut = lambda x: x.reshape(-1, n, *x.shape[1:])
        return jax.lax.map(lambda few: _whole(*few), tuple(map(cut, all_heads))).reshape(q.shape)

    out = jax.lax.platform_dependent(q, heads(k), heads(v), bias, cpu=some, default=_whole)
    return out.reshape(b, h, t, d).swapaxes(1, 2)


def local_attention(q: Queries, k: Keys, v: Values, bias: Float[Array, "B T"], reach: int) -> AttentionOut:
    """Every query attends to the keys at most `reach` places before and after it.

    Queries are taken in blocks of `reach`, each of which meets its own keys and those of the two blocks beside it: work
    and memory grow with T. There are as many key-value heads as query heads.

    Args:
      bias: as for `whole_attention`.
    """
    b, t, h, d = q.shape
    n = -(-t // reach)
    rows = lambda x, beside: jnp.pad(x, [(0, 0), (beside, n * reach - t + beside), *[(0, 0)] * (x.ndim - 2)])
    blocks = rows(q, 0).reshape(b, n, reach, h, d)
    beside = np.arange(n)[:, None] * reach + np.arange(3 * reach)  # [n, 3 reach], places in the padded keys
    places, keys = np.arange(reach)[:, None] + reach, np.arange(3 * reach)
    near = jnp.where(np.abs(keys - places) <= reach, 0.0, MASKED)
    outside = jnp.pad(bias, [(0, 0), (reach, n * reach - t + reach)], constant_values=MASKED)[:, beside]
    scores = scores_of("bnqhd,bnkhd->bnhqk", blocks, rows(k, reach)[:, beside])
    parts = exponentials(scores + jnp.minimum(near, outside[:, :, None, None, :]))
    out = weighted("bnhqk,bnkhd->bnhqd", parts.visible, rows(v, reach)[:, beside]) / parts.total
    return out.transpose(0, 1, 3, 2, 4).reshape(b, n * reach, h, d)[:, :t].astype(q.dtype)


def _whole(
    q: Float[Array, "N R D"], k: Float[Array, "N T D"], v: Float[Array, "N T D"], bias: Float[Array, "N 1 T"]
) -> Float[Array, "N R D"]:
    scores = scores_of("nrd,ntd->nrt", q, k) + bias
    parts = exponentials(scores)
    out = weighted("nrt,ntd->nrd", parts.visible, v)
    return (out / parts.total).astype(q.dtype)


@partial(jax.checkpoint, static_argnums=0)
def _attend_block(
    stored: tuple[Any, Any],
    traits: AttentionTraits,
    q: Float[Array, "B K G T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N D"],
    seen: Bool[Array, "*batch #K T N"],
    bias: Float[Array, "B K N"] | None = None,
    late: Bool[Array, "B 1 T N"] | None = None,
) -> Float[Array, "B K G T D"]:
    """Attention to the `seen` keys; a key's bias is added for the queries that are `late` for it.

    Args:
      stored: the storage dtypes of keys and values. The arrays themselves are `wide`, since gradients of many blocks
        are summed in them.
    """
    b, kv, g, t, d = q.shape
    # The query heads of a group are rows of one product: larger products, and K and V are never repeated.
    scores = traits.capped(scores_of("bkqd,bknd->bkqn", q.reshape(b, kv, g * t, d), k, stored[0]))
    added = jnp.where(seen, 0.0, MASKED)
    if bias is not None:
        assert late is not None
        added += jnp.where(late, bias[:, :, None], 0.0)
    scores += jnp.tile(added, (1, 1, g, 1))
    scores = scores.reshape(b, kv, g, t, -1)
    parts = exponentials(scores, sink=traits.sinks_beside(scores))
    out = weighted("bkqn,bknd->bkqd", parts.visible.reshape(b, kv, g * t, -1), v, stored[1])
    return (out.reshape(b, kv, g, t, d) / parts.total).astype(q.dtype)
