"""The devices of this machine, and the one for which code is traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.backend


def device() -> tuple[str, str]:
    """Platform and kind of the device that runs the code: JAX's default device, or the one that holds the arrays (see
    `by_device`)."""
    abstract = compiled_for()
    if abstract is not None:
        return abstract.platform or jax.default_backend(), abstract.device_kind
    return kind_of(jax.extend.backend.get_default_device())


def kind_of(found: jax.Device) -> tuple[str, str]:
    """Platform and kind of a device."""
    return found.platform, found.device_kind


def devices_here() -> dict[str, jax.Device]:
    """One device of each platform of this machine. Keys are the platform's names when JAX compiles (`cuda`, not
    `gpu`)."""
    found = {platform: client.local_devices() for platform, client in jax.extend.backend.backends().items()}
    return {platform: devices[0] for platform, devices in found.items() if devices}


def compiled_for() -> Any:
    """The absent device that code is compiled for ahead of time; None: code is compiled for a device of this
    machine."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
