"""No compression."""

from __future__ import annotations

from jaxcompress.policies.policy import Policy, policy
from jaxcompress.policies.schedule import Schedule


@policy
class Full(Policy):
    """Keeps every token: an ordinary KV cache of fixed allocation.

    Reading more tokens than the capacity is an error (see `jaxcompress.models.read`).
    """

    label = "full"

    schedule = Schedule("never")
