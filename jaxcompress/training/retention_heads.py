"""Retention heads: networks that predict future attention, for `jaxcompress.policies.Retention`.

The model reads with full attention and stays as it is. At the end of each block, the network's scores are compared with
the attention of later queries. The trained network serves as a policy with a fixed number of slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.cache_view import Scope
from jaxcompress.policies.forget_head import ForgetHead, token_numbers
from jaxcompress.policies.learned import LIKE_TOVA, Looked, foreseen
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.recurrence.softmax import MASKED, masked_softmax
from jaxcompress.state.attention_traits import PLAIN, AttentionTraits
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.shapes import Keys, Positions, Queries, Tokens, Valid
from jaxcompress.training.forget_heads import check_network, network, positions_of


def init_retention(config: DecoderConfig, key: Array, *, hidden: int = 64) -> ForgetHead:
    """A network for `jaxcompress.policies.Retention` whose policy equals TOVA."""
    return network(config, key, hidden, LIKE_TOVA)


def retention_loss(
    model: Decoder,
    tokens: Tokens,
    head: ForgetHead,
    *,
    scope: Scope = "kv_head",
    valid: Valid | None = None,
    block: int = 64,
    horizon: float | int | None = 128,
) -> Float[Array, ""]:
    """Cross-entropy between a retention head's scores and future attention, in nats.

    The mean of `future_attention_loss` over layers, sets and block ends. Only the network gets a gradient.

    Args:
      tokens: [B, T], longer than a block.
      scope: that of the policy; "pool" is trained as "kv_head".
      valid: [B, T], False for padding.
      block, horizon: see `future_attention_loss`.

    Raises:
      ValueError: a network for a model of another shape, scope "query_head", or as for `future_attention_loss`.
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
        apart = future_attention_loss(numbers, q, k, positions, block=block, horizon=horizon, **kind)
        return causal_attention(q, k, v, positions, **kind), carry, apart

    return model.run_layers(model.embed(tokens), positions_of(tokens, valid), attend, xs=head)[2].mean()


def future_attention_loss(
    numbers: Float[Array, "B P T R"],
    q: Queries,
    k: Keys,
    positions: Positions,
    *,
    block: int = 64,
    horizon: float | int | None = 128,
    window: Int[Array, ""] | None = None,
    traits: AttentionTraits = PLAIN,
) -> Float[Array, ""]:
    """Cross-entropy between future attention and the softmax of scores, in nats.

    At the end of each block of queries, at position t, every token j <= t has a score, from its numbers and the
    attention that it received (see `jaxcompress.policies.Retention`). The target is the attention that later queries
    give it,

        F[j] = sum over i > t of exp(-(i - t) / horizon) p[i, j], divided by its sum over j <= t,

    with p averaged over the heads that share a set. The result is the mean over rows, sets and block ends. Blocks
    without tokens, and blocks with no tokens after them, do not count. Attention is computed twice, one block of
    queries at a time, so memory is block x T. The gradient, for `numbers` only, is computed in the same pass.

    Args:
      numbers: four for each token; P is 1 or K.
      q, k: rotated.
      block: tokens between two block ends. If questions come at regular places, choose a length that does not divide
        their distance.
      horizon: in tokens; None weighs all future queries alike. A short horizon favours tokens that are needed soon.
      window: width of a sliding-window layer.
      traits: what the layer's attention does beyond scaled products and a softmax.

    Raises:
      ValueError: a block below 1 token, a text within one block, or a horizon that is not positive.
    """
    b, t = q.shape[:2]
    if horizon is not None and horizon <= 0:
        raise ValueError(f"a horizon is a positive number of tokens, not {horizon}")
    if not 1 <= block < t:
        raise ValueError(f"blocks of {block} tokens in texts of {t}: at least 1, and something has to come after one")
    q, k, still, traits = jax.lax.stop_gradient((q, k, numbers, traits))
    sets = numbers.shape[1]
    n = -(-t // block)
    pad = [(0, 0), (0, n * block - t)]
    cut = lambda x: x.reshape(b, n, block, *x.shape[2:]).swapaxes(0, 1)
    grouped = q.reshape(b, t, k.shape[2], -1, q.shape[-1])
    blocks = cut(jnp.pad(grouped, [*pad, *[(0, 0)] * 3])), cut(jnp.pad(positions, pad, constant_values=-1))
    ends = jax.lax.cummax(blocks[1].max(-1), axis=0)  # [n, B], the newest position at the end of each block
    before = jnp.concatenate([jnp.full((1, b), -1, jnp.int32), ends[:-1]])
    key = positions[:, None]
    fade = lambda ahead: jnp.exp(-ahead / horizon) if horizon else jnp.ones(ahead.shape)

    def attention(q: Array, at: Array) -> Float[Array, "B P block T"]:
        scores = traits.capped(scores_of("btkgd,bnkd->bkgtn", q, k))
        visible = (key <= at[:, :, None]) & (key >= 0)
        if window is not None:
            visible &= key > at[:, :, None] - window
        present = (at >= 0)[:, None, None, :, None]
        weights = masked_softmax(scores, visible[:, None, None], present, traits.sinks_beside(scores)).mean(2)
        return weights.mean(1, keepdims=True) if sets == 1 else weights

    def add(total: Array, inputs: Any) -> tuple[Array, None]:
        return total + attention(*inputs).sum(2), None

    nothing = jnp.zeros((b, sets, t))
    total, _ = jax.lax.scan(add, nothing, blocks)

    def apart(numbers: Array, last: Array, so_far: Array, future: Array, now: Array, counts: Array) -> Array:
        """The cross-entropy, summed over the rows and sets that count."""
        age = jnp.maximum(now[:, None] - positions, 0)[:, None]
        here = ((positions >= 0) & (positions <= now[:, None]))[:, None]
        future = jnp.where(here, future, 0.0)
        share = future / jnp.maximum(future.sum(-1, keepdims=True), 1e-30)
        scores = foreseen(Looked(tuple(numbers[..., i] for i in range(len(LIKE_TOVA))), last, so_far), age)
        losses = -(share * jax.nn.log_softmax(jnp.where(here, scores, MASKED), axis=-1)).sum(-1)
        return (losses * counts[:, None]).sum()

    def look(carry: Any, inputs: Any) -> tuple[Any, None]:
        """Goes from the last block to the first: future attention is then known, and past attention is the rest."""
        future, later, loss, slope, count = carry
        (q, at), now, previous = inputs
        weights = attention(q, at)
        last = jnp.take_along_axis(weights, at.argmax(-1)[:, None, None, None], axis=2)[:, :, 0]
        so_far = jnp.maximum(total - later, last)  # rounding may make the difference of two sums smaller
        counts = (at.max(-1) >= 0) & (now < ends[-1])
        more, change = jax.value_and_grad(apart)(still, last, so_far, future, now, counts)
        near = jnp.where(at >= 0, fade(at - previous[:, None]), 0.0)
        future = (weights * near[:, None, :, None]).sum(2) + fade(now - previous)[:, None, None] * future
        return (future, later + weights.sum(2), loss + more, slope + change, count + counts.sum() * sets), None

    start = nothing, nothing, jnp.zeros(()), jnp.zeros_like(still), jnp.zeros((), jnp.int32)
    (_, _, loss, slope, count), _ = jax.lax.scan(look, start, (blocks, ends, before), reverse=True)
    return _with_slope(loss, slope, numbers) / jnp.maximum(count, 1)


def _with_slope(value: Float[Array, ""], slope: Array, of: Array) -> Float[Array, ""]:
    """A value whose gradient is already known."""
    value, slope, at = jax.lax.stop_gradient((value, slope, of))
    return value + (slope * (of - at)).sum()
