"""jax and flax are released in lockstep; a pair that does not fit is named here rather than deep inside flax."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def check(jax: str | None = None, flax: str | None = None) -> None:
    """Raises ImportError, with what to install, if the versions given (by default those installed) do not fit.

    Only metadata is read: nothing is imported.
    """
    try:
        jax, flax = jax or version("jax"), flax or version("flax")
    except PackageNotFoundError as missing:
        raise ImportError(f"jaxcompress needs {missing.name}. Run: pip install -U jax flax") from missing
    here = f"here are jax {jax} and flax {flax}"
    if _number(jax) < (0, 8, 1):
        raise ImportError(f"jaxcompress needs jax 0.8.1 or later; {here}. Run: pip install -U jax flax")
    if _number(flax) < (0, 12, 6):
        raise ImportError(f"jaxcompress needs flax 0.12.6 or later; {here}. Run: pip install -U flax")
    if _number(jax) >= (0, 11) and _number(flax) < (0, 12, 10):
        raise ImportError(f"jax 0.11 needs flax 0.12.10 or later; {here}. Run: pip install -U flax")


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
