"""An eviction rule that kernels can follow by themselves: what policies tell them."""

from __future__ import annotations

from typing import Literal, NamedTuple


class EvictionRule(NamedTuple):
    """A policy that a kernel can follow on its own: one number per slot, folded from mass.

    The lowest score goes, on a tie the youngest token, after each token (`evict="after"`). The score is the number, or
    minus the age where nothing is folded. Mass is the mean over the heads that share a set.

    Attributes:
      fold: `last`: the number is the mass that the newest query gave (TOVA); `sum`: what all queries gave so far
        (H2O); `age`: there are no numbers (Window).
      first: positions below this never go.
      recent: nor do so many of the newest.
      spare: slots that stay free for good: allocated beyond the capacity (see `slot_multiple`).
    """

    fold: Literal["last", "sum", "age"]
    first: int = 0
    recent: int = 0
    spare: int = 0
