"""Kernels for NVIDIA GPUs: none yet."""

from __future__ import annotations

from jaxcompress.pallas_kernels.contract import Call, Op

needs = "an NVIDIA GPU of compute capability 9.0 (Hopper) or later"


def runs_on(platform: str, kind: str) -> bool:
    return False


def declines(op: Op, call: Call) -> str | None:
    return "there is no such kernel"
