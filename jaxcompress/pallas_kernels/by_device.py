"""Runs a function with the backend of the device that holds its arrays, which need not be the default device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import jax
from jax.core import Tracer

from jaxcompress.pallas_kernels import devices, measured
from jaxcompress.pallas_kernels.dispatch import known, limits
from jaxcompress.pallas_kernels.types import Backend, Here, On

Out = TypeVar("Out")


def by_device(run: Callable[[Backend], Out], backend: Backend, arrays: Any) -> Out:
    """`run(backend)`, with a backend for the device that computes (see `types.Here`).

    Arrays that are there say which device that is, and so does a mesh. Of a function that is being traced it is known
    only when it is compiled: where that makes a difference, what each kind of device here would compute is traced, and
    JAX takes the one (`jax.lax.platform_dependent`).

    Args:
      arrays: pytree of what is computed from; leaves that are not arrays say nothing.
    """
    if isinstance(backend, Here):
        return run(backend)
    if devices.compiled_for() is not None:
        return run(Here(backend))
    if isinstance(backend, On):
        found = _of_mesh(backend.mesh)
        with _computing_on(found):
            return run(Here(backend))
    name, leaves = known(backend), [x for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
    if not any(isinstance(x, Tracer) for x in leaves):
        placed = [next(iter(x.devices())) for x in leaves if x.committed]  # others go where these are
        with _computing_on(placed[0] if placed else None):
            return run(Here(name))
    if name == "auto":
        return _auto(run)
    able = [
        each
        for each in devices.devices_here().values()
        if name in ("tpu", "gpu") and limits(name).runs_on(*devices.kind_of(each))
    ]
    with _computing_on(able[0] if able and not limits(name).runs_on(*devices.device()) else None):
        return run(Here(name))


def _auto(run: Callable[[Backend], Out]) -> Out:
    """The same while a function is traced."""
    some = {
        platform: each
        for platform, each in devices.devices_here().items()
        if any(devices.kind_of(each)[1].startswith(row.kind) for row in measured.TABLE)
    }
    if not some:
        return run(Here("auto"))

    def on(each: Any) -> Out:
        with _computing_on(each):
            return run(Here("auto"))

    # Compiled, so that it is decided by where arrays are even if they are traced for a gradient only.
    branches = {platform: partial(on, each) for platform, each in some.items()}
    return jax.jit(lambda: jax.lax.platform_dependent(**branches, default=partial(run, Here("jnp"))))()


def _of_mesh(mesh: Any) -> Any:
    """A device of a mesh; None for a mesh without devices (compiled ahead of time)."""
    return mesh.devices.flat[0] if isinstance(mesh, jax.sharding.Mesh) else None


def _computing_on(found: Any) -> AbstractContextManager[Any]:
    """Makes this device the default one. A no-op where its kind is the default kind: JAX would trace anew."""
    if found is None or devices.kind_of(found) == devices.device():
        return nullcontext()
    return jax.default_device(found)
