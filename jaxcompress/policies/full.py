"""No compression."""

from __future__ import annotations

from jaxcompress.policies.policy import Policy, policy


@policy
class Full(Policy):
    """Keeps every token: an ordinary KV cache of fixed allocation.

    Reading more tokens than the capacity is an error (see `jaxcompress.models.bounded.read`).
    """

    evicts = False
    name = "full"  # type: ignore[assignment]
