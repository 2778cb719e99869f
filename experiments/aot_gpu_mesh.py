"""Compiles a decoding step of Llama 3 for eight H100s without having one, and checks what they exchange.

    make aot-gpu        # Python 3.12; installs JAX's CUDA plugin, its compilers and libraries, 4 GB

The cases and checks are those of `aot_mesh.py`. Nothing is executed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from aot_gpu import H100, TARGET  # before JAX: it finds the compilers
from aot_mesh import Case, Chips, tell
from command import Command, arguments
from jax.experimental import topologies


@dataclass(frozen=True)
class Arguments(Command):
    """Prints a table and any failed checks. The exit code is 1 if a check fails."""


CASES = (
    Case("8 H100", "tensor=8", "tova"), Case("8 H100", "data=2,tensor=4", "h2o-kv_head"),
    Case("8 H100", "tensor=8", "tova", model="Llama 3 70B"),
)  # fmt: skip
QUICK = Arguments(quick=True)


def h100s(case: Case, shape: tuple[int, ...]) -> Chips:
    """Eight H100s of one machine."""
    described = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x8")
    return Chips(np.array(described.devices).reshape(shape), H100, "cuda")


def main(args: Arguments) -> None:
    print(f"jax {version('jax')}\n")
    sys.exit(tell(CASES, h100s))


if __name__ == "__main__":
    main(arguments(QUICK))
