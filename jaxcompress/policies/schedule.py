"""When tokens go, and how many."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Schedule(NamedTuple):
    """When tokens go, and how many.

    Attributes:
      when: `after`: the incoming token's query sees capacity + 1 keys, then one goes. `before`: room is made first, and
        a query sees at most capacity keys. `once`: the first block (a one-shot prompt) is reduced to `keep` tokens, and
        nothing goes after that. `never`: nothing goes, and `score` is not asked.
      frees: how many slots are freed at once when a full state has to take a token.
      keep: how many tokens per set stay of the prompt, for `once`.
    """

    when: Literal["after", "before", "once", "never"] = "after"
    frees: int = 1
    keep: int = 0
