"""Policies by name, for command lines and tables."""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxcompress.policies.adaptive import adaptive
from jaxcompress.policies.chunks import by_chunks, within_chunks
from jaxcompress.policies.combine import every, once, protect, sampled
from jaxcompress.policies.critical import critical
from jaxcompress.policies.expected import expected_attention
from jaxcompress.policies.full import full
from jaxcompress.policies.geometry import cur, keydiff, knorm, lagkv
from jaxcompress.policies.h2o import h2o
from jaxcompress.policies.nacl import nacl
from jaxcompress.policies.observed import observed_attention
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.pooled import pooled
from jaxcompress.policies.random import random
from jaxcompress.policies.rkv import rkv
from jaxcompress.policies.scissorhands import scissorhands
from jaxcompress.policies.snapkv import snapkv
from jaxcompress.policies.tova import tova
from jaxcompress.policies.window import streaming_llm, window
from jaxcompress.reduce import cam, d2o, low_rank, mean_slots, merge_nearest, merge_weighted, with_reduce

_NAMED: dict[str, Callable[[int], Policy]] = {
    "full": lambda n: full(),
    "window": lambda n: window(),
    "window+N": lambda n: window(n),
    "streaming_llm": lambda n: streaming_llm(),
    "streaming_llm+N": lambda n: streaming_llm(n),
    "streaming_llm+N-before": lambda n: streaming_llm(n, evict="before"),
    "tova": lambda n: tova(),
    "tova-kv_head": lambda n: tova("kv_head"),
    "tova-query_head": lambda n: tova("query_head"),
    "h2o": lambda n: h2o(),
    "h2o-kv_head": lambda n: h2o(scope="kv_head"),
    "h2o-layer": lambda n: h2o(scope="layer"),
    "observed_attention": lambda n: observed_attention(),
    "scissorhands": lambda n: scissorhands(),
    "snapkv": lambda n: snapkv(),
    "snapkv+N": lambda n: snapkv(n),
    "snapkv+N-layer": lambda n: snapkv(n, scope="layer"),
    "snapkv+N-query_head": lambda n: snapkv(n, scope="query_head"),
    "ada-snapkv+N": lambda n: adaptive(snapkv(n, scope="pool")),
    "ada-h2o": lambda n: adaptive(h2o(scope="pool")),
    "ada-tova": lambda n: adaptive(tova("pool")),
    "nacl": lambda n: nacl(),
    "knorm": lambda n: knorm(),
    "keydiff": lambda n: keydiff(),
    "lagkv+N": lambda n: lagkv(n),
    "lagkv+N-cross": lambda n: lagkv(n, cross=True),
    "cur": lambda n: cur(),
    "expected_attention": lambda n: expected_attention(),
    "rkv": lambda n: rkv(),
    "rkv-sketchN": lambda n: rkv(sketch=n),
    "random": lambda n: random(),
}
NAMES = tuple(_NAMED)
"""Names that `named` knows; N stands for a number."""

_MODIFIED: dict[str, Callable[[Policy, int], Policy]] = {
    "firstN": lambda policy, n: protect(policy, first=n),
    "recentN": lambda policy, n: protect(policy, recent=n),
    "pooledN": lambda policy, n: pooled(policy, n),
    "chunksN": lambda policy, n: by_chunks(policy, n),
    "withinN": lambda policy, n: within_chunks(policy, n),
    "critical": lambda policy, n: critical(policy),
    "sampledN": lambda policy, n: sampled(n, policy),
    "merge_nearest": lambda policy, n: with_reduce(policy, merge_nearest()),
    "merge_weighted": lambda policy, n: with_reduce(policy, merge_weighted()),
    "camN": lambda policy, n: with_reduce(policy, cam(n)),
    "d2o": lambda policy, n: with_reduce(policy, d2o()),
    "mean_slotsN": lambda policy, n: with_reduce(policy, mean_slots(n)),
    "low_rankN": lambda policy, n: with_reduce(policy, low_rank(n)),
    "everyN": lambda policy, n: every(n, policy),
    "onceN": lambda policy, n: once(policy, n),
}
MODIFIERS = tuple(_MODIFIED)
"""What may follow a name after a slash, any number of times, from left to right: `snapkv+32/critical/every16`."""


def named(name: str, own: Policy | None = None) -> Policy:
    """The policy of a name such as `tova`, `window+4` or `snapkv+32/every16`, with its published defaults.

    Args:
      own: what the name `own` stands for, such as `load(folder).policy().make()`.

    Raises:
      ValueError: an unknown name or modifier (the message lists the known ones), or parts that do not fit together.
    """
    first, *modifiers = name.split("/")
    pattern, n = _pattern(first)
    if first == "own" and own is not None:
        policy = own
    elif pattern in _NAMED:
        policy = _NAMED[pattern](n)
    else:
        raise ValueError(f"unknown policy {first!r}; known: {', '.join(NAMES)}")
    for modifier in modifiers:
        pattern, n = _pattern(modifier)
        if pattern not in _MODIFIED:
            raise ValueError(f"unknown modifier {modifier!r} of {first}; known: {', '.join(MODIFIERS)}")
        policy = _MODIFIED[pattern](policy, n)
    return policy


def _pattern(name: str) -> tuple[str, int]:
    """The name with its number as N."""
    number = re.search(r"\d+(?!o)", name)  # not the 2 of h2o and d2o
    return (name, 0) if number is None else (name[: number.start()] + "N" + name[number.end() :], int(number[0]))
