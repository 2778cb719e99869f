"""From the logits of the next token to the token.

A `Sampler` is a frozen, hashable description, so that it can be a static argument under jit; the work is done by the
pure functions below it, on logits [B, V]. They follow Hugging Face's logits processors in order, on ties and in always
keeping a token: repetition penalty, temperature, top-k, top-p, min-p.

Rows are independent: each draws from its own key, so a batch of N gives what N batches of 1 give. Where a loop wants
another sampler it may pass any hashable callable with the signature of `Sampler.__call__`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcompress.scalars import number, whole
from jaxcompress.shapes import Tokens, Valid

NextLogits = Float[Array, "B V"]
NextTokens = Int[Array, "B"]
Seen = Bool[Array, "B V"]  # the tokens that a row's prompt and output have had so far
RowKeys = Key[Array, "B"]

_LEAST, _MOST = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn. The defaults draw from the model's own distribution.

    Numbers may be Python's, numpy's, or arrays without dimensions; they are kept as Python's own.

    Attributes:
      temperature: the logits are divided by it; 0 takes the best token (greedy) and needs no keys. One so small that
        float32 has no quotient draws among the tokens that are equally good, the best.
      top_k: keep the k best tokens, and those that tie with the k-th (Fan et al. 2018). None: all.
      top_p: keep the fewest best tokens that together have probability top_p (nucleus, Holtzman et al. 2020).
        None or 1: all.
      min_p: keep the tokens with at least min_p times the probability of the best (Nguyen et al. 2024). None: all.
      repetition_penalty: divides the positive and multiplies the negative logits of tokens seen before (Keskar et
        al. 2019). 1: no penalty; below 1 repetition is encouraged.

    Raises:
      ValueError: temperature is negative or not finite, top_k is not an integer >= 1, top_p is not in (0, 1], min_p
        is not in [0, 1], or repetition_penalty is not a positive number.
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = 1.0

    def __post_init__(self) -> None:
        positive = "a positive number (1: no penalty)"
        self._settle("temperature", number, lambda x: x >= 0, "a finite number >= 0 (0: greedy)")
        self._settle("top_k", whole, lambda x: x >= 1, "an integer >= 1, or None to keep all tokens")
        self._settle("top_p", number, lambda x: 0 < x <= 1, "in (0, 1], or None to keep all tokens")
        self._settle("min_p", number, lambda x: 0 <= x <= 1, "in [0, 1], or None to keep all tokens")
        self._settle("repetition_penalty", number, lambda x: x > 0, positive)

    def _settle(
        self, name: str, kind: Callable[[Any, str], int | float], holds: Callable[[Any], bool], rule: str
    ) -> None:
        """Makes a number of the field Python's own, if it keeps its rule."""
        given = getattr(self, name)
        if given is None and type(self).__dataclass_fields__[name].default is None:
            return
        try:
            value = kind(given, name)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise ValueError(f"{name} must be {rule}, got {given!r}")
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, so that no keys are needed."""
        return self.temperature == 0

    @property
    def needs_seen(self) -> bool:
        """Whether the sampler must be told which tokens came before."""
        return self.repetition_penalty != 1

    def __call__(self, keys: RowKeys | None, logits: NextLogits, seen: Seen | None = None) -> NextTokens:
        """Draws one token per row.

        Nothing is checked inside: a row of NaN still gives some token, so a loop has to look at the logits itself.

        Args:
          keys: [B] one key per row, for this step alone (see `row_keys`); None if greedy.
          logits: [B, V].
          seen: [B, V] bool, the tokens so far (see `remember`); only a repetition penalty reads it.

        Returns:
          [B] int32.

        Raises:
          ValueError: keys or seen are missing though they are needed.
        """
        logits = self.warp(logits, seen)
        if self.greedy:
            return greedy(logits)
        if keys is None:
            raise ValueError("sampling at a temperature above 0 needs one key per row: row_keys(seeds)")
        return draw(keys, logits)

    def warp(self, logits: NextLogits, seen: Seen | None = None) -> NextLogits:
        """The float32 logits that are drawn from: removed tokens have -inf.

        At temperature 0 only the repetition penalty applies, since nothing else moves the best token.

        Raises:
          ValueError: there is a repetition penalty and no `seen`.
        """
        logits = logits.astype(jnp.float32)
        if self.needs_seen:
            if seen is None:
                raise ValueError("a repetition penalty needs `seen`: jnp.zeros((B, V), bool), kept up by remember()")
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        if self.greedy:
            return logits
        if self.temperature != 1:
            logits = heat(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return logits


def row_keys(seeds: Sequence[int]) -> RowKeys:
    """One key per row, [B]; a row with seed s draws what it would draw alone with seed s.

    For step t of a loop use `jax.vmap(jax.random.fold_in, (0, None))(keys, t)`.
    """
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def remember(seen: Seen, tokens: Tokens, valid: Valid | None = None) -> Seen:
    """Adds tokens [B, T] to what each row has seen [B, V]; where valid [B, T] is False (padding) nothing is added."""
    rows = jnp.arange(seen.shape[0])[:, None]
    # A negative index would count from the end, and one past the end is dropped.
    columns = tokens if valid is None else jnp.where(valid, tokens, seen.shape[1])
    return seen.at[rows, columns].set(True, mode="drop")


def greedy(logits: NextLogits) -> NextTokens:
    """The best token of each row [B]; the first of several equal ones."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(keys: RowKeys, logits: NextLogits) -> NextTokens:
    """Draws a token per row [B] from softmax(logits), each row from its own key."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def heat(logits: NextLogits, temperature: float) -> NextLogits:
    """Logits divided by a temperature above 0; where the best quotient is no float32, all are taken less the best."""
    temperature = _divisor(temperature)
    best = logits.max(-1, keepdims=True)
    return jnp.where(jnp.isfinite(best / temperature), logits / temperature, (logits - best) / temperature)


def penalise_repetition(logits: NextLogits, seen: Seen, penalty: float) -> NextLogits:
    """Makes seen tokens less likely: positive logits are divided by the penalty, negative ones multiplied by it.

    Keskar et al. 2019, "CTRL", with Hugging Face's rule for negative logits. What is finite stays so.
    """
    penalty = _divisor(penalty)
    moved = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, jnp.where(jnp.isinf(logits), logits, jnp.clip(moved, -_MOST, _MOST)), logits)


def keep_top_k(logits: NextLogits, k: int) -> NextLogits:
    """Removes all that is below the k-th best logit, so what ties with it stays (Fan et al. 2018)."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: NextLogits, p: float) -> NextLogits:
    """Keeps the fewest best tokens whose probabilities sum to at least p (Holtzman et al. 2020), at least one.

    Of tokens that tie at the edge of the nucleus those with the higher index stay, as with Hugging Face (whose sort
    leaves it to chance in large vocabularies).
    """
    ascending = jnp.argsort(logits, axis=-1, stable=True)
    ordered = jnp.take_along_axis(logits, ascending, axis=-1)
    removed = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) <= 1 - p
    removed = removed.at[..., -1].set(False)
    removed = jnp.put_along_axis(jnp.zeros_like(removed), ascending, removed, axis=-1, inplace=False)
    return jnp.where(removed, -jnp.inf, logits)


def keep_min_p(logits: NextLogits, min_p: float) -> NextLogits:
    """Keeps the tokens with at least min_p times the probability of the best (Nguyen et al. 2024)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probabilities < min_p * probabilities.max(axis=-1, keepdims=True), -jnp.inf, logits)


def _divisor(number: float) -> float:
    """The nearest one that a device has in full precision, and its reciprocal."""
    return min(max(float(number), _LEAST), 1 / _LEAST)
