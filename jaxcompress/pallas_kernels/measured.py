"""Where kernels were measured to be faster than XLA's own code: `auto` follows this table.

A row is added with the table it comes from (`experiments/speed_kernels.py`, docs/results), and only after the kernel
was right on that device. Nothing has been measured on an accelerator yet, so that `auto` is jnp everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxcompress.pallas_kernels.types import KernelCall, Name, Op


class Measured(NamedTuple):
    """Calls for which a kernel won.

    Attributes:
      kind: what the kind of device begins with, such as `NVIDIA H100` or `TPU v6`.
      op: which.
      backend: what won.
      where: the calls it won.
    """

    kind: str
    op: Op
    backend: Name
    where: Callable[[KernelCall], bool]


TABLE: tuple[Measured, ...] = ()


def faster(op: Op, call: KernelCall, platform: str, kind: str) -> Name:
    """What `auto` means for a call."""
    for row in TABLE:
        if row.op == op and kind.startswith(row.kind) and row.where(call):
            return row.backend
    return "jnp"
