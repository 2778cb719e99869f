"""The array shapes of this library.

Letters used throughout:

  B  rows of the batch              L  layers
  T  tokens of a block of input     E  width of the residual stream
  H  query heads                    V  size of the vocabulary
  K  key-value heads                D  width of one head
  G  query heads per kv head (H/K)  S  slots, free ones included
  P  slot sets: 1 if all heads of a layer share one set, else K
  N  candidates: slots and incoming tokens that a query may attend to

Annotations are checked in the tests only; at run time they cost nothing.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B T"]
Positions = Int[Array, "B T"]  # -1: no token here (padding)
Valid = Bool[Array, "B T"]
Hidden = Float[Array, "B T E"]
Logits = Float[Array, "B T V"]

Queries = Float[Array, "B T H D"]
Keys = Float[Array, "B T K D"]
Values = Float[Array, "B T K D"]
AttentionOut = Float[Array, "B T H D"]

SlotPositions = Int[Array, "B P N"]  # -1: free
SlotScores = Float[Array, "B P N"]
Weights = Float[Array, "B K G T N"]  # attention probabilities
