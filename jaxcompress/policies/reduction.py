"""What becomes of the tokens that are not kept: dropped, merged into what stays, or summarised beside it.

    policy = with_reduce(TOVA(), merge_weighted())

Merging changes values, never keys. Cached keys are rotated to their positions, and the mean of keys that stand at
different positions is the key of none. Summaries average keys before rotation. They cost memory of their own, which
counts towards the bytes of the state. The choice (who goes, who joins whom) has no gradient; the sums do.

Tokens that leave a sliding window are dropped. If a layer has fewer slots than its window, what it merged or summarised
stays visible beyond the window.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from jaxcompress.policies.cache_view import Absorbed, CacheView, Evicted, LayerContext
from jaxcompress.policies.labels import Named
from jaxcompress.policies.summary import Summary
from jaxcompress.state.kv_state import Memory, Stats


class Reduction(Named):
    """What becomes of evicted tokens. It sees one kv head at a time, whoever shares a set in the policy.

    Attributes:
      weighs: whether it adds a bias to the attention scores of slots (see `bias`).
      summarises: whether queries see stand-ins beside the slots (see `summary`).
    """

    weighs: bool = False
    summarises: bool = False

    def absorb(self, numbers: Stats, held: CacheView, gone: Evicted) -> Absorbed:
        """What is held after tokens have gone. Positions and numbers are [B, K, N] or [B, K, M], keys and values
        float32, `owner` is None; memory is the reduction's own."""
        raise NotImplementedError

    def init(self, positions: Int[Array, "B K T"]) -> Stats:
        """The numbers of incoming tokens, of the shape of their positions each."""
        return ()

    def observe(self, numbers: Stats, mass: Float[Array, "B K N"]) -> Stats:
        """The numbers after a block of queries that gave this mass, the mean over a group's heads."""
        return numbers

    def memory(self, rows: int, heads: int, width: int) -> Memory:
        """Fresh memory of zeros, [B, K, ...] each."""
        return ()

    def bias(self, numbers: Stats) -> Float[Array, "B K N"]:
        """Added to attention scores, if it `weighs`."""
        raise NotImplementedError

    def summary(self, memory: Memory, context: LayerContext) -> Summary:
        """Stand-ins seen beside the slots, if it `summarises`."""
        raise NotImplementedError
