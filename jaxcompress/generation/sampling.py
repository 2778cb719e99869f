"""Sampling of the next token: pure functions on logits [B, V].

Ties are treated as in Hugging Face's logits processors, and at least one token is always kept, as there. Rows are
independent: each draws from its own key, so a batch of N gives the same tokens as N batches of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcompress.inputs.described import described
from jaxcompress.state.shapes import Tokens, Valid

NextLogits = Float[Array, "B V"]
NextTokens = Int[Array, "B"]
Appeared = Bool[Array, "B V"]  # the tokens that a row's prompt and output contain
RowKey = Key[Array, ""]
RowKeys = Key[Array, "B"]
Setting = float | Float[Array, "B 1"]  # one for all rows, or one for each

_LEAST, _MOST = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)


def row_keys(seeds: Sequence[int]) -> RowKeys:
    """One key per row, [B]; a row with seed s draws the same tokens in any batch.

    For step t of a loop use `jax.vmap(jax.random.fold_in, (0, None))(keys, t)`.

    Raises:
      ValueError: as `check_seed`.
    """
    return jnp.stack([_key(check_seed(seed)) for seed in seeds])


def check_seed(given: Any) -> int:
    """The seed as a whole number.

    Raises:
      ValueError: `given` is no whole number, or is not within 64 bits.
    """
    try:
        seed = index(given)
    except TypeError:
        raise ValueError(f"seeds must be a whole number, or one for each row, not {described(given)}") from None
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seeds must be within -2**63 and 2**63 - 1, not {seed}; take it modulo 2**63")
    return seed


def _key(seed: int) -> RowKey:
    """The key of a seed of 64 bits. JAX takes 32 of them, so the upper ones are folded in where they are not 0."""
    key, upper = jax.random.key(seed % 2**32), seed // 2**32 % 2**32
    return jax.random.fold_in(key, upper) if upper else key


def remember(appeared: Appeared, tokens: Tokens, valid: Valid | None = None) -> Appeared:
    """Marks tokens [B, T] as appeared in each row [B, V]; tokens where valid [B, T] is False (padding) are not
    marked."""
    rows = jnp.arange(appeared.shape[0])[:, None]
    # A negative index would count from the end, and one past the end is dropped.
    columns = tokens if valid is None else jnp.where(valid, tokens, appeared.shape[1])
    return appeared.at[rows, columns].set(True, mode="drop")


def greedy(logits: NextLogits) -> NextTokens:
    """The best token of each row [B]; the first of several equal ones."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(keys: RowKeys, logits: NextLogits) -> NextTokens:
    """Draws a token per row [B] from softmax(logits), each row from its own key."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def heat(logits: NextLogits, temperature: Setting) -> NextLogits:
    """Logits divided by a temperature above 0 (as `divisor` gives it); if the best quotient overflows float32, the best
    logit is subtracted first."""
    best = logits.max(-1, keepdims=True)
    return jnp.where(jnp.isfinite(best / temperature), logits / temperature, (logits - best) / temperature)


def penalise_repetition(logits: NextLogits, appeared: Appeared, penalty: Setting) -> NextLogits:
    """Makes tokens that appeared less likely: positive logits are divided by the penalty (as `divisor` gives it),
    negative ones multiplied by it.

    Keskar et al. 2019, "CTRL", with Hugging Face's rule for negative logits. Finite logits stay finite.
    """
    moved = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(appeared, jnp.where(jnp.isinf(logits), logits, jnp.clip(moved, -_MOST, _MOST)), logits)


def keep_top_k(logits: NextLogits, k: int) -> NextLogits:
    """Removes all logits below the k-th best; logits that tie with it stay (Fan et al. 2018)."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: NextLogits, p: float) -> NextLogits:
    """Keeps the fewest best tokens whose probabilities sum to at least p (Holtzman et al. 2020), at least one.

    Among tokens that tie at the edge of the nucleus, those with the higher index stay, as with Hugging Face (whose sort
    leaves the choice undefined in large vocabularies).
    """
    return leave_out(logits, 1 - p)


def leave_out(logits: NextLogits, most: Setting) -> NextLogits:
    """Removes the least likely tokens, as many as together have at most this probability; the best stays. See
    `keep_top_p`."""
    ascending = jnp.argsort(logits, axis=-1, stable=True)
    ordered = jnp.take_along_axis(logits, ascending, axis=-1)
    removed = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) <= most
    removed = removed.at[..., -1].set(False)
    removed = jnp.put_along_axis(jnp.zeros_like(removed), ascending, removed, axis=-1, inplace=False)
    return jnp.where(removed, -jnp.inf, logits)


def keep_min_p(logits: NextLogits, min_p: Setting) -> NextLogits:
    """Keeps the tokens with at least min_p times the probability of the best (Nguyen et al. 2024)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probabilities < min_p * probabilities.max(axis=-1, keepdims=True), -jnp.inf, logits)


def divisor(number: float) -> float:
    """The nearest divisor that a device represents in full precision together with its reciprocal."""
    return min(max(float(number), _LEAST), 1 / _LEAST)
