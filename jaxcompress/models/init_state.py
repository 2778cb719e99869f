"""A fresh state for a decoder, a policy and a number of slots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcompress.inputs.described import described
from jaxcompress.models.config import DecoderConfig
from jaxcompress.pallas_kernels.dispatch import slot_multiple as usual_multiple
from jaxcompress.policies.cache_view import LayerContext
from jaxcompress.policies.checks import check_policy
from jaxcompress.policies.numbers import numbers_of
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import Memory, State, Stats, empty, with_numbers
from jaxcompress.state.placement import Rotate
from jaxcompress.state.storage import dtype_name

Slots = int | Sequence[int] | Sequence[Sequence[int]]
"""Capacity: one for all layers, one per layer, or one per kv head of each layer (see
`jaxcompress.budgets.allocate`)."""


def init_state(
    config: DecoderConfig,
    policy: Policy,
    slots: Slots,
    *,
    batch: int = 1,
    dtype: DTypeLike = jnp.float32,
    slot_multiple: int | None = None,
) -> State:
    """A fresh state with every slot free.

    Consecutive layers with the same capacities and policy are stacked. Heads of different capacity are stored
    separately, so that a head with a small capacity allocates no unused slots.

    Args:
      slots: capacities (see `Slots`). A sliding-window layer gets no more than its window. In a pool the capacity is
        the mean of the kv heads that share it.
      dtype: of keys and values; that of a model is `model.dtype`. `int8`, `int4` and `float8_e4m3fn` are quantised (see
        `jaxcompress.state.storage`).
      slot_multiple: slots are allocated in multiples of this; slots that the policy does not need stay free. None
        follows the layout of the default device: 8 on a TPU (32 for quantised states), 1 elsewhere.

    Raises:
      ValueError: an argument is not a config, policy or capacity; a capacity is below 1 or below the policy's minimum;
        the number of capacities does not match the layers or heads; capacities are per head, but the policy's heads
        share a set; policies are for another number of layers; the dtype is unknown, or int4 for heads of odd width.
    """
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"the first argument must be a DecoderConfig, such as model.config, not {described(config)}")
    check_policy(policy)
    slot_multiple = usual_multiple(dtype_name(dtype)) if slot_multiple is None else slot_multiple
    if policy.layers and len(policy.layers) != config.num_layers:
        raise ValueError(f"{policy.name} has {len(policy.layers)} policies, the model has {config.num_layers} layers")
    capacities = [_capacities(config, policy.at(layer), layer, slots) for layer in range(config.num_layers)]
    plans = [(policy.at(layer), capacities[layer]) for layer in range(config.num_layers)]
    parts = []
    for _, run in groupby(range(config.num_layers), key=plans.__getitem__):
        layers = list(run)
        mine, capacity = plans[layers[0]]
        for which in sorted(_alike(capacity).values()):
            part = range(layers[0], layers[-1] + 1)
            parts.append(_part(config, mine, part, capacity[which[0]], which, batch, dtype, slot_multiple))
    return _made(tuple(parts))


class _Part(NamedTuple):
    """What a part of a state is made of, as a key of compiled programs.

    Attributes:
      shape: the arguments of `empty`.
      numbers: tree, shapes and dtypes of `policy_numbers`.
    """

    shape: tuple[tuple[str, Any], ...]
    numbers: tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]


@partial(jax.jit, static_argnums=0)
def _made(parts: tuple[_Part, ...]) -> State:
    """The state, by one program: a program for each of its arrays takes longer to start."""
    made = []
    for part in parts:
        tree, leaves = part.numbers
        numbers = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves])
        made.append(with_numbers(empty(**dict(part.shape)), *numbers))
    return tuple(made)


def _capacities(config: DecoderConfig, policy: Policy, layer: int, slots: Slots) -> tuple[int, ...]:
    """Capacity of each kv head of a layer."""
    every: Any = slots.tolist() if isinstance(slots, np.ndarray) else slots
    given = every
    if isinstance(every, list | tuple):
        if len(every) != config.num_layers:
            raise ValueError(f"slots has {len(every)} entries, the model has {config.num_layers} layers")
        given = every[layer]
    heads = list(given) if isinstance(given, list | tuple) else [given] * config.num_kv_heads
    heads = [_capacity(head) for head in heads]
    if len(heads) != config.num_kv_heads:
        raise ValueError(
            f"slots has {len(heads)} entries for layer {layer}, the model has {config.num_kv_heads} kv heads"
        )
    if len(set(heads)) > 1 and policy.scope != "kv_head":
        raise ValueError(
            f"policy {policy.name} cannot give the heads of layer {layer} different capacities {heads}: its scope is "
            f"{policy.scope}; use one with scope kv_head"
        )
    if min(heads) < 1:
        raise ValueError(f"a state needs at least 1 slot per layer, slots={slots} was given")
    if min(heads) < policy.needs:
        raise ValueError(f"policy {policy.name} needs at least {policy.needs} slots per layer, slots={slots} was given")
    window = config.sliding[layer] if config.sliding else None
    return tuple(min(head, window or head) for head in heads)


def _capacity(given: Any) -> int:
    try:
        if not isinstance(given, bool):
            return index(given)
    except TypeError:
        pass
    raise ValueError(
        f"slots must be a number of slots, one for each layer, or one for each kv head of each layer, not {given!r:.60}"
    )


def _alike(capacity: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Maps each capacity to its heads."""
    return {c: tuple(head for head, other in enumerate(capacity) if other == c) for c in capacity}


def _part(
    config: DecoderConfig,
    policy: Policy,
    layers: range,
    capacity: int,
    which: tuple[int, ...],
    batch: int,
    dtype: DTypeLike,
    slot_multiple: int,
) -> _Part:
    """The part of the state for some heads of some layers."""
    every = len(which) == config.num_kv_heads
    entries = config.num_kv_heads if policy.scope == "pool" else 1
    group = config.num_heads // config.num_kv_heads
    heads = policy.heads(group * len(which), len(which))
    slots = -(-policy.slots(capacity * entries, entries) // slot_multiple) * slot_multiple
    shape = dict(
        layers=layers, batch=batch, heads=heads, sets=policy.sets(heads), capacity=capacity * entries,
        slots=slots, head_dim=config.head_dim, dtype=dtype_name(dtype),
        which=() if every else which, pooled=policy.scope == "pool",
    )  # fmt: skip
    leaves, tree = jax.tree.flatten(policy_numbers(config, policy, which, capacity, batch))
    return _Part(tuple(shape.items()), (tree, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)))


def policy_numbers(
    config: DecoderConfig, policy: Policy, which: tuple[int, ...], capacity: int, batch: int
) -> tuple[Stats, Memory]:
    """Shapes and types of a policy's numbers per token and per row, for some heads of a layer."""
    entries = config.num_kv_heads if policy.scope == "pool" else 1
    group = config.num_heads // config.num_kv_heads
    heads = policy.heads(group * len(which), len(which))
    unplaced: Rotate = lambda x, positions: x
    mine = which if len(which) < config.num_kv_heads else tuple(range(heads))  # as while reading
    out: Any = jax.ShapeDtypeStruct((len(which), group, config.head_dim, config.hidden_size), jnp.float32)
    context = LayerContext(
        unplaced, policy.placement, out, (group * len(which), len(which)), mine, layers=config.num_layers
    )
    return numbers_of(
        policy, context, batch=batch, head_dim=config.head_dim, capacity=capacity * entries, pooled=entries > 1
    )
