"""Policies that look at positions only."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView
from jaxcompress.policies.policy import Policy, policy
from jaxcompress.policies.protect import protected
from jaxcompress.policies.schedule import Schedule
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.shapes import SlotScores


@policy
class Window(Policy):
    """Keeps the first `sinks` tokens of the sequence and the most recent ones (Window, Window+i).

        score[n] = -age
        score[n] = +inf for the `sinks` first tokens

    Positions stay absolute, as in the static masks of Oren et al. 2024, section 3; compare `StreamingLLM`. All heads
    keep the same tokens. scope="kv_head" is for capacities that differ between heads, such as the streaming heads of
    DuoAttention (see `jaxcompress.budgets.allocate`).

    Raises:
      ValueError: a negative number of sinks.
    """

    label = "window[+{sinks}]"

    sinks: int = 0
    scope: Literal["layer", "kv_head"] = "layer"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen

    def check(self) -> None:
        _check_sinks(self.sinks)

    def shields(self, capacity: int) -> tuple[int, int]:
        return self.sinks, 0

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return _newest(held, self.sinks)

    def rule(self, capacity: int) -> EvictionRule | None:
        return EvictionRule("age", first=self.sinks)


@policy
class StreamingLLM(Policy):
    """Attention sinks and a rolling window (Xiao et al. 2024), at positions re-indexed by rank (`placement="slot"`).

        score[n] = -age
        score[n] = +inf for the `sinks` first tokens

    evict="after": a query sees capacity + 1 keys (the paper's perplexity evaluation, `eval_long_ppl.py`).
    evict="before": room is made first, a query sees at most capacity keys (the chat demo, `evict_for_space`). The sinks
    stay, even beside a block that fills the capacity alone.

    Raises:
      ValueError: a negative number of sinks, or another time to evict.
    """

    label = "streaming_llm+{sinks}"

    sinks: int = 4
    evict: Literal["after", "before"] = "after"
    scope: Literal["layer", "kv_head"] = "layer"  # pyright: ignore[reportIncompatibleVariableOverride]  frozen
    placement = "slot"

    def check(self) -> None:
        _check_sinks(self.sinks)

    def shields(self, capacity: int) -> tuple[int, int]:
        return self.sinks, 0

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return Schedule(self.evict)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return _newest(held, self.sinks)


def _newest(held: CacheView, sinks: int) -> SlotScores:
    age = held.newest - held.positions  # small: exact in float32, however long the sequence
    return protected(-age.astype(jnp.float32), held, first=sinks)


def _check_sinks(sinks: int) -> None:
    if sinks < 0:
        raise ValueError(f"sinks must be 0 or more, not {sinks}")
