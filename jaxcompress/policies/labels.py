"""How the names of policies are built."""

from __future__ import annotations


def scoped(name: str, scope: str, usual: str) -> str:
    """The name, with the scope after it where that is not the usual one: `tova`, `tova-kv_head`."""
    return name if scope == usual else f"{name}-{scope}"
