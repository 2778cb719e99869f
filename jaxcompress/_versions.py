"""jax and flax are released in lockstep; a pair that does not fit is named here rather than deep inside flax."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PAIRS = (("0.11", "0.12.10"), ("0.9", "0.12.5"))
"""From which version of jax on flax has to be how new, the newest first: older ones import what jax took away."""


def check(jax: str | None = None, flax: str | None = None) -> None:
    """Raises ImportError, with what to install, if the versions given (by default those installed) do not fit.

    Only metadata is read: nothing is imported.
    """
    try:
        jax, flax = jax or version("jax"), flax or version("flax")
    except PackageNotFoundError as missing:
        raise ImportError(f"jaxcompress needs {missing.name}. Run: pip install -U jax flax") from missing
    here = f"here are jax {jax} and flax {flax}"
    if _number(jax) < (0, 8, 0):
        raise ImportError(f"jaxcompress needs jax 0.8.0 or later; {here}. Run: pip install -U jax flax")
    if _number(flax) < (0, 12, 0):
        raise ImportError(f"jaxcompress needs flax 0.12.0 or later; {here}. Run: pip install -U flax")
    for newer, least in PAIRS:
        if _number(jax) >= _number(newer) and _number(flax) < _number(least):
            raise ImportError(f"jax {newer} needs flax {least} or later; {here}. Run: pip install -U flax")


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
