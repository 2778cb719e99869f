"""Kernels for NVIDIA GPUs, through Pallas' Mosaic GPU. See docs/kernels.md for what was proven of them."""

from __future__ import annotations

import re
from typing import Any

from jaxcompress.pallas_kernels.contract import Call, Op

needs = "an NVIDIA GPU of compute capability 9.0 or later (Hopper, Blackwell)"

_GROUP = 8  # queries per kv head whose sums fit into registers
_WIDTHS = (64, 128, 192, 256)
_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")


def runs_on(platform: str, kind: str) -> bool:
    return platform in ("gpu", "cuda") and bool(re.search(r"H100|H200|H800|H20|GH200|B100|B200|B300|GB\d00", kind))


def declines(op: Op, call: Call) -> str | None:
    if op in ("block", "segment"):
        return "there is no such kernel"
    if call.head_dim not in _WIDTHS:
        return f"heads of {call.head_dim} numbers; it takes {', '.join(map(str, _WIDTHS))}"
    if call.dtype not in _DTYPES:
        return f"a state of {call.dtype}; it takes {', '.join(_DTYPES)}"
    if call.group > _GROUP:
        return f"{call.group} query heads share a kv head; it takes up to {_GROUP}"
    return None


def step(*args: Any, **options: Any) -> Any:
    from jaxcompress.pallas_kernels import gpu_step

    return gpu_step.step(*args, **options)


def step_evict(*args: Any, **options: Any) -> Any:
    from jaxcompress.pallas_kernels import gpu_step

    return gpu_step.step_evict(*args, **options)
