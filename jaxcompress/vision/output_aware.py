"""MustDrop, the decoding stage: patches leave the cache that what is written does not look at (section 3.4).

The paper names an "output-aware cache policy"; the released code only removes, after the prompt, what later layers
dropped from earlier ones (`survivors`). `OutputAware` is the policy: while words are written, the patches that they
attend to least go one by one, down to a number, and words stay.
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
    """Keeps all words, and of the tokens at positions first..last - 1, the patches, those that the output attends to.

    score[n] = mean over the tokens written so far of the attention that they gave token n, mean over heads. A layer's
    heads share a set. What the prompt attended to does not count: only what is written does. When a written token finds
    the state full, the patch with the lowest score goes; words go, oldest first, only where no patch is left.

    Attributes:
      first, last: where the patches stand in the sequence.

    Raises:
      ValueError: an empty or negative range.
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
        # Words above every patch, the newest on top; positions beyond float32's whole numbers do not occur.
        return jnp.where(patch, stats, 1e6 + held.positions.astype(jnp.float32))


def survivors(state: State, kept: Bool[Array, "B N"] | Int[Array, "B N"], layers: range) -> State:
    """Frees, in these layers, the slots of tokens that the last layers do not hold: the released code's third stage.

    Slots do not move; use `packed` for a smaller state.

    Args:
      kept: [B, N], the positions that stay, -1 for none.
      layers: of the model, those after the first stage's and up to the last one's.
    """
    done = []
    for part in state:
        stays = (part.positions[..., None] == kept[:, None, None]).any(-1) | (part.positions < 0)
        here = (part.layer >= layers.start) & (part.layer < layers.stop)
        freed = jnp.where(here[:, None, None, None] & ~stays, -1, part.positions)
        done.append(replace(part, positions=freed))
    return tuple(done)


def packed(state: KVState, capacity: int, slots: int) -> KVState:
    """The state with its occupied slots moved together into `slots` of them, for a smaller one.

    Every set has to have at most that many occupied. Tokens stand in the order of their positions.
    """
    order = jnp.argsort(
        jnp.where(state.positions >= 0, state.positions, jnp.iinfo(jnp.int32).max), axis=-1, stable=True
    )
    order = order[..., :slots]

    def pick(x: Array) -> Array:
        index = jnp.broadcast_to(order, (*x.shape[:3], order.shape[-1]))
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 4)), axis=3)

    return replace(state, capacity=capacity, **jax.tree.map(pick, state.slotted()))
