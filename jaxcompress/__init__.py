"""Transformers that live in a fixed amount of memory.

The names below are loaded when first used, so that the command line starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxcompress import _versions

if TYPE_CHECKING:
    from jaxcompress.checkpoints import load, save
    from jaxcompress.embedded import load_embedded
    from jaxcompress.generation import Sampler, Settings, Tokenizer, generate
    from jaxcompress.models.bounded import init_state, read
    from jaxcompress.naming import named
    from jaxcompress.policies import Policy
    from jaxcompress.recurrence import advance
    from jaxcompress.state import KVState, State
    from jaxcompress.tracing import trace

__version__ = "0.1.0"
__all__ = [
    "KVState", "Policy", "Sampler", "Settings", "State", "Tokenizer", "advance", "generate", "init_state", "load",
    "load_embedded", "named", "read", "save", "trace",
]  # fmt: skip

_HOME = {
    **dict.fromkeys(("load", "save"), "checkpoints"),
    "load_embedded": "embedded",
    **dict.fromkeys(("Sampler", "Settings", "Tokenizer", "generate"), "generation"),
    **dict.fromkeys(("init_state", "read"), "models.bounded"),
    "Policy": "policies",
    "named": "naming",
    "advance": "recurrence",
    **dict.fromkeys(("KVState", "State"), "state"),
    "trace": "tracing",
}

_versions.check()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxcompress' has no attribute {name!r}")
    return getattr(import_module(f"jaxcompress.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
