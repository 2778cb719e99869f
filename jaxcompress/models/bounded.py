"""A decoder as a bounded multi-state RNN: tokens and state in, hidden states and state out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise, product
from operator import index
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcompress.attention import Shown
from jaxcompress.models.decoder import Attend, Decoder, DecoderConfig
from jaxcompress.models.rope import rotate
from jaxcompress.pallas_kernels.contract import together as rows_together
from jaxcompress.policies.base import Around, Candidates, Placement, Policy, Rotate
from jaxcompress.recurrence import Recurrence, advance
from jaxcompress.shapes import Hidden, Positions, Tokens, Valid
from jaxcompress.state import KVState, Memory, State, Stats, empty, runs, with_numbers
from jaxcompress.storage import dtype_name, load
from jaxcompress.token_ids import check_read

Slots = int | Sequence[int] | Sequence[Sequence[int]]
"""Capacity: one for all layers, one for each, or one for each kv head of each layer (see `jaxcompress.budgets`)."""

Mode = Literal["streaming", "chunked", "oneshot"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Read(NamedTuple):
    """Result of `read`.

    Attributes:
      hidden: [B, T, E], normed; `model.logits(hidden)` gives the scores of next tokens. Padding's rows mean nothing.
      state: advanced by T tokens.
      freed, died: one entry per part of the state, [L, n, B, P, F]; see `jaxcompress.recurrence.Advanced`.
    """

    hidden: Hidden
    state: State
    freed: tuple[Array, ...]
    died: tuple[Array, ...]


def init_state(
    config: DecoderConfig,
    policy: Policy,
    slots: Slots,
    *,
    batch: int = 1,
    dtype: Any = jnp.float32,
    together: int | None = None,
) -> State:
    """A fresh state with every slot free.

    Consecutive layers that share capacities and policy are stacked. Heads of different capacity are stored apart, so
    that what a small one does not need is never allocated.

    Args:
      slots: capacities (see `Slots`). A sliding-window layer gets no more than its window. In a pool the capacity is
        the mean of the kv heads that share it.
      dtype: of keys and values; `int8`, `int4` and `float8_e4m3fn` are quantised (see `jaxcompress.storage`).
      together: slots are allocated in multiples of this; those beyond what the policy needs stay free. None: as the
        default device lays them out anyway, 8 on a TPU (32 for quantised states), 1 elsewhere.

    Raises:
      ValueError: something that is no policy or no capacity, a capacity below 1 or below what the policy needs, not one
        per layer or head, capacities per head for a policy whose heads share a set, policies for another number of
        layers, an unknown dtype, or int4 for heads of odd width.
    """
    check_policy(policy)
    together = rows_together(dtype_name(dtype)) if together is None else together
    if policy.layers and len(policy.layers) != config.num_layers:
        raise ValueError(f"{policy.name} has {len(policy.layers)} policies, the model has {config.num_layers} layers")
    capacities = [_capacities(config, policy.at(layer), layer, slots) for layer in range(config.num_layers)]
    plans = [(policy.at(layer), capacities[layer]) for layer in range(config.num_layers)]
    state = []
    for _, run in groupby(range(config.num_layers), key=plans.__getitem__):
        layers = list(run)
        mine, capacity = plans[layers[0]]
        for which in sorted(_alike(capacity).values()):
            part = range(layers[0], layers[-1] + 1)
            state.append(_part(config, mine, part, capacity[which[0]], which, batch, dtype, together))
    return tuple(state)


def _capacities(config: DecoderConfig, policy: Policy, layer: int, slots: Slots) -> tuple[int, ...]:
    """Of each kv head of a layer."""
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
    """Heads of each capacity."""
    return {c: tuple(head for head, other in enumerate(capacity) if other == c) for c in capacity}


def _part(
    config: DecoderConfig,
    policy: Policy,
    layers: range,
    capacity: int,
    which: tuple[int, ...],
    batch: int,
    dtype: Any,
    together: int,
) -> KVState:
    """Some heads of some layers."""
    every = len(which) == config.num_kv_heads
    entries = config.num_kv_heads if policy.scope == "pool" else 1
    group = config.num_heads // config.num_kv_heads
    heads = policy.heads(group * len(which), len(which))
    slots = -(-policy.slots(capacity * entries, entries) // together) * together
    bare = empty(
        layers=layers, batch=batch, heads=heads, sets=policy.sets(heads), capacity=capacity * entries,
        slots=slots, head_dim=config.head_dim, dtype=dtype,
        which=() if every else which, pooled=policy.scope == "pool",
    )  # fmt: skip
    return with_numbers(bare, *_numbers(config, policy, which, capacity, batch))


def _numbers(
    config: DecoderConfig, policy: Policy, which: tuple[int, ...], capacity: int, batch: int
) -> tuple[Stats, Memory]:
    """Shapes and types of a policy's numbers, of one token and of one row, for some heads of a layer."""
    entries = config.num_kv_heads if policy.scope == "pool" else 1
    group = config.num_heads // config.num_kv_heads
    heads = policy.heads(group * len(which), len(which))
    shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)
    sets, d = policy.sets(heads), config.head_dim
    unplaced: Rotate = lambda x, positions: x
    around = Around(unplaced, policy.placement, None, (group * len(which), len(which)), tuple(which[:heads]) or (0,))

    def numbers(keys: Any, positions: Any, owner: Any, seen: Any, layer: Any, out: Any) -> tuple[Any, Any]:
        one = Candidates(keys, keys, positions, owner, seen, layer, (), capacity * entries, around._replace(out=out))
        memory = policy.memory(one)
        return policy.init(one._replace(memory=memory)), memory

    return jax.eval_shape(
        numbers, shape(batch, heads, 1, d), shape(batch, sets, 1, dtype=jnp.int32),
        shape(batch, 1, 1, dtype=jnp.int32) if entries > 1 else None, shape(batch, dtype=jnp.int32),
        shape(dtype=jnp.int32), shape(len(which), group, d, config.hidden_size),
    )  # fmt: skip


def read(
    model: Decoder,
    tokens: Tokens,
    state: State,
    policy: Policy,
    *,
    valid: Valid | None = None,
    chunk: int = 1,
    placement: Placement | None = None,
    recurrence: Recurrence = advance,
) -> Read:
    """Reads a block of tokens into the state. Pure; jit it with `policy`, `chunk` and `placement` static.

    Args:
      tokens: [B, T]; T may be 1 (decoding).
      valid: [B, T], False for padding, which may stand anywhere. None: all are tokens.
      chunk: tokens between two selections: 1 is streaming, T one-shot, others chunked.
      placement: where tokens stand for RoPE.
      recurrence: computes a layer; another one gives the same result with another gradient (see
        `jaxcompress.training.recurrent`).

    Raises:
      ValueError: tokens that are no integers [B, T], ids outside the vocabulary (under jit values are not known, and
        not checked), a state of another batch, or one that was made for another model or policy.
    """
    config = model.config
    check_read(tokens, config.vocab_size, valid)
    check_state(config, state, policy, batch=tokens.shape[0])
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    nth = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    positions = jnp.where(valid, state[0].seen[:, None] + nth - 1, -1)
    x = model.embed(tokens)
    done, freed, died = [], [], []
    for layers, parts in runs(state):
        attend = _attend(config, policy.at(layers.start), layers.start, chunk, placement, recurrence)
        x, parts, gone = model.run_layers(x, _standing(positions, parts, state), attend, parts, layers=layers)
        done += [replace(part, seen=part.seen + nth[:, -1]) for part in parts]
        freed += [pair[0] for pair in gone]
        died += [pair[1] for pair in gone]
    return Read(model.norm(x), tuple(done), tuple(freed), tuple(died))


def _standing(positions: Positions, parts: State, before: State) -> Positions:
    """Positions as the layers of these parts count them, from those of layers before: they differ where tokens were
    numbered anew on the way (see `read_block`)."""
    return jnp.where(positions >= 0, positions + (parts[0].seen - before[0].seen)[:, None], -1)


def _attend(
    config: DecoderConfig, policy: Policy, first: int, chunk: int, placement: Placement | None, recurrence: Recurrence
) -> Attend:
    """A step of the recurrence, for the layers of one run; `first` is their first. The carry is the run's parts."""
    rope, windows = partial(rotate, rope=config.rope), config.windows

    def attend(q, k, v, positions, layer, index, carry: State, xs):
        window = None if windows is None else windows[index]
        out = layer.attention.out.kernel[...].reshape(config.num_kv_heads, -1, config.head_dim, config.hidden_size)
        results = []
        for part in carry:
            heads = _Heads(part.heads, config)
            results.append(recurrence(
                heads.queries(q), heads.kv(k), heads.kv(v), positions, part, index - first, policy,
                chunk=chunk, rotate=rope, placement=placement, window=window, project=heads.project(out),
            ))  # fmt: skip
        gone = tuple((result.freed, result.died) for result in results)
        return _together(results, carry, config), tuple(result.state for result in results), gone

    return attend


class Block(NamedTuple):
    """Tokens between two layers of a decoder, words and patches alike.

    Attributes:
      hidden: [B, T, E], the residual stream.
      positions: [B, T], growing along T; -1 for padding.
      patch: [B, T] int32, which visual token of its row each is, counted from 0; -1 for a word or padding.
    """

    hidden: Hidden
    positions: Positions
    patch: Int[Array, "B T"]

    def take(self, index: Int[Array, "B n"]) -> Block:
        """The tokens at these indices; give them in ascending order."""
        pick = lambda x: jnp.take_along_axis(x, index, axis=1)
        return Block(jnp.take_along_axis(self.hidden, index[..., None], axis=1), pick(self.positions), pick(self.patch))


class Stage(NamedTuple):
    """What happens between two layers while a prompt is read.

    Attributes:
      layer: after which layer.
      reduce: (tokens, what the attention of that layer compared) -> fewer tokens, as many in every row; padding where a
        row has less. The last token of a row has to stay: what is written next follows it.
    """

    layer: int
    reduce: Callable[[Block, Shown], Block]


def read_block(
    model: Decoder,
    block: Block,
    state: State,
    policy: Policy,
    *,
    stages: Sequence[Stage] = (),
    chunk: int | None = None,
    placement: Placement | None = None,
) -> tuple[Block, State]:
    """Reads embeddings into the state, with tokens leaving between layers: later layers then hold fewer.

    Pure; jit it with `policy`, `chunk`, `placement` and the stages static. Returns the tokens that are left after the
    last layer, normed, and the state. A next token stands after the last position of each layer: where stages number
    tokens anew, that differs between layers, as far as their states are apart (`init_state` with slots per layer).

    Args:
      stages: in ascending order of their layers.
      chunk: tokens between two selections; all at once by default (one-shot).

    Raises:
      ValueError: stages that are out of order, or after a layer that does not exist; a state of another batch, or one
        that was made for another model or policy.
    """
    config = model.config
    check_state(config, state, policy, batch=block.positions.shape[0])
    after = {stage.layer: stage.reduce for stage in stages}
    order = [stage.layer for stage in stages]
    if order != sorted(after) or not set(order) <= set(range(config.num_layers)):
        raise ValueError(
            f"stages after layers {order}: give each layer once, in order, out of 0..{config.num_layers - 1}"
        )
    begun, done = state, []
    for layers, parts in runs(state):
        mine = policy.at(layers.start)
        block = block._replace(positions=_standing(block.positions, parts, begun))
        begun, last = parts, block.positions.max(-1) + 1
        ends = [layer + 1 for layer in order if layer in layers]
        for start, stop in pairwise(sorted({layers.start, *ends, layers.stop})):
            attend = _attend(config, mine, layers.start, chunk or block.positions.shape[1], placement, advance)
            piece = range(start, stop)
            if stop - 1 in after:
                shown = _nothing_shown(block, config)
                x, (parts, shown), _ = model.run_layers(
                    block.hidden, block.positions, _showing(attend, config), (parts, shown), layers=piece
                )
                block = after[stop - 1](block._replace(hidden=x), shown)
            else:
                x, parts, _ = model.run_layers(block.hidden, block.positions, attend, parts, layers=piece)
                block = block._replace(hidden=x)
        done += [replace(part, seen=jnp.maximum(part.seen, last)) for part in parts]
    return block._replace(hidden=model.norm(block.hidden)), tuple(done)


def _showing(attend: Attend, config: DecoderConfig) -> Attend:
    """The same, with what was compared in the carry beside the state."""

    def and_show(q, k, v, positions, layer, index, carry, xs):
        out, parts, gone = attend(q, k, v, positions, layer, index, carry[0], xs)
        at = positions[..., None]
        shown = carry[1]._replace(queries=rotate(q, at, config.rope), keys=rotate(k, at, config.rope))
        return out, (parts, shown), gone

    return and_show


def _nothing_shown(block: Block, config: DecoderConfig) -> Shown:
    b, t = block.positions.shape
    heads = lambda n: jnp.zeros((b, t, n, config.head_dim), block.hidden.dtype)
    bias = jnp.zeros((b, t), jnp.float32)
    return Shown(heads(config.num_heads), heads(config.num_kv_heads), bias, block.positions)


class _Heads(NamedTuple):
    """Picks the heads of a part of a layer."""

    which: tuple[int, ...]
    config: DecoderConfig

    def kv(self, x: Array) -> Array:
        return x[:, :, self.which] if self.which else x

    def queries(self, x: Array) -> Array:
        if not self.which:
            return x
        split = x.reshape(*x.shape[:2], self.config.num_kv_heads, -1, x.shape[-1])[:, :, self.which]
        return split.reshape(*x.shape[:2], -1, x.shape[-1])

    def project(self, x: Array) -> Array:
        return x[self.which,] if self.which else x


def _together(results: list[Any], parts: State, config: DecoderConfig) -> Array:
    """The attention output of all heads, from that of the parts."""
    if len(results) == 1:
        return results[0].out
    order = np.argsort([head for part in parts for head in part.heads])
    heads = [result.out.reshape(*result.out.shape[:2], len(part.heads), -1, config.head_dim)
             for result, part in zip(results, parts, strict=True)]  # fmt: skip
    return jnp.concatenate(heads, axis=2)[:, :, order].reshape(*results[0].out.shape[:2], -1, config.head_dim)


def last_hidden(result: Read, valid: Valid | None) -> Float[Array, "B 1 E"]:
    """Hidden state of each row's last token, [B, 1, E]."""
    if valid is None:
        return result.hidden[:, -1:]
    t = valid.shape[1]
    last = (t - 1 - jnp.argmax(valid[:, ::-1], axis=1))[:, None, None]
    return jnp.take_along_axis(result.hidden, last, axis=1)


class Call(NamedTuple):
    """What one call reads of a text.

    Attributes:
      start, stop: tokens [start, stop) of the text.
      width: tokens of the call; what `stop - start` leaves of it is padding.
      chunk: tokens between two selections.
    """

    start: int
    stop: int
    width: int
    chunk: int


FEWEST = 32
"""The width of the shortest call: texts below it are filled up."""


def padded(tokens: int, most: int) -> int:
    """The width of a call that reads so many tokens: one of few, so that few programs are compiled.

    Up to `most` these are the powers of two from `FEWEST` on, and `most`; above it, multiples of `most`.
    """
    if tokens > most:
        return -(-tokens // most) * most
    return min(max(1 << (tokens - 1).bit_length(), FEWEST), most)


def calls(mode: Mode, total: int, *, chunk: int, segment: int, start: int = 0) -> list[Call]:
    """How to read tokens [start, total) of a text in a named mode: the calls, one after the other.

    Where calls end changes nothing: a segment is made a whole number of chunks, and padding is masked. Only `oneshot`
    needs all tokens in one call, since it selects from all of them at once.

    Raises:
      ValueError: an unknown mode, or a chunk or segment below 1.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if chunk < 1 or segment < 1:
        raise ValueError(f"a chunk and a segment have at least 1 token, not chunk={chunk}, segment={segment}")
    if mode == "oneshot":
        width = padded(total - start, segment)
        return [Call(start, total, width, width)]
    by = 1 if mode == "streaming" else chunk
    segment = max(segment // by, 1) * by
    plan = []
    for at in range(start, total, segment):
        stop = min(at + segment, total)
        width = padded(stop - at, segment)
        if width <= by:  # one selection, from all of it
            plan.append(Call(at, stop, width, width))
        else:
            plan.append(Call(at, stop, -(-width // by) * by, by))
    return plan


def check_policy(policy: Any) -> None:
    """Raises ValueError if something is no policy; says what it is and how to get one."""
    if isinstance(policy, Policy):
        return
    if isinstance(policy, str):
        told = f"its name {policy!r}: write jaxcompress.named({policy!r})"
    elif hasattr(policy, "make"):
        told = "one as it was saved: call its make()"
    elif callable(policy) and hasattr(policy, "__name__"):
        told = f"{policy.__name__} itself: call it, {policy.__name__}()"
    else:
        told = f"{policy!r:.60}; the model comes first, then tokens or a state, then the policy, then numbers"
    raise ValueError(f"a policy is expected, such as jaxcompress.named('tova'), not {told}")


def check_state(config: DecoderConfig, state: State, policy: Policy, *, batch: int) -> None:
    """Raises ValueError if a state was not made for a model's shape, a policy and so many rows.

    It compares shapes and types: policies that keep the same numbers for the same heads cannot be told apart by their
    state. A `Progress` knows its policy.
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
    made = lambda what, has, wants: ValueError(
        f"the state was not made for policy {policy.name}: it has {has} {what}, the policy needs {wants}; make it with "
        "init_state(config, policy, slots), and go on with the policy that it was made for"
    )
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
    stats, memory = _numbers(config, policy, which, part.capacity // entries, batch)
    if _kind(stats, 3) != _kind(part.stats, 4):
        raise made("numbers for each slot", _told(part.stats), _told(stats))
    if _kind(memory, 1) != _kind(part.memory, 2):
        raise made("numbers for each row", _told(part.memory), _told(memory))


def _width(part: KVState) -> int:
    """D, whatever values are stored as."""
    return jax.eval_shape(load, part.values).shape[-1]


def _kind(numbers: Any, leading: int) -> Any:
    """What tells one policy's numbers from another's: structure, type and the axes after the first few."""
    return jax.tree.structure(numbers), [(x.dtype, x.shape[leading:]) for x in jax.tree.leaves(numbers)]


def _told(numbers: Any) -> str:
    return ", ".join(f"{x.dtype}" for x in jax.tree.leaves(numbers)) or "no"


def check_mode(policy: Policy, mode: Mode) -> None:
    """Raises ValueError if a policy means nothing in a mode; says which it needs."""
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
    """Raises ValueError if a policy that cannot make room is to hold more tokens than it has slots.

    Args:
      tokens: how many will have been read in all; a sliding-window layer needs no more slots than its window.
      prompt: how many of them are read at once at first, for a policy that then selects once.
      held: where a prompt was read, and layers may have read different numbers of its tokens: how many each layer
        holds. `tokens` are then those to come.
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
                what, need = (
                    f"keeps {mine.schedule.keep} of {prompt} tokens and every later one",
                    mine.schedule.keep + tokens - prompt,
                )
            else:
                continue
            if capacity < need:
                raise ValueError(
                    f"policy {mine.name} {what}: {total} tokens do not fit into the {capacity} slots of layer "
                    f"{layer}; give {need} slots or more, or a policy that evicts"
                )
