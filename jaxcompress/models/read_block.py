"""Reads embeddings into a state; tokens may leave between layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.models.checks import check_state
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Attend, Decoder, attend_slots, by_parts, layer_positions
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.state.attention_traits import AttentionTraits
from jaxcompress.state.kv_state import State, runs
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import Hidden, Positions


class HiddenBlock(NamedTuple):
    """Tokens between two layers of a decoder, both words and patches.

    Attributes:
      hidden: [B, T, E], the residual stream.
      positions: [B, T], increasing along T; -1 for padding.
      patch: [B, T] int32, number of the visual token in its row, from 0; -1 for a word or padding.
    """

    hidden: Hidden
    positions: Positions
    patch: Int[Array, "B T"]

    def take(self, index: Int[Array, "B n"]) -> HiddenBlock:
        """The tokens at these indices; give them in ascending order."""
        pick = lambda x: jnp.take_along_axis(x, index, axis=1)
        return HiddenBlock(
            jnp.take_along_axis(self.hidden, index[..., None], axis=1), pick(self.positions), pick(self.patch)
        )


class LayerPruning(NamedTuple):
    """Tokens that leave between two layers while a prompt is read.

    Attributes:
      layer: the layer after which they leave.
      prune: (tokens, attention inputs of that layer) -> the remaining tokens, the same number in every row; shorter
        rows are padded. The last token of a row must stay, since the next token is predicted from it.
    """

    layer: int
    prune: Callable[[HiddenBlock, AttentionInputs], HiddenBlock]


def read_block(
    model: Decoder,
    block: HiddenBlock,
    state: State,
    policy: Policy,
    *,
    prunings: Sequence[LayerPruning] = (),
    chunk: int | None = None,
    placement: Placement | None = None,
) -> tuple[HiddenBlock, State]:
    """Reads embeddings into the state. Tokens may leave between layers; later layers then hold fewer.

    The function is pure; jit it with `prunings`, `chunk` and `placement` static. Returns the tokens left after the last
    layer, normed, and the state. The next token comes after the last position of each layer. If a pruning renumbers
    positions, the last position differs between layers with separate states (`init_state` with slots per layer).

    Args:
      prunings: in ascending order of their layers.
      chunk: tokens between two selections of the policy; one selection at the end by default (one-shot).

    Raises:
      ValueError: prunings are out of order, or name a layer that does not exist; the state has another batch size, or
        was made for another model or policy.
    """
    config = model.config
    check_state(config, state, policy, batch=block.positions.shape[0])
    prune = {pruning.layer: pruning.prune for pruning in prunings}
    _check_layers([pruning.layer for pruning in prunings], config)
    earlier, done = state, []
    for layers, parts in runs(state):
        mine = policy.at(layers.start)
        block = block._replace(positions=layer_positions(block.positions, parts, earlier))
        earlier, last = parts, block.positions.max(-1) + 1
        ends = [layer + 1 for layer in prune if layer in layers]
        for start, stop in pairwise(sorted({layers.start, *ends, layers.stop})):
            attend = attend_slots(config, mine, layers.start, chunk or block.positions.shape[1], placement, None)
            attend = attend if len(parts) == 1 else by_parts(attend, config)
            piece = range(start, stop)
            if stop - 1 in prune:
                start_carry = parts, _no_attention(block, config)
                x, (parts, attention), _ = model.run_layers(
                    block.hidden, block.positions, _with_attention(attend, config), start_carry, layers=piece
                )
                block = prune[stop - 1](block._replace(hidden=x), attention)
            else:
                x, parts, _ = model.run_layers(block.hidden, block.positions, attend, parts, layers=piece)
                block = block._replace(hidden=x)
        done += [replace(part, seen=jnp.maximum(part.seen, last)) for part in parts]
    return block._replace(hidden=model.norm(block.hidden)), tuple(done)


def _check_layers(given: list[int], config: DecoderConfig) -> None:
    if given != sorted(set(given)) or not set(given) <= set(range(config.num_layers)):
        raise ValueError(
            f"prunings after layers {given}: give each layer once, in order, out of 0..{config.num_layers - 1}"
        )


def _with_attention(attend: Attend, config: DecoderConfig) -> Attend:
    """The same attention; its carry also has the queries and keys, beside the state."""

    def attend_and_keep(q, k, v, positions, layer, index, carry, xs):
        out, parts, gone = attend(q, k, v, positions, layer, index, carry[0], xs)
        here = layer.attention.constants(config, index)
        q, k = here.placed(q, k, positions)
        attention = carry[1]._replace(queries=q, keys=k, traits=here.traits)
        return out, (parts, attention), gone

    return attend_and_keep


def _no_attention(block: HiddenBlock, config: DecoderConfig) -> AttentionInputs:
    b, t = block.positions.shape
    heads = lambda n: jnp.zeros((b, t, n, config.head_dim), block.hidden.dtype)
    bias = jnp.zeros((b, t), jnp.float32)
    sinks = jnp.zeros(config.num_heads, block.hidden.dtype) if config.sinks else None
    traits = AttentionTraits(config.softcap, sinks)
    return AttentionInputs(heads(config.num_heads), heads(config.num_kv_heads), bias, block.positions, traits)
