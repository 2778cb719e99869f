"""Eviction policies: one file per idea."""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxcompress.policies.full import full
from jaxcompress.policies.h2o import h2o
from jaxcompress.policies.policy import Observation, Policy
from jaxcompress.policies.random import random
from jaxcompress.policies.tova import tova
from jaxcompress.policies.window import streaming_llm, window

__all__ = ["NAMES", "Observation", "Policy", "full", "h2o", "named", "random", "streaming_llm", "tova", "window"]

_NAMED: dict[str, Callable[[str], Policy]] = {
    "full": lambda _: full(),
    "window": lambda _: window(),
    "window+N": lambda n: window(int(n)),
    "streaming_llm": lambda _: streaming_llm(),
    "streaming_llm+N": lambda n: streaming_llm(int(n)),
    "streaming_llm+N-before": lambda n: streaming_llm(int(n), evict="before"),
    "h2o": lambda _: h2o(),
    "h2o-kv_head": lambda _: h2o(scope="kv_head"),
    "h2o-layer": lambda _: h2o(scope="layer"),
    "tova": lambda _: tova(),
    "tova-kv_head": lambda _: tova("kv_head"),
    "tova-query_head": lambda _: tova("query_head"),
    "random": lambda _: random(),
}
NAMES = tuple(_NAMED)
"""Names that `named` knows; N stands for a number."""


def named(name: str) -> Policy:
    """The policy of a name such as `tova`, `h2o-layer` or `window+4`, with its published defaults.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
    """
    number = re.search(r"(?<=\+)\d+", name)
    pattern = name if number is None else name.replace(number[0], "N", 1)
    if pattern not in _NAMED:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(NAMES)}")
    return _NAMED[pattern](number[0] if number else "")
