"""Checks that policy, state and model match."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import product

import jax

from jaxcompress.inputs.position_warning import PositionWarning
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import policy_numbers
from jaxcompress.models.modes import Mode
from jaxcompress.policies.checks import check_policy
from jaxcompress.policies.numbers import check_numbers, not_made_for
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import KVState, State, runs
from jaxcompress.state.placement import Placement
from jaxcompress.state.storage import load_vectors


def check_state(config: DecoderConfig, state: State, policy: Policy, *, batch: int) -> None:
    """Raises ValueError if a state was not made for the model's shape, the policy and the batch size.

    The check compares shapes and types. It cannot distinguish policies that keep the same numbers for the same heads.
    A `DecodeState` knows its policy.
    """
    check_policy(policy)
    if not isinstance(state, tuple) or not all(isinstance(part, KVState) for part in state):
        raise ValueError(f"a state is expected, as init_state makes it, not {type(state).__name__}")
    if policy.layers and len(policy.layers) != config.num_layers:
        raise ValueError(f"{policy.name} has {len(policy.layers)} policies, the model has {config.num_layers} layers")
    layers = sum(parts[0].layer.shape[0] for _, parts in runs(state))
    if layers != config.num_layers:
        raise ValueError(f"the state has {layers} layers, the model {config.num_layers}: it was made for another model")
    for run, parts in runs(state):
        mine = policy.at(run.start)
        if other := next((policy.at(layer) for layer in run if policy.at(layer) != mine), None):
            raise ValueError(
                f"the state holds layers {run.start} to {run.stop - 1} together, and the policy has {mine.name} and "
                f"{other.name} for them: make the state with init_state(config, policy, slots)"
            )
        for part in parts:
            _check_part(config, part, mine, batch)


def _check_part(config: DecoderConfig, part: KVState, policy: Policy, batch: int) -> None:
    which = part.heads or tuple(range(config.num_kv_heads))
    pooled = policy.scope == "pool"
    entries = config.num_kv_heads if pooled else 1
    group = config.num_heads // config.num_kv_heads
    heads = policy.heads(group * len(which), len(which))
    if part.positions.shape[1] != batch:
        raise ValueError(f"the state has {part.positions.shape[1]} rows, the tokens {batch}")
    if jax.tree.leaves(part.values)[0].shape[1:3] != (batch, part.kv_heads) or _width(part) != config.head_dim:
        raise ValueError(f"the state's heads are {_width(part)} wide, the model's {config.head_dim}")
    made = partial(not_made_for, policy)
    pools = lambda pooled: "one pool for all heads" if pooled else "slots for each head"
    if pooled != (part.owner is not None):
        raise made("in a layer", pools(part.owner is not None), pools(pooled))
    if part.kv_heads != heads:
        raise made("heads in a layer", part.kv_heads, heads)
    if part.sets != policy.sets(heads):
        raise made("sets of slots in a layer", part.sets, policy.sets(heads))
    slots, need = part.positions.shape[-1], policy.slots(part.capacity, entries)
    if slots < need:
        raise made("slots in a set", slots, need)
    check_numbers(policy, part, *policy_numbers(config, policy, which, part.capacity // entries, batch))


def _width(part: KVState) -> int:
    """D, independent of the storage type of the values."""
    return jax.eval_shape(load_vectors, part.values).shape[-1]


def check_mode(policy: Policy, mode: Mode) -> None:
    """Raises ValueError if a policy does not work in a mode; the message names the mode that it needs."""
    check_policy(policy)
    if policy.oneshot_only and mode != "oneshot":
        raise ValueError(f"policy {policy.name} selects from a whole prompt at once: it needs mode oneshot, not {mode}")


def check_fits(
    config: DecoderConfig,
    policy: Policy,
    state: State,
    tokens: int,
    *,
    prompt: int | None = None,
    held: Sequence[int] | None = None,
) -> None:
    """Raises ValueError if a policy that cannot free slots would have to hold more tokens than it has slots.

    Args:
      tokens: total number of tokens to read; a sliding-window layer needs no more slots than its window.
      prompt: number of tokens read in the first call, for a policy that selects once after it.
      held: number of tokens that each layer holds after a prompt, since layers may have read different numbers.
        `tokens` then counts only the tokens still to come.
    """
    if policy.forgets:
        return
    total = tokens
    for layers, parts in runs(state):
        for part, layer in product(parts, layers):
            mine, window = policy.at(layer), config.sliding[layer] if config.sliding else None
            capacity = part.capacity if part.owner is None else part.capacity // config.num_kv_heads
            if held is not None:
                total = held[layer] + tokens
                what, need = "keeps every token", min(total, window or total)
            elif not mine.evicts:
                what, need = "keeps every token", min(tokens, window or tokens)
            elif mine.schedule.when == "once" and prompt:
                kept = min(mine.schedule.keep, prompt)
                what = f"keeps {kept} of {prompt} tokens and every later one"
                need = min(kept + tokens - prompt, window or tokens)
            else:
                continue
            if capacity < need:
                raise ValueError(
                    f"policy {mine.name} {what}: {total} tokens do not fit into the {capacity} slots of layer "
                    f"{layer}; give {need} slots or more, or a policy that evicts"
                )


def warn_of_positions(
    config: DecoderConfig, policy: Policy, placement: Placement | None, end: int, *, begin: int = 0
) -> None:
    """Warns if a text leaves the positions that the model was trained for. Every function that reads texts calls it.

    Only positions that grow with the text do: absolute ones, and those of a policy that never evicts. A sequence that
    is read in several calls is told of once, by the call that crosses the border.

    Args:
      placement: the positions that RoPE uses; None: the policy's.
      begin, end: tokens of the longest row before and after the call.

    Warns:
      PositionWarning: names both numbers and what to do.
    """
    places = {placement or one.placement for one in policy.layers or (policy,)}
    if begin <= config.max_position < end and ("absolute" in places or not policy.evicts):
        warnings.warn(
            f"positions reach {end:,}, the model was trained for {config.max_position:,}: a policy that evicts, with "
            "--placement slot or compact (placement= in Python), keeps distances short; or read a shorter text",
            PositionWarning,
            stacklevel=3,
        )
