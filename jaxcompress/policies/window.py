"""Policies that look at positions only."""

from __future__ import annotations

from functools import cache
from typing import Literal

import jax.numpy as jnp

from jaxcompress.pallas_kernels.contract import Rule
from jaxcompress.policies.policy import Candidates, Policy
from jaxcompress.shapes import SlotScores
from jaxcompress.state import Stats


@cache
def window(sinks: int = 0, scope: Literal["layer", "kv_head"] = "layer") -> Policy:
    """Keeps the first `sinks` tokens of the sequence and the most recent ones (Window, Window+i).

    score = +inf if position < sinks, else position. Positions stay absolute, as in the static masks of Oren et al.
    2024, section 3; compare `streaming_llm`. All heads keep the same; scope="kv_head" is for capacities that differ
    between heads, such as the streaming heads of DuoAttention (see `jaxcompress.budgets`).
    """
    _check_sinks(sinks)
    name = f"window+{sinks}" if sinks else "window"
    policy = Policy(_named(name, scope), score=_newest(sinks), scope=scope, needs=sinks + 1)
    return policy.follow(lambda capacity: Rule("age", first=sinks))


@cache
def streaming_llm(
    sinks: int = 4, evict: Literal["after", "before"] = "after", scope: Literal["layer", "kv_head"] = "layer"
) -> Policy:
    """Attention sinks and a rolling window (Xiao et al. 2024), at positions re-indexed by rank (`placement="slot"`).

    evict="after": a query sees capacity + 1 keys (the paper's perplexity evaluation, `eval_long_ppl.py`).
    evict="before": room is made first, a query sees at most capacity keys (the chat demo, `evict_for_space`).
    """
    _check_sinks(sinks)
    name = _named(f"streaming_llm+{sinks}-{evict}", scope)
    return Policy(name, score=_newest(sinks), scope=scope, evict=evict, placement="slot", needs=sinks + 1)


def _newest(sinks: int):
    def score(stats: Stats, held: Candidates) -> SlotScores:
        age = held.newest - held.positions  # small: exact in float32, however long the sequence
        return jnp.where(held.positions < sinks, jnp.inf, -age.astype(jnp.float32))

    return score


def _named(name: str, scope: str) -> str:
    return name if scope == "layer" else f"{name}-{scope}"


def _check_sinks(sinks: int) -> None:
    if sinks < 0:
        raise ValueError(f"sinks must be 0 or more, not {sinks}")
