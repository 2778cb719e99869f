"""No compression."""

from __future__ import annotations

from functools import cache

from jaxcompress.policies.policy import Policy


@cache
def full() -> Policy:
    """Keeps every token: an ordinary KV cache of fixed allocation.

    Reading more tokens than the capacity is an error (see `jaxcompress.models.bounded.read`).
    """
    return Policy("full", score=None)
