"""A policy with a score of the test's own around another: to look at what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxcompress.policies import policy
from jaxcompress.policies.wrapper import wrapper


@policy
class scored_as(wrapper):
    """Scores by a function (stats, held) -> scores."""

    function: Callable[..., Any]

    def score(self, stats: Any, held: Any) -> Any:
        return self.function(stats, held)
