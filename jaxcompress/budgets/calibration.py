"""What each head needs, measured on texts: the numbers from which `jaxcompress.budgets.allocate` makes capacities.

The model reads in parallel, as in training, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcompress._extras import extra
from jaxcompress.inputs.scalars import number, whole
from jaxcompress.inputs.token_ids import token_rows
from jaxcompress.models.attention import LayerConstants
from jaxcompress.models.decoder import Decoder
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.recurrence.softmax import masked_softmax
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.shapes import Hidden, Keys, Positions, Queries, Tokens, Valid, Values

with extra("train"):
    import optax

QUERY_BLOCK = 128  # queries whose weights exist at once


def attention_spread(model: Decoder, tokens: Tokens, valid: Valid | None = None) -> Float[Array, "L K"]:
    """Over how many tokens the attention of each kv head is spread.

    A query's spread is exp(entropy) of its attention, averaged over the query heads that share the kv head: 1 if all
    attention falls on one token, n if n tokens get the same. The result is the mean over all queries of all rows.

    Spread describes a head; it does not measure what the head needs. A head that looks at one token at a time may look
    far back for it, and the average of a diffuse head may not matter. On the embedded model, slots in proportion to
    spread are worse than equal shares; slots in proportion to the gates of `retrieval_heads` are better
    (`experiments/slot_sharing.py`).

    Weights exist for one layer and `QUERY_BLOCK` queries at a time, never for all queries and keys.

    Args:
      tokens: [B, T], texts like those that will be read.
      valid: False for padding, which may stand anywhere and counts nowhere.

    Raises:
      ValueError: what is no text (see `jaxcompress.inputs.token_ids`), or no token at all.
    """
    tokens = jnp.asarray(token_rows(tokens, model.config.vocab_size, valid=valid))
    positions = _positions(tokens, valid)
    if not (positions >= 0).any():
        raise ValueError("the attention of no token cannot be measured: every token is padding, or none was given")
    return _spread(model, tokens, positions)


@jax.jit
def _spread(model: Decoder, tokens: Tokens, positions: Positions) -> Float[Array, "L K"]:
    def attend(q, k, v, positions, layer, index, carry, xs):
        here = layer.attention.constants(model.config, index)
        q, k = here.placed(q, k, positions)
        out = causal_attention(q, k, v, positions, window=here.window, traits=here.traits)
        return out, carry, _spread_of(q, k, positions, here)

    return model.run_layers(model.embed(tokens), positions, attend)[2]


def _spread_of(q: Queries, k: Keys, positions: Positions, here: LayerConstants) -> Float[Array, " K"]:
    """Mean spread in one layer; q and k are rotated. It is over tokens: what a sink takes does not count."""
    b, t, _, d = q.shape
    q = q.reshape(b, t, k.shape[2], -1, d)
    n = -(-t // QUERY_BLOCK)
    pad = n * QUERY_BLOCK - t
    cut = lambda x: x.reshape(b, n, QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1)
    blocks = cut(jnp.pad(q, [(0, 0), (0, pad), *[(0, 0)] * 3]))
    ats = cut(jnp.pad(positions, [(0, 0), (0, pad)], constant_values=-1))

    def block(queries: tuple[Array, Array]) -> Float[Array, " K"]:
        q, at = queries
        scores = here.traits.capped(scores_of("btkgd,bnkd->bkgtn", q, k))
        at, key = at[:, :, None], positions[:, None]
        visible = (key <= at) & (key >= 0)
        if here.window is not None:
            visible &= key > at - here.window
        present = at >= 0
        weights = masked_softmax(scores, visible[:, None, None], present[:, None, None]).mean(2)  # [B, K, T, N]
        entropy = -jnp.where(weights > 0, weights * jnp.log(weights), 0.0).sum(-1)
        return jnp.where(present[:, None, :, 0], jnp.exp(entropy), 0.0).sum((0, 2))

    return jax.lax.map(block, (blocks, ats)).sum(0) / (positions >= 0).sum()


class RetrievalHeads(NamedTuple):
    """Which heads look far back.

    Attributes:
      gates: [L, K], how much of each head's full attention the answers need; 0 where sinks and recent tokens do.
      retrieval: [L, K] bool, the share of heads with the highest gates, for
        `jaxcompress.budgets.allocate.retrieval_split`.
      losses: [steps], how far the answers' hidden states were from those of full attention, without the penalty.
    """

    gates: Float[np.ndarray, "L K"]
    retrieval: Bool[np.ndarray, "L K"]
    losses: Float[np.ndarray, " steps"]


def retrieval_heads(  # twelve parameters: the settings of one search
    model: Decoder,
    tokens: np.ndarray,
    asked: np.ndarray,
    *,
    share: float = 0.5,
    sinks: int = 4,
    recent: int = 64,
    steps: int = 60,
    rows: int = 1,
    learning_rate: float = 0.05,
    penalty: float = 0.05,
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> RetrievalHeads:
    """Finds the heads that need the whole context (DuoAttention, Xiao et al. 2024, section 2.2).

    Each kv head of each layer gets a gate g, 1 at first, and returns g * full attention + (1 - g) * attention to sinks
    and recent tokens. Adam lowers, over the gates alone,

        mean over answers of mean_E (hidden of the model - hidden with gates)^2 + penalty * mean(gates)

    of final hidden states, so that a gate stays open only where an answer depends on it. Gates are clipped to 0..1
    after every step. The learning rate rises over the first fifth of the steps and falls over the last, from and to a
    tenth.

    Three differences from the authors' code. Both attentions of a head see the gated layers below, as in use; there,
    full attention is that of the ungated model. The hidden states that predict an answer's tokens are compared.
    Learning rate and steps suit a model of a few heads (theirs: 0.02 and 2,000).

    Args:
      tokens: [B, T] integers, texts that ask for something told long before (see `jaxcompress.evaluation.exam`).
      asked: [B, T] bool, True for the tokens of the answers.
      share: of all heads, how many are called retrieval heads; rounded.
      sinks, recent: what the other heads will see.
      rows: texts per step, drawn from all in an order given by the seed.
      penalty: on open gates. Final hidden states are normed, so one penalty suits many models.
      progress: called with the number of each step done.

    Raises:
      ValueError: what is no text (see `jaxcompress.inputs.token_ids`), a share outside 0..1, no answers in some text,
        no tokens beyond sinks and recent ones, no steps or rows, or what is no number.
    """
    steps, rows = whole(steps, "steps", least=1), whole(rows, "rows", least=1)
    sinks, recent = whole(sinks, "sinks"), whole(recent, "recent")
    learning_rate, penalty = number(learning_rate, "learning_rate"), number(penalty, "penalty")
    tokens, asked = token_rows(tokens, model.config.vocab_size), np.asarray(asked, bool)
    _check_texts(tokens, asked, share, sinks + recent)
    predicting = np.pad(asked[:, 1:], [(0, 0), (0, 1)])
    ramp = lambda step: jnp.minimum(1.0, jnp.maximum(0.1, jnp.minimum(step + 1, steps - step) * 5 / steps))
    optimizer = optax.adam(lambda step: ramp(step) * learning_rate)
    gates = jnp.ones((model.config.num_layers, model.config.num_kv_heads))
    update: Any
    moments = optimizer.init(gates)
    wanted = [np.asarray(_hidden(model, row[None])) for row in tokens]  # the same at every step
    how: dict[str, Any] = dict(streaming=(sinks, recent), penalty=penalty)
    rng, order, losses = np.random.default_rng(seed), np.zeros(0, int), []
    for step in range(steps):
        while len(order) < rows:
            order = np.concatenate([order, rng.permutation(len(tokens))])
        pick, order = order[:rows], order[rows:]
        target = np.concatenate([wanted[row] for row in pick])
        loss, slope = _slope(gates, model, tokens[pick], predicting[pick], target, **how)
        update, moments = optimizer.update(slope, moments)
        gates = jnp.clip(gates + update, 0.0, 1.0)
        losses.append(float(loss))
        progress(step + 1)
    found = np.asarray(gates)
    best = np.argsort(-found.ravel(), kind="stable")[: round(share * found.size)]
    retrieval = np.zeros(found.size, bool)
    retrieval[best] = True
    return RetrievalHeads(found, retrieval.reshape(found.shape), np.array(losses))


@jax.jit
def _hidden(model: Decoder, tokens: Tokens) -> Hidden:
    """Final hidden states, normed, with full attention."""

    def attend(q, k, v, positions, layer, index, carry, xs):
        here = layer.attention.constants(model.config, index)
        q, k = here.placed(q, k, positions)
        return causal_attention(q, k, v, positions, window=here.window, traits=here.traits), carry, None

    return model.norm(model.run_layers(model.embed(tokens), _positions(tokens, None), attend)[0])


@partial(jax.jit, static_argnames=("streaming", "penalty"))
def _slope(
    gates: Float[Array, "L K"],
    model: Decoder,
    tokens: Tokens,
    predicting: Bool[Array, "B T"],
    wanted: Hidden,
    *,
    streaming: tuple[int, int],
    penalty: float,
) -> tuple[Float[Array, ""], Float[Array, "L K"]]:
    """How far the hidden states that predict answers are from those wanted, and the gradient of loss and penalty."""
    positions = _positions(tokens, None)

    @jax.checkpoint
    def mixed(q: Queries, k: Keys, v: Values, gate: Float[Array, " K"], kind: dict[str, Any]) -> Array:
        full = causal_attention(q, k, v, positions, **kind)
        near = causal_attention(q, k, v, positions, streaming=streaming, **kind)
        gate = jnp.repeat(gate, q.shape[2] // k.shape[2])[:, None]  # float32, in which its gradient is added up
        return (gate * full + (1 - gate) * near).astype(q.dtype)

    def attend(q, k, v, positions, layer, index, carry, xs):
        here = layer.attention.constants(model.config, index)
        q, k = here.placed(q, k, positions)
        return mixed(q, k, v, xs, dict(window=here.window, traits=here.traits)), carry, None

    def loss(gates: Array) -> tuple[Array, Array]:
        hidden = model.norm(model.run_layers(model.embed(tokens), positions, attend, xs=gates)[0])
        apart = ((hidden.astype(jnp.float32) - wanted.astype(jnp.float32)) ** 2).mean(-1)
        apart = (apart * predicting).sum() / predicting.sum()
        return apart + penalty * jnp.abs(gates).mean(), apart

    (_, apart), slope = jax.value_and_grad(loss, has_aux=True)(gates)
    return apart, slope


def _positions(tokens: Tokens, valid: Valid | None) -> Positions:
    valid = jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid)
    return jnp.where(valid, jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, -1)


def _check_texts(tokens: np.ndarray, asked: np.ndarray, share: float, near: int) -> None:
    if tokens.shape != asked.shape:
        raise ValueError(f"tokens and asked are both [B, T], not {list(tokens.shape)} and {list(asked.shape)}")
    if not asked[:, 1:].any(axis=1).all():
        row = int((~asked[:, 1:].any(axis=1)).argmax())
        raise ValueError(f"text {row} has no answer (no token after the first is asked for)")
    if not 0 <= share <= 1:
        raise ValueError(f"share is a part of all heads, 0 to 1, not {share}")
    if tokens.shape[1] <= near:
        raise ValueError(
            f"texts of {tokens.shape[1]} tokens lie within the {near} sinks and recent tokens that every head sees; "
            "give longer texts or fewer of these"
        )
