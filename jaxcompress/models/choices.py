"""Checks the settings of a config that are one of a few words."""

from __future__ import annotations

from typing import Any

from jaxcompress.policies.labels import choices


def check_choices(config: Any) -> None:
    """Raises ValueError if a setting of a dataclass whose hint is a `Literal` is none of its words."""
    for name, words in choices(type(config)).items():
        given = getattr(config, name)
        if given not in words:
            raise ValueError(f"{name} must be one of {', '.join(map(str, words))}, not {given!r}")
