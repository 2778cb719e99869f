"""The room that a policy's protected tokens take."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

Shields = Callable[[int], tuple[int, int]]
"""How many of the first tokens and of the newest never go, of so many that stay (see `Policy.shields`)."""

ENDLESS = 2**31 - 1
"""More tokens than any state holds."""


def union(*shields: tuple[int, int]) -> tuple[int, int]:
    """What is protected if each of several protects its own."""
    return max(first for first, _ in shields), max(recent for _, recent in shields)


def leaves_room(shields: Shields, stay: int) -> bool:
    """Whether all that are protected can be among so many that stay, with one beside those protected by number."""
    return sum(shields(0)) < stay and sum(shields(stay)) <= stay


def least_kept(shields: Shields) -> int:
    """The least number of tokens to stay that leaves room; `ENDLESS` if none does."""
    return bisect_left(range(ENDLESS), True, key=partial(leaves_room, shields))
