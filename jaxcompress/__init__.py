"""Transformers with a KV cache of fixed size.

Each name below is imported when it is first used, so that importing the package and starting the command line are fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxcompress import _versions

if TYPE_CHECKING:
    from jaxcompress import (
        budgets,
        checkpoints,
        distributed,
        embedded,
        evaluation,
        generation,
        models,
        policies,
        prompt,
        serving,
        training,
        vision,
    )
    from jaxcompress.checkpoints import Loaded, load, load_embedded, save
    from jaxcompress.evaluation import perplexity, trace
    from jaxcompress.generation import Chat, GenerationConfig, Tokenizer, generate, load_state, save_state
    from jaxcompress.models import init_state, read
    from jaxcompress.policies import Policy, get_policy
    from jaxcompress.recurrence import advance
    from jaxcompress.state import KVState, State

__version__ = "0.2.0"
__all__ = [
    "Chat", "GenerationConfig", "KVState", "Loaded", "Policy", "State", "Tokenizer", "advance", "budgets",
    "checkpoints", "distributed", "embedded", "evaluation", "generate", "generation", "get_policy", "init_state",
    "load", "load_embedded", "load_state", "models", "perplexity", "policies", "prompt", "read", "save", "save_state",
    "serving", "trace", "training", "vision",
]  # fmt: skip

_ROOMS = (
    "budgets", "checkpoints", "distributed", "embedded", "evaluation", "generation", "models", "policies", "prompt",
    "serving", "training", "vision",
)  # fmt: skip
_INNER_ROOMS = ("inputs", "pallas_kernels", "recurrence", "state")
"""Rooms for those who change the library: there as well, but not listed by `dir`."""
_ROOM_OF = {
    **dict.fromkeys(("Loaded", "load", "load_embedded", "save"), "checkpoints"),
    **dict.fromkeys(("perplexity", "trace"), "evaluation"),
    **dict.fromkeys(("Chat", "GenerationConfig", "Tokenizer", "generate", "load_state", "save_state"), "generation"),
    **dict.fromkeys(("init_state", "read"), "models"),
    **dict.fromkeys(("Policy", "get_policy"), "policies"),
    "advance": "recurrence",
    **dict.fromkeys(("KVState", "State"), "state"),
}

_versions.check()


def __getattr__(name: str) -> Any:
    if name in _ROOMS or name in _INNER_ROOMS:
        return import_module(f"jaxcompress.{name}")
    if name in _ROOM_OF:
        return getattr(import_module(f"jaxcompress.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module 'jaxcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *__all__])
