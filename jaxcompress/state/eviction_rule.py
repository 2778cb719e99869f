"""An eviction rule that a kernel can follow by itself. Policies give it (`Policy.rule`), kernels read it."""

from __future__ import annotations

from typing import Literal, NamedTuple


class EvictionRule(NamedTuple):
    """A policy that a kernel can follow by itself: one number per slot, folded from attention mass.

    After each token the lowest score goes, on a tie the youngest token. The score is the number, or minus the age where
    nothing is folded. Mass is the attention probability that a slot received, the mean over the heads that share a set.

    Attributes:
      fold: `last`: the number is the mass that the newest query gave (TOVA); `sum`: what all queries gave so far
        (H2O); `age`: there are no numbers (Window).
      first: how many of the first tokens never go.
      recent: how many of the newest tokens never go.
      spare: how many slots stay free, allocated beyond the capacity (see `slot_multiple`).
    """

    fold: Literal["last", "sum", "age"]
    first: int = 0
    recent: int = 0
    spare: int = 0
