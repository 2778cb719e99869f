"""Chooses what computes a call: XLA's own code, or a kernel that runs on the device and accepts the call."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from typing import Any

from jaxcompress.pallas_kernels import devices, gpu_limits, measured, tpu_limits
from jaxcompress.pallas_kernels.types import NAMES, Backend, Chosen, Here, KernelCall, Kernels, Limits, Name, On, Op

LIMITS: dict[str, Limits] = {"tpu": tpu_limits, "gpu": gpu_limits}
"""What the kernels of each name can do."""


def choose_kernel(op: Op, call: KernelCall, backend: Backend, never: str | None = None) -> Chosen | None:
    """The kernels that compute a call; None: XLA's own code (jnp). Decided when the call is traced.

    A call that the kernels decline goes to jnp, and one log line says so.

    Args:
      never: why no kernel can do it, whichever is asked for.

    Raises:
      ValueError: an unknown name, or kernels asked for by name that this device cannot run.
    """
    backend = backend.backend if isinstance(backend, Here) else backend
    name, on = (backend.name, backend) if isinstance(backend, On) else (backend, None)
    name = known(name)
    if name == "auto":
        name = "jnp" if never else measured.faster(op, call, *devices.device())
    if name == "jnp":
        return None
    interpret = name.endswith("-interpret")
    if not interpret:
        check_device(name)
    mine = call if on is None else _share(call, on)
    why = never or (mine if isinstance(mine, str) else limits(name).declines(op, mine))
    if why is None:
        return Chosen(kernels(name), interpret, on)
    _say(f"no {name} kernel for a {_WORDS[op]}, jnp instead: {why}")
    return None


def known(name: Name) -> Name:
    """The name; `auto` becomes what the environment variable says, if it is set.

    Raises:
      ValueError: an unknown name.
    """
    own = os.environ.get("JAXCOMPRESS_BACKEND", "") if name == "auto" else ""
    if (own or name) not in NAMES:
        where = " (environment variable JAXCOMPRESS_BACKEND)" * bool(own)
        raise ValueError(f"unknown backend {own or name!r}{where}; known: {', '.join(NAMES)}")
    return own or name  # type: ignore


_WORDS = {
    "step": "decoding step",
    "step_evict": "decoding step with eviction",
    "block": "block of queries",
    "segment": "streamed segment",
}


def limits(name: Name) -> Limits:
    """What the kernels of a name can do."""
    return LIMITS[name.removesuffix("-interpret")]


def kernels(name: Name) -> Kernels:
    """The module of a name's kernels. It imports Pallas, which takes a while."""
    found: Any = import_module(f"jaxcompress.pallas_kernels.{name.removesuffix('-interpret')}")
    return found


def slot_multiple(dtype: str) -> int:
    """The number whose multiples slots are allocated in, for a state of a dtype.

    On a TPU this many slots lie together in memory, and kernels write in place only where slots are a multiple of it.
    It
    applies if any device of this machine is a TPU: which device a state will be on is not known when it is made. Else
      1.
    """
    able = (
        [devices.device()]
        if devices.compiled_for()
        else [devices.device(), *map(devices.kind_of, devices.devices_here().values())]
    )
    return tpu_limits.group_rows(dtype) if any(tpu_limits.runs_on(*each) for each in able) else 1


def check_device(name: Name) -> None:
    """Raises ValueError if the device cannot run the kernels of a name; says what can."""
    platform, kind = devices.device()
    if not limits(name).runs_on(platform, kind):
        able = [other for other in LIMITS if LIMITS[other].runs_on(platform, kind)]
        raise ValueError(
            f"backend {name!r} needs {limits(name).needs}, this is a {platform} device ({kind}), which can run "
            f"{', '.join(['auto', 'jnp', *able])}; {name}-interpret runs anywhere, slowly, for tests"
        )


def describe(backend: Backend) -> str:
    """What computes on the default device, in words; says so where the kernels of that name cannot."""
    backend = backend.backend if isinstance(backend, Here) else backend
    name = known(backend.name if isinstance(backend, On) else backend)
    platform, kind = devices.device()
    if name == "auto":
        won = [f"{row.backend} for a {_WORDS[row.op]}" for row in measured.TABLE if kind.startswith(row.kind)]
        able = [other for other in LIMITS if LIMITS[other].runs_on(platform, kind)]
        unmeasured = f" (kernels by name: {', '.join(able)}; not measured here)" if able and not won else ""
        return f"{', '.join([*won, 'jnp'])} on {platform}{unmeasured}"
    if name in ("tpu", "gpu"):
        try:
            check_device(name)
        except ValueError as error:
            return f"none: {error}"
    return f"{name} on {platform}"


def _share(call: KernelCall, on: On) -> KernelCall | str:
    """The call of one device of the mesh; or why the arrays cannot be sharded so."""
    rows, heads = (1 if axis is None else on.mesh.shape[axis] for axis in (on.rows, on.heads))
    if call.batch % rows or call.kv_heads % heads:
        return f"{call.batch} rows and {call.kv_heads} kv heads cannot be spread over {rows} x {heads} devices"
    if heads > 1 and call.sets == 1 and call.rule is not None:
        return "heads that share a set are on different devices, and the rule takes their mean"
    sets = call.sets if call.sets == 1 else call.sets // heads
    return call._replace(batch=call.batch // rows, kv_heads=call.kv_heads // heads, sets=sets)


@cache
def _say(message: str) -> None:
    """Logs a message once."""
    logging.getLogger("jaxcompress").warning(message)
