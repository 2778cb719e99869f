"""A decoder as a bounded multi-state RNN: tokens and state in, hidden states and state out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import index
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.models.decoder import Decoder, DecoderConfig
from jaxcompress.models.rope import rotate
from jaxcompress.policies.policy import Placement, Policy
from jaxcompress.recurrence import advance
from jaxcompress.shapes import Hidden, Tokens, Valid
from jaxcompress.state import KVState, State, empty, with_stats

Slots = int | Sequence[int]
"""Capacity: one for all layers, or one for each."""

Mode = Literal["streaming", "chunked", "oneshot"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Read(NamedTuple):
    """Result of `read`.

    Attributes:
      hidden: [B, T, E], normed; `model.logits(hidden)` gives the scores of next tokens. Padding's rows mean nothing.
      state: advanced by T tokens.
      freed, died: one entry per run of layers, [L, n, B, P, F]; see `jaxcompress.recurrence.Advanced`.
    """

    hidden: Hidden
    state: State
    freed: tuple[Array, ...]
    died: tuple[Array, ...]


def init_state(
    config: DecoderConfig, policy: Policy, slots: Slots, *, batch: int = 1, dtype: Any = jnp.float32
) -> State:
    """A fresh state with every slot free.

    Args:
      slots: capacity of each layer, or one for all. A sliding-window layer gets no more than its window.
      dtype: of keys and values.

    Raises:
      ValueError: a capacity below 1 or below what the policy needs, or not one per layer.
    """
    capacities = [index(c) for c in (slots if isinstance(slots, Sequence) else [slots] * config.num_layers)]
    if len(capacities) != config.num_layers:
        raise ValueError(f"slots has {len(capacities)} entries, the model has {config.num_layers} layers")
    if min(capacities) < 1:
        raise ValueError(f"a state needs at least 1 slot per layer, slots={slots} was given")
    if min(capacities) < policy.needs:
        raise ValueError(f"policy {policy.name} needs at least {policy.needs} slots per layer, slots={slots} was given")
    if config.sliding:
        capacities = [min(c, w) if w else c for c, w in zip(capacities, config.sliding, strict=True)]
    heads = config.num_heads if policy.scope == "query_head" else config.num_kv_heads
    runs = [[layer for layer, _ in run] for _, run in groupby(enumerate(capacities), key=lambda item: item[1])]
    state = []
    for run in runs:
        capacity = capacities[run[0]]
        bare = empty(
            layers=range(run[0], run[-1] + 1), batch=batch, heads=heads, sets=policy.sets(heads), capacity=capacity,
            slots=policy.slots(capacity), head_dim=config.head_dim, dtype=dtype,
        )  # fmt: skip
        state.append(with_stats(bare, jax.eval_shape(partial(_one_token_stats, policy), bare)))
    return tuple(state)


def _one_token_stats(policy: Policy, bare: KVState) -> Any:
    one = bare.take(0)
    one = replace(one, keys=one.keys[..., :1, :], values=one.values[..., :1, :], positions=one.positions[..., :1])
    return policy.init(one)


def read(
    model: Decoder,
    tokens: Tokens,
    state: State,
    policy: Policy,
    *,
    valid: Valid | None = None,
    chunk: int = 1,
    placement: Placement | None = None,
) -> Read:
    """Reads a block of tokens into the state. Pure; jit it with `policy`, `chunk` and `placement` static.

    Args:
      tokens: [B, T]; T may be 1 (decoding).
      valid: [B, T], False for padding, which may stand anywhere. None: all are tokens.
      chunk: tokens between two selections: 1 is streaming, T one-shot, others chunked.
      placement: where tokens stand for RoPE.
    """
    config = model.config
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    nth = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    positions = jnp.where(valid, state[0].seen[:, None] + nth - 1, -1)
    rope, windows = partial(rotate, rope=config.rope), config.windows
    x = model.embed(tokens)
    done, freed, died = [], [], []
    for run in state:
        first = int(sum(part.positions.shape[0] for part in done))

        def attend(q, k, v, positions, layer, carry: KVState, xs, *, first=first):
            window = None if windows is None else windows[layer]
            result = advance(
                q, k, v, positions, carry, layer - first, policy,
                chunk=chunk, rotate=rope, placement=placement, window=window,
            )  # fmt: skip
            return result.out, result.state, (result.freed, result.died)

        x, run, gone = model.run_layers(x, positions, attend, run, layers=range(first, first + run.layer.shape[0]))
        done.append(replace(run, seen=run.seen + nth[:, -1]))
        freed.append(gone[0])
        died.append(gone[1])
    return Read(model.norm(x), tuple(done), tuple(freed), tuple(died))


def last_hidden(result: Read, valid: Valid | None) -> Float[Array, "B 1 E"]:
    """Hidden state of each row's last token, [B, 1, E]."""
    if valid is None:
        return result.hidden[:, -1:]
    t = valid.shape[1]
    last = (t - 1 - jnp.argmax(valid[:, ::-1], axis=1))[:, None, None]
    return jnp.take_along_axis(result.hidden, last, axis=1)


def cut(mode: Mode, total: int, *, chunk: int, segment: int | None = None) -> tuple[int, int]:
    """How many of `total` tokens to read per call, and how many between two selections, in a named mode.

    Only `oneshot` needs all of them in one call. A segment is made a whole number of chunks, so that where it ends
    changes nothing.

    Raises:
      ValueError: an unknown mode, or a chunk or segment below 1.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    segment = total if segment is None else segment
    if chunk < 1 or segment < 1:
        raise ValueError(f"a chunk and a segment have at least 1 token, not chunk={chunk}, segment={segment}")
    if mode == "oneshot":
        return total, total
    if mode == "streaming":
        return min(segment, total), 1
    chunk = min(chunk, total)
    return max(min(segment, total) // chunk, 1) * chunk, chunk


def check_fits(config: DecoderConfig, policy: Policy, state: State, tokens: int) -> None:
    """Raises ValueError if a policy that forgets nothing is to hold more tokens than it has slots.

    Args:
      tokens: how many will have been read in all; a sliding-window layer needs no more slots than its window.
    """
    if policy.score is not None:
        return
    for run in state:
        for layer in run.layer.tolist():
            window = config.sliding[layer] if config.sliding else None
            if run.capacity < min(tokens, window or tokens):
                raise ValueError(
                    f"policy {policy.name} keeps every token: {tokens} tokens do not fit into the {run.capacity} slots "
                    f"of layer {layer}; give {tokens} slots or more, or a policy that evicts"
                )
