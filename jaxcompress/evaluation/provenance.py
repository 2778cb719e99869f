"""By what a figure was made: the code, the machine, the command."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax

from jaxcompress import __version__

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """By what a row was made.

    Attributes:
      version: of the package.
      code: the commit, with `-dirty` if files were changed since; of an installed package the hash of its sources.
      device: kind and number of devices.
      command: the command line.
    """

    version: str
    code: str
    device: str
    command: str


def provenance(command: Sequence[str] | None = None) -> Provenance:
    """That of this process.

    Args:
      command: the words of the command line; those of this process by default.
    """
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if command is None else command
    return Provenance(version=__version__, code=code_version(), device=device(), command=shlex.join(words))


@cache
def code_version() -> str:
    """The commit of a checkout; of an installed package the hash of its Python files."""
    tracked = _git("ls-files", "--error-unmatch", "__init__.py")  # the package may lie inside another repository
    if tracked is not None and (commit := _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")):
        return commit
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _git(*words: str) -> str | None:
    """What git prints about the package's folder; None if it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def device() -> str:
    """Such as `cpu, 2 cores of x86_64` or `2 x NVIDIA H100`."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu, {os.cpu_count()} cores of {platform.machine()}"
    return f"{len(devices)} x {devices[0].device_kind}"
