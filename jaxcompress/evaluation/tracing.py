"""Traces of a policy on a sequence: the tokens held after every step, and when each token was evicted."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxcompress.inputs.token_ids import token_rows
from jaxcompress.models.checks import check_fits, check_mode, warn_of_positions
from jaxcompress.models.decoder import Decoder, ReadResult, last_hidden, read
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.models.modes import Mode, calls, padded
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.advance import death_times
from jaxcompress.state.kv_state import KVState, State, runs
from jaxcompress.state.placement import Placement

AT_ONCE = 512
"""Prompts and texts up to this length are padded to one of a few lengths, longer ones to a multiple of it."""


class Trace(NamedTuple):
    """The contents of the state after every step, on the host.

    Attributes:
      positions: [L, steps, B, P, S] int32, the positions held after each step, -1 for a free slot. Step 0 is the
        prompt, every later step one token. Layers and heads with fewer slots are padded with -1. A layer whose heads
        share a set repeats it P times. A pool is split into the positions of each kv head.
      logits: [steps, B, V] float32, for the token after each step.
      death: [L, B, P, T] int32, the first position whose query no longer saw each token; T for tokens still held.
        Plain attention under the mask `j <= i < death[j]` is the same computation.
    """

    positions: Int[np.ndarray, "L steps B P S"]
    logits: Float[np.ndarray, "steps B V"]
    death: Int[np.ndarray, "L B P T"]


def trace(  # nine parameters: those of `perplexity` that set how to read
    model: Decoder,
    tokens: Int[np.ndarray, "B T"],
    policy: Policy,
    slots: Slots,
    *,
    prompt: int = 1,
    mode: Mode = "oneshot",
    chunk: int = 128,
    placement: Placement | None = None,
    dtype: DTypeLike | None = None,
) -> Trace:
    """Reads the first `prompt` tokens in one of three modes and the rest one by one; returns the state's contents.

    Args:
      tokens: [B, T] token ids, at least `prompt` of them.
      slots: capacity of the state, see `jaxcompress.init_state`.
      prompt: tokens of step 0. With 1, all are read as in decoding.
      mode: how the prompt is read: `oneshot`, `chunked` (by `chunk` tokens) or `streaming`.
      placement: the positions that RoPE uses; by default the policy's placement.
      dtype: the dtype of the state (see `jaxcompress.state.storage`); by default the model's.

    Raises:
      ValueError: `tokens` are no token ids (see `jaxcompress.inputs.token_ids`), the prompt is outside 1..T, the state
        is too small for the policy, or the dtype is unknown.
      FloatingPointError: logits are not finite.

    Warns:
      PositionWarning: the text is longer than the model was trained for.
    """
    tokens = token_rows(tokens, model.config.vocab_size)
    total = tokens.shape[1]
    if not 1 <= prompt <= total:
        raise ValueError(f"prompt must be between 1 and the {total} tokens given, not {prompt}")
    stored = dtype or model.dtype
    state = init_state(model.config, policy, slots, batch=tokens.shape[0], dtype=stored)
    check_mode(policy, mode)
    check_fits(model.config, policy, state, total, prompt=prompt)
    warn_of_positions(model.config, policy, placement, total)
    begun, steps = _prompt(tokens[:, :prompt], mode, chunk), _filled(tokens[:, prompt:])
    first, rest = _traced(model, begun[:2], steps, state, policy, chunk=begun[2], placement=placement)
    death = _deaths(first, rest, model, state, total)  # padding causes no deaths
    first, rest = jax.tree.map(np.asarray, first), jax.tree.map(lambda x: np.asarray(x)[: total - prompt], rest)
    held = [
        np.concatenate([start[:, None], steps.swapaxes(0, 1)], axis=1)
        for start, steps in zip(first[0], rest[0], strict=True)
    ]
    positions = _stack(held, state, axis=3, fill=-1)
    logits = np.concatenate([first[1][None], rest[1]])
    if not np.isfinite(logits).all():
        step, row, _ = np.argwhere(~np.isfinite(logits))[0]
        raise FloatingPointError(f"non-finite logits, first in row {row} by position {prompt - 1 + step}")
    return Trace(positions, logits, death)


def _prompt(tokens: np.ndarray, mode: Mode, chunk: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A prompt padded for reading in one call, a mask of its valid tokens, and the tokens between two selections."""
    total = tokens.shape[1]
    plan = calls(mode, total, chunk=chunk, segment=AT_ONCE)
    by = max(call.chunk for call in plan)
    width = -(-padded(total, AT_ONCE) // by) * by
    return *_filled(tokens, width), by


def _filled(tokens: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and a mask of them, padded to a width; by default to one of a few widths."""
    total = tokens.shape[1]
    width = padded(total, AT_ONCE) if width is None else width
    fill = [(0, 0), (0, width - total if total else 0)]
    return np.pad(tokens, fill), np.pad(np.ones(tokens.shape, bool), fill)


@partial(jax.jit, static_argnames=("chunk", "placement"))
def _traced(model, prompt, later, state, policy, *, chunk, placement):
    (prompt, known), (later, there) = prompt, later

    def facts(done: ReadResult, valid):
        held = tuple(_held(part, model.config.num_kv_heads) for part in done.state)
        return held, model.logits(last_hidden(done, valid))[:, 0], done.freed, done.died

    start = read(model, prompt, state, policy, valid=known, chunk=chunk, placement=placement)

    def step(state, inputs):
        token, valid = (x[:, None] for x in inputs)
        done = read(model, token, state, policy, valid=valid, placement=placement)
        return done.state, facts(done, valid)

    _, rest = jax.lax.scan(step, start.state, (later.T, there.T))
    return facts(start, known), rest


def _held(part: KVState, kv_heads: int) -> Int[Array, "L B P S"]:
    """Positions of each set; if the kv heads share a pool, positions of each kv head."""
    if part.owner is None:
        return part.positions
    return jnp.where(part.owner == jnp.arange(kv_heads)[:, None], part.positions, -1)


def _stack(values: list[np.ndarray], state: State, *, axis: int, fill: int = 0) -> np.ndarray:
    """One array per part, [L, ..., P, N] with P at `axis` -> one array of all layers."""
    layers, first = [], 0
    for _, parts in runs(state):
        mine = values[first : first + len(parts)]
        first += len(parts)
        width = max(x.shape[-1] for x in mine)
        mine = [np.pad(x, [(0, 0)] * (axis + 1) + [(0, width - x.shape[-1])], constant_values=fill) for x in mine]
        heads = [head for part in parts for head in part.heads]
        layers.append(np.concatenate(mine, axis)[(slice(None),) * axis + (np.argsort(heads),)] if heads else mine[0])
    width, sets = max(x.shape[-1] for x in layers), max(x.shape[axis] for x in layers)
    layers = [np.pad(x, [(0, 0)] * (axis + 1) + [(0, width - x.shape[-1])], constant_values=fill) for x in layers]
    return np.concatenate([np.repeat(x, sets // x.shape[axis], axis) for x in layers])


def _deaths(first, rest, model: Decoder, state: State, total: int) -> Int[np.ndarray, "L B P T"]:
    parts, width = [], padded(total, AT_ONCE)  # few shapes for all lengths
    for part in range(len(first[0])):
        pairs = zip((first[2][part], first[3][part]), (rest[2][part], rest[3][part]), strict=True)
        freed, died = (_join(prompt, steps) for prompt, steps in pairs)
        parts.append(np.stack([death_times(f, d, width) for f, d in zip(freed, died, strict=True)]))
    layers = _stack(parts, state, axis=2)[..., :total]
    if model.config.sliding:
        leaves = np.arange(total)
        layers = np.stack(
            [d if w is None else np.minimum(d, leaves + w) for d, w in zip(layers, model.config.sliding, strict=True)]
        )
    return np.minimum(layers, total)


def _join(prompt: Array, steps: Array) -> Array:
    """[L, n, B, P, F] and [steps, L, 1, B, P, F] -> [L, n + steps, B, P, F], with the narrower array padded with -1."""
    both = [prompt, steps[:, :, 0].swapaxes(0, 1)]
    width = max(x.shape[-1] for x in both)
    pad = lambda x: jnp.pad(x, [(0, 0)] * 4 + [(0, width - x.shape[-1])], constant_values=-1)
    return jnp.concatenate([pad(x) for x in both], axis=1)
