"""Attention as arrays: over a block of tokens, and of one token over the slots of a state.

This is the only door to kernels: whoever attends comes through here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.shapes import AttentionOut, Keys, Positions, Queries, Valid, Values
from jaxcompress.storage import Quantised, Stored, parts

MASKED = -1e30  # finite, so that a row in which nothing is visible stays finite


def causal_attention(
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    *,
    window: Int[Array, ""] | None = None,
    streaming: tuple[int, int] | None = None,
) -> AttentionOut:
    """Every query attends to the tokens at its own and earlier positions, at most `window` of them.

    With `streaming=(sinks, recent)` it sees of these only the first `sinks` positions and the `recent` newest ones.

    Positions grow along T; padding (-1) is attended by nothing, and what a padded query returns has no meaning but
    is finite. Queries are taken in blocks, each against the keys up to its own end only, and a block's weights are
    recomputed for the gradient: half the work of a T x T product, and memory that grows with T, not T squared.
    """
    return _causal(q, k, v, positions, window, streaming, None, 0)


def forgetful_attention(
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    bias: Float[Array, "B K T"],
    *,
    delay: int,
    window: Int[Array, ""] | None = None,
) -> AttentionOut:
    """Causal attention that forgets softly: from `delay` positions on, a key's scores have its bias added to them.

    Otherwise as `causal_attention`, in blocks too. The gradient goes through the bias; keep it finite.

    Args:
      bias: of each key, at most 0 to forget: the logarithm of how much of it is left.
    """
    return _causal(q, k, v, positions, window, None, bias, delay)


def _causal(
    q: Queries, k: Keys, v: Values, positions: Positions,
    window: Int[Array, ""] | None, streaming: tuple[int, int] | None, bias: Float[Array, "B K T"] | None, delay: int,
) -> AttentionOut:  # fmt: skip
    b, t, h, d = q.shape
    kv = k.shape[2]
    block = max(128, -(-t // 16))
    q = q.reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4) * d**-0.5
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    outs = []
    for start in range(0, t, block):
        end = min(start + block, t)
        query, key = positions[:, start:end, None], positions[:, None, :end]
        seen = (key <= query) & (key >= 0)
        if window is not None:
            seen &= key > query - window
        if streaming is not None:
            seen &= (key < streaming[0]) | (key > query - streaming[1])
        late = () if bias is None else (bias[:, :, :end], (key <= query - delay)[:, None])
        outs.append(_attend_block(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], seen[:, None], *late))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def bidirectional_attention(q: Queries, k: Keys, v: Values, valid: Valid) -> AttentionOut:
    """Every query attends to every valid token of its row, before and after it.

    What a query gets in a row without any valid token has no meaning but is finite. All T x T probabilities are in
    memory at once: this is for encoders, whose rows are short. On a CPU rows are taken one by one, so that they stay in
    its cache (4 times faster at 8 rows of 512).
    """
    one = lambda row: _bidirectional(*(x[None] for x in row))[0]
    rows = lambda *batch: jax.lax.map(one, batch)
    return jax.lax.platform_dependent(q, k, v, valid, cpu=rows, default=_bidirectional)


def _bidirectional(q: Queries, k: Keys, v: Values, valid: Valid) -> AttentionOut:
    b, t, h, d = q.shape
    kv = k.shape[2]
    q = q.reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4) * d**-0.5
    seen = jnp.broadcast_to(valid[:, None, None], (b, 1, t, t))
    out = _attend_block(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def lifetime_attention(
    q: Float[Array, "B T K G D"],
    keys: Float[Array, "B K N D"],
    values: Float[Array, "B K N D"],
    positions: Positions,
    born: Int[Array, "*batch #K N"],
    dies: Int[Array, "*batch #K N"],
    *,
    alive: int,
    block: int = 128,
) -> Float[Array, "B T K G D"]:
    """Every query attends to the tokens that live at its position: `born <= position < dies`.

    The last T of the N keys belong to the queries, those before them are older than any query. Queries are taken in
    blocks, each against its own tokens and the at most `alive` that live when it begins, gathered: the work is
    T x (alive + block), whatever T, and a block's weights are computed again for the gradient.

    Args:
      positions: [B, T], growing along T, -1 for padding.
      born: the position of each token, -1 for none.
      dies: the first position whose query no longer sees it.
    """
    b, t, kv, g, d = q.shape
    past = keys.shape[2] - t
    block = min(block, t)
    n = -(-t // block)
    pad = n * block - t
    q = jnp.pad(q * d**-0.5, [(0, 0), (0, pad), (0, 0), (0, 0), (0, 0)])
    positions = jnp.pad(positions, [(0, 0), (0, pad)], constant_values=-1)
    keys, values = (jnp.pad(x, [(0, 0), (0, 0), (0, pad), (0, 0)]) for x in (keys, values))
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
        return _attend_block(q.transpose(0, 2, 3, 1, 4), both(keys), both(values), seen)

    cut = lambda x: x.reshape(b, n, block, *x.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(attend, (cut(q), cut(positions), jnp.arange(n) * block))  # [n, B, K, G, block, D]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * block, kv, g, d)[:, :t]


class Summary(NamedTuple):
    """Stand-ins for evicted tokens that every query sees beside the slots.

    Attributes:
      keys, values: [B, K, M, D]; keys as queries meet them.
      bias: [B, K, 1 or G, M] float32, added to the scores: the logarithm of how many tokens each stands for, -inf for
        none.
      norm: times the squared norm of the query, taken off the scores.
    """

    keys: Float[Array, "B K M D"]
    values: Float[Array, "B K M D"]
    bias: Float[Array, "B K #G M"]
    norm: float = 0.0

    def scores(self, q: Float[Array, "B T K G D"]) -> Float[Array, "B K G T M"]:
        products = jnp.einsum("btkgd,bkmd->bkgtm", q, self.keys, preferred_element_type=jnp.float32)
        scores = products * q.shape[-1] ** -0.5 + self.bias[:, :, :, None]
        if self.norm:
            scores -= self.norm * jnp.square(q.astype(jnp.float32)).sum(-1).transpose(0, 2, 3, 1)[..., None]
        return scores


class Extra(NamedTuple):
    """What is added to attention over slots.

    Attributes:
      bias: [B, K or 1, S] float32, added to the scores of slots, or None.
      summary: seen beside the slots, or None.
    """

    bias: Float[Array, "B K S"] | None = None
    summary: Summary | None = None


NOTHING = Extra()


def slot_attention(
    q: Float[Array, "B K G D"],
    keys: Float[Array, "B K S D"] | Quantised,
    values: Float[Array, "B K S D"] | Quantised,
    visible: Bool[Array, "#B #K #G S"],
    present: Bool[Array, " B"],
    extra: Extra = NOTHING,
) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G S"]]:
    """One query per row and head over the slots of one layer: output, and the probability each slot received.

    What is not visible receives nothing; rows in which no query is present (padding) give nothing.
    """
    scores = _products(q, keys) * q.shape[-1] ** -0.5
    if extra.bias is not None:
        scores += extra.bias[:, :, None]
    present = present[:, None, None, None]
    if extra.summary is None:
        weights = masked_softmax(scores, visible, present)
        return _weighted_sum(weights, values), weights
    more = extra.summary.scores(q[:, None])[:, :, :, 0]
    both = jnp.concatenate([scores, more], axis=-1)
    seen = jnp.concatenate([jnp.broadcast_to(visible, scores.shape), jnp.isfinite(more)], axis=-1)
    weights, shares = jnp.split(masked_softmax(both, seen, present), [scores.shape[-1]], axis=-1)
    out = _weighted_sum(weights, values)
    return out + jnp.einsum("bkgm,bkmd->bkgd", shares, extra.summary.values).astype(out.dtype), weights


def _products(q: Float[Array, "B K G D"], keys: Stored) -> Float[Array, "B K G S"]:
    numbers, scale = parts(keys)
    pairs = zip(jnp.split(q, len(numbers), axis=-1), numbers, strict=True)
    first, *rest = [jnp.einsum("bkgd,bksd->bkgs", a, b, preferred_element_type=jnp.float32) for a, b in pairs]
    scores = sum(rest, first)
    return scores if scale is None else scores * scale[:, :, None]


def _weighted_sum(weights: Float[Array, "B K G S"], values: Stored) -> Float[Array, "B K G D"]:
    numbers, scale = parts(values)
    weights = (weights if scale is None else weights * scale[:, :, None]).astype(numbers[0].dtype)
    return jnp.concatenate([jnp.einsum("bkgs,bksd->bkgd", weights, x) for x in numbers], axis=-1)


def masked_softmax(
    scores: Float[Array, "*batch N"], visible: Bool[Array, "*#batch N"], present: Bool[Array, "*#batch 1"]
) -> Float[Array, "*batch N"]:
    """Probabilities over what is visible, float32; all zero for queries that are not present."""
    scores = jnp.where(visible, scores, MASKED)
    # The maximum cancels out and has no gradient; asked for one, jax divides by how many scores equal it, which is zero
    # where compiled code computes them twice and rounds differently.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights * (present / weights.sum(-1, keepdims=True))


def decode_backend() -> str:
    """What computes `slot_attention` on this machine's default device."""
    return f"jnp on {jax.default_backend()}"


@jax.checkpoint
def _attend_block(
    q: Float[Array, "B K G T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N D"],
    seen: Bool[Array, "*batch #K T N"],
    bias: Float[Array, "B K N"] | None = None,
    late: Bool[Array, "B 1 T N"] | None = None,
) -> Float[Array, "B K G T D"]:
    """Attention to what is `seen`, with the bias of a key added where a query comes `late` for it."""
    b, kv, g, t, d = q.shape
    # The query heads of a group are rows of one product: larger products, and K and V are never repeated.
    scores = jnp.einsum("bkqd,bknd->bkqn", q.reshape(b, kv, g * t, d), k, preferred_element_type=jnp.float32)
    added = jnp.where(seen, 0.0, MASKED)
    if bias is not None:
        assert late is not None
        added += jnp.where(late, bias[:, :, None], 0.0)
    scores += jnp.tile(added, (1, 1, g, 1))
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bkqn,bknd->bkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(b, kv, g, t, d)
