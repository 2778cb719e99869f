"""Perplexity of a text read through a bounded state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxcompress.distributed.processes import on_host
from jaxcompress.distributed.rules import ShardingRules, made
from jaxcompress.inputs.token_ids import token_rows
from jaxcompress.models.checks import check_fits, check_mode, warn_of_positions
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.models.modes import Mode, ReadCall, calls
from jaxcompress.policies.checks import check_policy
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import State, runs
from jaxcompress.state.placement import Placement
from jaxcompress.training.loss import token_losses


class Perplexity(NamedTuple):
    """The quality of the predictions of a text.

    Attributes:
      nats: mean negative log-likelihood per token, in nats.
      tokens: number of predicted tokens.
      tokens_per_second: reading speed, without compilation.
      state_bytes: bytes of the state of all rows.
      left_out: number of tokens of the text that were not predicted: the first token of each row, skipped tokens, a
        one-shot prompt, and tokens in no row.
    """

    nats: float
    tokens: int
    tokens_per_second: float
    state_bytes: int
    left_out: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def perplexity(  # fourteen parameters: how to read, and which tokens to count
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
    dtype: DTypeLike | None = None,
    sharding: ShardingRules | None = None,
    text: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Perplexity:
    """Mean loss of predicting each token of each row from the state after the tokens before it.

    Rows are independent texts. They are read in segments, so memory does not grow with T. The state is made here and
    donated from segment to segment; the model is not consumed.

    Args:
      tokens: [B, T] token ids.
      slots: capacity of the state, see `jaxcompress.init_state`.
      mode: `streaming`: as in decoding. `chunked`: tokens are evicted after every `chunk` tokens, so within a chunk a
        token sees more than the state. `oneshot`: the first `prompt` tokens attend to each other in full and tokens are
        evicted once; the rest is streamed, and only the rest is counted.
      chunk: tokens between two evictions, for `chunked`.
      prompt: tokens that are read at once, for `oneshot`.
      skip: the number of first predictions that are not counted, so that modes can be compared on the same tokens.
      segment: tokens per call; rounded to a whole number of chunks. It changes memory and speed, not the result.
      placement: the positions that RoPE uses; by default the policy's placement.
      dtype: the dtype of keys and values, one of `jaxcompress.state.storage.DTYPES`; by default the model's.
      sharding: where the state goes, each device making its own part; the model must be there too.
      text: the number of tokens of the text that the rows were cut from, for `left_out`; B * T by default.
      progress: called with the number of tokens read, per segment.

    Raises:
      ValueError: `tokens` are no token ids (see `jaxcompress.inputs.token_ids`) or fewer than 2, the mesh does not
        divide rows or heads, the prompt does not fit, a `full` state is too small, there are more slots than a policy
        that selects once can use, skip is negative or leaves nothing to count, or `text` is shorter than the predicted
        part.
      FloatingPointError: losses are not finite; the message names the first place.

    Warns:
      PositionWarning: rows are longer than the model was trained for (see `warn_of_positions`).
    """
    check_policy(policy)
    tokens = token_rows(tokens, model.config.vocab_size)
    batch, total = tokens.shape
    if total < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, {total} given")
    check_mode(policy, mode)
    fresh = lambda: init_state(model.config, policy, slots, batch=batch, dtype=dtype or model.dtype)
    state = made(fresh, model.config, batch, sharding)
    check_fits(model.config, policy, state, total - 1, prompt=prompt)
    check_used(policy, state, total - 1, prompt)
    nbytes = sum(run.nbytes for run in state)
    if mode == "oneshot":
        if prompt is None or not 1 <= prompt < total - 1:
            raise ValueError(f"mode oneshot needs a prompt of 1 to {total - 2} of the {total} tokens, not {prompt}")
        plan = once_and_stream(prompt, total - 1, segment=segment)
        first = max(skip, prompt)
    else:
        plan = calls(mode, total - 1, chunk=chunk, segment=segment)
        first = skip
    if skip < 0 or first >= total - 1:
        raise ValueError(f"nothing is left to measure: {total - 1} predictions, the first {skip} of them skipped")
    counted = batch * (total - 1 - first)
    of = tokens.size if text is None else text
    if of < counted:
        raise ValueError(f"a text of {of} tokens cannot have {counted} predictions; give the length of the whole text")
    warn_of_positions(model.config, policy, placement, total - 1)

    total_loss, seconds = 0.0, 0.0
    for part in predictions(model, tokens, state, policy, plan, placement=placement):
        if not np.isfinite(part.losses).all():
            row, at = np.argwhere(~np.isfinite(part.losses))[0]
            where = f"first in row {row} after the token at position {part.start + at}"
            raise FloatingPointError(f"non-finite logits, {where}")
        total_loss += part.losses[:, max(first - part.start, 0) :].sum()
        seconds += part.seconds
        progress(part.losses.size)
    return Perplexity(total_loss / counted, counted, batch * (total - 1) / seconds, nbytes, of - counted)


def check_used(policy: Policy, state: State, tokens: int, prompt: int | None) -> None:
    """Raises ValueError if a policy that selects only once, from a prompt, has more slots than it can fill.

    Such a policy keeps a fixed number of tokens of the prompt. With more slots its result would be the same, and a
    table would show that result under a capacity that had no effect.
    """
    for layers, parts in runs(state):
        one = policy.at(layers.start)
        need = once_slots(one, tokens, prompt)
        most = max(part.capacity for part in parts if part.owner is None) if parts[0].owner is None else None
        if one.schedule.when == "once" and most is not None and most > need:
            raise ValueError(
                f"policy {one.name} keeps {one.schedule.keep} tokens of the prompt and the {tokens - (prompt or 0)} "
                f"after it, whatever its capacity: {most} slots mean nothing to it; give {need} slots, or another "
                "number to keep"
            )


def once_slots(policy: Policy, tokens: int, prompt: int | None) -> int:
    """The number of slots that a policy fills which selects once, from a prompt, and then keeps every token; the least
    number that it can have if that is more."""
    keep = policy.schedule.keep
    kept = keep if prompt is None else min(keep, prompt)
    return max(kept + tokens - (prompt or 0), policy.needs)


def once_and_stream(prompt: int, total: int, *, segment: int) -> list[ReadCall]:
    """The calls that read a prompt at once, and the rest of a text token by token."""
    once = calls("oneshot", prompt, chunk=1, segment=segment) if prompt else []
    return once + calls("streaming", total, chunk=1, segment=segment, start=prompt)


class Predictions(NamedTuple):
    """The predictions made from the tokens of one piece; each is for the next token.

    Attributes:
      start: position at which the piece begins; losses[:, i] is the loss of token start + i + 1.
      losses: [B, n] float64, nats.
      right: [B, n] bool, whether the token was the most probable one.
      seconds: time to read the piece, without compilation.
      state: the state after the piece; donated when the next piece is read.
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
    plan: Sequence[ReadCall],
    *,
    placement: Placement | None = None,
) -> Iterator[Predictions]:
    """Reads rows of text piece by piece into a fresh state, and yields the predictions of each piece.

    Callers must check the arguments.

    Args:
      state: donated; do not use it after the first piece was read. The last `Predictions` has the state to continue
        from.
      plan: the calls (see `jaxcompress.models.modes.calls`); the last call ends before the last token.
    """
    for start, end, width, by in plan:
        # A shorter piece is padded, which costs less than compiling for another length.
        fill = [(0, 0), (0, width - (end - start))]
        piece, target = np.pad(tokens[:, start:end], fill), np.pad(tokens[:, start + 1 : end + 1], fill)
        valid = np.pad(np.ones((len(tokens), end - start), bool), fill)
        inputs = (model, jnp.asarray(piece), jnp.asarray(target), jnp.asarray(valid), state)
        # The program is compiled before the clock starts; JAX caches it for these shapes.
        program = predict_block.lower(*inputs, policy=policy, chunk=by, placement=placement).compile()
        begun = time.perf_counter()
        losses, right, state = program(*inputs, policy=policy)
        losses = on_host(losses).astype(np.float64)[:, : end - start]
        seconds = time.perf_counter() - begun
        yield Predictions(start, losses, on_host(right)[:, : end - start], seconds, state)


@partial(jax.jit, static_argnames=("chunk", "placement"), donate_argnames="state")
def predict_block(
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
    """Reads one block [B, T] into a state: the loss of each target, whether it was the best token, and the state.

    Predictions at tokens that are not valid mean nothing. Callers must check the arguments; the state is donated.
    """
    done = read(model, tokens, state, policy, valid=valid, chunk=chunk, placement=placement)
    logits = model.logits(done.hidden)
    return token_losses(logits, targets), logits.argmax(-1) == targets, done.state
