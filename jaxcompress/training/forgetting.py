"""Learning what to forget: losses for the networks behind `jaxcompress.policies.learned`.

`dms_loss` reads a text with attention that forgets softly, and asks the model to predict as well as ever while the
share of what it keeps goes down: the network learns through the model. `retention_loss` watches the model read with
everything in sight, and asks the network to foresee where attention is going to fall: no gradient goes through the
model. Either network then serves as a policy with a fixed number of slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.rope import rotate
from jaxcompress.policies.cache_view import Scope
from jaxcompress.policies.forget_head import KEEP_EVERYTHING, ForgetHead, check_head, init_forget_head, token_numbers
from jaxcompress.policies.learned import LIKE_TOVA, Looked, foreseen
from jaxcompress.recurrence.block_attention import causal_attention, forgetful_attention
from jaxcompress.recurrence.softmax import MASKED, masked_softmax
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.shapes import Hidden, Keys, Positions, Queries, Tokens, Valid
from jaxcompress.training.distillation import divergence
from jaxcompress.training.loss import token_losses


def init_dms(config: DecoderConfig, key: Array, *, hidden: int = 64) -> ForgetHead:
    """A network for `jaxcompress.policies.dms` that keeps everything."""
    return network(config, key, hidden, KEEP_EVERYTHING)


def init_retention(config: DecoderConfig, key: Array, *, hidden: int = 64) -> ForgetHead:
    """A network for `jaxcompress.policies.retention` that is TOVA."""
    return network(config, key, hidden, LIKE_TOVA)


def share_schedule(ratio: float | int, steps: int) -> optax.Schedule:
    """The share of tokens that may be kept: from all down to 1 / ratio, linear over so many steps.

    Raises:
      ValueError: a ratio below 1, or no steps.
    """
    if ratio < 1 or steps < 1:
        raise ValueError(f"a ratio is 1 or more and a schedule has steps, not ratio={ratio}, steps={steps}")
    return optax.linear_schedule(1.0, 1 / ratio, steps)


def temperature_schedule(start: float | int, end: float | int, steps: int) -> optax.Schedule:
    """The temperature of decisions, linear over so many steps.

    Start near 1: what is decided firmly at a low temperature has no gradient any more.

    Raises:
      ValueError: a temperature that is not positive, or no steps.
    """
    check_temperature(start)
    check_temperature(end)
    if steps < 1:
        raise ValueError(f"a schedule has steps, not {steps}")
    return optax.linear_schedule(start, end, steps)


def kept_share(logits: Float[Array, "B K T"], temperature: float | Float[Array, ""]) -> Float[Array, "B T"]:
    """In how many of the kv heads each token is kept: its logit is above zero. A share, 0 to 1.

    Straight-through: the gradient is that of the mean of sigmoid(logits / temperature).
    """
    soft = jax.nn.sigmoid(logits / temperature)
    return (soft + jax.lax.stop_gradient((logits > 0) - soft)).mean(1)


class Forgetful(NamedTuple):
    """Result of `read_forgetfully`.

    Attributes:
      hidden: [B, T, E], normed; `model.logits(hidden)` gives the scores of next tokens.
      kept: [L], the share of tokens that is kept, averaged over kv heads; its gradient is that of the soft share.
    """

    hidden: Hidden
    kept: Float[Array, " L"]


def read_forgetfully(
    model: Decoder,
    head: ForgetHead,
    tokens: Tokens,
    *,
    window: int,
    temperature: float | Float[Array, ""],
    valid: Valid | None = None,
    key: Array | None = None,
) -> Forgetful:
    """Reads with attention in which tokens fade that the network would evict (Łańcucki et al. 2025, section 3.1).

    Once a token is `window` tokens old, log sigmoid(logit / temperature) is added to its scores.

    Args:
      window: tokens before a decision takes effect.
      temperature: the lower, the less lies between kept and evicted.
      valid: [B, T], False for padding.
      key: for noise on the logits, which makes decisions samples (Gumbel-sigmoid); None for none.

    Raises:
      ValueError: a network for a model of another shape, a negative window, a temperature that is not positive.
    """
    check_network(head, 1, model.config)
    check_temperature(temperature)
    if window < 0:
        raise ValueError(f"a window of {window} tokens: give 0 or more")
    keys = None if key is None else jax.random.split(key, model.config.num_layers)
    there = positions_of(tokens, valid) >= 0

    def attend(q, k, v, positions, layer, index, carry, xs):
        mine, key = xs
        logits = token_numbers(mine, k.swapaxes(1, 2), v.swapaxes(1, 2))[..., 0]
        if key is not None:
            logits += jax.random.logistic(key, logits.shape)
        q, k, window_here = placed(model, q, k, positions, index)
        bias = jax.nn.log_sigmoid(logits / temperature)
        out = forgetful_attention(q, k, v, positions, bias, delay=window, window=window_here)
        kept = (kept_share(logits, temperature) * there).sum() / jnp.maximum(there.sum(), 1)
        return out, carry, kept

    x, _, kept = model.run_layers(model.embed(tokens), positions_of(tokens, valid), attend, xs=(head, keys))
    return Forgetful(model.norm(x), kept)


def dms_loss(
    model: Decoder,
    head: ForgetHead,
    tokens: Int[Array, "B _"],
    weights: Float[Array, "B T"],
    *,
    window: int,
    share: float | Float[Array, ""],
    temperature: float | Float[Array, ""],
    teacher: Decoder | None = None,
    pressure: float | int | Float[Array, ""] = 1.0,
    key: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """How badly a text is predicted from what is kept, and how much too much that is.

        loss = prediction + pressure * max(share kept - share allowed, 0)

    The second term is the one-sided loss of the paper (section 3.1), as a mean over all layers, kv heads and tokens:
    which layers and heads keep more is left to learning. Differentiate with respect to `head`, or to the model too.

    Args:
      tokens: [B, T + 1].
      weights: of predicting each but the first.
      window, temperature, key: see `read_forgetfully`; the temperature of a schedule.
      share: of tokens that may be kept, at this step of `share_schedule`.
      teacher: the prediction is then asked to be that of this model with everything in sight (divergence, as in the
        paper), without gradient; it may be the model itself. None: next-token loss.

    Returns:
      The loss, and its parts `prediction` and `kept`.

    Raises:
      ValueError: see `read_forgetfully`.
    """
    read = read_forgetfully(model, head, tokens[:, :-1], window=window, temperature=temperature, key=key)
    return prediction_and_share(model, read, tokens, weights, share=share, teacher=teacher, pressure=pressure)


def prediction_and_share(
    model: Decoder,
    read: Forgetful,
    tokens: Int[Array, "B _"],
    weights: Float[Array, "B T"],
    *,
    share: float | Float[Array, ""],
    teacher: Decoder | None,
    pressure: float | int | Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a text that was read while forgetting; see `dms_loss`."""
    logits = model.logits(read.hidden)
    if teacher is None:
        losses = token_losses(logits, tokens[:, 1:])
    else:
        losses = divergence(logits, jax.lax.stop_gradient(teacher)(tokens[:, :-1]))
    prediction = (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-9)
    kept = read.kept.mean()
    return prediction + pressure * jnp.maximum(kept - share, 0.0), {"prediction": prediction, "kept": kept}


def retention_loss(
    model: Decoder,
    head: ForgetHead,
    tokens: Tokens,
    *,
    scope: Scope = "kv_head",
    valid: Valid | None = None,
    block: int = 64,
    horizon: float | int | None = 128,
) -> Float[Array, ""]:
    """How far the scores of `jaxcompress.policies.retention` are from where attention is going to fall, in nats.

    The mean over layers, sets and the ends of blocks of `future_attention_loss`. The gradient reaches the network only.

    Args:
      tokens: [B, T], longer than a block.
      scope: as of the policy; "pool" learns as "kv_head".
      valid: [B, T], False for padding.
      block, horizon: as there.

    Raises:
      ValueError: a network for a model of another shape, scope "query_head", or as there.
    """
    check_network(head, len(LIKE_TOVA), model.config)
    if scope == "query_head":
        raise ValueError("retention has numbers per kv head: it cannot be learned per query head")
    model = jax.lax.stop_gradient(model)

    def attend(q, k, v, positions, layer, index, carry, xs):
        numbers = token_numbers(xs, k.swapaxes(1, 2), v.swapaxes(1, 2))
        numbers = numbers.mean(1, keepdims=True) if scope == "layer" else numbers
        q, k, window = placed(model, q, k, positions, index)
        apart = future_attention_loss(numbers, q, k, positions, block=block, horizon=horizon, window=window)
        return causal_attention(q, k, v, positions, window=window), carry, apart

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
) -> Float[Array, ""]:
    """Cross-entropy between the attention that is still to come and the softmax of scores, in nats.

    At the end of each block of queries, when the text has been read up to position t, the tokens j <= t have scores by
    their numbers and the attention that they received (see `jaxcompress.policies.retention`). What they are compared to
    is the attention that the queries i > t give them,

        F[j] = sum over i > t of exp(-(i - t) / horizon) p[i, j], as a share of its sum over j <= t,

    with p averaged over the heads that share a set. The mean over rows, sets and ends of blocks is returned; blocks in
    which no token is and those after which nothing comes do not count. All attention is computed twice, for one block
    of queries at a time, and memory does not grow beyond block x T: the gradient, which reaches `numbers` only, is
    taken on the way.

    Args:
      numbers: four for each token; P is 1 or K.
      q, k: rotated.
      block: tokens between two looks. If texts ask at regular places, take one that meets these at different ends.
      horizon: in tokens; None counts the whole future alike. A token that is needed soon can be let go soon after:
        the shorter the horizon, the more it is worth beside one that is needed once, much later.
      window: width of a sliding-window layer.

    Raises:
      ValueError: a block below 1 token, a text within one block, or a horizon that is not positive.
    """
    b, t = q.shape[:2]
    if horizon is not None and horizon <= 0:
        raise ValueError(f"a horizon is a positive number of tokens, not {horizon}")
    if not 1 <= block < t:
        raise ValueError(f"blocks of {block} tokens in texts of {t}: at least 1, and something has to come after one")
    q, k, still = jax.lax.stop_gradient((q, k, numbers))
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
        scores = scores_of("btkgd,bnkd->bkgtn", q, k)
        seen = (key <= at[:, :, None]) & (key >= 0)
        if window is not None:
            seen &= key > at[:, :, None] - window
        weights = masked_softmax(scores, seen[:, None, None], (at >= 0)[:, None, None, :, None]).mean(2)
        return weights.mean(1, keepdims=True) if sets == 1 else weights

    def add(total: Array, inputs: Any) -> tuple[Array, None]:
        return total + attention(*inputs).sum(2), None

    nothing = jnp.zeros((b, sets, t))
    total, _ = jax.lax.scan(add, nothing, blocks)

    def apart(numbers: Array, last: Array, so_far: Array, future: Array, now: Array, counts: Array) -> Array:
        """Summed over the rows and sets that count."""
        age = jnp.maximum(now[:, None] - positions, 0)[:, None]
        here = ((positions >= 0) & (positions <= now[:, None]))[:, None]
        future = jnp.where(here, future, 0.0)
        share = future / jnp.maximum(future.sum(-1, keepdims=True), 1e-30)
        scores = foreseen(Looked(tuple(numbers[..., i] for i in range(len(LIKE_TOVA))), last, so_far), age)
        losses = -(share * jax.nn.log_softmax(jnp.where(here, scores, MASKED), axis=-1)).sum(-1)
        return (losses * counts[:, None]).sum()

    def look(carry: Any, inputs: Any) -> tuple[Any, None]:
        """From the last block to the first: what is still to come is known then, and what has been is the rest."""
        future, later, loss, slope, count = carry
        (q, at), now, previous = inputs
        weights = attention(q, at)
        last = jnp.take_along_axis(weights, at.argmax(-1)[:, None, None, None], axis=2)[:, :, 0]
        so_far = jnp.maximum(total - later, last)  # the difference of two sums may round to less
        counts = (at.max(-1) >= 0) & (now < ends[-1])
        more, change = jax.value_and_grad(apart)(still, last, so_far, future, now, counts)
        near = jnp.where(at >= 0, fade(at - previous[:, None]), 0.0)
        future = (weights * near[:, None, :, None]).sum(2) + fade(now - previous)[:, None, None] * future
        return (future, later + weights.sum(2), loss + more, slope + change, count + counts.sum() * sets), None

    start = nothing, nothing, jnp.zeros(()), jnp.zeros_like(still), jnp.zeros((), jnp.int32)
    (_, _, loss, slope, count), _ = jax.lax.scan(look, start, (blocks, ends, before), reverse=True)
    return _with_slope(loss, slope, numbers) / jnp.maximum(count, 1)


def _with_slope(value: Float[Array, ""], slope: Array, of: Array) -> Float[Array, ""]:
    """A value with a gradient that is known already."""
    value, slope, at = jax.lax.stop_gradient((value, slope, of))
    return value + (slope * (of - at)).sum()


def network(config: DecoderConfig, key: Array, hidden: int, start: tuple[float, ...]) -> ForgetHead:
    """A fresh network for a model, which gives the numbers `start` for every token."""
    shape: dict[str, int] = dict(layers=config.num_layers, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    return init_forget_head(key, **shape, hidden=hidden, start=start)


def check_network(head: ForgetHead, outputs: int, config: DecoderConfig) -> None:
    """Raises ValueError if a network is for a model of another shape, or gives another number of numbers."""
    check_head(head, layers=config.num_layers, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    if head.outer_bias.shape[-1] != outputs:
        raise ValueError(f"this loss needs {outputs} numbers per token, the weights give {head.outer_bias.shape[-1]}")


def check_temperature(temperature: Any) -> None:
    """Raises ValueError if it is known and not positive."""
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"a temperature is positive, not {temperature}")


def placed(model: Decoder, q: Queries, k: Keys, positions: Positions, index: Any) -> tuple[Queries, Keys, Any]:
    """Queries and keys rotated, and the layer's window."""
    at, rope, windows = positions[..., None], model.config.rope, model.config.windows
    return rotate(q, at, rope), rotate(k, at, rope), None if windows is None else windows[index]


def positions_of(tokens: Tokens, valid: Valid | None) -> Positions:
    """Of each token in its row, -1 for padding."""
    valid = jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid)
    return jnp.where(valid, jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, -1)
