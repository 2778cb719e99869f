"""Policies by name, for command lines and tables."""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxcompress.policies.adaptive import adaptive
from jaxcompress.policies.chunks import by_chunks, within_chunks
from jaxcompress.policies.combine import every, once, protect, sampled
from jaxcompress.policies.critical import critical
from jaxcompress.policies.expected import ExpectedAttention
from jaxcompress.policies.full import Full
from jaxcompress.policies.geometry import CUR, KeyDiff, KNorm, LagKV
from jaxcompress.policies.h2o import H2O
from jaxcompress.policies.nacl import NACL
from jaxcompress.policies.observed import ObservedAttention
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.pooled import pooled
from jaxcompress.policies.random import Random
from jaxcompress.policies.reductions.merge import cam, d2o, merge_nearest, merge_weighted
from jaxcompress.policies.reductions.reduced import with_reduce
from jaxcompress.policies.reductions.summarise import low_rank, mean_slots
from jaxcompress.policies.rkv import RKV
from jaxcompress.policies.scissorhands import Scissorhands
from jaxcompress.policies.snapkv import SnapKV
from jaxcompress.policies.tova import TOVA
from jaxcompress.policies.window import StreamingLLM, Window

_NAMED: dict[str, Callable[[int], Policy]] = {
    "full": lambda n: Full(),
    "window": lambda n: Window(),
    "window+N": lambda n: Window(n),
    "streaming_llm": lambda n: StreamingLLM(),
    "streaming_llm+N": lambda n: StreamingLLM(n),
    "streaming_llm+N-before": lambda n: StreamingLLM(n, evict="before"),
    "tova": lambda n: TOVA(),
    "tova-kv_head": lambda n: TOVA("kv_head"),
    "tova-query_head": lambda n: TOVA("query_head"),
    "h2o": lambda n: H2O(),
    "h2o-kv_head": lambda n: H2O(scope="kv_head"),
    "h2o-layer": lambda n: H2O(scope="layer"),
    "observed_attention": lambda n: ObservedAttention(),
    "scissorhands": lambda n: Scissorhands(),
    "snapkv": lambda n: SnapKV(),
    "snapkv+N": lambda n: SnapKV(n),
    "snapkv+N-layer": lambda n: SnapKV(n, scope="layer"),
    "snapkv+N-query_head": lambda n: SnapKV(n, scope="query_head"),
    "ada-snapkv+N": lambda n: adaptive(SnapKV(n, scope="pool")),
    "ada-h2o": lambda n: adaptive(H2O(scope="pool")),
    "ada-tova": lambda n: adaptive(TOVA("pool")),
    "nacl": lambda n: NACL(),
    "knorm": lambda n: KNorm(),
    "keydiff": lambda n: KeyDiff(),
    "lagkv+N": lambda n: LagKV(n),
    "lagkv+N-cross": lambda n: LagKV(n, cross=True),
    "cur": lambda n: CUR(),
    "expected_attention": lambda n: ExpectedAttention(),
    "rkv": lambda n: RKV(),
    "rkv-sketchN": lambda n: RKV(sketch=n),
    "random": lambda n: Random(),
}
NAMES = tuple(_NAMED)
"""Names that `get_policy` knows; N stands for a number."""

_MODIFIED: dict[str, Callable[[Policy, int], Policy]] = {
    "firstN": lambda policy, n: protect(policy, first=n),
    "recentN": lambda policy, n: protect(policy, recent=n),
    "pooledN": lambda policy, n: pooled(policy, n),
    "chunksN": lambda policy, n: by_chunks(policy, n),
    "withinN": lambda policy, n: within_chunks(policy, n),
    "critical": lambda policy, n: critical(policy),
    "sampledN": lambda policy, n: sampled(policy, n),
    "merge_nearest": lambda policy, n: with_reduce(policy, merge_nearest()),
    "merge_weighted": lambda policy, n: with_reduce(policy, merge_weighted()),
    "camN": lambda policy, n: with_reduce(policy, cam(n)),
    "d2o": lambda policy, n: with_reduce(policy, d2o()),
    "mean_slotsN": lambda policy, n: with_reduce(policy, mean_slots(n)),
    "low_rankN": lambda policy, n: with_reduce(policy, low_rank(n)),
    "everyN": lambda policy, n: every(policy, n),
    "onceN": lambda policy, n: once(policy, n),
}
MODIFIERS = tuple(_MODIFIED)
"""What may follow a name after a slash, any number of times, from left to right: `snapkv+32/critical/every16`."""


def get_policy(name: str, learned: Policy | None = None) -> Policy:
    """The policy of a name such as `tova`, `window+4` or `snapkv+32/every16`, with its published defaults.

    Args:
      learned: what the name `learned` stands for, such as `load(folder).policy`.

    Raises:
      ValueError: an unknown name or modifier (the message lists the known ones), or parts that do not fit together.
    """
    first, *modifiers = name.split("/")
    pattern, n = _pattern(first)
    if first == "learned" and learned is not None:
        if not isinstance(learned, Policy):
            raise TypeError(f"learned must be a policy, such as load(folder).policy, not {learned!r}")
        policy = learned
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
