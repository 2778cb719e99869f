"""Many requests at a time: continuous batching over a pool of rows of fixed size."""

from jaxcompress.serving.engine import Engine, EngineLimits, PoolStats
from jaxcompress.serving.pool import PoolSpec
from jaxcompress.serving.prefixes import PrefixLimits
from jaxcompress.serving.request import Answer, EngineClosed, EngineFull, Piece, Request, Ticket, TokenLogprobs

__all__ = [
    "Answer", "Engine", "EngineClosed", "EngineFull", "EngineLimits", "Piece", "PoolSpec", "PoolStats", "PrefixLimits",
    "Request", "Ticket", "TokenLogprobs",
]  # fmt: skip
