"""Limits of the GPU kernels: supported devices and calls, and the sizes of their blocks."""

from __future__ import annotations

import re

import jax.numpy as jnp

from jaxcompress.pallas_kernels import tuning
from jaxcompress.pallas_kernels.devices import device
from jaxcompress.pallas_kernels.tuning import Sizes
from jaxcompress.pallas_kernels.types import KernelCall, Op
from jaxcompress.state.storage import DTYPES

needs = "an NVIDIA GPU of compute capability 9.0 or later (Hopper, Blackwell)"

GROUP = 8  # maximum queries per kv head whose sums fit into registers
WIDTHS = (64, 128, 192, 256)  # supported widths of a head
SHARED = 222 * 1024  # bytes of shared memory for a kernel's arrays, of the 227 KiB that a block of threads may have

# For the kernel of a whole segment: tokens loaded together, number of such groups in flight, slots attended to at once,
# and the multiple to which arrays over slots are rounded up.
TOKENS, STAGES, PASS, LINE = 8, 2, 16, 128

# For the kernel of a step: target number of blocks of threads, four per multiprocessor of an H100, and the minimum
# number of slots per block.
BLOCKS, FEWEST = 4 * 132, 64

_QUANTISED = ("int8", "float8_e4m3fn")
_HOPPER, _BLACKWELL = re.compile(r"H100|H200|H800|H20\b"), re.compile(r"B100|B200|B300|GB\d00")


def runs_on(platform: str, kind: str) -> bool:
    return platform in ("gpu", "cuda") and any(x.search(kind) for x in (_HOPPER, _BLACKWELL))


def step_sizes(op: Op, call: KernelCall, *, measured: bool = True) -> Sizes:
    """Sizes for `step` and `step_evict`: slots loaded together (a multiple of 8), number of such groups in flight, and
    number of blocks of threads that share the slots of a row and kv head."""
    rows = 32 if call.head_dim * _itemsize(call) <= 256 else 16
    wanted = -(-BLOCKS // (call.batch * call.kv_heads))
    splits = max(1, min(wanted, call.slots // FEWEST))
    stages = min(4 if _itemsize(call) == 1 else 3, -(-call.slots // (rows * splits)))
    default = dict(rows=rows, stages=stages, splits=splits)
    return tuning.sizes(op, call, default, lambda found: _step_fits(call, found)) if measured else default


def candidates(op: Op, call: KernelCall) -> list[Sizes]:
    """Sizes to try (see `tuning.tune`). `segment` and `block` have only one size."""
    if op in ("segment", "block"):
        return [{}]
    splits = sorted({1, 2, 4, 8, 16, 32, 64} | {step_sizes(op, call, measured=False)["splits"]})
    tried = [dict(rows=n, stages=m, splits=k) for n in (16, 32, 64) for m in (2, 3, 4) for k in splits]
    return [size for size in tried if _step_fits(call, size)]


def _step_fits(call: KernelCall, size: Sizes) -> bool:
    rows, stages, splits = size["rows"], size["stages"], size["splits"]
    if rows < 8 or rows % 8 or rows > 64 or stages < 1 or not 1 <= splits <= -(-call.slots // rows):
        return False
    return 2 * stages * rows * call.head_dim * _itemsize(call) <= SHARED


def declines(op: Op, call: KernelCall) -> str | None:
    if op == "block":
        return _block_declines(call)
    if call.head_dim not in WIDTHS:
        return f"heads of {call.head_dim} numbers; it takes {', '.join(map(str, WIDTHS))}"
    if call.dtype == "int4":
        return f"a state of int4; it takes {', '.join(x for x in DTYPES if x != 'int4')}"
    if call.group > GROUP:
        return f"{call.group} query heads share a kv head; it takes up to {GROUP}"
    return _segment_declines(call) if op == "segment" else None


def _block_declines(call: KernelCall) -> str | None:
    if _BLACKWELL.search(device()[1]):
        return "it uses Hopper's matrix units (wgmma), which Blackwell does not have"
    if call.head_dim not in (64, 128):
        return f"heads of {call.head_dim} numbers; the kernel for blocks takes 64 and 128"
    if call.query not in ("bfloat16", "float16"):
        return f"queries in {call.query}; matrix units multiply bfloat16 or float16 exactly"
    if call.dtype not in (call.query, *_QUANTISED):
        return f"a state of {call.dtype} and queries in {call.query}; their products take one of these"
    return None


def _segment_declines(call: KernelCall) -> str | None:
    if call.rule is not None and call.rule.spare:
        return f"{call.rule.spare} slots are to stay free, as on a TPU"
    if call.sets == 1 and call.kv_heads > 1 and call.rule is not None and call.rule.fold != "age":
        return "heads share a set, and would have to wait for each other at every token"
    size = segment_bytes(call)
    if size > SHARED:
        return f"{call.slots} slots take {size:,} bytes of shared memory per kv head; there are {SHARED:,}"
    return None


def segment_bytes(call: KernelCall) -> int:
    """Bytes of shared memory that a block of threads needs for a segment: slots, incoming tokens, and scores."""
    size, scaled = _itemsize(call), call.dtype in _QUANTISED
    rows, flat = rounded(call.slots, PASS), rounded(call.slots, LINE)
    state = 2 * rows * call.head_dim * size + 8 * flat * scaled
    incoming = STAGES * TOKENS * call.head_dim * (call.group * jnp.dtype(call.query).itemsize + 2 * size)
    return state + incoming + 4 * flat * (call.group + 1)


def _itemsize(call: KernelCall) -> int:
    return 1 if call.dtype in _QUANTISED else jnp.dtype(call.dtype).itemsize


def rounded(n: int, to: int) -> int:
    return -(-n // to) * to
