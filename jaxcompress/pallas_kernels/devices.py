"""Which devices this machine has, and for which one code is traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.backend


def device() -> tuple[str, str]:
    """Platform and kind of the device that is computed or compiled for: JAX's default one, unless arrays are known to
    be on another (see `by_device`)."""
    abstract = compiled_for()
    if abstract is not None:
        return abstract.platform or jax.default_backend(), abstract.device_kind
    return kind_of(jax.extend.backend.get_default_device())


def kind_of(found: jax.Device) -> tuple[str, str]:
    """Platform and kind of a device."""
    return found.platform, found.device_kind


def devices_here() -> dict[str, jax.Device]:
    """A device of every platform that JAX has found on this machine, by what JAX calls the platform when it compiles
    (`cuda`, not `gpu`)."""
    found = {platform: client.local_devices() for platform, client in jax.extend.backend.backends().items()}
    return {platform: devices[0] for platform, devices in found.items() if devices}


def compiled_for() -> Any:
    """The device that is compiled for ahead of time, which is not here; None: one of those here."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
