"""MustDrop, the decoding stage: drops patches from the cache that the output does not attend to (section 3.4).

The paper names an "output-aware cache policy". The released code does less: after the prompt, it removes from earlier
layers the tokens that later layers dropped (`survivors`). `OutputAware` is the policy of the paper: during generation,
the patches that the output attends to least go one by one, down to a given number, and words stay.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxcompress.policies.cache_view import CacheView, Observation
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.state.kv_state import KVState, State, Stats
from jaxcompress.state.shapes import SlotScores


@policy
class OutputAware(Policy):
    """Keeps all words, and those patches (positions first..last - 1) that the words after them attend to most.

    score[n] = attention to token n, mean over heads, summed over the words after the picture: the question first, then
    the answer as it is generated. A layer's heads share a set. Attention of patches and of words before the picture
    does not count. When the state is full, the patch with the lowest score goes. Words go only when no patch is left,
    oldest first.

    Attributes:
      first, last: the patches are at positions first..last - 1 of the sequence.

    Raises:
      ValueError: the range is empty or negative.
    """

    first: int
    last: int

    def check(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(f"patches stand at positions first..last - 1, {self.first}..{self.last - 1} was given")

    @property
    def name(self) -> str:
        return f"output_aware[{self.first}:{self.last}]"

    def init(self, incoming: CacheView) -> Stats:
        return jnp.zeros(incoming.positions.shape, jnp.float32)

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        written = (seen.queries >= self.last)[:, None, :, None]
        return stats + jnp.where(written, seen.per_set("layer"), 0.0).sum(2)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        patch = (held.positions >= self.first) & (held.positions < self.last)
        # Words score above every patch, the newest highest. Positions stay in the range of exact float32 integers.
        return jnp.where(patch, stats, 1e6 + held.positions.astype(jnp.float32))


def survivors(state: State, kept: Bool[Array, "B N"] | Int[Array, "B N"], layers: range) -> State:
    """Frees the slots, in these layers, of tokens that the last layers do not hold: the released code's third stage.

    Slots do not move; use `packed` for a smaller state.

    Args:
      kept: [B, N], the positions that stay, -1 for an unused entry.
      layers: the layers of the model after the first pruning stage, up to the last stage.
    """
    done = []
    for part in state:
        stays = (part.positions[..., None] == kept[:, None, None]).any(-1) | (part.positions < 0)
        here = (part.layer >= layers.start) & (part.layer < layers.stop)
        freed = jnp.where(here[:, None, None, None] & ~stays, -1, part.positions)
        done.append(replace(part, positions=freed))
    return tuple(done)


def packed(state: KVState, capacity: int, slots: int) -> KVState:
    """Moves the occupied slots together, into a smaller state with `slots` slots.

    Every set must have at most `slots` occupied slots. Tokens are in the order of their positions.
    """
    order = jnp.argsort(
        jnp.where(state.positions >= 0, state.positions, jnp.iinfo(jnp.int32).max), axis=-1, stable=True
    )
    order = order[..., :slots]

    def pick(x: Array) -> Array:
        index = jnp.broadcast_to(order, (*x.shape[:3], order.shape[-1]))
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 4)), axis=3)

    return replace(state, capacity=capacity, **jax.tree.map(pick, state.slotted()))
