"""Reading embeddings into a state, with tokens leaving between layers."""

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
from jaxcompress.models.rope import rotate
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.state.kv_state import State, runs
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import Hidden, Positions


class HiddenBlock(NamedTuple):
    """Tokens between two layers of a decoder, words and patches alike.

    Attributes:
      hidden: [B, T, E], the residual stream.
      positions: [B, T], growing along T; -1 for padding.
      patch: [B, T] int32, which visual token of its row each is, counted from 0; -1 for a word or padding.
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


class Stage(NamedTuple):
    """What happens between two layers while a prompt is read.

    Attributes:
      layer: after which layer.
      reduce: (tokens, what the attention of that layer compared) -> fewer tokens, as many in every row; padding where a
        row has less. The last token of a row has to stay: what is written next follows it.
    """

    layer: int
    reduce: Callable[[HiddenBlock, AttentionInputs], HiddenBlock]


def read_block(
    model: Decoder,
    block: HiddenBlock,
    state: State,
    policy: Policy,
    *,
    stages: Sequence[Stage] = (),
    chunk: int | None = None,
    placement: Placement | None = None,
) -> tuple[HiddenBlock, State]:
    """Reads embeddings into the state, with tokens leaving between layers: later layers then hold fewer.

    Pure; jit it with `chunk`, `placement` and the stages static. Returns the tokens that are left after the
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
        block = block._replace(positions=layer_positions(block.positions, parts, begun))
        begun, last = parts, block.positions.max(-1) + 1
        ends = [layer + 1 for layer in order if layer in layers]
        for start, stop in pairwise(sorted({layers.start, *ends, layers.stop})):
            attend = attend_slots(config, mine, layers.start, chunk or block.positions.shape[1], placement, None)
            attend = attend if len(parts) == 1 else by_parts(attend, config)
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


def _nothing_shown(block: HiddenBlock, config: DecoderConfig) -> AttentionInputs:
    b, t = block.positions.shape
    heads = lambda n: jnp.zeros((b, t, n, config.head_dim), block.hidden.dtype)
    bias = jnp.zeros((b, t), jnp.float32)
    return AttentionInputs(heads(config.num_heads), heads(config.num_kv_heads), bias, block.positions)
