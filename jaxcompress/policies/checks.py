"""Whether something is a policy."""

from __future__ import annotations

from typing import Any

from jaxcompress.policies.policy import Policy


def check_policy(policy: Any) -> None:
    """Raises ValueError if something is no policy; says what it is and how to get one."""
    if isinstance(policy, Policy):
        return
    if isinstance(policy, str):
        told = f"its name {policy!r}: write jaxcompress.get_policy({policy!r})"
    elif hasattr(policy, "make"):
        told = "one as it was saved: call its make()"
    elif callable(policy) and hasattr(policy, "__name__"):
        told = f"{policy.__name__} itself: call it, {policy.__name__}()"
    else:
        told = f"{policy!r:.60}; the model comes first, then tokens or a state, then the policy, then numbers"
    raise ValueError(f"a policy is expected, such as jaxcompress.get_policy('tova'), not {told}")
