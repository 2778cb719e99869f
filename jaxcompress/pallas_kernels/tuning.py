"""Sizes of a kernel's blocks: the fastest that were measured on this kind of device, kept on disk; else a default.

The file is `$XDG_CACHE_HOME/jaxcompress/kernels.json` (by default in `~/.cache`): a device, an operation, and all that
is known of a call (see `KernelCall`) -> sizes. It is read when a kernel is traced, and written by `tune` only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.inputs.whole_file import whole_file
from jaxcompress.pallas_kernels.devices import device
from jaxcompress.pallas_kernels.types import KernelCall, Op

Sizes = dict[str, int]

_TRIED: dict[str, Sizes] = {}  # while `tune` runs


def path() -> Path:
    """The file of sizes."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jaxcompress" / "kernels.json"


def key(op: Op, call: KernelCall) -> str:
    """The key of sizes in the file: the kind of device, the operation, and the call."""
    return " ".join([device()[1], op, *(f"{name}={value}" for name, value in zip(call._fields, call, strict=True))])


def sizes(op: Op, call: KernelCall, default: Sizes, fits: Callable[[Sizes], bool]) -> Sizes:
    """The measured sizes of a call; the default if none were measured, or if they do not fit."""
    tried = _TRIED.get(key(op, call))
    if tried is not None:
        if not fits(tried):
            raise ValueError(f"{tried} does not fit")
        return tried
    found = _read().get(key(op, call))
    if not isinstance(found, dict) or found.keys() != default.keys():
        return default
    return found if all(isinstance(x, int) for x in found.values()) and fits(found) else default


def tune(
    op: Op, call: KernelCall, candidates: Sequence[Sizes], run: Callable[[Sizes], Any], *, repeats: int = 20
) -> Sizes:
    """Times candidates on the default device, and writes the fastest to disk.

    Args:
      run: computes; what it returns is waited for. Kernels that are traced in it get the candidate's sizes, which it is
        also given, so that it can be compiled for each anew. The first call is not timed.

    Raises:
      ValueError: no candidate ran.
    """
    medians, errors = [], []
    for candidate in candidates:
        _TRIED[key(op, call)] = candidate
        try:
            jax.block_until_ready(run(candidate))
        except Exception as error:  # a block that does not fit into memory is found out by compiling
            errors.append(f"{candidate}: {(str(error) or type(error).__name__).splitlines()[0]}")
            continue
        finally:
            del _TRIED[key(op, call)]
        seconds = []
        for _ in range(repeats):
            before = time.perf_counter()
            jax.block_until_ready(run(candidate))
            seconds.append(time.perf_counter() - before)
        medians.append((float(np.median(seconds)), len(medians), candidate))
    if not medians:
        raise ValueError(f"no candidate ran for {op} {call}: {'; '.join(errors) or 'none was given'}")
    best = min(medians)[2]
    everything = _read() | {key(op, call): best}
    path().parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path(), writer=str(os.getpid())) as part:
        part.write_text(json.dumps(everything, indent=1, sort_keys=True))
    return best


def _read() -> dict[str, Any]:
    """The content of the file; {} where it cannot be read, since sizes change nothing but speed."""
    try:
        found = json.loads(path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
