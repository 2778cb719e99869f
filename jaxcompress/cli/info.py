"""jaxcompress info"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxcompress.cli.flags import JsonFlag


@dataclass(frozen=True, kw_only=True)
class Info(JsonFlag):
    """Shows versions, devices, policies, which attention is used here, and where compiled programs are kept.

    Example: jaxcompress info --json
    """

    def run(self) -> None:
        import os
        import platform
        from importlib.metadata import PackageNotFoundError, version

        import jax

        from jaxcompress import __version__
        from jaxcompress.cli.runtime import CACHE, write_json
        from jaxcompress.inputs.newest_files import bytes_of
        from jaxcompress.policies.names import MODIFIERS, NAMES
        from jaxcompress.recurrence.attention import decode_backend

        def installed(package: str) -> str | None:
            try:
                return version(package)
            except PackageNotFoundError:
                return None

        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE))
        packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "libtpu")
        facts = dict(
            jaxcompress=__version__,
            python=platform.python_version(),
            versions={name: found for name in packages if (found := installed(name))},
            devices=[f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
            attention=decode_backend(),
            policies=[*NAMES, "learned"],
            modifiers=[f"/{name}" for name in MODIFIERS],
            compiled=cache,
            compiled_mib=round(bytes_of(Path(cache)) / 2**20, 1),
        )
        if self.json:
            return write_json(facts)
        for name, value in facts.items():
            text = "  ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name:12}", ", ".join(text) if isinstance(text, list) else text)
        return None
