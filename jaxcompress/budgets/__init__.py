"""How a total of slots is shared among layers and heads, and how a model's need for them is measured.

What measures (`attention_spread`, `retrieval_heads`) is imported when it is first used: it needs `jaxcompress[train]`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxcompress.budgets.allocate import (
    from_scores,
    proportional,
    pyramid,
    pyramid_even,
    pyramid_official,
    retrieval_split,
    total,
)

if TYPE_CHECKING:
    from jaxcompress.budgets.calibration import RetrievalHeads, attention_spread, retrieval_heads

__all__ = [
    "RetrievalHeads", "attention_spread", "from_scores", "proportional", "pyramid", "pyramid_even", "pyramid_official",
    "retrieval_heads", "retrieval_split", "total",
]  # fmt: skip

_MEASURED = ("RetrievalHeads", "attention_spread", "retrieval_heads")


def __getattr__(name: str) -> Any:
    if name not in _MEASURED:
        raise AttributeError(f"module 'jaxcompress.budgets' has no attribute {name!r}")
    return getattr(import_module("jaxcompress.budgets.calibration"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
