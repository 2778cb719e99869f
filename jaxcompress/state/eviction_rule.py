"""An eviction rule that a kernel can apply itself. Policies define it (`Policy.rule`), kernels read it."""

from __future__ import annotations

from typing import Literal, NamedTuple


class EvictionRule(NamedTuple):
    """The rule of a policy that a kernel can apply itself: one number per slot, computed from attention mass.

    After each token the token with the lowest score is evicted; on a tie, the youngest. The score is the number, or
    minus the age if the rule has no numbers. The mass of a slot is its attention probability, averaged over the heads
    that share a set.

    Attributes:
      fold: `last`: the number is the mass from the newest query (TOVA); `sum`: the sum of the masses from all queries
        so far (H2O); `age`: there are no numbers (Window).
      first: the number of first tokens that are never evicted.
      recent: the number of newest tokens that are never evicted.
      spare: the number of slots allocated beyond the capacity that stay free (see `slot_multiple`).
    """

    fold: Literal["last", "sum", "age"]
    first: int = 0
    recent: int = 0
    spare: int = 0
