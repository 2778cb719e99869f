"""Prints the lower bounds of pyproject.toml as constraints of pip: `jax==0.8.1`, one a line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TRIED = ("train", "vision", "plots", "cli", "gguf")
"""The extras of what `make oldest` tests. The others bring large packages that only one function calls."""


def lower_bounds() -> Iterator[str]:
    wanted = [*PROJECT["dependencies"], *(one for extra in TRIED for one in PROJECT["optional-dependencies"][extra])]
    for requirement in dict.fromkeys(wanted):
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        yield f"{name}=={bound}"


if __name__ == "__main__":
    print("\n".join(lower_bounds()))
