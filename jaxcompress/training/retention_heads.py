"""Retention heads: networks that predict future attention, for `jaxcompress.policies.Retention`.

The model reads with full attention and stays as it is. At the end of each block, the network's scores are compared with
the attention of later queries. The trained network serves as a policy with a fixed number of slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.cache_view import Scope
from jaxcompress.policies.forget_head import ForgetHead, token_numbers
from jaxcompress.policies.learned import LIKE_TOVA, Looked, foreseen
from jaxcompress.recurrence.softmax import MASKED, masked_softmax
from jaxcompress.state.attention_traits import PLAIN, AttentionTraits
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.precision import weighted
from jaxcompress.state.shapes import AttentionOut, Keys, Positions, Queries, Tokens, Valid, Values
from jaxcompress.training.forget_heads import check_network, network, positions_of


def init_retention(config: DecoderConfig, key: Array, *, hidden: int = 64) -> ForgetHead:
    """A network for `jaxcompress.policies.Retention` whose policy equals TOVA."""
    return network(config, key, hidden, LIKE_TOVA)


def check_horizon(horizon: float | int | None) -> None:
    """Raises ValueError if a horizon is given and not positive."""
    if horizon is not None and not horizon > 0:
        raise ValueError(f"a horizon is a positive number of tokens, not {horizon}")


def retention_loss(
    model: Decoder,
    tokens: Tokens,
    head: ForgetHead,
    *,
    scope: Scope = "kv_head",
    valid: Valid | None = None,
    block: int = 64,
    horizon: float | int | None = 128,
    recent: int = 0,
) -> Float[Array, ""]:
    """Cross-entropy between a retention head's scores and future attention, in nats.

    The mean of the loss of `watched_attention` over layers, sets and block ends. Only the network gets a gradient.

    Args:
      tokens: [B, T], longer than a block.
      scope: that of the policy; "pool" is trained as "kv_head".
      valid: [B, T], False for padding.
      block, horizon: see `watched_attention`.
      recent: that of the policy.

    Raises:
      ValueError: a network for a model of another shape, scope "query_head", or as for `watched_attention`.
    """
    check_network(head, len(LIKE_TOVA), model.config)
    if scope == "query_head":
        raise ValueError("retention has numbers per kv head: it cannot be learned per query head")
    model = jax.lax.stop_gradient(model)

    def attend(q, k, v, positions, layer, index, carry, xs):
        numbers = token_numbers(xs, k.swapaxes(1, 2), v.swapaxes(1, 2))
        numbers = numbers.mean(1, keepdims=True) if scope == "layer" else numbers
        here = layer.attention.constants(model.config, index)
        q, k = here.placed(q, k, positions)
        kind = dict(window=here.window, traits=here.traits)
        how: dict[str, Any] = dict(block=block, horizon=horizon, recent=recent, **kind)
        out, apart = watched_attention(numbers, q, k, v, positions, **how)
        return out, carry, apart

    return model.run_layers(model.embed(tokens), positions_of(tokens, valid), attend, xs=head)[2].mean()


def watched_attention(  # ten parameters: the arrays, how the future is looked at, what bounds attention
    numbers: Float[Array, "B P T R"],
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    *,
    block: int = 64,
    horizon: float | int | None = 128,
    recent: int = 0,
    window: Int[Array, ""] | None = None,
    traits: AttentionTraits = PLAIN,
) -> tuple[AttentionOut, Float[Array, ""]]:
    """Causal attention, and the cross-entropy between its future and the softmax of scores, in nats.

    At the end of each block of queries, at position t, every token j <= t - recent has a score, from its numbers and
    the attention that it received (see `jaxcompress.policies.Retention`). The target is the attention that later
    queries give it,

        F[j] = sum over i > t of exp(-(i - t) / horizon) p[i, j], divided by its sum over j <= t - recent,

    with p averaged over the heads that share a set. The loss is the mean over rows, sets and block ends. Blocks without
    such tokens, and blocks with no tokens after them, do not count. Attention is computed once, one block of queries at
    a time, and three numbers per token are kept of each block, so memory is T x T / block. The gradient, for `numbers`
    only, is computed in the same pass.

    Args:
      numbers: four for each token; P is 1 or K.
      q, k: rotated.
      block: tokens between two block ends. If questions come at regular places, choose a length that does not divide
        their distance.
      horizon: in tokens; None weighs all future queries alike. A short horizon favours tokens that are needed soon.
      recent: newest tokens that the policy protects; they are no part of the loss.
      window: width of a sliding-window layer.
      traits: what the layer's attention does beyond scaled products and a softmax.

    Returns:
      The attention, and the loss.

    Raises:
      ValueError: a block below 1 token, a text within one block, so many protected tokens that there is nothing to
        learn at any block end but the last, or a horizon that is not positive.
    """
    t = q.shape[1]
    check_horizon(horizon)
    if not 1 <= block < t:
        raise ValueError(f"blocks of {block} tokens in texts of {t}: at least 1, and something has to come after one")
    if recent < 0:
        raise ValueError(f"recent is a number of protected tokens, 0 or more, not {recent}")
    if recent > (last := (t - 1) // block * block - 1):
        raise ValueError(
            f"nothing can be learned of texts of {t} tokens: the {recent} newest are protected, and the last end of a "
            f"block of {block} that tokens follow is at position {last}; give longer texts (--length) or protect fewer "
            "(--recent)"
        )
    q, k, v, traits = jax.lax.stop_gradient((q, k, v, traits))
    fade = lambda ahead: jnp.exp(-ahead / horizon) if horizon else jnp.ones(ahead.shape)
    out, blocks = _watched(q, k, v, positions, numbers.shape[1], block, fade, window, traits)
    return out, _foresight(numbers, blocks, positions, fade, recent)


class _Block(NamedTuple):
    """What is kept of a block of queries; arrays of all blocks have an axis more in front.

    Attributes:
      end, before: [B], the newest position at the end of the block, and at the end of the one before.
      counts: [B], whether a loss is taken at its end.
      near: [B, P, T], attention of its queries to each token, faded from the block before on.
      last: [B, P, T], attention of its newest query.
      total: [B, P, T], attention of all queries up to its end.
    """

    end: Array
    before: Array
    counts: Array
    near: Array
    last: Array
    total: Array


def _watched(  # nine parameters: those of `watched_attention`
    q: Queries, k: Keys, v: Values, positions: Positions,
    sets: int, block: int, fade: Callable[[Array], Array], window: Int[Array, ""] | None, traits: AttentionTraits,
) -> tuple[AttentionOut, _Block]:  # fmt: skip
    """Attention, and what is kept of each block."""
    b, t, h, d = q.shape
    kv, n = k.shape[2], -(-t // block)
    pad = [(0, 0), (0, n * block - t)]
    at = jnp.pad(positions, pad, constant_values=-1).reshape(b, n, block).swapaxes(0, 1)
    q = jnp.pad(q, [*pad, (0, 0), (0, 0)]).reshape(b, n, block, kv, h // kv, d).transpose(1, 0, 3, 4, 2, 5)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    ends = jax.lax.cummax(at.max(-1), axis=0)
    before = jnp.concatenate([jnp.full((1, b), -1, jnp.int32), ends[:-1]])
    there = at >= 0
    newest = jnp.arange(block) == at.argmax(-1)[..., None]
    looks = jnp.stack([jnp.where(there, fade(at - before[..., None]), 0.0), newest, there], axis=2)  # [n, B, 3, block]

    def attend(inputs: tuple[Array, Array, Array], end: int) -> tuple[Array, Array]:
        q, at, looks = inputs
        key = positions[:, None, :end]
        scores = traits.capped(scores_of("bkqd,bknd->bkqn", q.reshape(b, kv, -1, d), k[:, :, :end]))
        scores = scores.reshape(*q.shape[:-1], end)
        visible = (key <= at[:, :, None]) & (key >= 0)
        if window is not None:
            visible &= key > at[:, :, None] - window
        present = (at >= 0)[:, None, None, :, None]
        weights = masked_softmax(scores, visible[:, None, None], present, traits.sinks_beside(scores))
        weights = weights.reshape(b, kv, -1, end)
        out = weighted("bkqn,bknd->bkqd", weights, v[:, :, :end]).reshape(q.shape)
        seen = jnp.einsum("brq,bkqn->rbkn", jnp.tile(looks, (1, 1, h // kv)), weights) / (h // kv)
        seen = seen.mean(2, keepdims=True) if sets == 1 else seen
        return out.astype(q.dtype), jnp.pad(seen, [*[(0, 0)] * 3, (0, t - end)])

    outs, kept = [], []
    for start in range(0, n, many := -(-n // 4)):  # a block meets only the keys up to the end of its quarter
        some = slice(start, start + many)
        end = min((start + many) * block, t)
        out, seen = jax.lax.map(partial(attend, end=end), (q[some], at[some], looks[some]))
        outs, kept = [*outs, out], [*kept, seen]
    near, last, total = jnp.concatenate(kept).swapaxes(0, 1)
    counts = (at.max(-1) >= 0) & (ends < ends[-1])
    out = jnp.concatenate(outs).transpose(1, 0, 4, 2, 3, 5).reshape(b, n * block, h, d)[:, :t]
    return out, _Block(ends, before, counts, near, last, jnp.cumsum(total, axis=0))


def _foresight(
    numbers: Float[Array, "B P T R"],
    blocks: _Block,
    positions: Positions,
    fade: Callable[[Array], Array],
    recent: int,
) -> Float[Array, ""]:
    """The loss of `watched_attention`."""
    still = jax.lax.stop_gradient(numbers)
    blocks = blocks._replace(counts=blocks.counts & (blocks.end >= recent))

    def apart(numbers: Array, block: _Block, future: Array) -> Array:
        """The cross-entropy, summed over the rows and sets that count."""
        age = jnp.maximum(block.end[:, None] - positions, 0)[:, None]
        here = ((positions >= 0) & (positions <= block.end[:, None] - recent))[:, None]
        future = jnp.where(here, future, 0.0)
        share = future / jnp.maximum(future.sum(-1, keepdims=True), 1e-30)
        seen = Looked(tuple(numbers[..., i] for i in range(len(LIKE_TOVA))), block.last, block.total)
        losses = -(share * jax.nn.log_softmax(jnp.where(here, foreseen(seen, age), MASKED), axis=-1)).sum(-1)
        return (losses * block.counts[:, None]).sum()

    def look(carry: Any, block: _Block) -> tuple[Any, None]:
        """Goes from the last block to the first, so that future attention is known."""
        future, loss, slope = carry
        more, change = jax.value_and_grad(apart)(still, block, future)
        future = block.near + fade(block.end - block.before)[:, None, None] * future
        return (future, loss + more, slope + change), None

    start = jnp.zeros(still.shape[:-1]), jnp.zeros(()), jnp.zeros_like(still)
    (_, loss, slope), _ = jax.lax.scan(look, start, blocks, reverse=True)
    return _with_slope(loss, slope, numbers) / jnp.maximum(blocks.counts.sum() * still.shape[1], 1)


def _with_slope(value: Float[Array, ""], slope: Array, of: Array) -> Float[Array, ""]:
    """A value whose gradient is already known."""
    value, slope, at = jax.lax.stop_gradient((value, slope, of))
    return value + (slope * (of - at)).sum()
