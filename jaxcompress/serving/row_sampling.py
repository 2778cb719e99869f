"""Sampling where each row has settings of its own: arrays, so that a new request compiles nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.generation.config import GenerationConfig
from jaxcompress.generation.sampling import (
    Appeared,
    NextLogits,
    NextTokens,
    RowKeys,
    divisor,
    draw,
    greedy,
    heat,
    keep_min_p,
    leave_out,
    penalise_repetition,
)
from jaxcompress.inputs.described import described

STOPS = 16
"""Stop tokens of a request, at most."""

EVERY = int(np.iinfo(np.int32).max)
"""The top-k of a row that draws from all tokens."""

TOP = 20
"""The number of most likely tokens of which log-probabilities are given."""


class RowSampling(NamedTuple):
    """The settings of B rows, NumPy arrays on the host.

    Attributes:
      greedy: [B], rows that take the best token.
      temperature, penalty: [B, 1] float32, as `divisor` gives them.
      top_k: [B, 1] int32, `EVERY` for all tokens.
      rest: [B, 1] float32, 1 - top_p; -1 for all tokens.
      min_p: [B, 1] float32, 0 for all tokens.
      stop: [B, STOPS] int32, -1 for none.
      left: [B] int32, tokens that may still be written.
      logprobs: [B], rows that report log-probabilities.
    """

    greedy: Bool[np.ndarray | Array, " B"]
    temperature: Float[np.ndarray | Array, "B 1"]
    penalty: Float[np.ndarray | Array, "B 1"]
    top_k: Int[np.ndarray | Array, "B 1"]
    rest: Float[np.ndarray | Array, "B 1"]
    min_p: Float[np.ndarray | Array, "B 1"]
    stop: Int[np.ndarray | Array, "B STOPS"]
    left: Int[np.ndarray | Array, " B"]
    logprobs: Bool[np.ndarray | Array, " B"]


def idle_rows(rows: int) -> RowSampling:
    """The settings of rows that write nothing."""
    return RowSampling(
        np.ones(rows, bool), np.ones((rows, 1), np.float32), np.ones((rows, 1), np.float32),
        np.full((rows, 1), EVERY, np.int32), np.full((rows, 1), -1, np.float32), np.zeros((rows, 1), np.float32),
        np.full((rows, STOPS), -1, np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool),
    )  # fmt: skip


def set_row(rows: RowSampling, row: int, config: GenerationConfig, *, left: int, logprobs: bool) -> None:
    """Writes the settings of one row."""
    rows.greedy[row] = config.greedy
    rows.temperature[row] = 1 if config.greedy else divisor(config.temperature)
    rows.penalty[row] = divisor(config.repetition_penalty)
    rows.top_k[row] = EVERY if config.top_k is None else min(config.top_k, EVERY)
    rows.rest[row] = 1 - config.top_p if config.top_p is not None and config.top_p < 1 else -1
    rows.min_p[row] = config.min_p or 0
    rows.stop[row] = [*config.stop_token_ids, *[-1] * (STOPS - len(config.stop_token_ids))]
    rows.left[row], rows.logprobs[row] = left, logprobs


def check_row_config(config: GenerationConfig) -> None:
    """Raises ValueError for a configuration that does not fit into a row."""
    if type(config) is not GenerationConfig:
        raise ValueError(
            f"the rows of a pool share one way to sample, with settings of their own: give a GenerationConfig, not "
            f"{described(config)}; generate takes one of your own"
        )
    if len(config.stop_token_ids) > STOPS:
        raise ValueError(f"a request has at most {STOPS} stop tokens, not {len(config.stop_token_ids)}")


def sample_rows(keys: RowKeys, logits: NextLogits, appeared: Appeared, rows: RowSampling) -> NextTokens:
    """A token for each row, the one that `GenerationConfig.sample` gives with this row's settings."""
    logits = _if_any(rows.penalty != 1, lambda x: penalise_repetition(x, appeared, jnp.asarray(rows.penalty)), logits)
    best = greedy(logits)
    drawn = lambda: jnp.where(rows.greedy, best, draw(keys, _warped(logits, rows)))
    return jax.lax.cond(jnp.all(rows.greedy), lambda: best, drawn)


def _warped(logits: NextLogits, rows: RowSampling) -> NextLogits:
    logits = heat(logits, jnp.asarray(rows.temperature))
    logits = _if_any(rows.top_k < logits.shape[-1], lambda x: _keep_top_k(x, rows.top_k), logits)
    logits = _if_any(rows.rest >= 0, lambda x: leave_out(x, jnp.asarray(rows.rest)), logits)
    return _if_any(rows.min_p > 0, lambda x: keep_min_p(x, jnp.asarray(rows.min_p)), logits)


def _keep_top_k(logits: NextLogits, k: Int[Array, "B 1"] | np.ndarray) -> NextLogits:
    """`jaxcompress.generation.sampling.keep_top_k` with a k for each row."""
    kth = jnp.take_along_axis(jnp.sort(logits, axis=-1), jnp.maximum(logits.shape[-1] - k, 0), axis=-1)
    return jnp.where(logits < kth, -jnp.inf, logits)


def _if_any(rows: Bool[Array | np.ndarray, "B 1"], change, logits: NextLogits) -> NextLogits:
    """The changed logits if any row asks for the change, which leaves the others as they are. Saves the work else."""
    return jax.lax.cond(jnp.any(rows), change, lambda x: x, logits)


class Likely(NamedTuple):
    """Log-probabilities under the model's own distribution, before temperature and everything else.

    Attributes:
      chosen: [B] float32, of the token that was written.
      tokens: [B, K] int32, the most likely tokens, best first.
      logprobs: [B, K] float32, theirs.
    """

    chosen: Float[Array, "..."]
    tokens: Int[Array, "..."]
    logprobs: Float[Array, "..."]


def likely(logits: NextLogits, token: NextTokens, wanted: Bool[Array, " B"] | np.ndarray) -> Likely:
    """Zeros if no row wants them."""
    most = min(TOP, logits.shape[-1])

    def given() -> Likely:
        every = jax.nn.log_softmax(logits, axis=-1)
        best, tokens = jax.lax.top_k(every, most)
        return Likely(jnp.take_along_axis(every, token[:, None], axis=-1)[:, 0], tokens, best)

    return jax.lax.cond(jnp.any(jnp.asarray(wanted)), given, lambda: no_likely((logits.shape[0],), most))


def no_likely(shape: Sequence[int], most: int) -> Likely:
    """Zeros of this shape."""
    return Likely(
        jnp.zeros(tuple(shape), jnp.float32), jnp.zeros((*shape, most), jnp.int32),
        jnp.zeros((*shape, most), jnp.float32),
    )  # fmt: skip
