"""Kernels for TPUs (Mosaic): none yet."""

from __future__ import annotations

from jaxcompress.pallas_kernels.contract import Call, Op

needs = "a TPU (v4 or later)"


def runs_on(platform: str, kind: str) -> bool:
    return platform == "tpu"


def declines(op: Op, call: Call) -> str | None:
    return "there is no such kernel"
