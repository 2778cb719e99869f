"""Perplexity of a text read through a bounded state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxcompress.models.bounded import Mode, Slots, check_fits, check_mode, cut, init_state, read
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.base import Placement, Policy
from jaxcompress.state import State
from jaxcompress.training.loss import token_losses


class Perplexity(NamedTuple):
    """How well a text was predicted.

    Attributes:
      nats: mean negative log-likelihood per token, in nats.
      tokens: how many tokens were predicted.
      tokens_per_second: read, compilation left out.
      state_bytes: of the state, all rows.
    """

    nats: float
    tokens: int
    tokens_per_second: float
    state_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def perplexity(
    model: Decoder,
    tokens: Int[np.ndarray, "B T"],
    policy: Policy,
    slots: Slots,
    *,
    mode: Mode = "streaming",
    chunk: int = 128,
    prompt: int | None = None,
    skip: int = 0,
    segment: int = 512,
    placement: Placement | None = None,
    dtype: Any = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Perplexity:
    """Mean loss of predicting each token of each row from the state after the tokens before it.

    Rows are independent texts. They are read in segments, so that memory does not grow with T; a layer's projections
    run over a whole segment at once, which changes nothing (see `jaxcompress.recurrence`).

    Args:
      mode: `streaming`: exactly as in decoding. `chunked`: selection every `chunk` tokens, over which a token sees more
        than the state. `oneshot`: the first `prompt` tokens attend to each other in full and are selected from once,
        the rest is streamed; only the rest is counted.
      skip: leave so many of the first tokens out of the mean, to compare modes on the same tokens.
      segment: tokens read per call; made a whole number of chunks.
      dtype: of keys and values, one of `jaxcompress.storage.DTYPES`; the model's by default.
      progress: called with the number of tokens read, per segment.

    Raises:
      ValueError: fewer than 2 tokens, a prompt that does not fit, a `full` state that is too small.
      FloatingPointError: losses are not finite; says where first.
    """
    tokens = np.asarray(tokens, np.int32)
    batch, total = tokens.shape
    if total < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, {total} given")
    check_mode(policy, mode)
    state = init_state(model.config, policy, slots, batch=batch, dtype=dtype or model.embedding[...].dtype)
    check_fits(model.config, policy, state, total - 1, prompt=prompt)
    nbytes = sum(run.nbytes for run in state)
    if mode == "oneshot":
        if prompt is None or not 1 <= prompt < total - 1:
            raise ValueError(f"mode oneshot needs a prompt of 1 to {total - 2} of the {total} tokens, not {prompt}")
        plan = [(0, prompt, prompt)] + [(i, min(i + segment, total - 1), 1) for i in range(prompt, total - 1, segment)]
        skip = max(skip, prompt)
    else:
        segment, by = cut(mode, total - 1, chunk=chunk, segment=segment)
        plan = [(i, min(i + segment, total - 1), by) for i in range(0, total - 1, segment)]
    if skip >= total - 1:
        raise ValueError(f"nothing is left to measure: {total - 1} predictions, the first {skip} of them skipped")

    total_loss, seconds = 0.0, 0.0
    for part in predictions(model, tokens, state, policy, plan, placement=placement):
        if not np.isfinite(part.losses).all():
            row, at = np.argwhere(~np.isfinite(part.losses))[0]
            where = f"first in row {row} after the token at position {part.start + at}"
            raise FloatingPointError(f"non-finite logits, {where}")
        total_loss += part.losses[:, max(skip - part.start, 0) :].sum()
        seconds += part.seconds
        progress(part.losses.size)
    counted = batch * (total - 1 - skip)
    return Perplexity(total_loss / counted, counted, batch * (total - 1) / seconds, nbytes)


class Predictions(NamedTuple):
    """How the tokens after those of one piece were predicted.

    Attributes:
      start: where the piece begins; losses[:, i] is that of token start + i + 1.
      losses: [B, n] float64, nats.
      right: [B, n] bool, whether the token was the most probable one.
      seconds: to read the piece, compilation left out.
      state: after the piece; reading the next consumes it.
    """

    start: int
    losses: np.ndarray
    right: np.ndarray
    seconds: float
    state: State


def predictions(
    model: Decoder,
    tokens: Int[np.ndarray, "B T"],
    state: State,
    policy: Policy,
    plan: Sequence[tuple[int, int, int]],
    *,
    placement: Placement | None = None,
) -> Iterator[Predictions]:
    """Reads rows of text piece by piece into a fresh state; what is known of every next token, per piece.

    Args:
      plan: (start, end, tokens between two selections) of each piece; the last piece ends before the last token.
    """
    widths = {by: max(end - start for start, end, other in plan if other == by) for _, _, by in plan}
    programs: dict[int, Any] = {}
    for start, end, by in plan:
        # A shorter last piece is filled up with padding, which costs less than compiling for another length.
        fill = [(0, 0), (0, widths[by] - (end - start))]
        piece, target = np.pad(tokens[:, start:end], fill), np.pad(tokens[:, start + 1 : end + 1], fill)
        valid = np.pad(np.ones((len(tokens), end - start), bool), fill)
        inputs = (model, jnp.asarray(piece), jnp.asarray(target), jnp.asarray(valid), state)
        if by not in programs:
            how: dict[str, Any] = dict(policy=policy, chunk=by, placement=placement)
            programs[by] = _predict.lower(*inputs, **how).compile()
        begun = time.perf_counter()
        losses, right, state = programs[by](*inputs)
        losses = np.asarray(losses, np.float64)[:, : end - start]
        seconds = time.perf_counter() - begun
        yield Predictions(start, losses, np.asarray(right)[:, : end - start], seconds, state)


@partial(jax.jit, static_argnames=("chunk", "placement"), donate_argnames="state")
def _predict(
    model: Decoder,
    tokens: Array,
    targets: Array,
    valid: Array,
    state: State,
    *,
    policy: Policy,
    chunk: int,
    placement: Placement | None,
) -> tuple[Array, Array, State]:
    done = read(model, tokens, state, policy, valid=valid, chunk=chunk, placement=placement)
    logits = model.logits(done.hidden)
    return token_losses(logits, targets), logits.argmax(-1) == targets, done.state
