"""The base of policies that go around another."""

from __future__ import annotations

from typing import Any

from jaxcompress.policies.cache_view import CacheView, IncomingTokens, Observation
from jaxcompress.policies.policy import Policy, leaf, policy
from jaxcompress.policies.shields import ENDLESS, least_kept, leaves_room
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.shapes import SlotScores


def check_part(one: Any, what: str) -> None:
    """Raises an error if a combinator of the name `what` cannot be made of something.

    Raises:
      TypeError: it is no policy.
      ValueError: it never evicts, or differs from layer to layer.
    """
    if not isinstance(one, Policy):
        raise TypeError(f"{what} goes around a policy, such as TOVA(), not around {one!r}")
    if one.layers:
        raise ValueError(f"{what} goes inside per_layer, not around it: {one.name}")
    if not one.evicts:
        raise ValueError(f"policy {one.name} never evicts: {what} can do nothing with it")


def check_shields(one: Policy) -> None:
    """Raises ValueError if what a policy protects leaves no room for other tokens, in what `once` keeps or anywhere."""
    keep = one.schedule.keep
    if keep and not leaves_room(one.shields, keep):
        first, recent = one.shields(keep)
        raise ValueError(
            f"policy {one.name} protects {first} first tokens and {recent} newest ones, and keeps {keep} of a prompt: "
            "keep more than these, or protect fewer"
        )
    if least_kept(one.shields) == ENDLESS:
        raise ValueError(
            f"policy {one.name} protects more tokens than any state holds: protect fewer, or a share of them"
        )


class _of_inner:
    """An attribute of the policy inside; a subclass may have a field or property of the name instead."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, one: Any, owner: type) -> Any:
        return self if one is None else getattr(one.policy, self.name)


@policy
class wrapper(Policy):
    """A policy around another. It does what that one does, except for what a subclass overrides.

    A subclass with numbers of its own beside the other's refuses a policy that has a `reduction` (see `critical`).

    Attributes:
      policy: the other.
    """

    policy: Policy = leaf()

    scope = _of_inner()  # type: ignore[assignment]
    schedule = _of_inner()  # type: ignore[assignment]
    placement = _of_inner()  # type: ignore[assignment]
    gates = _of_inner()  # type: ignore[assignment]
    reduction = _of_inner()  # type: ignore[assignment]
    watches = _of_inner()  # type: ignore[assignment]

    @property
    def needs(self) -> int:  # type: ignore[override]
        return max(self.policy.needs, super().needs)

    @property
    def oneshot_only(self) -> bool:
        return super().oneshot_only or self.policy.oneshot_only

    @property
    def name(self) -> str:
        return f"{self.policy.name}/{super().name}"

    def check(self) -> None:
        """Raises ValueError if the policy inside never evicts or differs from layer to layer."""
        check_part(self.policy, type(self).__name__)

    def shields(self, capacity: int) -> tuple[int, int]:
        return self.policy.shields(capacity)

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return self.policy.score(stats, held)

    def init(self, incoming: CacheView) -> Stats:
        return self.policy.init(incoming)

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return self.policy.observe(stats, seen)

    def memory(self, held: CacheView) -> Memory:
        return self.policy.memory(held)

    def remember(self, memory: Memory, incoming: IncomingTokens) -> Memory:
        return self.policy.remember(memory, incoming)
