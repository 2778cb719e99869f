"""Whether a compression pays: the time and the money that a shorter prompt saves its reader.

payoff = Payoff(tokens_before=4000, tokens_after=1320, seconds=0.4, loading=0.6)
payoff.cost_saved(price=3)            # of one reading, at 3 per million tokens
payoff.pays_from(reader_speed=1000)   # tokens of a prompt, None if at no length
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxcompress.inputs.scalars import Number


@dataclass(frozen=True)
class Payoff:
    """What one compression cost and left, measured.

    A prompt of n tokens takes a reader n / v seconds at v tokens per second. Shortened to a share r it takes

        loading + c n + r n / v,    c = seconds / tokens_before,    r = tokens_after / tokens_before

    so it pays from n = loading / ((1 - r) / v - c) on, and at no length if c >= (1 - r) / v: if the reader is faster
    than (1 - r) / c. A reader whose time per token grows with the prompt gains more than this.

    Attributes:
      tokens_before, tokens_after: as the reader counts them.
      seconds: of the compression, without loading.
      loading: seconds before it, the same for any length; 0 for a compressor that is in memory already.
    """

    tokens_before: int
    tokens_after: int
    seconds: float
    loading: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens compressed per second."""
        return self.tokens_before / self.seconds if self.seconds > 0 else math.inf

    @property
    def fastest_reader(self) -> float:
        """Tokens per second of the reader that gains nothing, however long the prompt; a slower one gains."""
        share = self.tokens_after / self.tokens_before if self.tokens_before else 1.0
        return (1 - share) * self.speed if share < 1 else 0.0

    def cost_saved(self, price: Number) -> float:
        """Of one reading, in the unit of the price, which is per million tokens."""
        return (self.tokens_before - self.tokens_after) * float(price) / 1e6

    def pays_from(self, reader_speed: Number) -> int | None:
        """The least number of tokens of a prompt that is read sooner shortened than whole; None if there is none.

        Args:
          reader_speed: prompt tokens that the reader takes in per second, above 0.
        """
        reader_speed = float(reader_speed)
        if not self.tokens_before or reader_speed >= self.fastest_reader:
            return None
        gain = (1 - self.tokens_after / self.tokens_before) / reader_speed - self.seconds / self.tokens_before
        return max(1, math.ceil(self.loading / gain))
