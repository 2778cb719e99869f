"""Transformers that live in a fixed amount of memory.

Everything below is loaded when first used, so that the command line starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxcompress import _versions

if TYPE_CHECKING:
    from jaxcompress import budgets, evaluation, generation, models, policies, prompt, training, vision
    from jaxcompress.checkpoints import load, load_embedded, save
    from jaxcompress.evaluation import perplexity
    from jaxcompress.evaluation.tracing import trace
    from jaxcompress.generation import GenerationConfig, Tokenizer, generate
    from jaxcompress.models import init_state, read
    from jaxcompress.policies import Policy
    from jaxcompress.policies.names import get_policy
    from jaxcompress.recurrence import advance
    from jaxcompress.state import KVState, State

__version__ = "0.1.0"
__all__ = [
    "GenerationConfig", "KVState", "Policy", "State", "Tokenizer", "advance", "budgets", "evaluation", "generate",
    "generation", "get_policy", "init_state", "load", "load_embedded", "models", "perplexity", "policies", "prompt",
    "read", "save", "trace", "training", "vision",
]  # fmt: skip

_ROOMS = ("budgets", "evaluation", "generation", "models", "policies", "prompt", "training", "vision")
_HOME = {
    **dict.fromkeys(("load", "load_embedded", "save"), "checkpoints"),
    **dict.fromkeys(("perplexity", "trace"), "evaluation"),
    **dict.fromkeys(("GenerationConfig", "Tokenizer", "generate"), "generation"),
    **dict.fromkeys(("init_state", "read"), "models"),
    **dict.fromkeys(("Policy", "get_policy"), "policies"),
    "advance": "recurrence",
    **dict.fromkeys(("KVState", "State"), "state"),
}

_versions.check()


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"jaxcompress.{name}")
    if name in _HOME:
        return getattr(import_module(f"jaxcompress.{_HOME[name]}"), name)
    raise AttributeError(f"module 'jaxcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *__all__])
