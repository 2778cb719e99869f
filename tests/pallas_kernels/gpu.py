"""What the tests of GPU kernels share: an H100 that is not there, the interpreter where JAX has one, random states."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxcompress.state.storage import store_vectors, zeros

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX interprets Mosaic GPU kernels from 0.11 on (Python 3.12)"
)


def h100() -> AbstractContextManager[Any]:
    """In which is compiled for an H100."""
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")))


def exported(function: Any, *args: Any) -> str:
    """What is left of a function after lowering it for an NVIDIA GPU, where the kernels are compiled to the dialect of
    their target."""
    with h100():
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*args).mlir_module()


def compiled(function: Any) -> Any:
    """Compiled in little time: what an interpreter makes of a kernel is long."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found


def normal(seed: int, shape: tuple[int, ...], dtype: str) -> Any:
    """Random vectors as a state of a dtype stores them."""
    return store_vectors(jax.random.normal(jax.random.key(seed), shape), zeros((1, shape[-1]), dtype))
